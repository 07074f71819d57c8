"""Which output gradients of a batch are left out of ``sum g g^T``, and which are made smaller."""

import torch
from torch import Tensor

from lightning_prehab.linalg.matrices import working_dtype


def inner(present: Tensor, trim: float, positions: Tensor | None = None) -> Tensor:
    """The tokens of a batch that are left when a share of each sequence is cut off at both ends.

    Args:
        present: Booleans of shape ``(batch, positions)``, False for padding.
        trim: The share, in ``[0, 0.5)``; rounded down to whole tokens.
        positions: ``position_ids`` of the same shape, or of one row for all: a row of several sequences, one after the
            other, counts anew in each. None: a row is one sequence.

    Returns:
        Booleans of the same shape; no sequence loses all of its tokens.

    >>> inner(torch.tensor([[True] * 8, [True] * 4 + [False] * 4]), 0.25).int()
    tensor([[0, 0, 1, 1, 1, 1, 0, 0],
            [0, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    rows, places = present.nonzero(as_tuple=True)
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = rows[1:] != rows[:-1]
    if positions is not None:
        numbers = positions.expand(present.shape)[rows, places]
        begins[1:] |= numbers[1:] != numbers[:-1] + 1
    sequence = begins.cumsum(0) - 1
    lengths = torch.bincount(sequence)
    place = torch.arange(len(rows), device=rows.device) - begins.nonzero()[:, 0][sequence]
    off = (trim * lengths + 1e-9).long()  # a product that misses an integer by rounding alone counts as that integer
    found = torch.zeros_like(present)
    found[rows, places] = (place >= off[sequence]) & (place < (lengths - off)[sequence])
    return found


def clipped(g: Tensor, times: float) -> Tensor:
    """Rows whose norm is at most so many times the median one: longer ones are made shorter.

    Args:
        g: Shape ``(tokens, m)``, any floating dtype.
        times: The median is that of the rows that are not zero.
    """
    norms = torch.linalg.vector_norm(g, dim=1, dtype=working_dtype(g.dtype))
    some = norms[norms > 0]
    if not len(some):
        return g
    factor = (times * some.median() / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max_(1.0)
    shorter: Tensor = g * factor[:, None].to(g.dtype)
    return shorter
