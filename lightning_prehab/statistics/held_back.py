"""Holds a part of the calibration data back, to measure on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.errors import ArgumentError
from lightning_prehab.statistics.batches import batch_size

#: Of the calibration data, what is held back to try cuts on.
FEW = 1 / 16


def hold_back_few(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Parts batches as :func:`hold_back` does, with as little held back as is enough to try cuts on.

    One row in 16; of fewer batches or rows than that one of them.

    Raises:
        ArgumentError: If there is nothing to part.

    >>> [len(part) for part in hold_back_few([torch.zeros(8, 3) for _ in range(64)])]
    [60, 4]
    >>> [[len(batch) for batch in part] for part in hold_back_few([torch.zeros(8, 3), torch.zeros(8, 3)])]
    [[7, 7], [1, 1]]
    """
    finest = max([len(batches), *map(batch_size, batches)])
    return hold_back(batches, max(FEW, 1 / max(finest, 2)), " (a policy with trials tries cuts on a part of them)")


def hold_back(
    batches: Sequence[Any], share: float, or_else: str = ", or evaluate= other batches"
) -> tuple[list[Any], list[Any]]:
    """Parts batches in those to calibrate with and those to measure on: always the same ones, spread evenly.

    Whole batches, if the share is that of one or more, to rounding, and not of all; else rows of each batch, where all
    its tensors have the same number of rows and it has enough of them; else one batch.

    Args:
        batches: In order.
        share: Of them, in ``(0, 1)``.
        or_else: What else can be done where there is nothing to part.

    Returns:
        What remains, and what is held back; neither is empty.

    Raises:
        ArgumentError: If there is nothing to part.

    >>> hold_back([torch.tensor([[i]]) for i in range(4)], 0.25)[1]
    [tensor([[2]])]
    >>> hold_back([torch.arange(4)], 0.25)
    ([tensor([0, 1, 3])], [tensor([2])])
    """
    if not batches:
        raise ArgumentError(
            "batches is empty: there is nothing to hold back. A generator can be gone through once only: make a new "
            "one, or give a list."
        )
    whole = round(len(batches) * share)
    if not 1 <= whole < len(batches):
        parts = [_part(batch, share) for batch in batches]
        held = [found for _, found in parts if found is not None]
        if held:
            return [rest for rest, _ in parts], held
    if len(batches) < 2:
        rows = batch_size(batches[0])
        raise ArgumentError(
            f"Nothing can be held back of 1 batch of {rows} row{'' if rows == 1 else 's'}; give more batches{or_else}."
        )
    chosen = set(_spread(min(max(whole, 1), len(batches) - 1), len(batches)))
    rest = [batch for number, batch in enumerate(batches) if number not in chosen]
    return rest, [batches[number] for number in sorted(chosen)]


def _part(batch: Any, share: float) -> tuple[Any, Any | None]:
    """The rows that remain, and those that are held back, if rows can be told apart and there are enough."""
    rows = batch_size(batch)
    count = min(round(rows * share), rows - 1)
    if count < 1 or not _has_rows(batch, rows):
        return batch, None
    chosen = torch.zeros(rows, dtype=torch.bool)
    chosen[_spread(count, rows)] = True
    return _chosen(batch, ~chosen), _chosen(batch, chosen)


def rows_of(batch: Any, chosen: Tensor) -> Any | None:
    """Some rows of a batch, told by booleans of shape ``(rows,)``; None where they cannot be told apart."""
    return _chosen(batch, chosen) if _has_rows(batch, len(chosen)) else None


def _spread(count: int, total: int) -> list[int]:
    """So many numbers below ``total``, each in the middle of its part."""
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _has_rows(batch: Any, rows: int) -> bool:
    """Whether a batch is tensors alone, in a plain container or none, each with so many rows."""
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        return False
    parts = [batch] if isinstance(batch, Tensor) else list(batch.values() if isinstance(batch, Mapping) else batch)
    return all(isinstance(part, Tensor) and part.dim() > 0 and len(part) == rows for part in parts)


def _chosen(batch: Any, chosen: Tensor) -> Any:
    if isinstance(batch, Tensor):
        return batch[chosen.to(batch.device)]
    if isinstance(batch, Mapping):
        return {key: _chosen(part, chosen) for key, part in batch.items()}
    parts = [_chosen(part, chosen) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
