"""``transformers.pytorch_utils.Conv1D``, the linear layer of GPT-2: its weight is transposed."""

import sys
from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn

from lightning_prehab.kinds.base import MatrixView, not_its_own, plain_type
from lightning_prehab.kinds.linear import LinearKind
from lightning_prehab.layers.blocks import LowRankConv1D, LowRankConv1DBlocks, PivotConv1D
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.linalg.factors import Factors


class Conv1DView(MatrixView):
    """The weight of a ``Conv1D``, transposed."""

    def __init__(self, module: nn.Module) -> None:
        columns, rows = cast(Tensor, module.weight).shape
        super().__init__(module, rows, columns)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight, of shape ``(in, out)``."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias."""
        return self.module._parameters["bias"]

    def matrix(self, tensor: Tensor) -> Tensor:
        """The transposed tensor."""
        return tensor.mT


class Conv1DKind(LinearKind):
    """Layers of exactly the type ``transformers.pytorch_utils.Conv1D``; transformers itself is not imported."""

    sparse: ClassVar[bool] = False

    def fits(self, module: nn.Module) -> bool:
        """Whether this is a ``Conv1D``: nobody can have made one before transformers was imported."""
        source = sys.modules.get("transformers.pytorch_utils")
        return source is not None and plain_type(module) is source.Conv1D

    def refusal(self, module: nn.Module) -> str | None:
        """A weight that is no parameter, or of another shape than the layer says."""
        shape = module.nx, module.nf
        return not_its_own(module, "weight", shape) or not_its_own(module, "bias", None)  # type: ignore[arg-type]

    def whole(self, module: nn.Module) -> MatrixView:
        """The view of the whole matrix."""
        return Conv1DView(module)

    def one(self, module: nn.Module, factors: Factors) -> LowRankLayer:
        """The low-rank module for a layer that is one matrix."""
        if factors.order is not None:
            return PivotConv1D.from_factors(factors.A, factors.B, module, factors.order)
        return LowRankConv1D.from_factors(factors.A, factors.B, module)

    def joined(self, module: nn.Module, children: Mapping[str, nn.Module]) -> LowRankLayer:
        """The low-rank module for a layer of row blocks."""
        return LowRankConv1DBlocks(children, module._parameters["bias"]).train(module.training)
