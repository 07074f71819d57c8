"""How far the rehab of each optimizer has come: a warm-up, then perhaps a decay. Numbers alone, no Trainer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from lightning_prehab.callbacks._schedules import Shape, between

#: What is counted: steps of the optimizer itself; batches; steps that the Trainer counts, of all optimizers together.
UNITS = ("steps", "batches", "run")
#: So many of one unit, or of several: what has several is over when the first of them has run out.
Lengths = Mapping[str, int]


@dataclass
class Progress:
    """What one optimizer has done since the cut.

    Attributes:
        done: By unit.
        decaying_since: What was done when the warm-up was over; None until then.
    """

    done: dict[str, int] = field(default_factory=lambda: dict.fromkeys(UNITS, 0))
    decaying_since: dict[str, int] | None = None


@dataclass
class WarmupAndDecay:
    """The factor on the learning rate from one cut on, for several optimizers.

    Attributes:
        warmup: Length of the warm-up.
        optimizers: How far each has come.
        decay: Length of the decay, if it is known.
        end: Or from the cut to the end of the run.
        limits: Of the run that ``end`` belongs to.
        last: No other cut comes after this one, so that the decay may begin.
    """

    warmup: Lengths
    optimizers: list[Progress]
    decay: Lengths | None = None
    end: Lengths | None = None
    limits: list[int | None] = field(default_factory=list)
    last: bool = True

    def factor(self, index: int, start: float, peak: float, end: float | None, shape: Shape) -> float:
        """The factor on the next step of an optimizer."""
        one = self.optimizers[index]
        share = _share(one.done, self.warmup)
        if share < 1.0:
            return between(start, peak, share, shape)
        if end is None or one.decaying_since is None:
            return peak
        return between(peak, end, _share(_minus(one.done, one.decaying_since), self._decay_of(one)), shape)

    def count_step(self, index: int) -> None:
        """Notes that an optimizer has made a step."""
        self.optimizers[index].done["steps"] += 1
        self.note_warm({"batches": 1, "run": 1})  # of the batch that is not over yet

    def count_batch(self, run: int) -> None:
        """Notes that a batch is over, in which the Trainer has counted so many steps."""
        for one in self.optimizers:
            one.done["batches"] += 1
            one.done["run"] += run
        self.note_warm()

    def note_warm(self, under_way: Lengths = MappingProxyType({})) -> None:
        """Notes which optimizers have just been warmed up."""
        for one in self.optimizers:
            if self.last and one.decaying_since is None and _share(one.done, self.warmup) >= 1.0:
                one.decaying_since = {unit: number + under_way.get(unit, 0) for unit, number in one.done.items()}

    def end_after(self, rest: Lengths, limits: list[int | None]) -> None:
        """Notes where the run ends: so much after what the first optimizer has done."""
        done = self.optimizers[0].done if self.optimizers else dict.fromkeys(rest, 0)
        self.end = {unit: done[unit] + number for unit, number in rest.items()}
        self.limits = limits

    def forget_end(self) -> None:
        """Another run begins: a decay to the end of the one before begins anew."""
        for one in self.optimizers if self.end is not None else ():
            one.decaying_since = None
        self.end, self.limits = None, []
        self.note_warm()

    def take_lengths(self, warmup: Lengths, decay: Lengths | None) -> None:
        """Other lengths: of the warm-up from the cut on, of the decay from now on."""
        self.warmup, self.decay, self.end, self.limits = warmup, decay, None, []
        for one in self.optimizers:
            one.decaying_since = None
        self.note_warm()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "warmup": dict(self.warmup)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "WarmupAndDecay":
        """There and back."""
        return cls(**{**state, "optimizers": [Progress(**one) for one in state["optimizers"]]})

    def _decay_of(self, one: Progress) -> Lengths:
        if self.decay is not None:
            return self.decay
        assert one.decaying_since is not None
        return _minus(self.end or {}, one.decaying_since)


def _share(done: Lengths, lengths: Lengths) -> float:
    """How much of a length is over, in [0, 1]; nothing of one that is not known."""
    shares = [done[unit] / length if length > 0 else 1.0 for unit, length in lengths.items()]
    return min(max([0.0, *shares]), 1.0)


def _minus(one: Lengths, other: Lengths) -> dict[str, int]:
    return {unit: number - other[unit] for unit, number in one.items()}
