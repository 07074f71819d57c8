"""The stable rank as a penalty."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_prehab.documents.checks import check_whole
from lightning_prehab.linalg.lanczos import leading_right_vector
from lightning_prehab.linalg.matrices import power_iteration, to_float64
from lightning_prehab.linalg.rows import Rows, own_part, summed, taken
from lightning_prehab.regularizers.base import Memory, Penalty, start_vector
from lightning_prehab.regularizers.metric import IDENTITY, Metric, Unformed


class _StableRankFunction(torch.autograd.Function):
    """``|M|_F^2 / s_1^2`` of ``M = L^T W S`` with its closed-form gradient in ``W``.

    That is ``2 / s_1^2 (L L^T W S S^T) - 2 |M|_F^2 / s_1^3 (L u) (S v)^T``. The first product gives the value too,
    since ``|M|_F^2 = <W, L L^T W S S^T>``: ``M`` itself is not needed.
    """

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, weight: Tensor | Rows, metric: Metric, sigma: Tensor, u: Tensor, v: Tensor
    ) -> Tensor:
        """The value, given the leading singular triple of ``M``; 0 for a zero matrix. Differentiable in ``own``."""
        weighed = metric.weigh(weight)
        energy = summed(own.square().sum() if metric.is_identity else (own * weighed).sum(), weight)
        ctx.metric, ctx.weight = metric, weight
        ctx.save_for_backward(weighed, energy, sigma, u, v)
        return torch.where(_is_safe(sigma), energy / sigma.square(), torch.zeros_like(sigma))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """The gradient in the weight; 0 for a zero matrix."""
        weighed, energy, sigma, u, v = ctx.saved_tensors
        inverse = torch.where(_is_safe(sigma), 1.0 / sigma, torch.zeros_like(sigma))
        scale = 2.0 * grad * inverse.square()
        left, right = ctx.metric.left, ctx.metric.right
        u = u if left is None else left.to(u).mT @ u
        v = v if right is None else right.to(v) @ v
        u = taken(u, ctx.weight)
        change = torch.addcmul(scale * weighed, scale * energy * inverse * u[:, None], v[None, :], value=-1.0)
        return change, None, None, None, None, None


def _is_safe(sigma: Tensor) -> Tensor:
    """Whether the square can be divided by; smaller matrices count as zero."""
    return sigma.square() >= torch.finfo(sigma.dtype).tiny


@dataclass(frozen=True)
class StableRank(Penalty):
    """Sum of squared singular values over the largest square, ``sum s_i^2 / s_1^2``.

    The penalty of "Low-Rank Prehab" (Qin et al., 2025, https://arxiv.org/abs/2512.01980) for language models. The
    leading direction is found to 1e-5 at the first call, however close the next one is; from then on one power
    iteration per step from the vector of the step before is enough. The gradient is closed-form, without an SVD.

    Args:
        first_steps: At most so many Lanczos steps, of two products with vectors each, at the first call for a layer;
            it ends when it has converged, in some dozens of steps where the weight is random.
        steps: Power iterations at every call.

    Raises:
        ArgumentError: If a step count is below 1.

    >>> round(StableRank()(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item(), 4)
    1.5
    """

    first_steps: int = 300
    steps: int = 1
    default_strength: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        check_whole("first_steps", self.first_steps, 1)
        check_whole("steps", self.steps, 1)

    def __call__(self, matrix: Tensor, rank: int | None = None, memory: Memory | None = None) -> Tensor:
        """The stable rank, in ``[1, min(m, n)]``; ``rank`` is ignored."""
        return StableRank.in_metric(self, matrix, IDENTITY, rank, memory)  # that of a subclass may come back here

    def needs_whole(self, memory: Memory, rank: int | None) -> bool:
        """Never: products with vectors are all that is asked of a matrix."""
        return False

    def in_metric(
        self, weight: Tensor | Rows, metric: Metric, rank: int | None = None, memory: Memory | None = None
    ) -> Tensor:
        """The stable rank of ``M = L^T W S``: one product ``L L^T W S S^T`` and products with vectors."""
        warm = memory.get("v") if memory is not None else None
        own = own_part(weight)
        fixed = weight.with_own(own.detach()) if isinstance(weight, Rows) else weight.detach()
        start = self._leading_vector(fixed, metric) if warm is None else warm.to(own)
        sigma, u, v = power_iteration(Unformed(fixed, metric), start, self.steps)
        if memory is not None:
            memory["v"] = v
        return _StableRankFunction.apply(own, fixed, metric, sigma, u, v)  # type: ignore[no-any-return]

    def _leading_vector(self, weight: Tensor | Rows, metric: Metric) -> Tensor:
        """The leading right singular vector of ``M``, found from nothing, in float64."""
        own = to_float64(own_part(weight))
        wide = Unformed(weight.with_own(own) if isinstance(weight, Rows) else own, metric.in_float64())
        start = start_vector(weight.shape[1], own)
        return leading_right_vector(wide, start, self.first_steps).to(own_part(weight))
