"""The pivot layout: a matrix of rank ``r`` as ``r`` of its rows, and what makes the others of them.

Zhao et al., "Pivoting Factorization", ICML 2025, https://arxiv.org/abs/2501.19090. That is ``r (m + n - r)`` numbers
instead of the ``r (m + n)`` of two factors, never more than ``m n``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prehab.linalg.balance import balanced
from lightning_prehab.linalg.matrices import require_finite, to_float64

#: Rows are exchanged until no entry of C is larger.
LARGEST_ENTRY = 1.1
#: At most so many are.
EXCHANGES = 500
#: Up to so many entries rows are exchanged on the CPU: a GPU is asked for the largest entry each time, and waits.
SMALL = 2**21


class PivotParts(NamedTuple):
    """``W[rows[:r]] = D`` and ``W[rows[r:]] = C D``.

    Attributes:
        D: The pivot rows: shape ``(r, n)``.
        C: What makes the other rows of them: shape ``(m - r, r)``.
        rows: Which rows of ``W`` those are: a permutation of ``range(m)``, ascending up to ``r`` and from there on.
    """

    D: Tensor
    C: Tensor
    rows: Tensor

    @property
    def order(self) -> Tensor:
        """Where each row of ``W`` stands in ``[D; C D]``: the permutation the other way round, shape ``(m,)``."""
        return self.rows.argsort()


def pivot_parts(a: Tensor, b: Tensor) -> PivotParts:
    """The pivot layout of ``W = B A``, which is the same matrix to rounding, also where its rank is below ``r``.

    Gaussian elimination with partial pivoting, ``P B = L U``, finds rows that the others are combinations of, and
    ``C = L_2 L_1^-1`` how: nothing is divided by ``U``, so that zero and deficient matrices need no care. Then rows are
    exchanged, each time for the largest entry of ``C``, until it is near 1: such rows span (locally) the largest volume
    (Goreinov et al., "How to find a good submatrix", 2010, https://doi.org/10.1142/9789812836021_0015). That gives
    entries as small as a QR with column pivoting, which torch does not have, in about its time.

    Args:
        a: Shape ``(r, n)``.
        b: Shape ``(m, r)`` with ``r <= m``.

    Returns:
        The parts in float64 (on the CPU where the device has no float64).

    Raises:
        NumericalError: If a factor is not finite.

    >>> parts = pivot_parts(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [4.0], [2.0]]))
    >>> parts.D.tolist(), parts.C.tolist(), parts.rows.tolist()
    ([[4.0, 8.0]], [[0.25], [0.5]], [1, 0, 2])
    """
    require_finite(a, "The factor A")
    require_finite(b, "The factor B")
    a, b = to_float64(a), to_float64(b)
    pivots, others, c = _eliminated(b.cpu() if b.numel() <= SMALL else b)
    _exchange_(pivots, others, c)
    pivots, by_pivot = pivots.sort()
    others, by_other = others.sort()
    c, rows = c[by_other][:, by_pivot].to(b.device), torch.cat([pivots, others]).to(b.device)
    return PivotParts(b[rows[: len(pivots)]] @ a, c, rows)


def as_factor(c: Tensor, order: Tensor) -> Tensor:
    """The factor ``B`` of shape ``(m, r)`` with ``W = B D``: rows of the identity where the pivots are, else of ``C``.

    Args:
        c: Shape ``(m - r, r)``, or that of a kernel, with sizes of 1 behind; differentiable.
        order: As :attr:`PivotParts.order`.
    """
    identity = torch.eye(c.shape[1], dtype=c.dtype, device=c.device).reshape(c.shape[1], *c.shape[1:])
    return torch.cat([identity, c]).index_select(0, order.to(c.device))


def from_factor(b: Tensor, order: Tensor) -> Tensor:
    """The way back from :func:`as_factor`: the rows of ``C``, bit by bit."""
    return b.index_select(0, order.argsort()[b.shape[1] :].to(b.device))


def balanced_factors(d: Tensor, c: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same matrix; see :func:`~lightning_prehab.linalg.balance.balanced`.

    Args:
        d: Shape ``(r, n)``.
        c: Shape ``(m - r, r)``.
        order: As :attr:`PivotParts.order`.

    Returns:
        ``A`` of shape ``(r, n)`` and ``B`` of shape ``(m, r)``, in float64.
    """
    return balanced(d, as_factor(to_float64(c), order))


def is_order(order: Tensor, rows: int) -> bool:
    """Whether this is a :attr:`PivotParts.order` of a matrix with so many rows."""
    if order.shape != (rows,) or order.is_floating_point() or order.dtype == torch.bool:
        return False
    found = order.argsort()
    return torch.equal(order[found].cpu(), torch.arange(rows, dtype=order.dtype, device="cpu"))


def _eliminated(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pivot rows, the other rows and C, by Gaussian elimination."""
    rank = b.shape[1]
    triangles, exchanged, _ = torch.linalg.lu_factor_ex(b)
    rows = list(range(len(b)))
    for place, other in enumerate(exchanged.tolist()):  # counted from 1, as LAPACK does
        rows[place], rows[other - 1] = rows[other - 1], rows[place]
    first, rest = triangles[:rank], triangles[rank:]
    c = torch.linalg.solve_triangular(first, rest, upper=False, left=False, unitriangular=True)
    order = torch.tensor(rows, device=b.device)
    return order[:rank].clone(), order[rank:].clone(), c


def _exchange_(pivots: Tensor, others: Tensor, c: Tensor) -> None:
    """Makes another row a pivot, for the largest entry of C, while that is too large; in place."""
    for _ in range(EXCHANGES if c.numel() else 0):
        i, j = divmod(int(c.abs().argmax()), c.shape[1])
        pivot = float(c[i, j])
        if abs(pivot) <= LARGEST_ENTRY:
            return
        row, column = c[i].clone(), c[:, j].clone()
        row[j] -= 1.0
        column[i] += 1.0
        c.addr_(column, row, alpha=-1.0 / pivot)
        pivots[j], others[i] = others[i].clone(), pivots[j].clone()
