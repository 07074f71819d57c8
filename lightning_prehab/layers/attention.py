"""The drop-in module for ``nn.MultiheadAttention``, and the attention between its projections."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prehab.errors import ArgumentError
from lightning_prehab.layers.linear import LowRankLayer, LowRankLinear

#: The weight matrices of an attention layer, in the order of its parameters.
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")

#: Queries, keys and values.
Three = tuple[Tensor, Tensor, Tensor]


class Masks(NamedTuple):
    """What the caller of an attention layer may set, with the meaning it has for ``nn.MultiheadAttention``."""

    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


class Projections(NamedTuple):
    """What stands before and behind the attention itself.

    Attributes:
        inputs: From batched queries, keys and values to their projections, the sizes in the same order.
        output: From ``(positions, batch, embed_dim)`` to the output of the same shape.
    """

    inputs: Callable[[Tensor, Tensor, Tensor], Three]
    output: Callable[[Tensor], Tensor]


class LowRankMultiheadAttention(LowRankLayer):
    """Multi-head attention whose projections are low-rank: takes the place of ``nn.MultiheadAttention``.

    The children ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are :class:`LowRankLinear` layers or, where a
    matrix is not cut, ordinary ``nn.Linear`` ones. The three input biases stay one parameter, ``in_proj_bias``, as in
    the dense module. The result, the random numbers of the dropout and the meaning of all arguments are those of the
    dense module with the products of the factors as weights.

    The products can be read under the names of the dense weights (``in_proj_weight``, ``q_proj_weight``, ...); they are
    differentiable and computed anew at each access. The fused kernels of ``nn.TransformerEncoderLayer`` need dense
    weights and are not used (``_qkv_same_embed_dim`` is False for that reason); nested tensors are padded inside.

    Args:
        embed_dim: Size of the queries and of the output.
        num_heads: Number of heads; divides ``embed_dim``.
        ranks: Rank by child; the others are dense.
        dropout: Probability that an attention weight is dropped in training.
        bias: Whether the projections have a bias.
        add_bias_kv: Whether a learned key and value are added to the sequence.
        add_zero_attn: Whether a zero key and value are added to the sequence.
        kdim: Size of the keys; ``embed_dim`` by default.
        vdim: Size of the values; ``embed_dim`` by default.
        batch_first: Whether inputs are ``(batch, positions, size)`` instead of ``(positions, batch, size)``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ArgumentError: If ``num_heads`` does not divide ``embed_dim``, or a rank or its name does not exist.

    >>> attention = LowRankMultiheadAttention(16, 4, {"q_proj": 2, "k_proj": 2}, batch_first=True)
    >>> x = torch.zeros(3, 5, 16)
    >>> output, weights = attention(x, x, x)
    >>> output.shape, weights.shape, type(attention.v_proj).__name__
    (torch.Size([3, 5, 16]), torch.Size([3, 5, 5]), 'Linear')
    """

    if TYPE_CHECKING:  # said here because nn.Module.__getattr__ hides their types
        in_proj_bias: nn.Parameter | None
        bias_k: nn.Parameter | None
        bias_v: nn.Parameter | None
        q_proj: nn.Linear | LowRankLinear
        k_proj: nn.Linear | LowRankLinear
        v_proj: nn.Linear | LowRankLinear
        out_proj: nn.Linear | LowRankLinear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ranks: Mapping[str, int],
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ArgumentError(f"num_heads must divide embed_dim, got {num_heads} heads for size {embed_dim}.")
        unknown = sorted(set(ranks) - set(PARTS))
        if unknown:
            raise ArgumentError(f"ranks: {unknown[0]!r} is not a projection; there are {', '.join(PARTS)}.")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.add_zero_attn, self.batch_first = dropout, add_zero_attn, batch_first
        self._qkv_same_embed_dim = False  # what nn.TransformerEncoderLayer asks before it uses the fused kernel

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        self.register_parameter("in_proj_bias", parameter(3 * embed_dim) if bias else None)
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, parameter(1, 1, embed_dim) if add_bias_kv else None)
        for name, size in zip(PARTS, (embed_dim, self.kdim, self.vdim, embed_dim), strict=True):
            own_bias, rank = bias and name == "out_proj", ranks.get(name)
            child: nn.Module
            if rank is None:
                child = nn.Linear(size, embed_dim, own_bias, device=device, dtype=dtype)
            else:
                child = LowRankLinear(size, embed_dim, rank, own_bias, device=device, dtype=dtype)
            self.add_module(name, child)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """Dense product of the three input projections, ``(3 * embed_dim, embed_dim)``; None if sizes differ."""
        if self.kdim != self.embed_dim or self.vdim != self.embed_dim:
            return None
        product = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        return self._computed(product, "in_proj_weight")

    @property
    def q_proj_weight(self) -> Tensor:
        """Dense product of the query projection, ``(embed_dim, embed_dim)``; read-only."""
        return self.q_proj.weight

    @property
    def k_proj_weight(self) -> Tensor:
        """Dense product of the key projection, ``(embed_dim, kdim)``; read-only."""
        return self.k_proj.weight

    @property
    def v_proj_weight(self) -> Tensor:
        """Dense product of the value projection, ``(embed_dim, vdim)``; read-only."""
        return self.v_proj.weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and, if ``need_weights``, the attention weights; see ``nn.MultiheadAttention`` for arguments."""
        masks = Masks(key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return attend(self, query, key, value, masks, Projections(self._project, self.out_proj))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Three:
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.in_proj_bias is None:
            return q, k, v
        bias_q, bias_k, bias_v = self.in_proj_bias.chunk(3)
        return q + bias_q, k + bias_k, v + bias_v

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"

    @classmethod
    def from_parts(
        cls, like: nn.MultiheadAttention, parts: Mapping[str, nn.Linear | LowRankLinear]
    ) -> "LowRankMultiheadAttention":
        """A module of the given children that *shares* the input bias, ``bias_k`` and ``bias_v`` of a dense one.

        Args:
            like: The dense module; sizes, settings and train/eval mode are taken from it.
            parts: A child for each of ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``. Those of the inputs have no
                bias where ``like`` has one.
        """
        layer = cls(
            like.embed_dim,
            like.num_heads,
            {},
            dropout=like.dropout,
            bias=False,
            add_zero_attn=like.add_zero_attn,
            kdim=like.kdim,
            vdim=like.vdim,
            batch_first=like.batch_first,
            device="meta",
        )
        layer.in_proj_bias, layer.bias_k, layer.bias_v = like.in_proj_bias, like.bias_k, like.bias_v  # type: ignore[assignment]
        for name in PARTS:
            setattr(layer, name, parts[name])
        return layer.train(like.training)

    @torch.no_grad()
    def to_dense(self) -> nn.MultiheadAttention:
        """An ``nn.MultiheadAttention`` with the same function; its parameters are copies."""
        children = [self.q_proj, self.k_proj, self.v_proj, self.out_proj]
        dense = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=False,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        weights = [child.weight.detach().clone() for child in children]
        learn = [next(child.parameters()).requires_grad for child in children]
        if dense._qkv_same_embed_dim:
            dense.in_proj_weight = nn.Parameter(torch.cat(weights[:3]), requires_grad=any(learn[:3]))
        else:
            for name, weight, learns in zip(PARTS[:3], weights[:3], learn[:3], strict=True):
                setattr(dense, f"{name}_weight", nn.Parameter(weight, requires_grad=learns))
        dense.out_proj.weight = nn.Parameter(weights[3], requires_grad=learn[3])
        self._write_biases(dense, [_bias(child) for child in children])
        for name in ("bias_k", "bias_v"):
            own = self._parameters[name]
            if own is not None:
                setattr(dense, name, nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad))
        return dense.train(self.training)

    def _write_biases(self, dense: nn.MultiheadAttention, biases: list[nn.Parameter | None]) -> None:
        """Both biases or none: torch knows no attention with one of them."""
        own = self.in_proj_bias
        if own is None and all(bias is None for bias in biases):
            return
        zeros = dense.out_proj.weight.new_zeros(self.embed_dim)
        total = torch.cat([zeros if bias is None else bias for bias in biases[:3]])
        total = total if own is None else total + own
        learns = any(bias is not None and bias.requires_grad for bias in (own, *biases[:3]))
        out = biases[3]
        dense.in_proj_bias = nn.Parameter(total, requires_grad=learns)
        dense.out_proj.bias = nn.Parameter(
            zeros if out is None else out.detach().clone(), requires_grad=out is not None and out.requires_grad
        )


