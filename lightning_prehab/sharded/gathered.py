"""Stand-ins: a shallow copy of a layer that holds another tensor as its weight, for code that reads ``view.weight``.

A sharded layer is served by the same code as any other, one at a time. A *gathered* stand-in holds the whole weight. A
*pinned* one holds the sharded parameter for good: what hangs in the layer itself is the sharded one at one time and a
whole, plain one at another, between its forward and its backward pass and after an evaluation.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from lightning_prehab.kinds import MatrixView
from lightning_prehab.kinds.base import plain_type
from lightning_prehab.surgery.hooks import HOOKS


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, plain and detached; it may share memory with it.

    Collective for a ``DTensor``: all processes that hold a part have to call it. Parts that are kept on the CPU come
    onto the device of the mesh first.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    local, mesh = tensor.to_local(), tensor.device_mesh
    if local.device.type != mesh.device_type:
        tensor = dtensor_like(local.to(mesh.device_type), tensor)
    whole: Tensor = tensor.full_tensor()
    return whole


def dtensor_like(local: Tensor, like: DTensor) -> DTensor:
    """A ``DTensor`` of the shape, mesh and placements of another one, around what this process holds of it."""
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def share_of(whole: Tensor, like: DTensor) -> Tensor:
    """What this process holds of a whole tensor that is divided like another one: a copy, where that one has its own.

    Nothing is sent.
    """
    part = _part_of(whole, like.device_mesh, like.placements)
    return part.to(like.to_local().device, copy=True, memory_format=torch.contiguous_format)


def divided(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A ``DTensor`` of which every process takes its own part out of a whole tensor that all have; nothing is sent."""
    local = _part_of(whole, mesh, placements).clone(memory_format=torch.contiguous_format)
    shape, stride = whole.shape, whole.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _part_of(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """What this process has of it: a view."""
    part, coordinate = whole.detach(), mesh.get_coordinate()
    assert coordinate is not None
    places = enumerate(placements)
    strided = {index for index, placement in places if type(placement).__name__ == "_StridedShard"}
    for index in sorted(range(mesh.ndim), key=lambda one: one in strided):  # these divide what the others have divided
        placement: Any = placements[index]
        if not placement.is_replicate():
            size, length = -(-part.shape[placement.dim] // mesh.size(index)), part.shape[placement.dim]
            start = min(coordinate[index] * size, length)
            part = part.narrow(placement.dim, start, min(size, length - start))
    return part


def stand_in(view: MatrixView, weight: nn.Parameter | Tensor) -> MatrixView:
    """The same matrix of a shallow copy of its layer that holds this weight: the parameter, or a tensor for one.

    Biases, settings and everything else are those of the layer; hooks are not.
    """
    return rebound(view, copies_of(view.module, {id(view.parameter): _as_parameter(weight, view.parameter)}))


def gathered(view: MatrixView) -> MatrixView:
    """A stand-in that holds the whole weight; collective. Keep one of them at a time."""
    whole = {id(one): _as_parameter(full(one), one) for one in view.parameters}
    return rebound(view, copies_of(view.module, whole))


def pinned(view: MatrixView) -> MatrixView:
    """A stand-in that holds the parameter which hangs in the layer now; the model has to be resharded for that.

    See :func:`~lightning_prehab.sharded.engine.reshard_`.
    """
    return rebound(view, copies_of(view.module, {}))


def copies_of(layer: nn.Module, instead: Mapping[int, nn.Parameter]) -> dict[int, nn.Module]:
    """Shallow copies of a layer and of all modules inside, by the id of the original.

    They are of the plain classes, without hooks, and hold the same objects, but for parameters that others stand for.

    Args:
        layer: The layer.
        instead: Parameters, by the id of those in whose place they stand.
    """
    copies: dict[int, nn.Module] = {}
    for module in layer.modules():
        made: nn.Module = object.__new__(plain_type(module))
        theirs = {key: value for key, value in vars(module).items() if key != "forward"}
        made.__dict__.update(theirs)
        made.__dict__.update({key: OrderedDict() for key in HOOKS})
        own = {name: instead.get(id(one), one) for name, one in module._parameters.items()}
        made.__dict__.update(_parameters=own, _buffers=dict(module._buffers), _modules=dict(module._modules))
        copies[id(module)] = made
    for made in copies.values():
        made._modules.update({key: copies.get(id(child), child) for key, child in made._modules.items()})
    return copies


def rebound(view: MatrixView, modules: Mapping[int, nn.Module]) -> MatrixView:
    """A copy of a view that sees other modules: these, by the id of the original."""
    made = copy.copy(view)
    for name, value in vars(view).items():
        if isinstance(value, nn.Module) and id(value) in modules:
            vars(made)[name] = modules[id(value)]
        elif isinstance(value, MatrixView):
            vars(made)[name] = rebound(value, modules)
    return made


def _as_parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    with torch.no_grad():
        return nn.Parameter(tensor, requires_grad=like.requires_grad)
