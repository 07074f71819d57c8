"""Whole weights on one process each, so that several processes can work on several layers at the same time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_prehab.kinds import MatrixView
from lightning_prehab.sharded.gathered import copies_of, full, rebound

#: ``agree(work)``: what ``work`` returns on this process; an error on one process is raised on every one.
Agree = Callable[[Callable[[], Any]], Any]


def gathered_on(view: MatrixView, owner: int, agree: Agree) -> MatrixView | None:
    """A stand-in that holds the whole weight, on the process that is going to work on it; None on the others.

    Collective. Where each process has rows of the weight, the others send theirs and need no room; in other placements
    they have the whole weight for a moment.

    Args:
        view: Of a sharded layer; the model has to be resharded.
        owner: Global rank.
        agree: Asked before anything is sent.
    """
    here = distributed.get_rank() == owner
    instead: dict[int, nn.Parameter] = {}
    for parameter in view.parameters:
        whole = whole_on(parameter, owner, agree)
        if here and whole is not None:
            instead[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        del whole
    return rebound(view, copies_of(view.module, instead)) if here else None


@torch.no_grad()
def whole_on(tensor: Tensor, owner: int, agree: Agree) -> Tensor | None:
    """The whole of a tensor on one process, detached; None on the others. Collective."""
    here = distributed.get_rank() == owner
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor if here else None
    mesh, dimension = tensor.device_mesh, _rows(tensor)
    if dimension is None:
        agree(lambda: None)
        whole = full(tensor)
        return whole if here else None
    group = mesh.get_group(dimension)
    ranks = distributed.get_process_group_ranks(group)
    most = -(-tensor.shape[0] // len(ranks))  # rows of a process; the last ones may have fewer

    part: Tensor = agree(lambda: _even_part(tensor, most))
    room: Tensor | None = agree(lambda: part.new_empty(len(ranks) * most, *part.shape[1:]) if here else None)
    if owner in ranks:
        distributed.gather(part, None if room is None else list(torch.split(room, most)), dst=owner, group=group)
    return None if room is None else room[: tensor.shape[0]]


def _even_part(tensor: DTensor, rows: int) -> Tensor:
    """What this process holds, with as many rows as every other one sends."""
    part = tensor.to_local().to(tensor.device_mesh.device_type)
    if len(part) == rows and part.is_contiguous():
        return part
    return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])


def _rows(tensor: DTensor) -> int | None:
    """The dimension of the mesh along which processes have rows of a tensor, if that is all there is to it."""
    cuts = [index for index, placement in enumerate(tensor.placements) if type(placement) is not Replicate]
    if len(cuts) != 1 or tensor.dim() == 0:
        return None
    placement = tensor.placements[cuts[0]]
    return cuts[0] if type(placement) is Shard and placement.dim == 0 else None
