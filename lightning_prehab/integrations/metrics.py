"""Stable and effective rank as torchmetrics: to be logged like any other metric."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prehab.errors import ArgumentError, TargetError
from lightning_prehab.layers.linear import LowRankLinear
from lightning_prehab.layers.pivot import PivotLinear
from lightning_prehab.linalg.matrices import effective_rank, stable_rank


class _SpectralMetric(Metric):
    """Mean of a spectral quantity over all matrices seen; processes are averaged by their counts."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, matrices: Tensor | nn.Module) -> None:
        """Takes in a matrix ``(m, n)``, a batch of them ``(..., m, n)``, or the linear layers of a module.

        Raises:
            ArgumentError: If a tensor has less than two dimensions.
            TargetError: If a module has no linear layer.
        """
        for matrix in _weights(matrices) if isinstance(matrices, nn.Module) else _matrices(matrices):
            self.total += self._quantity(matrix).to(self.total)
            self.count += 1

    def compute(self) -> Tensor:
        """Mean over everything given since the last reset, float64; NaN if nothing was."""
        return self.total / self.count

    @staticmethod
    @abstractmethod
    def _quantity(matrix: Tensor) -> Tensor:
        """The quantity of one matrix."""


class StableRankMetric(_SpectralMetric):
    """Mean stable rank, ``sum s_i^2 / s_1^2``; see :func:`~lightning_prehab.linalg.matrices.stable_rank`.

    Args:
        **kwargs: Passed to ``torchmetrics.Metric``.

    >>> metric = StableRankMetric()
    >>> metric.update(torch.eye(3))
    >>> metric.update(torch.diag(torch.tensor([2.0, 2.0, 0.0])))
    >>> metric.compute().item()
    2.5
    """

    _quantity = staticmethod(stable_rank)


class EffectiveRankMetric(_SpectralMetric):
    """Mean effective rank, the exponential of the entropy of ``s / sum s``.

    See :func:`~lightning_prehab.linalg.matrices.effective_rank`. After the surgery it shows the effective rank of the
    product of the factors.

    Args:
        **kwargs: Passed to ``torchmetrics.Metric``.

    >>> metric = EffectiveRankMetric()
    >>> layer = nn.Linear(4, 4)
    >>> _ = nn.init.eye_(layer.weight)
    >>> metric.update(nn.Sequential(layer, nn.ReLU()))
    >>> round(metric.compute().item(), 6)
    4.0
    """

    _quantity = staticmethod(effective_rank)


def _matrices(tensor: Tensor) -> list[Tensor]:
    if tensor.dim() < 2:
        raise ArgumentError(f"A matrix or a batch of matrices is needed, got a tensor of shape {tuple(tensor.shape)}.")
    return list(tensor.detach().flatten(0, -3)) if tensor.dim() > 2 else [tensor.detach()]


def _weights(module: nn.Module) -> list[Tensor]:
    """Weights of the linear layers, each parameter once; of low-rank layers the product, not the factors."""
    inside = {
        id(part)
        for layer in module.modules()
        if isinstance(layer, LowRankLinear | PivotLinear)
        for part in layer.children()
    }
    kinds = (nn.Linear, LowRankLinear, PivotLinear)
    layers = [layer for layer in module.modules() if isinstance(layer, kinds) and id(layer) not in inside]
    if not layers:
        raise TargetError(f"{type(module).__name__} has no linear layer to take a spectrum of.")
    unique = {id(layer.weight) if isinstance(layer, nn.Linear) else id(layer): layer for layer in layers}
    return [layer.weight.detach() for layer in unique.values()]
