"""The truncated SVD of a weight in a metric, for all ranks at once: one eigenproblem of the smaller side.

The metric is ``trace(G (W - BA) C (W - BA)^T)``. With ``L L^T = G`` and ``R R^T = C`` its optimum is the truncated SVD
of ``L^T W R``, mapped back (Eckart and Young, 1936). For ``m <= n`` only ``M = L^T W C W^T L`` is needed, and the root
of the smaller side alone: ``BA = L^-T U_r U_r^T L^T W`` with the eigenvectors ``U`` of ``M``; otherwise the transposed
formula. No root and no inverse of the larger side is ever taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prehab.errors import ArgumentError
from lightning_prehab.linalg.cumulated import running_sum
from lightning_prehab.linalg.matrices import (
    RELATIVE_FLOOR,
    break_even_rank,
    gram_root,
    require_finite,
    symmetric_eigh,
    to_float64,
)

#: Below this size of the smaller side speed does not matter, and everything is done in float64.
FLOAT32_SIZE = 256
#: Share of the truncation loss that float32 may cost by its estimate; beyond it the layer is solved in float64.
FLOAT32_LOSS = 1e-6
#: Largest number of matrix entries that one call of the eigensolver gets.
BATCH_ENTRIES = 2**24
#: Entries of a metric that are converted to another dtype at a time.
AT_ONCE = 2**23


@dataclass(eq=False)
class WeightedSVD:
    """A decomposed weight; see :func:`decompose`.

    Attributes:
        singular_values: Of ``L^T W R``: shape ``(min(m, n),)``, float64, descending. The squares beyond ``r`` sum to
            the squared error at rank ``r`` in the metric.
    """

    singular_values: Tensor
    _rows: Tensor  # W, or its transpose if it has more rows than columns
    _basis: Tensor
    _root: "_Root | None"
    _transposed: bool
    _kept: tuple[Tensor, Tensor] | None = None

    def compact_(self, rank: int, dtype: torch.dtype) -> None:
        """Keeps the factors up to a rank alone: at most as many entries as the weight, instead of all else."""
        a, b = self.low_rank(rank)
        self._kept = a.to(dtype), b.to(dtype)
        self._basis, self._root = self._basis.new_empty(0, 0), None
        self._rows = torch.empty_like(self._rows, device="meta")  # the shape; the weight may be a whole one of shards

    def low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors of a rank, ordered by importance in the metric.

        Args:
            rank: ``r`` in ``[1, min(m, n)]``.

        Returns:
            ``A`` of shape ``(r, n)`` and ``B`` of shape ``(m, r)``. Row ``i`` of ``A`` and column ``i`` of ``B`` have
            the same norm: balanced factors train better. Float64, or float32 where that was accurate enough.
        """
        if not 1 <= rank <= len(self.singular_values):
            m, n = self._rows.mT.shape if self._transposed else self._rows.shape
            raise ArgumentError(f"Rank {rank} is outside [1, {min(m, n)}] for a {(m, n)} matrix.")
        if self._kept is not None:
            a, b = self._kept
            if rank > a.shape[0]:
                raise ArgumentError(f"Only ranks up to {a.shape[0]} were kept, not {rank}.")
            return a[:rank], b[:, :rank]
        u = self._basis[:, :rank]
        rows = self._rows.to(u)
        if self._root is None:
            a, b = u.mT @ rows, u
        else:
            a, b = self._root.apply(u).mT @ rows, self._root.solve(u)
        scale = (a.norm(dim=1) / b.norm(dim=0)).sqrt()
        scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
        a, b = a / scale[:, None], b * scale
        return (b.mT, a.mT) if self._transposed else (a, b)


