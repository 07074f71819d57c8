"""The energy that the cut is going to drop, as a penalty."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_prehab.documents.checks import check_whole
from lightning_prehab.errors import ArgumentError
from lightning_prehab.linalg.matrices import leading_subspace, subspace_iteration
from lightning_prehab.linalg.rows import Rows
from lightning_prehab.regularizers.base import Memory, Penalty, is_due
from lightning_prehab.regularizers.metric import Metric, Unformed


class _TailShareFunction(torch.autograd.Function):
    """``t = |M - U U^T M|_F^2 / |M|_F^2`` for fixed ``U``, with gradient ``2 (M - U U^T M - t M) / |M|_F^2``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, basis: Tensor) -> Tensor:
        """The share; 0 for a zero matrix."""
        tail = rows - basis @ (basis.mT @ rows)
        energy = rows.square().sum()
        inverse = torch.where(energy >= torch.finfo(energy.dtype).tiny, 1.0 / energy, torch.zeros_like(energy))
        share = tail.square().sum() * inverse
        ctx.save_for_backward(rows, tail, share, inverse)
        return share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient in the matrix; 0 for a zero matrix."""
        rows, tail, share, inverse = ctx.saved_tensors
        return (2.0 * grad * inverse) * (tail - share * rows), None


class _TailShareOfRows(torch.autograd.Function):
    """The same of ``M = L^T W S``, for own rows of a ``W`` that lies on several processes.

    With ``D`` for ``L (M - U U^T M) S^T`` the energies are ``<W, D>`` and ``<W, L L^T W S S^T>``, and the gradient in
    ``W`` is ``2 (D - t L L^T W S S^T) / |M|_F^2``. Apart from these two, all is thin.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: Rows, metric: Metric, basis: Tensor) -> Tensor:
        """The share; 0 for a zero matrix."""
        weighed = metric.weigh(rows)
        if rows.shape[0] <= rows.shape[1]:  # L U (L U)^T W S S^T
            span = basis if metric.left is None else metric.left.to(own).mT @ basis
            seen = rows.mT @ span
            seen = seen if metric.right is None else metric.right_gram.to(own) @ seen
            kept = rows.take(span) @ seen.mT
        else:  # L L^T W S V (S V)^T
            span = basis if metric.right is None else metric.right.to(own) @ basis
            seen = rows @ span
            seen = seen if metric.left is None else metric.left_gram.to(own) @ seen
            kept = rows.take(seen) @ span.mT
        tail = weighed - kept
        energy, left_out = rows.add_up(torch.stack([(own * weighed).sum(), (own * tail).sum()]))
        inverse = torch.where(energy >= torch.finfo(energy.dtype).tiny, 1.0 / energy, torch.zeros_like(energy))
        share: Tensor = left_out.clamp_min(0.0) * inverse
        ctx.save_for_backward(weighed, tail, share, inverse)
        return share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient in the own rows; 0 for a zero matrix."""
        weighed, tail, share, inverse = ctx.saved_tensors
        change: Tensor = (2.0 * grad * inverse) * (tail - share * weighed)
        return change, None, None, None


@dataclass(frozen=True)
class TailEnergy(Penalty):
    """Share of the energy beyond the target rank, ``sum_{i > r} s_i^2 / sum s_i^2``, in [0, 1].

    It pulls on exactly the directions that the cut removes and leaves the others alone (original to this package). The
    leading directions are computed exactly at the first call and brought up to date by one warm subspace step at every
    ``refresh``-th; in between the tail is measured against the last ones. By Danskin's theorem the gradient is exact
    where the directions are; with others the value is an upper bound.

    Args:
        rank: Target rank for all layers where no plan gives one.
        refresh: Calls between two subspace steps.

    Raises:
        ArgumentError: If a value is below 1, or if no rank is known when it is called.

    >>> round(TailEnergy()(torch.diag(torch.tensor([2.0, 1.0, 1.0])), rank=1).item(), 4)
    0.3333
    """

    rank: int | None = None
    refresh: int = 10
    needs_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 1, optional=True)
        check_whole("refresh", self.refresh, 1)

    def __call__(self, matrix: Tensor, rank: int | None = None, memory: Memory | None = None) -> Tensor:
        """The tail's share of the energy; 0 for a zero matrix."""
        target = self._target(rank)
        rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        basis = self._basis(rows.detach(), target, memory)
        return _TailShareFunction.apply(rows, basis)  # type: ignore[no-any-return]

    def needs_whole(self, memory: Memory, rank: int | None) -> bool:
        """For the exact directions of the first call, and of a new rank."""
        basis = memory.get("basis")
        return basis is None or basis.shape[1] != min(self._target(rank), basis.shape[0])

    def in_metric(
        self, weight: Tensor | Rows, metric: Metric, rank: int | None = None, memory: Memory | None = None
    ) -> Tensor:
        """The share of ``M = L^T W S``."""
        if not isinstance(weight, Rows):
            return super().in_metric(weight, metric, rank, memory)
        assert memory is not None
        rows = weight.with_own(weight.own.detach())
        if is_due(memory, self.refresh):
            seen = Unformed(rows, metric)
            thin = seen if rows.shape[0] <= rows.shape[1] else seen.mT
            memory["basis"] = subspace_iteration(thin, memory["basis"].to(rows.own))
        return _TailShareOfRows.apply(weight.own, rows, metric, memory["basis"].to(rows.own))  # type: ignore[no-any-return]

    def _target(self, rank: int | None) -> int:
        target = self.rank if rank is None else rank
        if target is None:
            raise ArgumentError("TailEnergy has no target rank: give TailEnergy(rank=...), or a plan to take it from.")
        return target

    def _basis(self, rows: Tensor, rank: int, memory: Memory | None) -> Tensor:
        """Leading left singular vectors, shape ``(min(m, n), rank)``, from the memory while they are fresh enough."""
        if memory is None:
            return leading_subspace(rows, rank)
        due, warm = is_due(memory, self.refresh), memory.get("basis")
        if due or warm is None or warm.shape[1] != min(rank, rows.shape[0]):
            memory["basis"] = leading_subspace(rows, rank, warm)
        return memory["basis"].to(rows)
