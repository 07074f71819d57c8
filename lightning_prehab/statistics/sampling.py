"""Gram matrices, and from how few of a batch's tokens they can be estimated."""

from functools import lru_cache

import torch
from torch import Tensor

from lightning_prehab.linalg.cumulated import running_sum
from lightning_prehab.linalg.matrices import widened, working_dtype

#: Columns of a Gram matrix that are computed at a time, where there are at least twice as many: what lies on the other
#: side of the diagonal is copied.
BLOCK = 256
#: Rows that are looked at for each one that is taken.
LOOKED_AT = 8


def gram(rows: Tensor) -> Tensor:
    """``sum r r^T`` over the rows: shape ``(k, k)``, exactly symmetric where ``k`` is large."""
    size = rows.shape[1]
    if size < 2 * BLOCK:
        return rows.mT @ rows
    found = rows.new_empty(size, size)
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        torch.mm(rows[:, start:end].mT, rows[:, start:], out=found[start:end, start:])
        found[end:, start:end] = found[start:end, end:].mT
        square = found[start:end, start:end]  # which a product gives to rounding alone, on some machines
        square.copy_(square.triu() + square.triu(1).mT)
    return found


def sample(rows: Tensor, at_most: int | None, turn: int = 0) -> tuple[Tensor, float]:
    """Some rows, from which sums over all of them can be estimated: chosen blindly, in another place at each turn.

    Args:
        rows: Shape ``(tokens, k)``.
        at_most: How many will be taken of them by :func:`sample_by_energy`; ``LOOKED_AT`` times as many are returned.
            None, or no less than there are, returns the rows as they are.
        turn: Number of the batch.

    Returns:
        The rows, and the factor to multiply their sums with.
    """
    tokens = rows.shape[0]
    if at_most is None or tokens <= LOOKED_AT * at_most:
        return rows, 1.0
    count = LOOKED_AT * at_most
    order = _shuffled(tokens, rows.device).roll(-(turn * count) % tokens)
    return rows.index_select(0, order[:count]), tokens / count


def sample_by_energy(rows: Tensor, at_most: int | None) -> Tensor:
    """Fewer rows with nearly the same Gram matrix: the trace is exact, the rest unbiased up to the fixed order.

    Rows are taken with probability proportional to their squared norm and scaled to compensate (Drineas, Kannan and
    Mahoney, 2006, https://doi.org/10.1137/S0097539704442684), here by systematic sampling along a fixed shuffled order:
    no random state is touched, and a few rows that carry all the energy are all taken.

    Args:
        rows: Shape ``(tokens, k)``, any floating dtype.
        at_most: Number of rows to return; None or a number of at least ``tokens`` returns the rows as they are.

    Returns:
        Float32, or float64 if the rows are.
    """
    if at_most is None or rows.shape[0] <= at_most:
        return widened(rows)
    order = _shuffled(rows.shape[0], rows.device)
    energy = torch.linalg.vector_norm(rows, dim=1, dtype=working_dtype(rows.dtype)).square()[order]
    total = energy.sum()
    marks = (torch.arange(at_most, dtype=energy.dtype, device=rows.device) + 0.5) * (total / at_most)
    taken = torch.searchsorted(running_sum(energy), marks).clamp_max_(len(energy) - 1)
    scale = (total / (at_most * energy[taken].clamp_min(torch.finfo(energy.dtype).tiny))).sqrt()
    return widened(rows.index_select(0, order[taken])).mul_(scale[:, None])


@lru_cache(maxsize=64)
def _shuffled(size: int, device: torch.device) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size), device="cpu").to(device)
