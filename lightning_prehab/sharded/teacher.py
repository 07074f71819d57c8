"""The teacher of a sharded model: a copy that is sharded like it, of which each process keeps its part."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from lightning_prehab.distillation.teacher import Teacher, of_products
from lightning_prehab.errors import CheckpointError
from lightning_prehab.linalg.sharding import local_part
from lightning_prehab.sharded.copies import fill_, places_of
from lightning_prehab.sharded.engine import managed_by, reshard_
from lightning_prehab.sharded.shares import dtensor_like, full, share_of
from lightning_prehab.targets.names import clean_name


class ShardedTeacher(Teacher):
    """A sharded module in eval mode; while it answers, one of its units at a time is whole.

    Args:
        module: The teacher; all processes have to ask it at the same time.
        device: Where it computes.
        half: The dtype of autocast that it computes under; None follows the student.
        by_name: It has the modules of the student, under the same names.
    """

    def __init__(
        self, module: nn.Module, *, device: torch.device, half: torch.dtype | None = None, by_name: bool = True
    ) -> None:
        super().__init__(module, half=half, by_name=by_name)
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where it computes; its parts may be kept on the CPU."""
        return self._device

    @property
    def bytes(self) -> int:
        """What the part of this process takes."""
        return bytes_of_part(self.module, {})

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers, the divided ones as ``DTensor``."""
        reshard_(self.module)
        return slots_of(self.module)

    @contextmanager
    def at_work(self, autocast: torch.dtype | None) -> Iterator[None]:
        """Inside, it answers as in the student's precision; afterwards nothing of it is whole."""
        try:
            with super().at_work(autocast):
                yield
        finally:
            reshard_(self.module)


def kept_dtypes(model: nn.Module, half: torch.dtype | None) -> dict[int, torch.dtype]:
    """The dtypes of the parameters that a teacher keeps in another one, by their id; the model has to be resharded.

    Args:
        model: The model.
        half: What autocast computes in; None without it, or where all is to be kept as it is.
    """
    if half is None:
        return {}
    return {id(one): half for one in of_products(model)}


def cast_anyway(model: nn.Module) -> dict[int, torch.dtype]:
    """Parameters that FSDP2 casts to another dtype before it gathers them (``MixedPrecisionPolicy``), by their id."""
    found = {key: one.group.mp_policy.param_dtype for key, one in managed_by(model).items()}
    return {key: dtype for key, dtype in found.items() if dtype is not None}


def bytes_of_part(model: nn.Module, dtypes: Mapping[int, torch.dtype]) -> int:
    """What the parameters and buffers of a model take on this process.

    Args:
        model: The model, resharded.
        dtypes: As if these parameters were in these.
    """
    size = 0
    for one in (*model.parameters(), *model.buffers()):
        local = one.to_local() if isinstance(one, DTensor) else one
        size += local.numel() * dtypes.get(id(one), one.dtype).itemsize
    return size