def decompose(weight: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> WeightedSVD:
    """Decomposes one weight; see :func:`decompose_many`."""
    return decompose_many([(weight, left, right)])[0]


def decompose_many(items: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]) -> list[WeightedSVD]:
    """Decomposes weights in their metrics, eigenproblems of one size batched.

    Products and solver run in float32 for large weights of at most that precision. An estimate from the spectrum says
    what that costs; where it may be noticeable, and for small matrices, everything is repeated in float64.

    Args:
        items: ``(weight, left, right)``: ``W`` of shape ``(m, n)``, ``G`` of shape ``(m, m)`` and ``C`` of shape
            ``(n, n)``. A vector stands for a diagonal matrix, None for the identity.

    Returns:
        A :class:`WeightedSVD` for each.

    Raises:
        NumericalError: If an input is not finite or a decomposition does not converge.
    """
    results: list[WeightedSVD | None] = [None] * len(items)
    waiting = {index: _Problem(*item) for index, item in enumerate(items)}
    for dtype in (torch.float32, torch.float64):
        chosen = [index for index, problem in waiting.items() if dtype == torch.float64 or problem.may_use_float32()]
        for batch in _batches(chosen, waiting):
            prepared = [waiting[index].gram(dtype) for index in batch]
            values, vectors = symmetric_eigh(torch.stack([gram for gram, _, _ in prepared]), dtype)
            for index, value, vector, (_, root, scale) in zip(batch, values.double(), vectors, prepared, strict=True):
                problem = waiting[index]
                if dtype == torch.float64 or _float32_suffices(value, problem.rank_limit, scale, root, vector):
                    results[index] = WeightedSVD(value.sqrt(), problem.rows, vector, root, problem.transposed)
                    del waiting[index]
    return [result for result in results if result is not None]


