"""The two factors of each matrix of a model as one thing: what is trained of it, and how large it is."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prehab.layers.conv import LowRankConv, kernel_to_matrix, matrix_to_kernel
from lightning_prehab.layers.linear import LowRankLinear, LowRankPlusSparseLinear
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.linalg.balance import even_scales
from lightning_prehab.linalg.matrices import widened
from lightning_prehab.linalg.sharding import is_distributed, local_part
from lightning_prehab.linalg.sizes import pivot_gradients, product_gradients


@dataclass(frozen=True)
class FactorPair:
    """The factors of one matrix: ``A`` and ``B``, or in the pivot layout ``D`` and ``C``, which stand for them.

    Attributes:
        name: Of the layer that holds them, within the model.
        layer: That layer.
        A: What the input meets first.
        B: What makes the output of that.
    """

    name: str
    layer: LowRankLinear | LowRankConv | PivotLayer
    A: nn.Parameter
    B: nn.Parameter

    @property
    def both(self) -> tuple[nn.Parameter, nn.Parameter]:
        """``(A, B)``."""
        return self.A, self.B

    @property
    def scalable(self) -> bool:
        """Whether the sizes of the factors can be shared out anew; rows of the matrix itself have the one they have."""
        return not isinstance(self.layer, PivotLayer)

    @torch.no_grad()
    def size_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of half the squared Frobenius norm of the product, for ``A`` and ``B``, in at least float32.

        Of a :class:`LowRankPlusSparseLinear` the product alone counts, without the sparse part.
        """
        if isinstance(self.layer, PivotLayer):
            for_a, for_b = pivot_gradients(*(widened(part.detach()).flatten(1) for part in self.both))
            return for_a.reshape(self.A.shape), for_b.reshape(self.B.shape)
        a, b = product_gradients(*self._matrices())
        shape, scheme = list(self.B.shape), getattr(self.layer, "scheme", "channel")
        return a.reshape(self.A.shape), matrix_to_kernel(b.flatten(0, 1), shape, scheme)

    @torch.no_grad()
    def even_scales(self) -> tuple[Tensor, Tensor] | None:
        """What to multiply ``A`` and ``B`` by to share their sizes out evenly; None if they do already.

        Both are powers of two, and broadcast against the parameters. The product stays the same bit by bit.
        """
        scales = even_scales(*self._matrices())
        if bool((scales == 1).all()):
            return None
        rows = self.B.shape[0] // len(scales)
        behind_a, behind_b = [1] * (self.A.dim() - 1), [1] * (self.B.dim() - 2)
        for_b = (1 / scales).repeat_interleave(rows, 0).reshape(self.B.shape[0], scales.shape[1], *behind_b)
        return scales.reshape(-1, *behind_a), for_b

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` as matrices, one of each for every group of a convolution."""
        groups = getattr(self.layer, "groups", 1)
        a = kernel_to_matrix(widened(self.A.detach()))
        b = kernel_to_matrix(widened(self.B.detach()), getattr(self.layer, "scheme", "channel"))
        return a.reshape(groups, -1, a.shape[1]), b.reshape(groups, -1, b.shape[1])


def factor_pairs(model: nn.Module) -> list[FactorPair]:
    """The pairs of a model that can be trained as such: both are ordinary parameters of their layer, of floats.

    Factors that are quantized, parametrized or wrapped by an adapter are left out.

    >>> [pair.name for pair in factor_pairs(nn.Sequential(LowRankLinear(8, 6, 2), nn.Linear(6, 2)))]
    ['0']
    """
    return [pair for name, layer in model.named_modules() if (pair := _pair(name, layer)) is not None]


def factors_in(pairs: list[FactorPair]) -> Iterator[nn.Parameter]:
    """All that the matrices are made of: both factors, and the values of a sparse part."""
    for pair in pairs:
        yield from pair.both
        if isinstance(pair.layer, LowRankPlusSparseLinear):
            yield pair.layer.values


def _pair(name: str, layer: nn.Module) -> FactorPair | None:
    if isinstance(layer, PivotLayer):
        children = layer.D, layer.C
    elif isinstance(layer, LowRankLinear | LowRankConv):
        children = layer.A, layer.B
    else:
        return None
    weights = [child._parameters.get("weight") for child in children]
    if any(weight is None or not _is_ordinary(weight) or not weight.is_floating_point() for weight in weights):
        return None
    a, b = weights
    assert a is not None
    assert b is not None
    return FactorPair(name, layer, a, b)


def _is_ordinary(weight: nn.Parameter) -> bool:
    """Whether it holds its numbers itself, all of them or the part of this process."""
    return type(weight) is nn.Parameter or (is_distributed(weight) and type(local_part(weight)) is Tensor)
