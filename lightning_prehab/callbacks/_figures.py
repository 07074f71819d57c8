"""Numbers that are told of regularized layers, wherever these lie."""

from collections.abc import Callable, Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_prehab.callbacks._distributed import merge
from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.callbacks._sharded_layers import ShardedLayer, on_owners


def figures(
    trainer: "pl.Trainer",
    layers: Sequence[RegularizedLayer],
    of_layer: Callable[[RegularizedLayer], tuple[Tensor, ...]],
) -> list[tuple[Tensor, ...]]:
    """Some numbers of each layer, as scalars: computed here, or of sharded layers where they are whole for a moment."""
    sharded = [layer for layer in layers if isinstance(layer, ShardedLayer)]
    if not sharded:
        return [of_layer(layer) for layer in layers]
    own: dict[str, list[float]] = {}

    def work(wholes: list[RegularizedLayer], _: Mapping[int, nn.Parameter]) -> dict[str, list[float]]:
        return {one.name: [float(number) for number in of_layer(one)] for one in wholes}

    on_owners(trainer, sharded, work, lambda _, found: own.update(found or {}))
    known = merge(trainer, own)
    return [tuple(torch.tensor(known[layer.name], dtype=torch.float64, device=layer.device)) for layer in layers]


def tails_of(trainer: "pl.Trainer", layers: Sequence[RegularizedLayer]) -> tuple[float | None, float]:
    """The share of energy that the cut would drop now, mean over layers, and the energy itself, summed.

    The share is None if no layer has a target rank. Reads values back from the device, all at once.
    """
    found = figures(trainer, [layer for layer in layers if layer.rank is not None], RegularizedLayer.tail)
    if not found:
        return None, 0.0
    tails, energies = (torch.stack(parts) for parts in zip(*found, strict=True))
    shares, absolute = torch.stack([tails / energies.clamp_min(torch.finfo(energies.dtype).tiny), tails]).tolist()
    return sum(shares) / len(shares), sum(absolute)
