"""Spectral work on several processes: each one works on its own layers, one in ``world_size``."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed

from lightning_prehab.callbacks._distributed import together
from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.regularizers import Memory, Shrinkage

T = TypeVar("T")
#: Of each tensor of a memory the shape, the dtype, and whether it lives on the CPU whatever the device.
Description = dict[str, tuple[torch.Size, torch.dtype, bool]]


def own_part(items: Sequence[T], global_rank: int, world_size: int) -> Sequence[T]:
    """What one process works on."""
    return items[global_rank::world_size]


def prepare_together(
    trainer: "pl.Trainer", layers: Sequence[RegularizedLayer], shrinkage: Shrinkage, progress: float
) -> None:
    """Does what a shrinkage has to do before the next call, each layer on one process; all have the results then.

    They are the owner's bit by bit, so the weights of all processes stay equal whatever their hardware rounds to.
    """
    world_size = trainer.world_size
    due = [layer for layer in layers if layer.has_work(shrinkage, progress)]
    if world_size == 1 or not due:
        return

    def prepare() -> None:
        for layer in own_part(layers, trainer.global_rank, world_size):
            if layer in due:
                layer.prepare_(shrinkage, progress)

    together(trainer, prepare)
    _hand_out_(due, layers, trainer.global_rank, world_size)


def shrink_together_(
    trainer: "pl.Trainer",
    layers: Sequence[RegularizedLayer],
    shrinkage: Shrinkage,
    progress: float,
    rates: Mapping[int, float | Tensor],
) -> None:
    """Shrinks the trainable ones of those weights that an optimizer has stepped, at the rates of their last steps."""
    prepare_together(trainer, layers, shrinkage, progress)
    read: dict[int, float] = {}  # a rate that is a tensor on a device is read once for all layers of its group
    for layer in layers:
        rate = rates.get(id(layer.parameter))
        if rate is not None and layer.parameter.requires_grad:
            if id(rate) not in read:
                read[id(rate)] = float(rate)
            layer.shrink_(shrinkage, progress, read[id(rate)])


def complete_memories_(layers: Sequence[RegularizedLayer], global_rank: int, world_size: int) -> None:
    """Gives each process the memories of the layers that others work on, for a checkpoint; every process calls this."""
    if world_size == 1:
        return
    _hand_out_(layers, layers, global_rank, world_size)


def _hand_out_(
    wanted: Sequence[RegularizedLayer], layers: Sequence[RegularizedLayer], global_rank: int, world_size: int
) -> None:
    """Replaces the memories of the wanted layers by those of their owners, by one broadcast for each tensor."""
    owners = {layer.name: index % world_size for index, layer in enumerate(layers)}
    own = {layer.name: _describe(layer.memory) for layer in wanted if owners[layer.name] == global_rank}
    parts: list[dict[str, Description]] = [{}] * world_size
    distributed.all_gather_object(parts, own)
    described = {name: description for part in parts for name, description in part.items()}
    for layer in wanted:
        for key, (shape, dtype, on_cpu) in described[layer.name].items():
            source = owners[layer.name]
            tensor = layer.memory[key] if source == global_rank else torch.empty(shape, dtype=dtype)
            tensor = tensor.to(layer.parameter.device).contiguous()
            distributed.broadcast(tensor, src=source)
            layer.memory[key] = tensor.cpu() if on_cpu else tensor


def _describe(memory: Memory) -> Description:
    return {key: (tensor.shape, tensor.dtype, tensor.is_cpu) for key, tensor in memory.items()}
