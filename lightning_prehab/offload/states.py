"""Tensors between the blocks, on disk: one file for all batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_prehab.errors import NumericalError
from lightning_prehab.offload.tensors import Written, read_into, to_disk
from lightning_prehab.offload.work import Work

T = TypeVar("T")


class Each(Sequence[T]):
    """What a function makes of each of some items, whenever it is asked for: nothing is kept.

    >>> doubled = Each([1, 2, 3], lambda number: 2 * number)
    >>> doubled[0], list(doubled[1:])
    (2, [4, 6])
    """

    def __init__(self, items: Sequence[Any], change: Callable[[Any], T]) -> None:
        self._items, self._change = items, change

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return Each(self._items[key], self._change)
        return self._change(self._items[key])

    def __len__(self) -> int:
        return len(self._items)


class States:
    """One tensor for each batch: in each file they have the same shapes and the same dtype.

    Args:
        work: Where the files lie.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._like: list[Tensor] = []  # without memory
        self._starts = [0]

    def note(self, tensor: Tensor) -> None:
        """How large the tensor of the next batch is, in every file."""
        self._like.append(torch.empty_like(tensor, device="meta"))
        self._starts.append(self._starts[-1] + tensor.numel() * tensor.element_size())

    def is_there(self, name: str) -> bool:
        """Whether a file is."""
        return self._work.path(name).is_file()

    def read(self, name: str, number: int) -> Tensor:
        """The tensor of a batch."""
        path = self._work.path(name)
        found = torch.empty_like(self._like[number], device="cpu")
        with path.open("rb", buffering=0) as file:
            file.seek(self._starts[number])
            read_into(file, found, path)
        return found

    def all(self, name: str) -> Sequence[Tensor]:
        """The tensors of all batches, each read when it is asked for."""
        return Each(range(len(self._like)), lambda number: self.read(name, number))

    @contextmanager
    def writing(self, name: str) -> Iterator["_Writer"]:
        """Inside, a file is written, batch by batch; it is there afterwards."""
        with self._work.writing(name) as path, path.open("wb") as file:
            yield _Writer(file, name)
            to_disk(file)

    def remove(self, name: str) -> None:
        """A file that is not needed any more."""
        self._work.remove(name)


class _Writer:
    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def add(self, tensor: Tensor | None) -> None:
        """The tensor of the next batch.

        Raises:
            NumericalError: If it is not finite.
        """
        assert tensor is not None
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"{self._name}: NaN or Inf between two blocks; check the batches and the weights.")
        self._file.write(Written.of(tensor).raw())
