"""``nn.MultiheadAttention``: three input projections and one of the output."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from lightning_prehab.kinds.base import Kind, MatrixView, See, dense_linear, not_its_own, part_of, plain_type
from lightning_prehab.layers.attend import Masks, Projections, Three, attend, each
from lightning_prehab.layers.attention import PARTS, LowRankMultiheadAttention, Projection
from lightning_prehab.layers.pivot import low_rank_linear
from lightning_prehab.linalg.factors import Factors

Watcher = Callable[[str, Tensor, Tensor], None]


class AttentionView(MatrixView):
    """One projection of an attention layer.

    Args:
        module: The layer.
        part: ``"q_proj"``, ``"k_proj"``, ``"v_proj"`` or ``"out_proj"``.
    """

    module: nn.MultiheadAttention

    def __init__(self, module: nn.MultiheadAttention, part: str) -> None:
        columns = {"k_proj": module.kdim, "v_proj": module.vdim}.get(part, module.embed_dim)
        super().__init__(module, module.embed_dim, columns)
        self.part = part

    @property
    def parameter(self) -> nn.Parameter:
        """The weight of the output, or of the three inputs, or the own one of this input."""
        if self.part == "out_proj":
            found = self.module.out_proj._parameters["weight"]
        else:
            found = self.module._parameters["in_proj_weight" if self.packed else f"{self.part}_weight"]
        assert found is not None
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias of the output, or the part of the input bias that belongs to this projection."""
        if self.part == "out_proj":
            return self.module.out_proj._parameters["bias"]
        bias = self.module._parameters["in_proj_bias"]
        return None if bias is None else part_of(bias, self._start, self.out_features)

    @property
    def packed(self) -> bool:
        """Whether its parameter holds the other input projections too."""
        return self.part != "out_proj" and self.module._qkv_same_embed_dim

    def _block(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(0, self._start, self.out_features)

    @property
    def _start(self) -> int:
        return PARTS.index(self.part) * self.out_features

    def matrix(self, tensor: Tensor) -> Tensor:
        """The rows that belong to this projection."""
        return self._block(tensor) if self.packed else tensor

    @property
    def slices(self) -> range | None:
        """The same."""
        start = PARTS.index(self.part) * self.out_features if self.packed else 0
        return range(start, start + self.out_features)


class MultiheadAttentionKind(Kind):
    """Exactly ``nn.MultiheadAttention``, also inside torch's transformer layers."""

    linear: ClassVar[bool] = True
    sparse: ClassVar[bool] = True
    pivot: ClassVar[bool] = True

    def fits(self, module: nn.Module) -> bool:
        """The exact type."""
        return plain_type(module) is nn.MultiheadAttention

    def refusal(self, module: nn.Module) -> str | None:
        """Weights that are not those of torch are not known."""
        assert isinstance(module, nn.MultiheadAttention)
        names = ["in_proj_weight"] if module._qkv_same_embed_dim else [f"{part}_weight" for part in PARTS[:3]]
        if is_parametrized(module.out_proj):
            return "the weight of its out_proj is parametrized; remove the parametrization first"
        if plain_type(module.out_proj) not in (NonDynamicallyQuantizableLinear, nn.Linear):
            return f"its out_proj is a {type(module.out_proj).__name__}"
        if "weight" not in module.out_proj._parameters or not module._parameters.keys() >= set(names):
            return "a weight of it is pruned or normalized by a hook; make that permanent or remove it first"
        size, widths = module.embed_dim, (module.embed_dim, module.kdim, module.vdim)
        shapes = [(3 * size, size)] if module._qkv_same_embed_dim else [(size, width) for width in widths]
        found = [not_its_own(module, name, shape) for name, shape in zip(names, shapes, strict=True)]
        found += [not_its_own(module, "in_proj_bias", None)]
        found += [not_its_own(module.out_proj, "weight", (size, size)), not_its_own(module.out_proj, "bias", None)]
        return next((reason for reason in found if reason is not None), None)

    def views(self, module: nn.Module, blocks: Mapping[str, int] | None = None) -> dict[str, MatrixView]:
        """The four projections; ``blocks`` has no meaning here."""
        assert isinstance(module, nn.MultiheadAttention)
        return {part: AttentionView(module, part) for part in PARTS}

    def low_rank(
        self, module: nn.Module, views: Mapping[str, MatrixView], factors: Mapping[str, Factors]
    ) -> LowRankMultiheadAttention:
        """The module with a low-rank child for each matrix that has factors."""
        assert isinstance(module, nn.MultiheadAttention)
        children = {part: _child(AttentionView(module, part), factors.get(part)) for part in views}
        return LowRankMultiheadAttention.from_parts(module, children)

    def watch(self, module: nn.Module, views: Sequence[MatrixView], see: See) -> list[RemovableHandle]:
        """Calls ``see`` once for each view whenever the layer has been called, with the tensors of its projection.

        The projections happen inside one function of torch. While it is watched, the layer goes through the same
        operations one by one: the same output to rounding, the same random numbers.
        """
        assert isinstance(module, nn.MultiheadAttention)
        by_part = {view.part: view for view in views if isinstance(view, AttentionView)}

        def watcher(part: str, x: Tensor, y: Tensor) -> None:
            if part in by_part:
                see([by_part[part]], x, y)

        return [_Watch(module, watcher), module.register_forward_pre_hook(_keep_slow)]


def _child(view: AttentionView, factors: Factors | None) -> Projection:
    """A projection with its factors, or dense: then with the parameter itself if that holds nothing else."""
    dense = dense_linear(view.weight, view.parameter, view.module.training)
    if view.part == "out_proj":
        dense.register_parameter("bias", view.module.out_proj._parameters["bias"])
    if factors is not None:
        return low_rank_linear(factors, dense)
    if not view.packed:
        dense.weight = view.parameter
    return dense


class _Watch(RemovableHandle):
    """A watcher of one layer, until it is removed; the first one replaces the forward pass, the last one gives it back.

    Args:
        module: The layer.
        watcher: Called as ``watcher(part, x, y)``.
    """

    def __init__(self, module: nn.MultiheadAttention, watcher: Watcher) -> None:
        super().__init__(OrderedDict())
        self._module = module
        self._watcher = watcher
        watchers = _watchers(module)
        if watchers is None:
            watchers = []
            module.__dict__["forward"] = MethodType(_visible_forward(watchers), module)
        self._watchers = watchers
        self._watchers.append(watcher)

    def remove(self) -> None:
        """Ends this watch; the layer is as it was when nobody else watches it."""
        if self._watcher not in self._watchers:
            return
        self._watchers.remove(self._watcher)
        if not self._watchers and _watchers(self._module) is self._watchers:
            del self._module.__dict__["forward"]


def _watchers(module: nn.Module) -> list[Watcher] | None:
    """Who watches a layer; None if its forward pass is its own."""
    found: list[Watcher] | None = getattr(module.__dict__.get("forward"), "watchers", None)
    return found


def _visible_forward(watchers: list[Watcher]) -> Callable[..., Any]:
    """A forward pass of ``nn.MultiheadAttention`` that shows its projections to the watchers."""

    def forward(
        self: nn.MultiheadAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = Masks(key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        call = _Call(self, (query, key, value), watchers)
        return attend(self, query, key, value, masks, Projections(call.inputs, call.output), positions_first=True)

    forward.__dict__["watchers"] = watchers
    return forward


class _Call:
    """One call of a watched layer: computes the projections as torch does and shows them, the batch first.

    Args:
        module: The layer.
        given: Queries, keys and values.
        watchers: Who wants to see them.
    """

    def __init__(self, module: nn.MultiheadAttention, given: Three, watchers: Sequence[Watcher]) -> None:
        self._module = module
        self._given = given
        self._watchers = watchers
        self._lengths = [sequence.shape[0] for sequence in given[0].unbind()] if given[0].is_nested else None

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> Three:
        """The projections of ``(positions, batch, size)``."""
        if self._given[0].dim() == 3 and self._module.batch_first and self._lengths is None:
            shown = self._given
        else:
            shown = each(self._layout, query, key, value)
        projected = _project(self._module, query, key, value)
        q, k, v = (self._show(part, x, y) for part, x, y in zip(PARTS, shown, projected, strict=False))
        return q, k, v

    def output(self, attended: Tensor) -> Tensor:
        """The output projection of ``(positions, batch, size)``."""
        tokens = attended.flatten(0, 1)
        projected = F.linear(tokens, self._module.out_proj.weight, self._module.out_proj.bias).view_as(attended)
        return self._show("out_proj", self._layout(attended), projected)

    def _show(self, part: str, x: Tensor, y: Tensor) -> Tensor:
        """Lets the watchers see ``y``; what comes back has passed through the tensor that they saw."""
        shown = self._layout(y)
        for watcher in tuple(self._watchers):
            watcher(part, x, shown)
        if self._lengths is not None:
            return y  # there are no gradients with nested tensors
        return shown.transpose(0, 1) if shown.dim() == 3 else shown.unsqueeze(1)

    def _layout(self, x: Tensor) -> Tensor:
        """From ``(positions, batch, size)`` to the layout that is shown: tokens of nested tensors stand in one row."""
        if self._lengths is not None:
            return torch.cat([sequence[:n] for sequence, n in zip(x.unbind(1), self._lengths, strict=True)])
        return x.squeeze(1) if self._given[0].dim() == 2 else x.transpose(0, 1)


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Three:
    """The input projections, in one product where torch does it in one."""
    size, bias = module.embed_dim, module.in_proj_bias
    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v
    if key is value:
        blocks = [(query, 0, 3)] if query is key else [(query, 0, 1), (key, 1, 3)]
    else:
        blocks = [(query, 0, 1), (key, 1, 2), (value, 2, 3)]
    projected: list[Tensor] = []
    for x, first, last in blocks:
        rows = slice(first * size, last * size)
        product = F.linear(x, module.in_proj_weight[rows], None if bias is None else bias[rows])
        projected += [part.contiguous() for part in product.chunk(last - first, dim=-1)]
    q, k, v = projected
    return q, k, v


def _keep_slow(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Does nothing: an encoder layer around a module with a hook does not use the kernel that bypasses the module."""
