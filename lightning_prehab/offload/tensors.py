"""Tensors in files, in the format of safetensors, read and written one at a time.

Files are read into memory of their own rather than mapped: pages of a mapped file count as memory of the process until
somebody else needs them, and nobody could say beforehand how much that will be.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prehab.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
#: Longest header that is believed.
_LONGEST = 100 * 2**20
#: Bytes that are compared at a time.
PIECE = 2**24


class Entry(NamedTuple):
    """One tensor in a file.

    Attributes:
        path: The file.
        shape: Of the tensor.
        dtype: Of the tensor.
        start: Where its bytes begin.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: If the file ends before it does.
        """
        found = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            read_into(file, found, self.path)
        return found


def same(one: Entry, other: Entry) -> bool:
    """Whether two entries hold the same, byte by byte; a piece of each is in memory."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for begin in range(0, one.nbytes, PIECE):
            size = min(PIECE, one.nbytes - begin)
            if first.read(size) != second.read(size):
                return False
    return True


def read_into(file: Any, tensor: Tensor, path: Path) -> None:
    """Fills a contiguous tensor with the next bytes of a file."""
    if not tensor.numel():
        return
    view = memoryview(_bytes_of(tensor))
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{path} ends too early; copy it again.")
        view = view[count:]


def entries_in(path: Path) -> dict[str, Entry]:
    """What a file of safetensors holds.

    Raises:
        CheckpointError: If it is none, or holds what torch has no type for.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length < _LONGEST:
                raise ValueError("its header is no header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: Entry(path, tuple(one["shape"]), _DTYPES[one["dtype"]], 8 + length + one["data_offsets"][0])
            for name, one in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({type(error).__name__}: {error}).") from error


class Written(NamedTuple):
    """A tensor to be written, whose values are asked for when its turn comes.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        values: Gives it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Any

    @classmethod
    def of(cls, tensor: Tensor) -> "Written":
        """A tensor that is in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def raw(self) -> Any:
        """Its bytes."""
        tensor = self.values()
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype)
        return _bytes_of(tensor)


def write_tensors(path: Path, tensors: Mapping[str, Written]) -> str:
    """Writes a file of safetensors, one tensor after the other, to the disk.

    Returns:
        The SHA-256 of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # aligned, as safetensors wants it
    for name in order:
        shape, dtype, _ = tensors[name]
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def pieces() -> Iterable[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield tensors[name].raw()

    with path.open("wb") as file:
        for piece in pieces():
            digest.update(piece)
            file.write(piece)
        to_disk(file)
    return digest.hexdigest()


def to_disk(file: Any) -> None:
    """Does not return before everything that was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
