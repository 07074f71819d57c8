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
    divided = [index for index, placement in enumerate(tensor.placements) if type(placement) is not Replicate]
    if len(divided) != 1:
        return None
    placement = tensor.placements[divided[0]]
    return divided[0] if type(placement) is Shard and placement.dim == 0 else None


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
    divided = [index for index, placement in enumerate(tensor.placements) if type(placement) is not Replicate]
    if len(divided) == 1 and type(tensor.placements[divided[0]]) is Shard:
        return _assembled(tensor, divided[0])
    whole: Tensor = tensor.full_tensor()
    return whole


@torch.no_grad()
def _assembled(tensor: DTensor, dimension: int) -> Tensor:
    """The whole, of parts that are sent one after the other: nothing but one part is there twice meanwhile."""
    group, dim = tensor.device_mesh.get_group(dimension), cast(Shard, tensor.placements[dimension]).dim
    ranks, own = distributed.get_process_group_ranks(group), tensor.to_local()
    whole = own.new_empty(tensor.shape)
    size, length = -(-tensor.shape[dim] // len(ranks)), tensor.shape[dim]
    for place, rank in enumerate(ranks):
        start = min(place * size, length)
        part = whole.narrow(dim, start, min(size, length - start))
        if part.numel() > 0:
            _send_part_(part, own, rank, group)
    return whole


def _send_part_(part: Tensor, own: Tensor, source: int, group: distributed.ProcessGroup) -> None:
    """Fills a part of a whole on all processes with what one of them holds."""
    sent = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
    if source == distributed.get_rank():
        sent.copy_(own)
    distributed.broadcast(sent, src=source, group=group)
    if sent is not part:
        part.copy_(sent)


@torch.no_grad()
def whole_on(tensor: Tensor, owner: int, agree: Agree = alone) -> Tensor | None:
    """The whole of a tensor on one process, detached; None on the others. Collective.

    Where each process has slices along the first dimension, the others send theirs and need no room; in other
    placements they have the whole tensor for a moment.

    Args:
        tensor: A ``DTensor``; of another one nothing is sent.
        owner: Global rank. Processes that hold no slices of the same copy as the owner take no part.
        agree: Asked before anything is sent.
    """
    here = distributed.get_rank() == owner
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor if here else None
    dimension = row_dimension(tensor)
    if dimension is None:
        agree(lambda: None)
        whole = full(tensor)
        return whole if here else None
    group = tensor.device_mesh.get_group(dimension)
    ranks = distributed.get_process_group_ranks(group)
    most = -(-tensor.shape[0] // len(ranks))  # slices of a process; the last ones may have fewer

    part: Tensor = agree(lambda: _even_part(tensor, most))
    room: Tensor | None = agree(lambda: part.new_empty(len(ranks) * most, *part.shape[1:]) if here else None)
    if owner in ranks:
        distributed.gather(part, None if room is None else list(torch.split(room, most)), dst=owner, group=group)
    return None if room is None else room[: tensor.shape[0]]


def _even_part(tensor: DTensor, slices: int) -> Tensor:
    """What this process holds, with as many slices as every other one sends."""
    part = tensor.to_local().to(tensor.device_mesh.device_type)
    if len(part) == slices and part.is_contiguous():
        return part
    return torch.cat([part, part.new_zeros(slices - len(part), *part.shape[1:])])
