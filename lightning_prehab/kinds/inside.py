"""Layers inside of a low-rank layer of several matrices, for another cut: parts of fused projections, of attention.

Each is a linear layer, low-rank or dense, that knows nothing of two things that its owner does: adding one bias for
several parts, and handing sequences over with the positions first.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prehab.kinds.base import Kind, MatrixView, part_of
from lightning_prehab.kinds.low_rank import LowRankView
from lightning_prehab.layers.attention import PARTS, LowRankMultiheadAttention
from lightning_prehab.layers.blocks import LowRankBlocks
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.products import Product


class InsideView(MatrixView):
    """The matrix of such a layer.

    Args:
        own: As the layer alone shows it.
        bias: The part of the owner's bias that belongs to it, or None.
        positions_first: Whether it is given sequences as ``(positions, batch, size)``.
    """

    def __init__(self, own: MatrixView, bias: Tensor | None, positions_first: bool) -> None:
        super().__init__(own.module, own.out_features, own.in_features)
        self.rank, self.layout = own.rank, own.layout
        self.reads = "positions first" if positions_first else own.reads
        self.own, self._owners, self._positions_first = own, bias, positions_first

    @property
    def parameter(self) -> nn.Parameter:
        """As of the layer alone."""
        return self.own.parameter

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """As of the layer alone."""
        return self.own.parameters

    @property
    def bias(self) -> Tensor | None:
        """Its own one, or its part of the owner's."""
        return self._owners if self.own.bias is None else self.own.bias

    def matrix(self, tensor: Tensor) -> Tensor:
        """As of the layer alone."""
        return self.own.matrix(tensor)

    @property
    def slices(self) -> range | None:
        """As of the layer alone."""
        return self.own.slices

    def product(self) -> Product | None:
        """As of the layer alone."""
        return self.own.product()

    @torch.no_grad()
    def write_(self, matrix: Tensor, into: Tensor | None = None) -> None:
        """As of the layer alone."""
        self.own.write_(matrix, into)

    def inputs(self, x: Tensor) -> Tensor:
        """With the batch first."""
        return self._batch_first(x)

    def outputs(self, y: Tensor) -> Tensor:
        """With the batch first."""
        return self._batch_first(y)

    def _batch_first(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self._positions_first and x.dim() == 3 else x


class InsideKind(Kind):
    """The kind of a layer where it stands.

    Args:
        kind: That of the layer alone.
        owner: The low-rank layer that holds it.
        key: Its name there.
    """

    pivot: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def __init__(self, kind: Kind, owner: LowRankLayer, key: str) -> None:
        self._kind, self._owner, self._key = kind, owner, key

    def fits(self, module: nn.Module) -> bool:
        """As the kind of the layer alone."""
        return self._kind.fits(module)

    def refusal(self, module: nn.Module) -> str | None:
        """As the kind of the layer alone."""
        return self._kind.refusal(module)

    def views(self, module: nn.Module, blocks: Mapping[str, int] | None = None) -> dict[str, MatrixView]:
        """The matrix of the layer."""
        own = self._kind.views(module)[""]
        return {"": InsideView(own, *self._surroundings(own.out_features))}

    def _surroundings(self, rows: int) -> tuple[Tensor | None, bool]:
        """Its part of a bias for several layers, and whether positions come first."""
        owner: Any = self._owner
        if isinstance(owner, LowRankMultiheadAttention):
            place = PARTS.index(self._key)
            last, bias = place == len(PARTS) - 1, owner.in_proj_bias
            return None if last or bias is None else part_of(bias, place * rows, rows), last or not owner.batch_first
        assert isinstance(owner, LowRankBlocks)
        start = 0
        for key, block in owner.named_children():
            if key == self._key:
                break
            start += int(block.out_features)  # type: ignore[arg-type]
        return None if owner.bias is None else part_of(owner.bias, start, rows), False

    def low_rank(
        self, module: nn.Module, views: Mapping[str, MatrixView], factors: Mapping[str, Factors]
    ) -> LowRankLayer:
        """As the kind of the layer alone: the owner keeps its bias."""
        return self._kind.low_rank(module, {part: view.own for part, view in views.items()}, factors)  # type: ignore[attr-defined]


def low_rank_view(view: MatrixView) -> LowRankView:
    """The view of a layer that has been cut before, without its surroundings."""
    own = view.own if isinstance(view, InsideView) else view
    assert isinstance(own, LowRankView)
    return own


def write_first_(view: MatrixView, a: Tensor) -> None:
    """Copies ``a`` of shape ``(r, n)`` into the first factor of a layer that has been cut before."""
    low_rank_view(view).write_first_(a)


def inside_kind(kind: Kind | None, owner: nn.Module | None, key: str) -> Kind | None:
    """The kind of a layer where it stands: in a low-rank layer of several matrices, or anywhere else."""
    if kind is None or not isinstance(owner, LowRankMultiheadAttention | LowRankBlocks):
        return kind
    return InsideKind(kind, owner, key)
