"""Layers that have been cut already, for another cut: each shows the product of its factors.

They are no kinds that are found by :func:`~lightning_prehab.kinds.kind_of`, since nothing but another cut sees them as
layers of one matrix. Layers of several matrices (fused projections, attention) are seen as the layers inside of them,
see :mod:`lightning_prehab.kinds.inside`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_prehab.kinds.base import Kind, MatrixView, part_of, plain_type
from lightning_prehab.kinds.conv import ChannelView, SpatialView
from lightning_prehab.kinds.linear import LinearView
from lightning_prehab.layers.blocks import LowRankConv1D, PivotConv1D
from lightning_prehab.layers.conv import LowRankConv, LowRankConv1d, LowRankConv2d, kernel_to_matrix
from lightning_prehab.layers.linear import LowRankLayer, LowRankLinear, LowRankPlusSparseLinear
from lightning_prehab.layers.pivot import (
    PivotConv,
    PivotConv1d,
    PivotConv2d,
    PivotLayer,
    PivotLinear,
    like_conv,
    like_linear,
    low_rank_linear,
)
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.matrices import is_quantized, to_float64
from lightning_prehab.linalg.products import Product


class LowRankView(MatrixView):
    """The matrix ``W = B A`` of a layer that has been cut; of a grouped convolution, or of one group of it.

    Inputs and outputs are those of the dense layer that it stands for. The first factor, ``A`` (or the pivot rows
    ``D``, with ``B`` what makes all rows of them), is the parameter: where a matrix is written, it is the one to
    change, which reaches every matrix whose columns lie in the span of ``B``, and so all that a deeper cut can leave.

    Args:
        module: The layer.
        dense: How a dense layer of the same sizes shows its matrix.
        group: Number of the group, for one of them.
    """

    def __init__(self, module: LowRankLayer, dense: MatrixView, group: int | None = None) -> None:
        super().__init__(module, dense.out_features, dense.in_features, dense.group_count)
        self.form, self.reads = dense.form, dense.reads
        self.rank = int(module.rank)  # type: ignore[arg-type]
        self.layout = "pivot" if isinstance(module, PivotLayer) else "factors"
        self._dense, self._group = dense, group

    @property
    def parameter(self) -> nn.Parameter:
        """The first factor."""
        return self.parameters[0]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Both factors."""
        children: Any = self.module._modules
        first, second = ("D", "C") if self.layout == "pivot" else ("A", "B")
        return children[first].weight, children[second].weight

    @property
    def bias(self) -> Tensor | None:
        """That of the layer, or of the group."""
        layer: Any = self.module
        bias: Tensor | None = layer.bias
        if bias is None or self._group is None:
            return bias
        return part_of(bias, self._group * self.out_features, self.out_features)

    def sides(self, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` as matrices, of all groups or of this one: shapes ``(groups * r, n)`` and ``(m, r)``.

        Args:
            first: Stands for the first factor; a tensor of its shape.
        """
        a = (self.parameter if first is None else first).flatten(1)
        if isinstance(self.module, PivotLayer):
            b = self.module.factors().B
        else:
            b = self.parameters[1]
            b = kernel_to_matrix(b, self.module.scheme) if isinstance(self.module, LowRankConv) else b
        if self._group is None:
            return a, b
        assert self.rank is not None
        rows = b.narrow(0, self._group * self.out_features, self.out_features)
        return a.narrow(0, self._group * self.rank, self.rank), rows

    def matrix(self, tensor: Tensor) -> Tensor:
        """The product, with ``tensor`` in the place of the first factor."""
        a, b = self.sides(tensor)
        return Factors(a, b).product(self.group_count)

    def product(self) -> Product | None:
        """The two factors, if there is one group."""
        a, b = self.sides()
        return Product(b, a) if self.group_count == 1 else None

    @torch.no_grad()
    def write_(self, matrix: Tensor, into: Tensor | None = None) -> None:
        """Changes the first factor so that the product is ``matrix``, as far as it lies in the span of ``B``."""
        target = self.parameter if into is None else into
        if isinstance(self.module, PivotLayer):
            found = matrix[self.module.order.argsort()[: self.rank]]
        else:
            _, b = self.sides()
            pairs = zip(to_float64(b).chunk(self.group_count), to_float64(matrix).chunk(self.group_count), strict=True)
            found = torch.cat([torch.linalg.pinv(side) @ part for side, part in pairs])
        self.write_first_(found, target)

    @torch.no_grad()
    def write_first_(self, a: Tensor, into: Tensor | None = None) -> None:
        """Copies ``a``, of the shape that :meth:`sides` gives, into the first factor."""
        target = self.parameter if into is None else into
        rows = target if self._group is None else target.narrow(0, self._group * len(a), len(a))
        rows.copy_(a.reshape(rows.shape))

    def inputs(self, x: Tensor) -> Tensor:
        """As of the dense layer."""
        return self._dense.inputs(x)

    def samples_at_once(self, x: Tensor, entries: int) -> int | None:
        """As of the dense layer."""
        return self._dense.samples_at_once(x, entries)

    def outputs(self, y: Tensor) -> Tensor:
        """As of the dense layer."""
        return self._dense.outputs(y)

    @property
    def copies(self) -> int:
        """As of the dense layer."""
        return self._dense.copies

    def distinct_outputs(self, y: Tensor) -> Tensor:
        """As of the dense layer."""
        return self._dense.distinct_outputs(y)

    @property
    def bias_size(self) -> int:
        """As of the dense layer."""
        return self._dense.bias_size

    def to_bias(self, shift: Tensor) -> Tensor:
        """As of the dense layer."""
        return self._dense.to_bias(shift)

    def fold(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """As of the dense layer."""
        return self._dense.fold(a, b)

    def unfold(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """As of the dense layer."""
        return self._dense.unfold(a, b)

    def groups(self) -> Sequence[MatrixView]:
        """A view of each group."""
        if self.group_count == 1:
            return [self]
        module: Any = self.module
        return [LowRankView(module, dense, index) for index, dense in enumerate(self._dense.groups())]


class CutKind(Kind):
    """Low-rank layers of one matrix: what the kinds below have in common."""

    pivot: ClassVar[bool] = True
    types: ClassVar[tuple[type[LowRankLayer], ...]]

    def fits(self, module: nn.Module) -> bool:
        """The exact types."""
        return plain_type(module) in self.types

    def refusal(self, module: nn.Module) -> str | None:
        """What is on the factors beside them."""
        for name, child in module._modules.items():
            weight = None if child is None else child._parameters.get("weight")
            if child is None or is_parametrized(child) or plain_type(child) not in (nn.Linear, nn.Conv1d, nn.Conv2d):
                return (
                    f"it is low-rank already, and its {name} is a {type(child).__name__}: something is on the factors"
                )
            if weight is None or is_quantized(weight):
                return f"it is low-rank already, and its {name} is quantized"
        if isinstance(module, LowRankPlusSparseLinear):
            return "it is low-rank already, with a sparse part; to_dense_ gives the dense layer back, for another cut"
        return None

    def views(self, module: nn.Module, blocks: Mapping[str, int] | None = None) -> dict[str, MatrixView]:
        """The product."""
        assert isinstance(module, LowRankLayer)
        return {"": LowRankView(module, self.dense(module))}

    @abstractmethod
    def dense(self, module: Any) -> MatrixView:
        """How a dense layer of the same sizes shows its matrix; its weight has no values."""

    def can_pivot(self, view: MatrixView) -> bool:
        """Where the dense layer could be."""
        return super().can_pivot(view) and view.form == ""


class CutLinearKind(CutKind):
    """What has taken the place of a linear layer."""

    linear: ClassVar[bool] = True
    types = (LowRankLinear, PivotLinear, LowRankConv1D, PivotConv1D, LowRankPlusSparseLinear)

    def dense(self, module: Any) -> MatrixView:
        """As of an ``nn.Linear``: a transposed weight is no matter here."""
        return LinearView(nn.Linear(module.in_features, module.out_features, bias=False, device="meta"))

    def low_rank(
        self, module: nn.Module, views: Mapping[str, MatrixView], factors: Mapping[str, Factors]
    ) -> LowRankLayer:
        """The same kind of layer with other factors, which shares the bias."""
        layer: Any = module
        found, like = factors[""], like_linear(views[""].parameter, layer.bias, module.training)
        if not isinstance(module, LowRankConv1D | PivotConv1D):
            return low_rank_linear(found, like)
        if found.order is not None:
            return PivotConv1D.from_factors(found.A, found.B, like, found.order)
        return LowRankConv1D.from_factors(found.A, found.B, like)


class CutConvKind(CutKind):
    """What has taken the place of a convolution."""

    types = (LowRankConv1d, LowRankConv2d, PivotConv1d, PivotConv2d)

    def dense(self, module: Any) -> MatrixView:
        """In the scheme that it was cut in."""
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        kernel = nn.Parameter(torch.empty(shape, device="meta"))
        shell = like_conv(module, kernel, None)
        return SpatialView(shell) if getattr(module, "scheme", "channel") == "spatial" else ChannelView(shell)

    def low_rank(
        self, module: nn.Module, views: Mapping[str, MatrixView], factors: Mapping[str, Factors]
    ) -> LowRankConv | PivotConv:
        """The same kind of layer with other factors, which shares the bias."""
        layer: Any = module
        found, one = factors[""], isinstance(module, LowRankConv1d | PivotConv1d)
        like = like_conv(module, views[""].parameter, layer.bias)
        if found.order is not None:
            return (PivotConv1d if one else PivotConv2d).from_factors(found.A, found.B, like, found.order)
        kind: Any = LowRankConv1d if one else LowRankConv2d
        made: LowRankConv = kind.from_factors(found.A, found.B, like, getattr(module, "scheme", "channel"))
        return made


_KINDS: tuple[CutKind, ...] = (CutLinearKind(), CutConvKind())


def cut_kind_of(module: nn.Module) -> CutKind | None:
    """The kind of a low-rank layer of one matrix, or None if it is none, or not of this package."""
    return next((kind for kind in _KINDS if kind.fits(module)), None)
