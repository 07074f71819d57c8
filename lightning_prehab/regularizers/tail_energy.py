"""The energy that the cut is going to drop, as a penalty."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prehab.errors import ArgumentError
from lightning_prehab.linalg import symmetric_eigh
from lightning_prehab.regularizers.base import Memory, Penalty


@dataclass(frozen=True)
class TailEnergy(Penalty):
    """Share of the energy beyond the target rank, ``sum_{i > r} s_i^2 / sum s_i^2``, in [0, 1].

    It pulls on exactly the directions that the cut removes and leaves the others alone (original to this package). The
    projector on the leading directions is recomputed at every ``refresh``-th call; in between the tail is measured
    against the last projector. By Danskin's theorem the gradient is exact whenever the projector is fresh.

    Args:
        rank: Target rank for all layers where no plan gives one.
        refresh: Calls between two eigendecompositions of the smaller Gram matrix.

    Raises:
        ArgumentError: If a value is below 1, or if no rank is known when it is called.

    >>> round(TailEnergy()(torch.diag(torch.tensor([2.0, 1.0, 1.0])), rank=1).item(), 4)
    0.3333
    """

    rank: int | None = None
    refresh: int = 10
    needs_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.refresh < 1 or (self.rank is not None and self.rank < 1):
            raise ArgumentError(f"rank and refresh must be at least 1, got rank={self.rank}, refresh={self.refresh}.")

    def __call__(self, matrix: Tensor, rank: int | None = None, memory: Memory | None = None) -> Tensor:
        """The tail's share of the energy; 0 for a zero matrix."""
        target = self.rank if rank is None else rank
        if target is None:
            raise ArgumentError("TailEnergy has no target rank: give TailEnergy(rank=...), or a plan to take it from.")
        rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        basis = self._basis(rows.detach(), target, memory)
        energy = rows.square().sum()
        share = 1.0 - (basis.mT @ rows).square().sum() / energy.clamp_min(torch.finfo(rows.dtype).tiny)
        return torch.where(energy > 0, share, torch.zeros_like(share))

    def _basis(self, rows: Tensor, rank: int, memory: Memory | None) -> Tensor:
        """Leading left singular vectors, shape ``(min(m, n), rank)``, from the memory while they are fresh enough."""
        if memory is None:
            return symmetric_eigh(rows @ rows.mT)[1][:, :rank].to(rows)
        age = memory.get("age")
        if age is None or int(age) + 1 >= self.refresh or memory["basis"].shape[1] != min(rank, rows.shape[0]):
            memory["basis"] = symmetric_eigh(rows @ rows.mT)[1][:, :rank].to(rows)
            memory["age"] = torch.zeros((), dtype=torch.int64)
        else:
            memory["age"] = age + 1
        return memory["basis"].to(rows)
