"""What regularizers remember of layers in shards: owners know it all, the other processes what they need."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed

from lightning_prehab.callbacks._distributed import merge
from lightning_prehab.callbacks._regularized import RegularizedLayer, restore_layers
from lightning_prehab.callbacks._sharded_layers import Gathering, ShardedLayer, gatherings_of, share_out_
from lightning_prehab.kinds import MatrixView
from lightning_prehab.regularizers import Penalty, Shrinkage

#: What :meth:`RegularizedLayer.tail` remembers, which only owners are asked for.
_FORECAST = "forecast"

#: Of each tensor of a memory the shape, the strides of a copy (products are rounded as memory is laid out), the dtype,
#: and whether it lives on the CPU whatever the device.
_Description = dict[str, tuple[torch.Size, tuple[int, ...], torch.dtype, bool]]


def hand_out_(trainer: "pl.Trainer", gatherings: Sequence[Gathering]) -> None:
    """Gives all processes what those remember who have worked on some layers, but for what nobody else needs."""
    if not gatherings:
        return
    described = merge(trainer, _described(gatherings))
    for one in described.values():
        one.pop(_FORECAST, None)
    for layer, memory in _memories_of_owners(gatherings, described):
        kept = {key: tensor for key, tensor in layer.memory.items() if key == _FORECAST}
        layer.memory.clear()
        layer.memory.update(kept | memory)


def states_of_shards(layers: Sequence[ShardedLayer]) -> dict[str, dict[str, Any]]:
    """The states of all layers, with what their owners alone remember, on the CPU; every process has to call this."""
    states = {layer.name: layer.state_dict() for layer in layers}
    gatherings = list(gatherings_of(layers).values())
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, _described(gatherings))
    described = {name: one for part in parts for name, one in part.items()}
    for layer, memory in _memories_of_owners(gatherings, described):
        states[layer.name]["memory"] = {key: tensor.cpu().clone() for key, tensor in memory.items()}
    return states


def restore_shards(
    views: Mapping[str, MatrixView], states: Mapping[str, Mapping[str, Any]], regularizer: Penalty | Shrinkage
) -> list[RegularizedLayer]:
    """The layers that :func:`states_of_shards` has described; what owners alone remember stays with them.

    Raises:
        CheckpointError: If one of them is not a target now.
    """
    bare = {name: {**state, "memory": {}} for name, state in states.items()}
    layers = restore_layers(views, bare, ShardedLayer)
    shards = [layer for layer in layers if isinstance(layer, ShardedLayer)]
    share_out_(shards)
    for one in gatherings_of(shards).values():
        for layer in one.layers:
            memory = dict(states[layer.name]["memory"])
            if not one.is_here:
                memory.pop(_FORECAST, None)
                if isinstance(regularizer, Penalty) and not learns_of_owners(regularizer):
                    memory = {}
            layer.load_memory(memory)
    return layers


def learns_of_owners(penalty: Penalty) -> bool:
    """Whether all processes have to know what an owner remembers, since the next call may do with rows."""
    return type(penalty).needs_whole is not Penalty.needs_whole


def _described(gatherings: Sequence[Gathering]) -> dict[str, _Description]:
    """What this process remembers of its own layers."""
    return {
        layer.name: {
            key: (tensor.shape, torch.empty_like(tensor, device="meta").stride(), tensor.dtype, tensor.is_cpu)
            for key, tensor in layer.memory.items()
        }
        for one in gatherings
        for layer in one.layers
        if one.is_here
    }


def _memories_of_owners(
    gatherings: Sequence[Gathering], described: Mapping[str, _Description]
) -> Iterator[tuple[ShardedLayer, dict[str, Tensor]]]:
    """Each layer with what its owner remembers of it, sent to all, one layer after the other."""
    for one in gatherings:
        for layer in one.layers:
            memory = {}
            for key, (shape, strides, dtype, on_cpu) in described[layer.name].items():
                tensor = layer.memory[key] if one.is_here else torch.empty(shape, dtype=dtype)
                tensor = one.spreads[0].send(tensor.to(layer.device), one.owner)
                memory[key] = torch.empty_strided(shape, strides, dtype=dtype, device="cpu" if on_cpu else layer.device)
                memory[key].copy_(tensor)
            yield layer, memory
