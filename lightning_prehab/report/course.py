"""What a training run with prehab went through: its start, the cut, the end."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_prehab.documents.numbers import ROUNDING, format_error
from lightning_prehab.errors import CheckpointError
from lightning_prehab.report.scores import show_number

#: Losses and metrics in one line.
_TOLD = 3


@dataclass(frozen=True)
class Moment:
    """Where a training run stands; what is not known is None.

    Attributes:
        step: Optimizer steps before it.
        loss: Of training, a mean over the last steps.
        validation: ``{name: value}`` of what the last validation has logged.
        stable_rank: Of the regularized weights, their mean.
        effective_rank: Of the regularized weights, their mean.
        tail_energy: Share of the weights' energy beyond the planned ranks, mean over the layers that have one.
    """

    step: int
    loss: float | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    stable_rank: float | None = None
    effective_rank: float | None = None
    tail_energy: float | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Moment":
        """What ``dataclasses.asdict`` has made of it; keys that are missing are not known."""
        names = [one.name for one in fields(cls) if one.name not in ("step", "validation")]
        numbers = {name: None if data.get(name) is None else float(data[name]) for name in names}
        validation = {str(name): float(value) for name, value in data.get("validation", {}).items()}
        return cls(int(data["step"]), validation=validation, **numbers)


@dataclass(frozen=True)
class PrehabCourse:
    """What prehab itself took, and what came after the cut.

    Attributes:
        start: When the regularizer began to act.
        cut: Right before the surgery.
        end: When training ended; None before that.
    """

    start: Moment
    cut: Moment
    end: Moment | None = None

    def rows(self) -> dict[str, list[str]]:
        """``{what: at the start, at the cut, at the end}``, as it is shown; what is not known is empty.

        After the cut there are no spectra to speak of: the tails are gone.
        """
        moments = [self.start, self.cut, self.end or Moment(0)]
        found = {"training loss": [one.loss for one in moments]}
        names = dict.fromkeys(name for one in moments for name in one.validation)
        found |= {name: [one.validation.get(name) for one in moments] for name in names}
        found["stable rank"] = [one.stable_rank for one in moments]
        found["effective rank"] = [one.effective_rank for one in moments]
        shown = {
            what: ["" if value is None else show_number(value) for value in values] for what, values in found.items()
        }
        shown["energy beyond the ranks"] = [
            "" if one.tail_energy is None else format_error(one.tail_energy, ROUNDING**2) for one in moments
        ]
        return {what: values for what, values in shown.items() if any(values)}

    def summary(self) -> str:
        """One line.

        >>> PrehabCourse(Moment(0, 0.31, stable_rank=5.1), Moment(9, 0.34, stable_rank=3.2), Moment(18, 0.29)).summary()
        'training loss 0.310 -> 0.340 at the cut -> 0.290 at the end; stable rank 5.10 -> 3.20'
        """
        rows = self.rows()
        told = [what for what in ("training loss", *self.cut.validation) if what in rows][:_TOLD]
        places = ("", " at the cut", " at the end")
        texts = [
            (what, [text + place for text, place in zip(rows[what], places, strict=True) if text]) for what in told
        ]
        texts += [(what, list(filter(None, rows[what]))) for what in ("stable rank",) if what in rows]
        return "; ".join(f"{what} {' -> '.join(values)}" for what, values in texts)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> "PrehabCourse":
        """What :meth:`to_dict` has written.

        Raises:
            CheckpointError: If it is something else.
        """
        try:
            if not isinstance(data, Mapping):
                raise TypeError("no mapping")
            end = data.get("end")
            return cls(
                Moment.from_dict(data["start"]),
                Moment.from_dict(data["cut"]),
                None if end is None else Moment.from_dict(end),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"This is not the course of a prehab ({type(error).__name__}: {error}).") from error
