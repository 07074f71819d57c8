"""How tensors are divided among processes: what each of them holds, all of it, and the way of all of it to one."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lightning_prehab.sharded.agreement import Agree, alone


def dtensor_like(local: Tensor, like: DTensor) -> DTensor:
    """A ``DTensor`` of the shape, mesh and placements of another one, around what this process holds of it."""
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def row_dimension(tensor: Tensor) -> int | None:
    """The dimension of the mesh over which slices along the first dimension are divided, and nothing else is.

    None if it is not so.
    """
    if not isinstance(tensor, DTensor) or tensor.dim() == 0:
        return None
    dimension = _one_dimension(tensor)
    return None if dimension is None or cast(Shard, tensor.placements[dimension]).dim != 0 else dimension


def share_in(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """What this process would hold of a tensor that all have, if it were divided like this: a view; nothing is sent."""
    part, coordinate = whole.detach(), mesh.get_coordinate()
    assert coordinate is not None
    strided = {index for index, placement in enumerate(placements) if type(placement).__name__ == "_StridedShard"}
    for index in sorted(range(mesh.ndim), key=lambda one: one in strided):  # these divide what the others have divided
        placement: Any = placements[index]
        if not placement.is_replicate():
            size, length = -(-part.shape[placement.dim] // mesh.size(index)), part.shape[placement.dim]
            start = min(coordinate[index] * size, length)
            part = part.narrow(placement.dim, start, min(size, length - start))
    return part


def share_of(whole: Tensor, like: DTensor, device: torch.device | None = None) -> Tensor:
    """What this process would hold of a tensor that all have, if it were divided like another one: a copy.

    Args:
        whole: Of the shape of the other one.
        like: The other one.
        device: Of the copy; None means where the other one lies.
    """
    part = share_in(whole, like.device_mesh, like.placements)
    device = like.to_local().device if device is None else device
    return part.to(device, copy=True, memory_format=torch.contiguous_format)


def divided(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A ``DTensor`` of which every process takes its own part out of a whole tensor that all have; nothing is sent."""
    local = share_in(whole, mesh, placements).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, plain and detached; it may share memory with it.

    Collective for a ``DTensor``: all processes that hold a part have to call it. Parts that are kept on the CPU come
    onto the device of the mesh first.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    sent = _where_it_is_sent(tensor)
    dimension = _one_dimension(sent)
    if dimension is None:
        whole: Tensor = sent.full_tensor()
        return whole
    room: Tensor = sent.to_local().new_empty(sent.shape)
    _assemble_(room, sent, dimension)
    return room


@torch.no_grad()
def whole_on(tensor: Tensor, owner: int, agree: Agree = alone) -> Tensor | None:
    """The whole of a tensor on one process, detached; None on the others. Collective.

    The others need room for a part at most, but where a tensor is divided over several dimensions of a mesh: there they
    have the whole of it for a moment.

    Args:
        tensor: A ``DTensor``; of another one nothing is sent.
        owner: Global rank. Where it is among other copies of all parts, this process has nothing to do.
        agree: Asked before anything is sent.
    """
    here = distributed.get_rank() == owner
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor if here else None
    dimension = _one_dimension(tensor)
    if dimension is None:
        agree(lambda: None)
        whole = full(tensor)
        return whole if here else None
    group = tensor.device_mesh.get_group(dimension)
    ranks = distributed.get_process_group_ranks(group)
    if row_dimension(tensor) is None:
        sent: DTensor = agree(lambda: _where_it_is_sent(tensor))
        room: Tensor | None = agree(lambda: sent.to_local().new_empty(sent.shape) if here else None)
        if owner in ranks:
            _assemble_(room, sent, dimension)
        return room
    most = -(-tensor.shape[0] // len(ranks))  # slices of a process; the last ones may have fewer
    part: Tensor = agree(lambda: _even_part(tensor, most))
    room = agree(lambda: part.new_empty(len(ranks) * most, *part.shape[1:]) if here else None)
    if owner in ranks:
        distributed.gather(part, None if room is None else list(torch.split(room, most)), dst=owner, group=group)
    return None if room is None else room[: tensor.shape[0]]


def _where_it_is_sent(tensor: DTensor) -> DTensor:
    """With its parts on the device of the mesh."""
    local, mesh = tensor.to_local(), tensor.device_mesh
    if local.device.type == mesh.device_type:
        return tensor
    return dtensor_like(local.to(mesh.device_type), tensor)


def _one_dimension(tensor: DTensor) -> int | None:
    """The dimension of the mesh over which a tensor is divided, if that is one and it is divided in shards."""
    divided = [index for index, placement in enumerate(tensor.placements) if type(placement) is not Replicate]
    if len(divided) != 1 or type(tensor.placements[divided[0]]) is not Shard:
        return None
    return divided[0]


@torch.no_grad()
def _assemble_(whole: Tensor | None, tensor: DTensor, dimension: int) -> None:
    """Fills the whole, where there is room for it, part by part: no more than one part is there twice meanwhile."""
    group, dim = tensor.device_mesh.get_group(dimension), cast(Shard, tensor.placements[dimension]).dim
    ranks, own, length = distributed.get_process_group_ranks(group), tensor.to_local(), tensor.shape[dim]
    size = -(-length // len(ranks))
    for place, rank in enumerate(ranks):
        start, stop = min(place * size, length), min((place + 1) * size, length)
        if start < stop:
            room = None if whole is None else whole.narrow(dim, start, stop - start)
            shape = (*tensor.shape[:dim], stop - start, *tensor.shape[dim + 1 :])
            _send_part_(room, shape, own, rank, group)


def _send_part_(
    room: Tensor | None, shape: Sequence[int], own: Tensor, source: int, group: distributed.ProcessGroup
) -> None:
    """Sends what one process holds to all, who keep it where there is room."""
    sent = own.new_empty(shape) if room is None or not room.is_contiguous() else room
    if source == distributed.get_rank():
        sent.copy_(own)
    distributed.broadcast(sent, src=source, group=group)
    if room is not None and sent is not room:
        room.copy_(sent)


def _even_part(tensor: DTensor, slices: int) -> Tensor:
    """What this process holds, with as many slices as every other one sends."""
    part = tensor.to_local().to(tensor.device_mesh.device_type)
    if len(part) == slices and part.is_contiguous():
        return part
    return torch.cat([part, part.new_zeros(slices - len(part), *part.shape[1:])])
