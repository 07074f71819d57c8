"""Some batches that are kept, to see later what a change of the weights does to their loss."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from lightning_prehab.statistics.batches import tensors

#: How many, at most.
MOST_BATCHES = 16
#: Their bytes, at most; one batch in any case.
KEPT_BYTES = 256 * 2**20


class KeptBatches(list[tuple[Any, int]]):
    """Copies of some batches with their numbers, taken before anybody can change them.

    What cannot be copied is not kept; of batches whose size is not known (objects that are no mapping, tuple, list or
    tensor) one is.
    """

    def keep(self, batch: Any, number: int) -> None:
        """Keeps it, if there is room."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(batch))
        room = len(self) < MOST_BATCHES and size > 0 and (len(self) + 1) * size <= KEPT_BYTES
        if self and not room:
            return
        try:
            self.append((copy.deepcopy(batch), number))
        except Exception:  # a batch may be anything: a non-leaf tensor, a generator
            return

    def passing(self, batches: Iterable[Any]) -> "Passing":
        """The batches, each kept as it comes."""
        return Passing(self, batches)


class Passing:
    """Batches that are kept as they pass; its length is theirs, if they have one."""

    def __init__(self, kept: KeptBatches, batches: Iterable[Any]) -> None:
        self._kept, self._batches = kept, batches

    def __iter__(self) -> Iterator[Any]:
        self._kept.clear()
        for number, batch in enumerate(self._batches):
            self._kept.keep(batch, number)
            yield batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # as it raises, so does this
