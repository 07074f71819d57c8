"""The part that the cut is going to drop, taken off little by little."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.errors import ArgumentError
from lightning_prehab.linalg.matrices import leading_subspace, subspace_iteration
from lightning_prehab.linalg.rows import Rows, own_part
from lightning_prehab.regularizers.base import Memory, Shrinkage, is_due, will_be_due
from lightning_prehab.regularizers.metric import IDENTITY, Metric, Side, Unformed, project

Schedule = Literal["geometric", "linear"]


@dataclass(frozen=True)
class TailShrinkage(Shrinkage):
    """After an optimizer step ``W <- W - eta (W - W_r)``, where ``W_r`` is the part of ``W`` that the cut keeps.

    ``eta`` rises from ``start`` to 1 over the first ``anneal`` of the time before the surgery, so the tail is gone when
    the cut comes, and for the rest of that time the layer trains near its final rank. There is no strength to tune.
    It is done at every ``every``-th call, with the effect of as many single ones, ``1 - (1 - eta)^every``, and at
    progress 1. ``W_r`` is the projection of ``W``, in the metric, on leading directions that are exact at the first
    call and at progress 1, and brought up to date by one warm subspace step at every ``refresh``-th call between. Seen
    from the weight the projection is one fixed map, so between refreshes it costs two thin products and never touches
    the metric.

    Original to this package in this form; a cousin of Trained Rank Pruning (Xu et al., 2020,
    https://arxiv.org/abs/2004.14566), which truncates at once every few steps.

    Args:
        start: ``eta`` at progress 0, in (0, 1].
        anneal: Share of the time over which ``eta`` rises to 1, in (0, 1].
        refresh: Calls between two subspace steps.
        every: Calls between two shrinkages; counted from the last subspace step.
        schedule: ``"geometric"``: the same factor in equal times. ``"linear"``: the same difference.
        rank: Target rank for all layers where no plan gives one.

    Raises:
        ArgumentError: If a value is out of range, or if no rank is known when it is called.

    >>> TailShrinkage()(torch.diag(torch.tensor([2.0, 1.0, 0.5])), rank=2)
    tensor([[2., 0., 0.],
            [0., 1., 0.],
            [0., 0., 0.]])
    >>> [round(TailShrinkage().eta(progress), 4) for progress in (0.0, 0.4, 0.8, 1.0)]
    [0.002, 0.0447, 1.0, 1.0]
    """

    start: float = 0.002
    anneal: float = 0.8
    refresh: int = 20
    every: int = 5
    schedule: Schedule = "geometric"
    rank: int | None = None
    needs_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_real("start", self.start, "(0, 1]")
        check_real("anneal", self.anneal, "(0, 1]")
        if self.schedule not in ("geometric", "linear"):
            raise ArgumentError(f"schedule must be 'geometric' or 'linear', got {self.schedule!r}.")
        check_whole("rank", self.rank, 1, optional=True)
        check_whole("refresh", self.refresh, 1)
        check_whole("every", self.every, 1)

    def eta(self, progress: float) -> float:
        """Share of the tail that a step takes off on average; non-decreasing in ``progress``, 1 from ``anneal`` on."""
        done = min(max(progress, 0.0) / self.anneal, 1.0)
        if done == 1.0:
            return 1.0
        return (
            float(self.start ** (1.0 - done)) if self.schedule == "geometric" else self.start + (1 - self.start) * done
        )

    def projector(self, matrix: Tensor, rank: int, warm: Tensor | None = None) -> tuple[Side, Tensor]:
        """The smaller side of ``matrix`` and the leading singular vectors on it, in orthonormal columns.

        Args:
            matrix: Shape ``(m, n)``, in the metric.
            rank: Number of directions.
            warm: An earlier basis, to be brought up to date; None is exact.
        """
        if matrix.shape[0] <= matrix.shape[1]:
            return "left", leading_subspace(matrix, rank, warm)
        return "right", leading_subspace(matrix.mT, rank, warm)

    def has_work(self, memory: Memory, progress: float, rank: int | None) -> bool:
        """At the first call, at every ``refresh``-th, at progress 1, and for a new rank."""
        return self._exact_is_due(memory, progress, rank) or will_be_due(memory, self.refresh)

    def needs_whole(self, memory: Memory, progress: float, rank: int | None) -> bool:
        """Where exact directions are due and not prepared; a step from earlier ones takes thin products alone."""
        return "prepared" not in memory and self._exact_is_due(memory, progress, rank)

    def passes_(self, memory: Memory, progress: float, rank: int | None, lr: float) -> bool:
        """All calls but every ``every``-th, where the directions are fresh enough."""
        if "prepared" in memory or self.has_work(memory, progress, rank):
            return False
        if (int(memory["age"]) + 1) % self.every == 0:
            return False
        is_due(memory, self.refresh)
        return True

    def _exact_is_due(self, memory: Memory, progress: float, rank: int | None) -> bool:
        basis = memory.get("basis")
        return basis is None or progress >= 1.0 or basis.shape[1] != self._rank(rank)

    @torch.no_grad()
    def prepare_(
        self, weight: Tensor | Rows, rank: int | None, memory: Memory, progress: float, metric: Metric
    ) -> None:
        """Brings the projector up to date."""
        target, warm = self._rank(rank), None if progress >= 1.0 else memory.get("basis")
        side: Side
        if isinstance(weight, Rows):
            assert warm is not None
            seen, side = Unformed(weight, metric), "left" if weight.shape[0] <= weight.shape[1] else "right"
            basis = subspace_iteration(seen if side == "left" else seen.mT, warm.to(weight.own))
        else:
            side, basis = self.projector(metric.view(weight), target, warm)
        memory["basis"] = basis
        if not metric.is_identity_on(side):
            memory["outer"], memory["inner"] = metric.projector(side, basis)
        memory["prepared"] = torch.ones((), dtype=torch.bool, device="cpu")

    @torch.no_grad()
    def __call__(
        self,
        weight: Tensor | Rows,
        rank: int | None = None,
        memory: Memory | None = None,
        progress: float = 1.0,
        lr: float = 0.0,
        metric: Metric = IDENTITY,
    ) -> Tensor:
        """The weight less a share of its tail; of exactly the target rank where that is 1."""
        own = own_part(weight).detach()
        weight = weight.with_own(own) if isinstance(weight, Rows) else own
        if self._rank(rank) >= min(weight.shape):
            return own
        memory = {} if memory is None else memory
        if self.passes_(memory, progress, rank, lr):
            return own
        if self.has_work(memory, progress, rank) and "prepared" not in memory:
            self.prepare_(weight, rank, memory, progress, metric)
        if "prepared" in memory:
            del memory["prepared"]
            memory.pop("age", None)  # counted from here
        is_due(memory, self.refresh)
        side: Side = "left" if weight.shape[0] <= weight.shape[1] else "right"
        if metric.is_identity_on(side):
            outer, inner = IDENTITY.projector(side, memory["basis"].to(own))
        else:
            outer, inner = memory["outer"].to(own), memory["inner"].to(own)
        share = 1.0 - (1.0 - self.eta(progress)) ** min(self.every, self.refresh)
        return torch.lerp(own, project(weight, side, outer, inner), share)

    def _rank(self, planned: int | None) -> int:
        target = self.rank if planned is None else planned
        if target is None:
            raise ArgumentError(
                "TailShrinkage has no target rank: give TailShrinkage(rank=...), or a plan to take it from."
            )
        return target