def attend(
    module: nn.MultiheadAttention | LowRankMultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    projections: Projections,
    positions_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``nn.MultiheadAttention`` computes, around given projections, with the random numbers that it draws.

    Args:
        module: Sizes, dropout, ``bias_k``, ``bias_v`` and ``add_zero_attn`` are taken from it.
        query: As for the dense module; so are ``key`` and ``value``. The three may be one nested tensor.
        key: The keys.
        value: The values.
        masks: What the caller set.
        projections: What stands before and behind the attention.
        positions_first: Call the input projections with ``(positions, batch, size)`` even if the inputs are
            ``batch_first``, as torch does; the output is then that of torch, summed in the same order.

    Raises:
        ArgumentError: If shapes or masks do not fit.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        return _attend_nested(module, query, key, value, masks, projections, positions_first)
    _check_shapes(query, key, value)
    if query.dim() == 2:
        padding = None if masks.key_padding_mask is None else masks.key_padding_mask.unsqueeze(0)
        masks = masks._replace(key_padding_mask=padding)
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        output, weights = _attend(module, query, key, value, masks, projections, batch_first=False)
        return output.squeeze(1), None if weights is None else weights.squeeze(0)
    if not (module.batch_first and positions_first):
        return _attend(module, query, key, value, masks, projections, module.batch_first)
    query, key, value = each(lambda x: x.transpose(0, 1), query, key, value)
    output, weights = _attend(module, query, key, value, masks, projections, batch_first=False)
    return output.transpose(0, 1), weights


def _attend(
    module: nn.MultiheadAttention | LowRankMultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    projections: Projections,
    batch_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same for ``(batch, positions, size)`` or ``(positions, batch, size)``."""
    heads, size, positions = module.num_heads, module.head_dim, int(batch_first)
    length, batch = query.shape[positions], query.shape[1 - positions]
    mask, is_causal = _merged_mask(module, masks, batch, length, key.shape[positions], query.dtype)
    q, k, v = projections.inputs(query, key, value)
    if module.bias_k is not None and module.bias_v is not None:
        added = (batch, 1, -1) if batch_first else (1, batch, -1)
        k = torch.cat([k, module.bias_k.expand(added).to(k.dtype)], dim=positions)
        v = torch.cat([v, module.bias_v.expand(added).to(v.dtype)], dim=positions)
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)  # to (batch, heads, positions, head_dim)
    q, k, v = (x.view(*x.shape[:-1], heads, size).permute(order) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(batch, heads, 1, size)], dim=2) for x in (k, v))
    dropout = module.dropout if module.training else 0.0
    if masks.need_weights:
        attended, weights = _attention_and_weights(q, k, v, mask, dropout)
        weights = weights.mean(dim=1) if masks.average_attn_weights else weights
    else:
        attended, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
    # In torch's order in memory whatever the layout: the dropout behind the layer draws its numbers in that order.
    output = projections.output(attended.permute(2, 0, 1, 3).flatten(-2))
    return (output.transpose(0, 1) if batch_first else output), weights


def _attention_and_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The attention step by step, and its weights ``(batch, heads, positions, keys)`` after dropout."""
    shape = (*q.shape[:-1], k.shape[-2])
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scaled = q * math.sqrt(1.0 / q.shape[-1])
    scores = torch.bmm(scaled, k.mT) if mask is None else torch.baddbmm(mask.flatten(0, 1), scaled, k.mT)
    weights = F.softmax(scores, dim=-1)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, v).view(*shape[:-1], -1), weights.view(shape)


def _attend_nested(
    module: nn.MultiheadAttention | LowRankMultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    projections: Projections,
    positions_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sequences of different lengths, padded for the time of the attention."""
    same = query is key and key is value
    if not (same and module.batch_first and masks.key_padding_mask is None and masks.attn_mask is None):
        raise ArgumentError(
            "A nested tensor is taken where queries, keys and values are the same tensor, batch_first is True and no "
            "mask is given; pad the sequences and pass key_padding_mask instead."
        )
    lengths = [sequence.shape[0] for sequence in query.unbind()]
    x = query.to_padded_tensor(0.0)
    padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
    masks = masks._replace(key_padding_mask=padding)
    output, weights = attend(module, x, x, x, masks, projections, positions_first)
    sequences = [sequence[:length] for sequence, length in zip(output.unbind(), lengths, strict=True)]
    return torch.nested.as_nested_tensor(sequences, layout=query.layout), weights


def _merged_mask(
    module: nn.MultiheadAttention | LowRankMultiheadAttention,
    masks: Masks,
    batch: int,
    length: int,
    keys: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, bool]:
    """One mask to be added to the scores, shape ``(batch or 1, heads or 1, length or 1, keys)``.

    The flag says that the kernel shall make a causal one instead.
    """
    heads = module.num_heads
    if masks.is_causal and masks.attn_mask is None:
        raise ArgumentError("is_causal says what attn_mask holds; pass the mask too.")
    kernel = masks.is_causal and masks.key_padding_mask is None and not masks.need_weights
    merged = None if kernel else _additive(masks.attn_mask, "attn_mask", dtype)
    if merged is not None:
        if merged.shape not in ((length, keys), (batch * heads, length, keys)):
            raise ArgumentError(
                f"attn_mask must have shape {(length, keys)} or {(batch * heads, length, keys)}, got "
                f"{tuple(merged.shape)}."
            )
        merged = merged[None, None] if merged.dim() == 2 else merged.view(batch, heads, length, keys)
    padding = _additive(masks.key_padding_mask, "key_padding_mask", dtype)
    if padding is not None:
        if padding.shape != (batch, keys):
            raise ArgumentError(f"key_padding_mask must have shape {(batch, keys)}, got {tuple(padding.shape)}.")
        padding = padding[:, None, None, :].expand(-1, heads, -1, -1)
        merged = padding if merged is None else merged + padding
    added = int(module.bias_k is not None) + int(module.add_zero_attn)
    return (F.pad(merged, (0, added)) if merged is not None and added else merged), kernel


def _additive(mask: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
    """A mask to be added to the scores; booleans are True where nothing is to be attended to."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ArgumentError(f"{name} must be boolean or floating, got {mask.dtype}.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim() or key.shape[:-1] != value.shape[:-1]:
        raise ArgumentError(
            "Queries, keys and values must all be 3-D, or 2-D without a batch, with as many keys as values; got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )


def each(change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor) -> Three:
    """Changes three tensors; those that were one stay one."""
    new_query = change(query)
    new_key = new_query if key is query else change(key)
    new_value = new_key if value is key else change(value)
    return new_query, new_key, new_value


def _bias(child: nn.Linear | LowRankLinear) -> nn.Parameter | None:
    return child.bias
