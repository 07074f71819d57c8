"""Weight decay of the singular values: all by the same amount, not in proportion."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.linalg.matrices import polar_factor
from lightning_prehab.linalg.rows import Rows
from lightning_prehab.regularizers.base import Memory, Shrinkage, is_due
from lightning_prehab.regularizers.metric import IDENTITY, Metric


@dataclass(frozen=True)
class SpectralWeightDecay(Shrinkage):
    """After each optimizer step ``M <- M - lr decay U V^T``: every singular value loses ``lr decay``.

    The decoupled form of the nuclear norm, as weight decay is of the squared norm (Andriianov et al., 2026, appendix
    B.2). Small singular values reach zero, where they stay within ``lr decay``; ordinary weight decay never gets them
    there. The polar factor takes matrix products only, but many of them: it is applied at every ``every``-th call, with
    the sum of the learning rates since the last time, and at progress 1.

    Args:
        decay: Loss of each singular value per step and unit of learning rate, above 0. The default takes 0.1 off in
            1,000 steps at a learning rate of 1e-3; no value has been tuned.
        every: Calls between two applications; without a memory each call is one.
        steps: Iterations for the polar factor; see :func:`~lightning_prehab.linalg.matrices.polar_factor`.

    Raises:
        ArgumentError: If a value is out of range.

    >>> SpectralWeightDecay(decay=1.0)(torch.diag(torch.tensor([2.0, 1.0])), lr=0.25).round(decimals=3)
    tensor([[1.7500, 0.0000],
            [0.0000, 0.7500]])
    """

    decay: float = 0.1
    every: int = 10
    steps: int = 6

    def __post_init__(self) -> None:
        check_real("decay", self.decay, "(0, inf)")
        check_whole("every", self.every, 1)
        check_whole("steps", self.steps, 1)

    def passes_(self, memory: Memory, progress: float, rank: int | None, lr: float) -> bool:
        """All calls but every ``every``-th and those at progress 1; they add to what is owed."""
        calls = int(memory["age"]) + 1 if "age" in memory else 1
        if progress >= 1.0 or calls >= self.every:
            return False
        is_due(memory, self.every, first=False)
        memory["lr"] = torch.tensor(lr + float(memory.get("lr", 0.0)), dtype=torch.float64, device="cpu")
        return True

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
        """The weight with all singular values lowered, or as it was where the call is not due; ``rank`` is ignored."""
        assert isinstance(weight, Tensor)
        if memory is not None and self.passes_(memory, progress, rank, lr):
            return weight.clone()
        owed = lr if memory is None or "lr" not in memory else lr + float(memory["lr"])
        if memory is not None:
            if progress < 1.0:
                is_due(memory, self.every, first=self.every == 1)
            memory["lr"] = torch.zeros((), dtype=torch.float64, device="cpu")
        return weight - (owed * self.decay) * metric.back(polar_factor(metric.view(weight), self.steps))