def weighted_low_rank(
    weight: Tensor, rank: int, left: Tensor | None = None, right: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best ``(A, B)`` of one rank in the metric; see :func:`decompose` and :meth:`WeightedSVD.low_rank`."""
    return decompose(weight, left, right).low_rank(rank)


class _Root:
    """``L`` with ``L L^T`` a Gram matrix: a Cholesky factor where that is safe, else a symmetric root."""

    def __init__(self, gram: Tensor, like: Tensor) -> None:
        """Of the dtype and on the device of another tensor."""
        self._diagonal: Tensor | None = None
        self._triangle: Tensor | None = None  # lower
        self._pair: tuple[Tensor, Tensor] | None = None  # L and its inverse, symmetric
        require_finite(gram, "The Gram matrix")
        gram = to_float64(gram if like.device.type == "mps" else gram.to(like.device))  # MPS has no float64
        if gram.dim() == 1:
            top = gram.max()
            root = gram.clamp_min(top * RELATIVE_FLOOR).sqrt() if top > 0 else torch.ones_like(gram)
            self._diagonal = root.to(like)
            return
        triangle, failed = torch.linalg.cholesky_ex((gram + gram.mT) / 2)
        pivots = triangle.diagonal().square()
        if int(failed) == 0 and bool(pivots.min() > RELATIVE_FLOOR * pivots.max()):
            self._triangle = triangle.to(like)
        else:
            root, inverse = gram_root(gram)
            self._pair = root.to(like), inverse.to(like)

    def congruence(self, gram: Tensor) -> Tensor:
        """``L^T gram L``."""
        if self._diagonal is not None:
            return self._diagonal[:, None] * gram * self._diagonal
        root = self._matrix()
        return root.mT @ gram @ root

    def apply(self, u: Tensor) -> Tensor:
        """``L u``."""
        if self._diagonal is not None:
            return self._diagonal[:, None] * u
        return self._matrix() @ u

    def solve(self, u: Tensor) -> Tensor:
        """``L^-T u``."""
        if self._diagonal is not None:
            return u / self._diagonal[:, None]
        if self._triangle is not None:
            solved: Tensor = torch.linalg.solve_triangular(self._triangle.mT, u, upper=True)
            return solved
        assert self._pair is not None
        return self._pair[1] @ u

    def _matrix(self) -> Tensor:
        if self._triangle is not None:
            return self._triangle
        assert self._pair is not None
        return self._pair[0]


class _Problem:
    """One weight in its metric, turned so that it has at most as many rows as columns."""

    def __init__(self, weight: Tensor, left: Tensor | None, right: Tensor | None) -> None:
        require_finite(weight, "The weight")
        for metric in (left, right):
            if metric is not None:
                require_finite(metric, "The metric")
        self.transposed = weight.shape[0] > weight.shape[1]
        self.rows = weight.detach().mT if self.transposed else weight.detach()
        self._small, self._large = (right, left) if self.transposed else (left, right)
        self.rank_limit = max(break_even_rank(*weight.shape), 1)

    def may_use_float32(self) -> bool:
        """Whether the matrix is large, of no higher precision, and products of float32 are really of float32."""
        exact = torch.get_float32_matmul_precision() == "highest"
        return exact and self.rows.dtype != torch.float64 and self.rows.shape[0] >= FLOAT32_SIZE

    def gram(self, dtype: torch.dtype) -> tuple[Tensor, _Root | None, float]:
        """``M``, the root ``L`` of the smaller side, and the size of the products that ``W C W^T`` is made of."""
        rows = to_float64(self.rows) if dtype == torch.float64 else self.rows.float()
        product = rows
        if self._large is not None:
            product = rows * self._large.to(rows) if self._large.dim() == 1 else _product(rows, self._large)
        gram = product @ rows.mT
        scale = float(product.norm(dim=1).max() * rows.norm(dim=1).max())
        if self._small is None:
            return gram, None, scale
        root = _Root(self._small, rows)
        return root.congruence(gram), root, scale


def _product(rows: Tensor, metric: Tensor) -> Tensor:
    """``rows @ metric``; a metric of another dtype is converted part by part: it may be the largest thing in memory."""
    if metric.dtype == rows.dtype:
        return rows @ metric.to(rows.device)
    columns = max(AT_ONCE // len(metric), 1)
    return torch.cat([rows @ part.to(rows) for part in torch.split(metric, columns, dim=1)], dim=1)


def _batches(indices: Sequence[int], problems: dict[int, _Problem]) -> list[list[int]]:
    """Groups of one size and device, none larger than the solver should get at once."""
    groups: dict[tuple[int, torch.device], list[list[int]]] = {}
    for index in indices:
        rows = problems[index].rows
        stacks = groups.setdefault((rows.shape[0], rows.device), [[]])
        if (len(stacks[-1]) + 1) * rows.shape[0] ** 2 > BATCH_ENTRIES and stacks[-1]:
            stacks.append([])
        stacks[-1].append(index)
    return [stack for stacks in groups.values() for stack in stacks if stack]


def _float32_suffices(eigenvalues: Tensor, limit: int, scale: float, root: _Root | None, vectors: Tensor) -> bool:
    """Whether rounding in float32 costs less than ``FLOAT32_LOSS`` of the truncation loss at every rank up to a limit.

    Rounding perturbs the entries of ``W C W^T`` by about ``eps s / sqrt(k)``, with ``s`` the size of the products that
    it is made of (far above the result where they cancel), and so entry ``ij`` of ``M`` in its eigenbasis by that times
    ``|L u_i| |L u_j|``; the solver adds ``eps l_1 / sqrt(k)`` to every entry. To second order a truncation at ``r``
    then loses the squares of the entries with ``i <= r < j`` over a gap of order ``l_r`` (a smaller gap costs less,
    since swapping equal eigenvalues is free).
    """
    k = len(eigenvalues)
    if float(eigenvalues[0]) == 0.0:
        return scale == 0.0
    gains = torch.ones_like(eigenvalues) if root is None else root.apply(vectors).square().sum(0).double()
    gains = gains.clamp_min(float(gains.mean()))
    below = running_sum(gains)[:limit]
    tail = eigenvalues.sum() - running_sum(eigenvalues)[:limit]
    rank = torch.arange(1, limit + 1, dtype=torch.float64, device=eigenvalues.device)
    noise = scale**2 * below * (gains.sum() - below) + float(eigenvalues[0]) ** 2 * rank * (k - rank)
    cost = torch.finfo(torch.float32).eps ** 2 / k * noise / eigenvalues[:limit].clamp_min(1e-300)
    return bool((cost <= FLOAT32_LOSS * tail).all())
