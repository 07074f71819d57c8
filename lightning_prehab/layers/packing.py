"""From two factors to the pivot layout and back: the same function in another module, with other parameters."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.layers.attention import PARTS, LowRankMultiheadAttention
from lightning_prehab.layers.blocks import LowRankBlocks, LowRankConv1D, PivotConv1D
from lightning_prehab.layers.conv import LowRankConv, LowRankConv1d, LowRankConv2d
from lightning_prehab.layers.linear import LowRankLayer, LowRankLinear, LowRankPlusSparseLinear
from lightning_prehab.layers.pivot import PivotConv1d, PivotConv2d, PivotLayer, PivotLinear, like_conv, like_linear
from lightning_prehab.linalg.matrices import is_quantized

_PACKED: dict[type[LowRankLayer], Any] = {
    LowRankLinear: PivotLinear,
    LowRankConv1D: PivotConv1D,
    LowRankConv1d: PivotConv1d,
    LowRankConv2d: PivotConv2d,
}


def packed(layer: LowRankLayer) -> LowRankLayer:
    """The same layer in the pivot layout: a new module, which shares the biases and whatever is not cut.

    Args:
        layer: Any low-rank layer; what is packed already stays as it is.

    Raises:
        UnsupportedError: If a matrix of it has no such layout (a sparse part, groups, the spatial scheme), or
            something is on it that would be lost (quantized, parametrized).
        NumericalError: If a factor is not finite.
    """
    return _with_parts(layer, _pack)


def unpacked(layer: LowRankLayer) -> LowRankLayer:
    """The same layer as balanced factors, which share what is not cut: the way back from :func:`packed`.

    Raises:
        UnsupportedError: If a part of it is quantized or parametrized.
    """
    return _with_parts(layer, _unpack)


def why_not_packed(layer: nn.Module) -> str | None:
    """Why a low-rank layer has no pivot layout, or None if it has one."""
    for part in _low_rank_parts(layer):
        if isinstance(part, LowRankPlusSparseLinear):
            return "it has a sparse part"
        if isinstance(part, LowRankConv) and part.groups > 1:
            return f"its {part.groups} groups have factors of their own"
        if isinstance(part, LowRankConv) and part.scheme != "channel":
            return f"its second convolution, of the {part.scheme} scheme, is larger than 1x1"
        if isinstance(part, LowRankConv) and part.rank == part.out_channels:
            return "it has as many inner channels as outputs"
        if not isinstance(part, PivotLayer | LowRankBlocks | LowRankMultiheadAttention) and type(part) not in _PACKED:
            return f"a {type(part).__name__} has none"
    return _why_not_read(layer, [part for part in _low_rank_parts(layer) if type(part) in _PACKED])


def why_not_unpacked(layer: nn.Module) -> str | None:
    """Why a low-rank layer cannot be made into two factors, or None if it can."""
    return _why_not_read(layer, [part for part in _low_rank_parts(layer) if isinstance(part, PivotLayer)])


def _low_rank_parts(layer: nn.Module) -> list[LowRankLayer]:
    return [module for module in layer.modules() if isinstance(module, LowRankLayer)]


def _why_not_read(layer: nn.Module, parts: list[LowRankLayer]) -> str | None:
    """Why the numbers of a layer cannot be made into others, or None if those of these parts can."""
    if any(is_quantized(parameter) for parameter in layer.parameters()):
        return "it is quantized"
    if any(is_parametrized(part) for part in layer.modules()):
        return "a parametrization is on its parts, and would be lost; remove_parametrizations first"
    for part in parts:
        keys = ("D", "C") if isinstance(part, PivotLayer) else ("A", "B")
        if len({part.get_submodule(key).weight.requires_grad for key in keys}) > 1:
            return f"of {keys[0]} and {keys[1]} one is frozen, and each part of the other layout comes of both"
    return None


def _with_parts(layer: LowRankLayer, change: Callable[[Any], LowRankLayer]) -> LowRankLayer:
    """A layer whose matrices are changed."""
    if isinstance(layer, LowRankBlocks):
        children = {name: _changed(child, change) for name, child in layer.named_children()}
        return type(layer)(children, layer.bias).train(layer.training)
    if isinstance(layer, LowRankMultiheadAttention):
        parts = {name: _changed(layer.get_submodule(name), change) for name in PARTS}
        return LowRankMultiheadAttention.from_parts(layer, parts)
    return change(layer)


def _changed(child: nn.Module, change: Callable[[Any], LowRankLayer]) -> Any:
    return change(child) if isinstance(child, LowRankLayer) else child


def _pack(layer: LowRankLayer) -> LowRankLayer:
    if isinstance(layer, PivotLayer):
        return layer
    reason = why_not_packed(layer)
    if reason is not None:
        raise UnsupportedError(f"{type(layer).__name__} has no pivot layout: {reason}.")
    made: LowRankLayer
    if isinstance(layer, LowRankConv):
        like = like_conv(layer, layer.A.weight, layer.bias)
        made = _PACKED[type(layer)].from_factors(*layer.factors(), like=like)
    else:
        assert isinstance(layer, LowRankLinear)
        like = like_linear(layer.A.weight, layer.bias, layer.training)
        made = _PACKED[type(layer)].from_factors(layer.A.weight, layer.B.weight, like=like)
    return made


def _unpack(layer: LowRankLayer) -> LowRankLayer:
    if not isinstance(layer, PivotLayer):
        return layer
    reason = why_not_unpacked(layer)
    if reason is not None:
        raise UnsupportedError(f"{type(layer).__name__} cannot be made into two factors: {reason}.")
    return layer.low_rank()