def slots_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model by all their names, without what wrappers put into these."""
    named: list[tuple[str, Tensor]] = [(place.name, place.parameter) for place in places_of(model)]
    named += model.named_buffers(remove_duplicate=False)
    return {clean_name(name): tensor.detach() for name, tensor in named}


def gathered_tensors(teacher: ShardedTeacher, keep: bool) -> dict[str, Tensor]:
    """What :meth:`Teacher.tensors` is of a whole one, on the CPU; collective, and one tensor at a time is gathered.

    Args:
        teacher: The teacher.
        keep: On this process; the others only take part.
    """
    found: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}  # what is tied is gathered once
    for place in places_of(teacher.module):
        if id(place.parameter) not in known:
            whole = full(place.parameter)
            known[id(place.parameter)] = whole.cpu() if keep else torch.empty(0)
        found[clean_name(place.name)] = known[id(place.parameter)]
    found |= {
        clean_name(name): one.detach().cpu() for name, one in teacher.module.named_buffers(remove_duplicate=False)
    }
    return found if keep else {}


@torch.no_grad()
def fill_from_whole_(
    blank: nn.Module, tensors: Mapping[str, Tensor], device: torch.device, dtypes: Mapping[int, torch.dtype]
) -> None:
    """Gives a blank copy the parts of whole tensors that are this process's.

    Args:
        blank: From :func:`~lightning_prehab.sharded.copies.skeleton_of`.
        tensors: As of :meth:`Teacher.tensors`, or a state dict.
        device: Where the parts are kept.
        dtypes: Of parameters of the copy that are kept in another one, by their id.

    Raises:
        CheckpointError: If weights are missing, or do not fit (the tensor is named).
    """
    parts: dict[str, DTensor] = {}
    _check(blank, {name: one.shape for name, one in tensors.items()})
    for place in places_of(blank):
        whole, like = tensors[clean_name(place.name)].detach(), place.parameter
        if isinstance(like, DTensor):
            whole = whole.to(like.device_mesh.device_type)
            dtype = dtypes.get(id(like), whole.dtype)
            parts[place.name] = dtensor_like(share_of(whole, like, device).to(dtype), like)
        else:
            like.copy_(whole)
    for name, buffer in blank.named_buffers(remove_duplicate=False):
        if clean_name(name) in tensors:
            buffer.copy_(tensors[clean_name(name)])
    fill_(blank, parts)


def save_parts(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes what :meth:`ShardedTeacher.tensors` returns, each process its part; collective."""
    save(dict(tensors), checkpoint_id=folder)


@torch.no_grad()
def fill_from_parts_(
    blank: nn.Module,
    folder: Path,
    device: torch.device,
    dtypes: Mapping[int, torch.dtype],
    agree: Callable[[Callable[[], Any]], Any],
    prefix: str = "",
) -> None:
    """Gives a blank copy what lies in a folder that any number of processes have written; collective.

    Args:
        blank: From :func:`~lightning_prehab.sharded.copies.skeleton_of`.
        folder: From :func:`save_parts`, or a distributed checkpoint.
        device: Where the parts are kept.
        dtypes: Of parameters of the copy that are kept in another one, by their id.
        agree: Does work, and raises on all processes what one of them has raised.
        prefix: Of the names there.

    Raises:
        CheckpointError: If weights are missing, or do not fit (the tensor is named).
    """
    stored = agree(partial(_stored_in, folder, prefix, blank))
    names = {clean_name(name): name for name in stored}
    wanted: dict[str, Tensor] = {}
    for place in places_of(blank):
        name, like = names[clean_name(place.name)], place.parameter
        wanted[prefix + name] = like.detach()
        if isinstance(like, DTensor):
            local = torch.empty(like.to_local().shape, dtype=stored[name].properties.dtype, device=device)
            wanted[prefix + name] = dtensor_like(local, like)
    for raw, buffer in blank.named_buffers(remove_duplicate=False):
        if clean_name(raw) in names:
            wanted[prefix + names[clean_name(raw)]] = buffer
    load(wanted, checkpoint_id=folder)
    parts: dict[str, DTensor] = {}
    for place in places_of(blank):
        found, like = wanted[prefix + names[clean_name(place.name)]], place.parameter
        if isinstance(found, DTensor):
            parts[place.name] = dtensor_like(local_part(found).to(dtypes.get(id(like), found.dtype)), found)
    fill_(blank, parts)


def _stored_in(folder: Path, prefix: str, blank: nn.Module) -> dict[str, TensorStorageMetadata]:
    try:
        index = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(
            f"The teacher in {str(folder)!r} cannot be read ({type(error).__name__}: {error}); give "
            "RehabDistillation(teacher=), a module or a checkpoint of the dense model."
        ) from error
    stored = {
        key.removeprefix(prefix): one
        for key, one in index.items()
        if key.startswith(prefix) and isinstance(one, TensorStorageMetadata)
    }
    _check(blank, {clean_name(name): one.size for name, one in stored.items()})
    return stored


def _check(blank: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    for place in places_of(blank):
        name = clean_name(place.name)
        if name not in shapes:
            raise CheckpointError(f"The teacher's weights lack {name!r}; they are not those of this model.")
        if shapes[name] != place.parameter.shape:
            raise CheckpointError(
                f"The teacher's {name!r} has shape {tuple(shapes[name])}, that of the model "
                f"{tuple(place.parameter.shape)}."
            )
