"""What a checkpoint of a Trainer holds, told without its weights: names and shapes, of one file or of a folder.

A run with ``ModelParallelStrategy`` writes a folder: ``.metadata`` (of torch: which tensors, and where their pieces
are), a file of pieces for each process, and ``meta.pt`` (of Lightning: all the rest), in this order.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lightning_prehab.errors import CheckpointError

_INDEX, _REST = ".metadata", "meta.pt"
_WEIGHTS = "state_dict."
_ADVICE = (
    "A run that was killed while it wrote leaves such a folder, and so does a copy that was cut short. Take an earlier "
    "checkpoint of the run."
)
#: Buffers of low-rank layers that hold places, not numbers.
_PLACES = ("order", "indices")


def is_distributed(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder with pieces of a checkpoint, complete or not."""
    folder = Path(path)
    return folder.is_dir() and any(
        file.name in (_INDEX, _REST) or file.suffix == ".distcp" for file in folder.iterdir()
    )


def stored_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Stand-ins for the weights that a checkpoint holds: their names, shapes and dtypes, and one zero for all numbers.

    Args:
        path: A folder of pieces, or a file, of which nothing but plain data is read.

    Raises:
        CheckpointError: If it cannot be read (it is named).
    """
    if Path(path).is_dir():
        described = {
            key.removeprefix(_WEIGHTS): (one.size, one.properties.dtype)
            for key, one in _index(path).state_dict_metadata.items()
            if key.startswith(_WEIGHTS) and hasattr(one, "size")
        }
    else:
        described = {key: (one.shape, one.dtype) for key, one in _weights_of_file(path).items()}
    return {key: _stand_in(key, *one) for key, one in described.items()}


def check_complete(path: str | os.PathLike[str]) -> None:
    """Raises :class:`CheckpointError` for a folder that lacks a part, or holds one that is cut short."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if not is_distributed(folder):
        raise CheckpointError(f"{str(path)!r} is a folder, and no checkpoint: there is no {_INDEX} in it.")
    needed: dict[str, int] = {}
    for one in _index(folder).storage_data.values():
        needed[one.relative_path] = max(needed.get(one.relative_path, 0), one.offset + one.length)
    for name, size in needed.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found is None or found < size:
            state = "is missing" if found is None else f"has {found:,} bytes, of {size:,} at least"
            raise CheckpointError(f"{str(path)!r} is no complete checkpoint: {name} {state}. {_ADVICE}")
    if not zipfile.is_zipfile(folder / _REST):
        state = "is cut short" if (folder / _REST).is_file() else "is missing"
        raise CheckpointError(f"{str(path)!r} is no complete checkpoint: {_REST} {state}. {_ADVICE}")


def first_failure(error: CheckpointException) -> BaseException:
    """What is behind the error of a load on many processes: that of the first one that failed."""
    return error.failures[min(error.failures)][0] if error.failures else error


def _index(folder: str | os.PathLike[str]) -> Any:
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # whatever a damaged file leads to
        state = f"cannot be read ({type(error).__name__})" if (Path(folder) / _INDEX).exists() else "is missing"
        raise CheckpointError(f"{str(folder)!r} is no complete checkpoint: {_INDEX} {state}. {_ADVICE}") from error


def _weights_of_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        checkpoint = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # likewise
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        raise CheckpointError(f"{str(path)!r} cannot be read as a checkpoint ({reason}).") from error
    found = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{str(path)!r} was not written by a Trainer of Lightning: it has no 'state_dict'.")
    return {key: one for key, one in found.items() if isinstance(one, Tensor)}


def _stand_in(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if key.rpartition(".")[2] in _PLACES and not dtype.is_floating_point and len(shape) == 1:
        return torch.arange(shape[0], dtype=dtype)
    return torch.zeros((), dtype=dtype).expand(shape)
