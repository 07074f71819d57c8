"""How far a regularizer has come on its way to the cut."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: Share of the time before the surgery in which metric and ranks are not changed any more.
LAST_UPDATE = 0.3


@dataclass
class Way:
    """From the moment in which a regularizer knows its metric and ranks to the surgery.

    Attributes:
        steps: Batches with an optimizer step, since it is ready.
        planned_at: The value of ``steps`` when the ranks were planned.
        span: Batches from there to the end, when the regularizer became ready; None where the end is not known.
        ready: Whether metric and ranks are known.
    """

    steps: int = 0
    planned_at: int = 0
    span: int | None = None
    ready: bool = False

    def begin(self, remaining: int | None) -> None:
        """Metric and ranks are known for the first time.

        Args:
            remaining: Batches to the end, if it can be foreseen.
        """
        self.span, self.ready = remaining, True

    def share_done(self, remaining: int | None) -> float:
        """The share of the time that is over: exactly 1 at the last batch."""
        return 1.0 - (remaining or 0) / max(self.span or 0, 1)

    def is_due(self, every: int) -> bool:
        """Whether this step is one of every so many."""
        return self.steps % every == 0

    def is_old(self, every: int) -> bool:
        """Whether metric and ranks are as old as this in steps; 0 means never."""
        return every > 0 and self.steps - self.planned_at >= every

    def leaves_time(self, remaining: int | None) -> bool:
        """Whether there is time enough to do something with new ones."""
        return remaining is None or (self.span is not None and remaining > LAST_UPDATE * self.span)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Way":
        """What :meth:`state_dict` describes, among other things."""
        return cls(state["steps"], state["planned_at"], state["span"], state["ready"])
