"""The sparse part of a weight: some entries of a matrix, by place and value."""

from typing import NamedTuple

from torch import Tensor


class Sparse(NamedTuple):
    """A matrix that is zero but for ``k`` entries.

    Attributes:
        indices: Places in the matrix read row by row, ascending: shape ``(k,)``, int64 (or int32 where it fits).
        values: Shape ``(k,)``.
    """

    indices: Tensor
    values: Tensor

    def matrix(self, rows: int, columns: int) -> Tensor:
        """The matrix, of shape ``(rows, columns)``, differentiable in the values.

        >>> import torch
        >>> Sparse(torch.tensor([1, 5]), torch.tensor([2.0, 3.0])).matrix(2, 3)
        tensor([[0., 2., 0.],
                [0., 0., 3.]])
        """
        return sparse_matrix(self.indices, self.values, rows, columns)

    def rows(self, part: slice, columns: int) -> Tensor:
        """Some rows of the matrix.

        >>> import torch
        >>> Sparse(torch.tensor([1, 5]), torch.tensor([2.0, 3.0])).rows(slice(1, 2), 3)
        tensor([[0., 0., 3.]])
        """
        first, last = part.start * columns, part.stop * columns
        inside = (self.indices >= first) & (self.indices < last)
        return sparse_matrix(self.indices[inside] - first, self.values[inside], part.stop - part.start, columns)

    def fits(self, rows: int, columns: int) -> bool:
        """Whether these are entries of a matrix of this size, each place once."""
        indices, values = self
        if indices.dim() != 1 or indices.shape != values.shape or indices.is_floating_point() or len(indices) == 0:
            return False
        return bool(indices[0] >= 0) and bool(indices[-1] < rows * columns) and bool((indices.diff() > 0).all())


def sparse_matrix(indices: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """:meth:`Sparse.matrix`, for TorchScript, which knows no methods of named tuples."""
    return values.new_zeros([rows * columns]).index_put([indices.long()], values).view(rows, columns)


def largest_entries(matrix: Tensor, score: Tensor, count: int) -> Sparse:
    """The ``count`` entries of a matrix with the largest scores (of the same shape).

    >>> import torch
    >>> largest_entries(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), torch.tensor([[1.0, 16.0], [9.0, 4.0]]), 2)
    Sparse(indices=tensor([1, 2]), values=tensor([-4.,  3.]))
    """
    indices = score.flatten().topk(count, sorted=False).indices.sort().values
    return Sparse(indices, matrix.flatten()[indices])
