"""The rows that a refinement trains on, step by step, and those that it measures on."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.errors import ArgumentError
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.statistics.batches import batch_size, check_batches, tensors
from lightning_prehab.statistics.held_back import hold_back, rows_of
from lightning_prehab.statistics.running import copied

#: Tokens of text that a step takes, unless the settings say something else.
TOKENS = 2048
#: So many steps' rows are measured on, at most.
MOST_HELD_BACK = 4


class Sequences:
    """Batches, parted in what steps take at a time.

    Args:
        batches: As they are given; no more of them are read than the steps need.
        refinement: The settings.

    Attributes:
        training: What one step takes, in order.
        held_back: What is measured on, in parts of the same size.

    Raises:
        ArgumentError: If there is too little to hold something back.
    """

    def __init__(self, batches: Iterable[Any] | None, refinement: Refinement) -> None:
        check_batches(batches)
        if batches is None:
            raise ArgumentError("A refinement needs batches to train on; give some hundred rows of text or inputs.")
        steps = refinement.steps_in("model")
        found: list[Any] = []
        parts = 0
        for batch in batches:
            found.append(batch if isinstance(batches, list | tuple) else copied(batch))  # a generator may refill one
            parts += len(_parts(batch, refinement.rows))
            if (1.0 - refinement.held_back) * parts > steps and parts > steps + MOST_HELD_BACK:
                break
        if not found:
            raise ArgumentError(
                "batches is empty; a refinement needs at least two. A generator can be gone through once only: make a "
                "new one, or give a list."
            )
        share = min(refinement.held_back, MOST_HELD_BACK / parts)
        training, held_back = hold_back(found, share, " (a refinement measures on a part of them)")
        self.training = [part for batch in training for part in _parts(batch, refinement.rows)]
        self.held_back = [part for batch in held_back for part in _parts(batch, refinement.rows)]
        self._generator = torch.Generator().manual_seed(refinement.seed)

    @property
    def data(self) -> str:
        """What is measured on, in words."""
        rows = sum(batch_size(batch) for batch in self.held_back)
        return f"{rows:,} held-back row{'' if rows == 1 else 's'}"

    def order(self, steps: int) -> Iterator[int]:
        """The numbers of what the steps take: all of it in some order, then all in another one."""
        left: list[int] = []
        for _ in range(steps):
            left = left or torch.randperm(len(self.training), generator=self._generator).tolist()
            yield left.pop()


def first_row(batch: Any) -> Any:
    """The first row of a batch alone, where rows can be told apart; else all of it."""
    chosen = torch.zeros(batch_size(batch), dtype=torch.bool)
    chosen[:1] = True
    alone = rows_of(batch, chosen)
    return batch if alone is None else alone


def _parts(batch: Any, rows: int | None) -> list[Any]:
    """The batch in parts of so many rows, where rows can be told apart."""
    total = batch_size(batch)
    if rows is None:
        positions = next((one.shape[1] for one in tensors(batch) if _are_tokens(one)), None)
        rows = total if positions is None else max(round(TOKENS / max(positions, 1)), 1)
    if rows >= total:
        return [batch]
    pieces = []
    for start in range(0, total, rows):
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[start : start + rows] = True
        pieces.append(rows_of(batch, chosen))
    return [batch] if any(piece is None for piece in pieces) else pieces


def _are_tokens(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int32, torch.int64) and tensor.dim() == 2
