"""``nn.Linear``, whole or as row blocks."""

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn

from lightning_prehab.kinds.base import Kind, MatrixView, dense_linear, not_its_own, part_of, plain_type
from lightning_prehab.layers.blocks import LowRankBlocks
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.layers.pivot import low_rank_linear
from lightning_prehab.linalg.factors import Factors


class LinearView(MatrixView):
    """The weight of an ``nn.Linear``."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module, module.out_features, module.in_features)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias."""
        return self.module._parameters["bias"]

    def matrix(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    @property
    def slices(self) -> range | None:
        """All."""
        return range(self.out_features)


class RowBlock(MatrixView):
    """Rows of the matrix of a layer, such as the queries of a fused projection.

    Args:
        whole: The view of the whole matrix.
        start: First row.
        rows: Number of rows.
    """

    def __init__(self, whole: MatrixView, start: int, rows: int) -> None:
        super().__init__(whole.module, rows, whole.in_features)
        self.whole, self.start = whole, start
        self.reads = whole.reads

    @property
    def parameter(self) -> nn.Parameter:
        """The weight of the layer."""
        return self.whole.parameter

    @property
    def bias(self) -> Tensor | None:
        """The part of the bias that belongs to these rows."""
        bias = self.whole.bias
        return None if bias is None else part_of(bias, self.start, self.out_features)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The rows."""
        return self.whole.matrix(tensor).narrow(0, self.start, self.out_features)

    @property
    def slices(self) -> range | None:
        """Some of those of the whole."""
        slices = self.whole.slices
        return None if slices is None else slices[self.start : self.start + self.out_features]

    def inputs(self, x: Tensor) -> Tensor:
        """What the whole matrix is multiplied with."""
        return self.whole.inputs(x)

    def outputs(self, y: Tensor) -> Tensor:
        """The part of the output that belongs to these rows."""
        return self.whole.outputs(y).narrow(-1, self.start, self.out_features)


def row_blocks(whole: MatrixView, blocks: Mapping[str, int] | None) -> dict[str, MatrixView]:
    """Views of row blocks, ``{part: rows}``, or of the whole under the part ``""``."""
    if blocks is None:
        return {"": whole}
    views: dict[str, MatrixView] = {}
    start = 0
    for part, rows in blocks.items():
        views[part] = RowBlock(whole, start, rows)
        start += rows
    assert start == whole.out_features, (blocks, whole)
    return views


#: Subclasses of ``nn.Linear`` that compute the same, by their module and name.
_ALIKE = {
    "timm.layers.linear": "Linear",  # casts, in TorchScript
    "transformers.models.falcon.modeling_falcon": "FalconLinear",  # multiplies, then adds the bias
}


class LinearKind(Kind):
    """Layers of exactly the type ``nn.Linear``, and of two subclasses that are known to compute the same."""

    linear: ClassVar[bool] = True
    sparse: ClassVar[bool] = True
    pivot: ClassVar[bool] = True

    def fits(self, module: nn.Module) -> bool:
        """Whether this is an ``nn.Linear``, by its exact type."""
        kind = plain_type(module)
        return kind is nn.Linear or (issubclass(kind, nn.Linear) and _ALIKE.get(kind.__module__) == kind.__name__)

    def refusal(self, module: nn.Module) -> str | None:
        """A weight that is no parameter, or of another shape than the layer says."""
        shape = module.out_features, module.in_features
        return not_its_own(module, "weight", shape) or not_its_own(module, "bias", None)  # type: ignore[arg-type]

    def whole(self, module: nn.Module) -> MatrixView:
        """The view of the whole matrix."""
        return LinearView(cast(nn.Linear, module))

    def views(self, module: nn.Module, blocks: Mapping[str, int] | None = None) -> dict[str, MatrixView]:
        """One view, or one for each row block."""
        return row_blocks(self.whole(module), blocks)

    def low_rank(
        self, module: nn.Module, views: Mapping[str, MatrixView], factors: Mapping[str, Factors]
    ) -> LowRankLayer:
        """A :class:`~lightning_prehab.LowRankLinear` or its like, or :class:`~lightning_prehab.LowRankBlocks`."""
        if "" in views:
            return self.one(module, factors[""])
        return self.joined(module, {part: _child(view, factors.get(part)) for part, view in views.items()})

    def one(self, module: nn.Module, factors: Factors) -> LowRankLayer:
        """The low-rank module for a layer that is one matrix."""
        return low_rank_linear(factors, module)

    def joined(self, module: nn.Module, children: Mapping[str, nn.Module]) -> LowRankLayer:
        """The low-rank module for a layer of row blocks."""
        return LowRankBlocks(children, module._parameters["bias"]).train(module.training)


def _child(view: MatrixView, factors: Factors | None) -> nn.Module:
    """A block with its factors, or dense."""
    dense = dense_linear(view.weight, view.parameter, view.module.training)
    return dense if factors is None else low_rank_linear(factors, dense)
