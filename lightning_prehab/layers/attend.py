"""What ``nn.MultiheadAttention`` does between its projections."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prehab.errors import ArgumentError

#: Queries, keys and values.
Three = tuple[Tensor, Tensor, Tensor]


class Attention(Protocol):
    """What both modules say of themselves, the dense one and the low-rank one."""

    num_heads: int
    head_dim: int
    dropout: float
    add_zero_attn: bool
    batch_first: bool
    training: bool

    @property
    def bias_k(self) -> Tensor | None:
        """A learned key at the end of the sequence."""

    @property
    def bias_v(self) -> Tensor | None:
        """A learned value."""


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


def attend(
    module: Attention,
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
    module: Attention,
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
    module: Attention,
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
    module: Attention,
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
