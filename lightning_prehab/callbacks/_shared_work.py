"""Spectral work on several processes: each one works on its own layers, one in ``world_size``."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed

from lightning_prehab.callbacks._distributed import together
from lightning_prehab.callbacks._owners import owners_of
from lightning_prehab.callbacks._regularized import RegularizedLayer, matrices, restore_layers
from lightning_prehab.callbacks._sharded_acts import shrink_sharded_
from lightning_prehab.callbacks._sharded_layers import ShardedLayer
from lightning_prehab.callbacks._sharded_memories import restore_shards, states_of_shards
from lightning_prehab.regularizers import Memory, Penalty, Shrinkage
from lightning_prehab.sharded.engine import check_engine, is_sharded, reshard_
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import in_all_forms

#: Of each tensor of a memory the shape, the dtype, and whether it lives on the CPU whatever the device.
Description = dict[str, tuple[torch.Size, torch.dtype, bool]]


def own_part(layers: Sequence[RegularizedLayer], global_rank: int, world_size: int) -> Sequence[RegularizedLayer]:
    """What one process works on, so that all have about the same to do."""
    if world_size == 1:
        return layers
    owners = _owners(layers, world_size)
    return [layer for layer in layers if owners[layer.name] == global_rank]


def _owners(layers: Sequence[RegularizedLayer], world_size: int) -> dict[str, int]:
    return owners_of({layer.name: layer.view for layer in layers}, world_size)


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
    read: dict[int, float] = {}  # a rate that is a tensor on a device is read once for all layers of its group
    stepped: dict[str, float] = {}
    for layer in layers:
        rate = rates.get(id(layer.parameter))
        if rate is not None and layer.parameter.requires_grad:
            if id(rate) not in read:
                read[id(rate)] = float(rate)
            stepped[layer.name] = read[id(rate)]
    shards = [layer for layer in layers if isinstance(layer, ShardedLayer)]
    if shards:
        shrink_sharded_(trainer, shards, shrinkage, progress, stepped)
        return
    prepare_together(trainer, layers, shrinkage, progress)
    for layer in layers:
        if layer.name in stepped:
            layer.shrink_(shrinkage, progress, stepped[layer.name])


def reshard_if_sharded_(pl_module: "pl.LightningModule") -> bool:
    """Whether a module is sharded; its sharded parameters then hang in it, and nothing is known against working on it.

    Raises:
        UnsupportedError: If something is.
    """
    sharded = is_sharded(pl_module)
    if sharded:
        check_engine(pl_module)
        reshard_(pl_module)
    return sharded


def states_of(
    layers: Sequence[RegularizedLayer], owned: bool, global_rank: int, world_size: int
) -> dict[str, dict[str, Any]]:
    """The states of all layers, for a checkpoint; every process has to call this.

    Args:
        layers: All of them.
        owned: What a regularizer remembers of a layer is known to its owner alone.
        global_rank: The number of this process.
        world_size: How many there are.
    """
    shards = [layer for layer in layers if isinstance(layer, ShardedLayer)]
    if shards:
        return states_of_shards(shards)
    if owned:
        complete_memories_(layers, global_rank, world_size)
    return {layer.name: layer.state_dict() for layer in layers}


def restored(
    pl_module: "pl.LightningModule",
    targets: Targets,
    states: Mapping[str, Mapping[str, Any]],
    regularizer: Penalty | Shrinkage,
) -> list[RegularizedLayer]:
    """The layers that :func:`states_of` has described.

    Raises:
        CheckpointError: If one of them is not a target now.
    """
    views = matrices(in_all_forms(targets))
    return restore_shards(views, states, regularizer) if is_sharded(pl_module) else restore_layers(views, states)


def complete_memories_(layers: Sequence[RegularizedLayer], global_rank: int, world_size: int) -> None:
    """Gives each process the memories of the layers that others work on, for a checkpoint; every process calls this."""
    if world_size == 1:
        return
    _hand_out_(layers, layers, global_rank, world_size)


def _hand_out_(
    wanted: Sequence[RegularizedLayer], layers: Sequence[RegularizedLayer], global_rank: int, world_size: int
) -> None:
    """Replaces the memories of the wanted layers by those of their owners, by one broadcast for each tensor."""
    owners = _owners(layers, world_size)
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
