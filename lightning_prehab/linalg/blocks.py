"""Work on large matrices block by block: what it needs beside them stays small, whatever they are."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.matrices import working_dtype

#: Entries of a block: 4 MB of float64. A matrix that is not larger is one block.
ENTRIES = 2**19


def blocks(length: int, width: int) -> list[slice]:
    """Slices of rows that are ``width`` wide, each of ``ENTRIES`` entries at most, or a single row.

    >>> blocks(3, 2**18)
    [slice(0, 2, None), slice(2, 3, None)]
    """
    rows = max(ENTRIES // max(width, 1), 1)
    return [slice(start, min(start + rows, length)) for start in range(0, max(length, 1), rows)]


def unchanged(tensor: Tensor) -> Tensor:
    """The tensor: what is done to it where there is nothing to do."""
    return tensor


def wide_product(
    left: Tensor, right: Tensor, of: Callable[[Tensor], Tensor] = unchanged, dtype: torch.dtype | None = None
) -> Tensor:
    """A product of a thin matrix and a large one in float64 (float32 where the device has no float64).

    Args:
        left: Shape ``(m, k)``.
        right: Shape ``(k, n)``.
        of: Applied to the entries of the larger one before.
        dtype: Of the answer; None means that in which it is computed.

    Returns:
        Shape ``(m, n)``.

    >>> wide_product(torch.ones(1, 2), torch.full((2, 3), 2.0), torch.square)
    tensor([[8., 8., 8.]], dtype=torch.float64)
    """
    wide = torch.float32 if left.device.type == "mps" else torch.float64
    left, right = left.detach(), right.detach()
    answer = left.new_empty(len(left), right.shape[1], dtype=wide if dtype is None else dtype)
    of_left, of_right = (unchanged, of) if left.numel() <= right.numel() else (of, unchanged)
    for rows in blocks(*left.shape):
        own = of_left(left[rows].to(wide))
        for columns in blocks(right.shape[1], len(right)):
            answer[rows, columns] = own @ of_right(right[:, columns].to(wide))
    return answer


def row_squares(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The square of each row, computed in a dtype: shape ``(m, 1)``."""
    answer = matrix.new_empty(len(matrix), 1, dtype=dtype)
    for part in blocks(*matrix.shape):
        answer[part] = matrix[part].to(dtype).square().sum(1, keepdim=True)
    return answer


@torch.no_grad()
def squares_of_error(weight: Tensor, factors: Factors, groups: int = 1) -> Tensor:
    """``|W - B A - S|_F^2`` and ``|W|_F^2``, of differences in float32 or the dtype of a wider weight: shape ``(2,)``.

    Args:
        weight: Shape ``(m, n)``.
        factors: ``A``, ``B`` and ``S``.
        groups: Of as many matrices that stand one below the other.

    >>> squares_of_error(torch.ones(2, 2), Factors(torch.zeros(1, 2), torch.zeros(2, 1)))
    tensor([4., 4.], dtype=torch.float64)
    """
    rows, width, dtype = len(weight) // groups, weight.shape[1], working_dtype(weight.dtype)
    total = weight.new_zeros(2, dtype=torch.float32 if weight.device.type == "mps" else torch.float64)
    for number, (a, b) in enumerate(zip(factors.A.chunk(groups), factors.B.chunk(groups), strict=True)):
        for part in blocks(rows, width):
            here = slice(number * rows + part.start, number * rows + part.stop)
            block = weight[here].to(dtype)
            error = block - b[part].to(dtype) @ a.to(dtype)
            if factors.sparse is not None:
                error -= factors.sparse.rows(here, width).to(dtype)
            total += torch.stack([error.norm(), block.norm()]).to(total).square()
    return total
