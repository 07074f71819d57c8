"""The stable rank as a penalty."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_prehab.errors import ArgumentError
from lightning_prehab.linalg import power_iteration
from lightning_prehab.regularizers.base import Memory, Penalty, start_vector


class _StableRankFunction(torch.autograd.Function):
    """``|M|_F^2 / s_1^2`` with its closed-form gradient ``2 M / s_1^2 - 2 |M|_F^2 / s_1^3 u v^T``."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The value, given the leading singular triple; 0 for a zero matrix."""
        ctx.save_for_backward(matrix, sigma, u, v)
        return torch.where(_is_safe(sigma), matrix.square().sum() / sigma.square(), torch.zeros_like(sigma))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient in the matrix; 0 for a zero matrix."""
        matrix, sigma, u, v = ctx.saved_tensors
        inverse = torch.where(_is_safe(sigma), 1.0 / sigma, torch.zeros_like(sigma))
        scale = 2.0 * grad * inverse.square()
        ratio = matrix.square().sum() * inverse
        return torch.addcmul(scale * matrix, scale * ratio * u[:, None], v[None, :], value=-1.0), None, None, None


def _is_safe(sigma: Tensor) -> Tensor:
    """Whether the square can be divided by; smaller matrices count as zero."""
    return sigma.square() >= torch.finfo(sigma.dtype).tiny


@dataclass(frozen=True)
class StableRank(Penalty):
    """Sum of squared singular values over the largest square, ``sum s_i^2 / s_1^2``.

    The penalty of "Low-Rank Prehab" (Qin et al., 2025, https://arxiv.org/abs/2512.01980) for language models. One
    power iteration per step from the vector of the step before is enough; the gradient is closed-form, without an SVD.

    Args:
        first_steps: Power iterations at the first call for a layer.
        steps: Power iterations at every later call.

    Raises:
        ArgumentError: If a step count is below 1.

    >>> round(StableRank()(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item(), 4)
    1.5
    """

    first_steps: int = 30
    steps: int = 1
    default_strength: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        if self.first_steps < 1 or self.steps < 1:
            raise ArgumentError(f"Power iterations must be at least 1, got {self.first_steps} and {self.steps}.")

    def __call__(self, matrix: Tensor, rank: int | None = None, memory: Memory | None = None) -> Tensor:
        """The stable rank, in ``[1, min(m, n)]``; ``rank`` is ignored."""
        warm = memory.get("v") if memory is not None else None
        start = start_vector(matrix.shape[1], matrix) if warm is None else warm.to(matrix)
        sigma, u, v = power_iteration(matrix.detach(), start, self.first_steps if warm is None else self.steps)
        if memory is not None:
            memory["v"] = v
        return _StableRankFunction.apply(matrix, sigma, u, v)  # type: ignore[no-any-return]
