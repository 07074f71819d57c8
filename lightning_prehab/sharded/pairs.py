"""Pairs of factors that lie in shards: they are thin, so one pair at a time is gathered for what needs them whole."""

from dataclasses import fields

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_prehab.layers.pairs import FactorPair, factor_pairs
from lightning_prehab.sharded.engine import reshard_
from lightning_prehab.sharded.shares import full, share_of


class ShardedPair(FactorPair):
    """A pair whose factors are ``DTensor``; what it says of them is the part of this process, and collective."""

    def size_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of half the squared size of the product: the parts of this process."""
        for_a, for_b = self._whole().size_gradients()
        return _own(for_a, self.A), _own(for_b, self.B)

    def even_scales(self) -> tuple[Tensor, Tensor] | None:
        """What to multiply the parts of this process by to share the sizes out evenly; None if they do already."""
        scales = self._whole().even_scales()
        if scales is None:
            return None
        for_a, for_b = (scale.expand(like.shape) for scale, like in zip(scales, self.both, strict=True))
        return _own(for_a, self.A), _own(for_b, self.B)

    def _whole(self) -> FactorPair:
        a, b = (nn.Parameter(full(one), requires_grad=False) for one in self.both)
        return FactorPair(self.name, self.layer, a, b)


def pairs_of_now(model: nn.Module) -> list[FactorPair]:
    """The pairs of a model, sharded or not; their parameters are those that optimizers hold. Units are resharded."""
    reshard_(model)
    found = factor_pairs(model)
    return [
        ShardedPair(*(getattr(pair, one.name) for one in fields(pair)))
        if any(isinstance(one, DTensor) for one in pair.both)
        else pair
        for pair in found
    ]


def _own(whole: Tensor, factor: Tensor) -> Tensor:
    return share_of(whole, factor) if isinstance(factor, DTensor) else whole
