"""Spectral work on several processes: each one works on its own layers, one in ``world_size``."""

from collections.abc import Sequence
from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import distributed

from lightning_prehab.callbacks._distributed import merge, raise_together
from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.regularizers import Memory, Shrinkage

T = TypeVar("T")


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
    waiting = [layer.has_work(shrinkage, progress) for layer in layers]
    if world_size == 1 or not any(waiting):
        return
    error = None
    own = [
        layer
        for layer, due in own_part(list(zip(layers, waiting, strict=True)), trainer.global_rank, world_size)
        if due
    ]
    try:
        for layer in own:
            layer.prepare_(shrinkage, progress)
    except Exception as caught:
        error = caught
    raise_together(trainer, error)
    described = merge(trainer, {layer.name: _describe(layer.memory) for layer in own})
    for index, layer in enumerate(layers):
        for key, (shape, dtype, on_cpu) in described.get(layer.name, {}).items():
            source = index % world_size
            tensor = layer.memory[key] if source == trainer.global_rank else torch.empty(shape, dtype=dtype)
            tensor = tensor.to(trainer.strategy.root_device).contiguous()
            distributed.broadcast(tensor, src=source)
            layer.memory[key] = tensor.cpu() if on_cpu else tensor


def complete_memories_(layers: Sequence[RegularizedLayer], global_rank: int, world_size: int) -> None:
    """Gives each process the memories of the layers that others work on, for a checkpoint; every process calls this."""
    if world_size == 1:
        return
    own = {layer.name: _on_cpu(layer.memory) for layer in own_part(layers, global_rank, world_size)}
    parts: list[dict[str, Memory]] = [{}] * world_size
    distributed.all_gather_object(parts, own)
    found = {name: memory for part in parts for name, memory in part.items()}
    for layer in layers:
        if layer.name not in own:
            layer.memory.update(found[layer.name])


def _describe(memory: Memory) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
    return {key: (tensor.shape, tensor.dtype, tensor.is_cpu) for key, tensor in memory.items()}


def _on_cpu(memory: Memory) -> Memory:
    return {key: tensor.cpu() for key, tensor in memory.items()}
