"""A matrix whose rows lie on several processes, for whoever only multiplies with it."""

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Rows(ABC):
    """Some rows of a matrix, with what it takes to multiply with all of it.

    Every process calls the same products in the same order, and has the same results, bit by bit.

    Args:
        own: The rows of this process, shape ``(k, n)``; there may be none.
        start: Number of the first of them.
        count: Rows of the whole matrix, ``m``.
    """

    def __init__(self, own: Tensor, start: int, count: int) -> None:
        self.own, self.start = own, start
        self.shape = count, own.shape[1]

    @abstractmethod
    def add_up(self, part: Tensor) -> Tensor:
        """The sum of what each process has, of equal shapes."""

    def with_own(self, own: Tensor) -> "Rows":
        """Other rows in the same places."""
        found = copy.copy(self)
        found.own = own
        return found

    def take(self, whole: Tensor) -> Tensor:
        """Of something with ``m`` rows those that belong to the own ones: a view of shape ``(k, ...)``."""
        return whole.narrow(0, self.start, len(self.own))

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.own.dtype

    @property
    def mT(self) -> "Columns":
        """The transpose."""
        return Columns(self)

    def __matmul__(self, right: Tensor, /) -> Tensor:
        """The product with a vector or a thin matrix, whole: shape ``(m,)`` or ``(m, r)``."""
        product = self.own @ right
        whole = product.new_zeros(self.shape[0], *product.shape[1:])
        self.take(whole).copy_(product)
        return self.add_up(whole)


class Columns:
    """The transpose of :class:`Rows`."""

    def __init__(self, rows: Rows) -> None:
        self.mT = rows
        self.shape = rows.shape[1], rows.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.mT.dtype

    def __matmul__(self, left: Tensor, /) -> Tensor:
        """The product with a vector or a thin matrix: shape ``(n,)`` or ``(n, r)``."""
        return self.mT.add_up(self.mT.own.mT @ self.mT.take(left))


def own_part(matrix: Tensor | Rows) -> Tensor:
    """The rows that are here: of a tensor all."""
    return matrix.own if isinstance(matrix, Rows) else matrix


def taken(whole: Tensor, of: Tensor | Rows) -> Tensor:
    """Of something with as many rows as ``of`` those that are here."""
    return of.take(whole) if isinstance(of, Rows) else whole


def summed(part: Tensor, over: Tensor | Rows) -> Tensor:
    """The sum over the processes that have rows of ``over``."""
    return over.add_up(part) if isinstance(over, Rows) else part
