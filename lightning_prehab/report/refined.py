"""What a refinement after the cut has brought."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_prehab.documents import settings
from lightning_prehab.errors import CheckpointError
from lightning_prehab.progress import clock_time
from lightning_prehab.report.scores import show_number

#: What is measured, in words, by its name in the report.
MEASURES = {"divergence": "divergence from the dense model", "squared": "squared error to the dense model"}


@dataclass(frozen=True)
class RefinementReport:
    """The facts of one refinement.

    Attributes:
        scope: ``"model"``, end to end, or ``"blocks"``, one after the other.
        measure: What is measured: ``"divergence"``, the mean Kullback-Leibler divergence of a prediction from that of
            the dense model, in nats; or ``"squared"``, the squared error of the outputs, relative to their square.
        before: Right after the cut, on sequences that were held back.
        after: Of the model as it is now, on the same sequences.
        steps: Steps that were made; of ``"blocks"``, in all of them together.
        seconds: What it took.
        kept: Whether something of it was kept: only what is measured to be better is.
        data: Where it was measured, such as ``"8 held-back rows"``.
        stopped: Why it ended before its time, or None.
    """

    scope: str
    measure: str
    before: float
    after: float
    steps: int
    seconds: float
    kept: bool
    data: str = ""
    stopped: str | None = None

    def summary(self) -> str:
        """All of it in one line.

        >>> RefinementReport("model", "divergence", 0.64, 0.31, 128, 751.0, True, "8 held-back rows").summary()
        'refined in 128 steps (12:31): divergence from the dense model 0.640 -> 0.310 on 8 held-back rows'
        """
        steps = f"{self.steps} step{'' if self.steps == 1 else 's'}"
        where = f" on {self.data}" if self.data else ""
        end = f"; ended early: {self.stopped}" if self.stopped else ""
        what = MEASURES.get(self.measure, self.measure)
        if not self.kept:
            nothing = f"not refined: {steps} ({clock_time(self.seconds)}) brought nothing"
            return f"{nothing}, {what} {show_number(self.before)}{where}{end}"
        change = f"{show_number(self.before)} -> {show_number(self.after)}"
        blocks = ", block by block" if self.scope == "blocks" else ""
        return f"refined in {steps}{blocks} ({clock_time(self.seconds)}): {what} {change}{where}{end}"

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> "RefinementReport":
        """What :meth:`to_dict` has written; keys that are not known are passed over.

        Raises:
            CheckpointError: If it is something else.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(f"This is no refinement, but {settings.show(data)}.")
        known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        try:
            found = cls(**known)
            found.summary()
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"This is no whole refinement ({type(error).__name__}: {error}).") from error
        return found
