"""The drop-in module for ``nn.MultiheadAttention``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prehab.errors import ArgumentError
from lightning_prehab.layers.attend import Masks, Projections, Three, attend
from lightning_prehab.layers.linear import LowRankLayer, LowRankLinear, learns
from lightning_prehab.layers.pivot import PivotLinear

#: The weight matrices of an attention layer, in the order of its parameters.
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
#: What a projection may be.
Projection = nn.Linear | LowRankLinear | PivotLinear


class LowRankMultiheadAttention(LowRankLayer):
    """Multi-head attention whose projections are low-rank: takes the place of ``nn.MultiheadAttention``.

    The children ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are :class:`LowRankLinear` layers (or
    :class:`PivotLinear`) or, where a matrix is not cut, ordinary ``nn.Linear`` ones. The three input biases stay one
    parameter, ``in_proj_bias``, as in the dense module. The result, the random numbers of the dropout and the meaning
    of all arguments are those of the dense module with the products of the factors as weights.

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
        q_proj: Projection
        k_proj: Projection
        v_proj: Projection
        out_proj: Projection

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

    merge_masks = nn.MultiheadAttention.merge_masks  # TorchScript asks for it inside of nn.TransformerEncoderLayer

    @property
    def in_proj_weight(self) -> Tensor:
        """Dense product of the three input projections, ``(3 * embed_dim, embed_dim)``; None if sizes differ."""
        other_sizes = self.kdim != self.embed_dim or self.vdim != self.embed_dim
        if other_sizes and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return None  # type: ignore[return-value]
        product = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        return self._show(product, "in_proj_weight")

    @property
    def q_proj_weight(self) -> Tensor:
        """Dense product of the query projection, ``(embed_dim, embed_dim)``; read-only."""
        return self._show(self.q_proj.weight, "q_proj_weight")

    @property
    def k_proj_weight(self) -> Tensor:
        """Dense product of the key projection, ``(embed_dim, kdim)``; read-only."""
        return self._show(self.k_proj.weight, "k_proj_weight")

    @property
    def v_proj_weight(self) -> Tensor:
        """Dense product of the value projection, ``(embed_dim, vdim)``; read-only."""
        return self._show(self.v_proj.weight, "v_proj_weight")

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
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        else:  # noqa: RET505
            masks = Masks(key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return attend(self, query, key, value, masks, Projections(self._project, self.out_proj))

    def _scripted(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The same for TorchScript: by torch's own function, with the products of the factors."""
        turned = self.batch_first and query.dim() == 3
        if turned:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        zeros = torch.zeros(self.embed_dim, dtype=query.dtype, device=query.device)
        bias = torch.cat([_or(self.q_proj.bias, zeros), _or(self.k_proj.bias, zeros), _or(self.v_proj.bias, zeros)])
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            None,
            bias + _or(self.in_proj_bias, torch.zeros_like(bias)),
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            self.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            True,
            self.q_proj.weight,
            self.k_proj.weight,
            self.v_proj.weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (output.transpose(0, 1) if turned else output), weights

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
        cls, like: "nn.MultiheadAttention | LowRankMultiheadAttention", parts: Mapping[str, Projection]
    ) -> "LowRankMultiheadAttention":
        """A module of the given children that *shares* the input bias, ``bias_k`` and ``bias_v`` of another one.

        Args:
            like: The dense module, or one of these; sizes, settings and train/eval mode are taken from it.
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
        learn = [learns(child) for child in children]
        if dense._qkv_same_embed_dim:
            dense.in_proj_weight = nn.Parameter(torch.cat(weights[:3]), requires_grad=any(learn[:3]))
        else:
            for name, weight, one in zip(PARTS[:3], weights[:3], learn[:3], strict=True):
                setattr(dense, f"{name}_weight", nn.Parameter(weight, requires_grad=one))
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
        trained = any(bias is not None and bias.requires_grad for bias in (own, *biases[:3]))
        out = biases[3]
        dense.in_proj_bias = nn.Parameter(total, requires_grad=trained)
        dense.out_proj.bias = nn.Parameter(
            zeros if out is None else out.detach().clone(), requires_grad=out is not None and out.requires_grad
        )


def _or(bias: Tensor | None, zeros: Tensor) -> Tensor:
    return zeros if bias is None else bias


def _bias(child: Projection) -> nn.Parameter | None:
    return child.bias
