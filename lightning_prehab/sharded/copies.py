"""Copies of sharded modules, which ``copy.deepcopy`` refuses: sharded alike, and nothing is gathered for them.

The modules are copied around parameters that take no memory, FSDP2 shards these as it has sharded the originals, and
then each process puts its own parts of the weights in.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.kinds.base import plain_type
from lightning_prehab.linalg.sharding import local_part
from lightning_prehab.sharded.engine import managed_by, parallel_plan, reshard_, unit_layouts
from lightning_prehab.sharded.shares import divided, dtensor_like
from lightning_prehab.surgery.hooks import without_hooks
from lightning_prehab.targets.names import join

#: What a copy refers to as its original does: they stand for processes.
_OF_PROCESSES = (DeviceMesh, distributed.ProcessGroup)
#: What ``fully_shard`` notes in the modules themselves.
_NOTES = "__composable_api_state_key"


class Place(NamedTuple):
    """Where a parameter hangs.

    Attributes:
        name: Dotted name of the parameter, one of several if it is tied.
        module: The module that holds it.
        key: Its name there.
        parameter: It.
    """

    name: str
    module: nn.Module
    key: str
    parameter: nn.Parameter


def copy_of_sharded(model: nn.Module, dtypes: Mapping[int, torch.dtype] | None = None) -> nn.Module:
    """A copy of a module that FSDP2 has sharded, in whole or in part: it answers the same, bit by bit.

    It shares no memory with the model and has none of its hooks; what is tied is tied in it, too. Nothing is sent. All
    processes have to make it, since all take part in its forward pass.

    Args:
        model: The model, whose units are resharded.
        dtypes: Of parameters that are to be kept in another one, by their id.

    Raises:
        UnsupportedError: If it cannot be copied (the reason is given).
    """
    made, dtypes = skeleton_of(model), dtypes or {}
    tensors: dict[str, DTensor] = {}
    for place in places_of(model):
        if isinstance(place.parameter, DTensor):
            dtype = dtypes.get(id(place.parameter), place.parameter.dtype)
            tensors[place.name] = dtensor_like(local_part(place.parameter).to(dtype, copy=True), place.parameter)
    fill_(made, tensors)
    return made


def skeleton_of(model: nn.Module) -> nn.Module:
    """The modules of such a copy, sharded alike, around parameters without memory; the others, and buffers, are copied.

    Args:
        model: The model, whose units are resharded.

    Raises:
        UnsupportedError: If it cannot be copied.
    """
    reshard_(model)
    managed = managed_by(model)
    memo = without_hooks(model)
    for place in places_of(model):
        parameter = place.parameter
        if not isinstance(parameter, DTensor):
            continue
        blank = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        plan = parallel_plan(parameter, managed.get(id(parameter)))
        blank = blank if plan is None else divided(blank, *plan)
        memo[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
    for module in model.modules():
        memo |= {id(one): one for one in vars(module).values() if isinstance(one, _OF_PROCESSES)}
        if isinstance(module, FSDPModule):
            memo[id(module)] = object.__new__(plain_type(module))
    try:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                state: dict[str, Any] = module.__reduce_ex__(4)[2]  # type: ignore[assignment]
                own = {key: value for key, value in state.items() if not key.startswith(_NOTES)}
                memo[id(module)].__setstate__(copy.deepcopy(own, memo))
        made: nn.Module = copy.deepcopy(model, memo) if id(model) not in memo else memo[id(model)]
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error})."
        ) from error
    _shard_alike_(made, model)
    return made


def fill_(made: nn.Module, tensors: Mapping[str, DTensor]) -> None:
    """Puts tensors in the places of the sharded parameters of a copy.

    Args:
        made: From :func:`skeleton_of`; nothing has gone through it yet.
        tensors: By the names of :func:`places_of`: of the same shapes and placements, in any dtype; not copied.
    """
    put: dict[int, nn.Parameter] = {}  # what is tied stays so
    for place in places_of(made):
        if isinstance(place.parameter, DTensor):
            new = put.get(id(place.parameter))
            if new is None:
                new = nn.Parameter(tensors[place.name], requires_grad=place.parameter.requires_grad)
                put[id(place.parameter)] = new
            setattr(place.module, place.key, new)


def places_of(model: nn.Module) -> list[Place]:
    """Where all parameters hang, the tied ones several times; by the modules themselves, whatever they call them."""
    return list(_places(model))


def _places(model: nn.Module) -> Iterator[Place]:
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(join(name, key), module, key, parameter)


def _shard_alike_(made: nn.Module, model: nn.Module) -> None:
    """Calls ``fully_shard`` on the modules of a copy as it was called on those of the model."""
    twins, managed = dict(zip(model.modules(), made.modules(), strict=True)), managed_by(model)
    dimensions, ignored = {}, set()
    for place in places_of(model):
        twin = twins[place.module]._parameters[place.key]
        if id(place.parameter) in managed:
            placements: Any = place.parameter.placements  # type: ignore[attr-defined]
            plan = parallel_plan(place.parameter, managed[id(place.parameter)])
            own = len(placements) - (0 if plan is None else plan[0].ndim)
            dimensions[id(twin)] = Shard(placements[own - 1].dim)
        elif twin is not None:
            ignored.add(twin)
    extra: dict[str, Any] = {"ignored_params": ignored} if ignored else {}
    for modules, settings in unit_layouts(model):
        unit = [twins[module] for module in modules]
        fully_shard(
            unit if len(unit) > 1 else unit[0],
            shard_placement_fn=lambda parameter: dimensions[id(parameter)],
            **settings,
            **extra,
        )
