"""The space in which singular values are meant: a weight seen through two roots, and the way back."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_prehab.linalg.matrices import gram_root, to_float64
from lightning_prehab.linalg.rows import Columns, Rows

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Metric:
    """``M = L^T W S``, with ``L L^T = G`` and ``S S^T = C``.

    Args:
        left: ``L^T`` of shape ``(m, m)``, invertible; None for the identity.
        right: ``S`` of shape ``(n, n)``, invertible; None for the identity.

    >>> metric = Metric(right=torch.diag(torch.tensor([2.0, 4.0])))
    >>> metric.view(torch.ones(1, 2))
    tensor([[2., 4.]])
    >>> metric.back(metric.view(torch.ones(1, 2)))
    tensor([[1., 1.]])
    """

    left: Tensor | None = None
    right: Tensor | None = None

    @classmethod
    def from_grams(
        cls, left_gram: Tensor | None = None, right_gram: Tensor | None = None, shrinkage: float = 0.0
    ) -> "Metric":
        """The metric of ``G`` and ``C``, in float64; ``shrinkage`` as in ``linalg.matrices.shrink``."""
        roots = (None if gram is None else gram_root(gram, shrinkage)[0] for gram in (left_gram, right_gram))
        return cls(*roots)

    def view(self, weight: Tensor) -> Tensor:
        """``L^T W S``, in the dtype and on the device of ``weight``."""
        seen = weight if self.left is None else self.left.to(weight) @ weight
        return seen if self.right is None else seen @ self.right.to(weight)

    def back(self, seen: Tensor) -> Tensor:
        """``L^-T M S^-1``, the inverse of :meth:`view`.

        The rounding of ``seen`` grows with the condition of the roots: map small changes of a weight back, not the
        weight itself.
        """
        weight = seen if self.left is None else self.left_inverse.to(seen) @ seen
        return weight if self.right is None else weight @ self.right_inverse.to(seen)

    @cached_property
    def left_inverse(self) -> Tensor:
        """``L^-T``, computed once, in float64, and kept in the dtype of the root."""
        assert self.left is not None
        return _inverse(self.left)

    @cached_property
    def right_inverse(self) -> Tensor:
        """``S^-1``, computed once, in float64, and kept in the dtype of the root."""
        assert self.right is not None
        return _inverse(self.right)

    @property
    def is_identity(self) -> bool:
        """Whether ``M`` is ``W``."""
        return self.left is None and self.right is None

    def in_float64(self) -> "Metric":
        """The same metric, with roots in float64."""
        return Metric(*(None if root is None else to_float64(root) for root in (self.left, self.right)))

    def weigh(self, weight: Tensor | Rows) -> Tensor:
        """``L L^T W S S^T``: half the gradient of ``|M|_F^2`` in ``W``, at the cost of one :meth:`view`.

        Where the rows lie on several processes, those that are here.
        """
        if isinstance(weight, Rows):
            seen = weight.own if self.right is None else weight.own @ self.right_gram.to(weight.own)
            if self.left is None:
                return seen
            return weight.take(weight.add_up(weight.take(self.left_gram).mT.to(seen) @ seen))  # a Gram is symmetric
        weighed = weight if self.left is None else self.left_gram.to(weight) @ weight
        return weighed if self.right is None else weighed @ self.right_gram.to(weight)

    @cached_property
    def left_gram(self) -> Tensor:
        """``L L^T``, computed once, in float64, and kept in the dtype of the root."""
        assert self.left is not None
        root = to_float64(self.left)
        return (root.mT @ root).to(self.left)

    @cached_property
    def right_gram(self) -> Tensor:
        """``S S^T``, computed once, in float64, and kept in the dtype of the root."""
        assert self.right is not None
        root = to_float64(self.right)
        return (root @ root.mT).to(self.right)

    def is_identity_on(self, side: Side) -> bool:
        """Whether a projection on this side is the same in both spaces."""
        return (self.left if side == "left" else self.right) is None

    def projector(self, side: Side, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Thin factors ``P = outer @ inner`` of the map of weights that is an orthogonal projection of ``M``.

        With ``U`` orthonormal, ``M -> U U^T M`` is ``W -> P W`` with ``P = L^-T U U^T L^T``, whatever ``S`` is; and
        ``M -> M V V^T`` is ``W -> W P`` with ``P = S V V^T S^-1``. The factors are computed in float64, and the one
        that spans the result is orthonormal, so they can be applied in float32 even if the root is badly conditioned.

        Args:
            side: The side of ``M`` to project on.
            basis: ``U`` of shape ``(m, r)`` or ``V`` of shape ``(n, r)``, orthonormal columns.

        Returns:
            ``outer`` of shape ``(m, r)`` and ``inner`` of shape ``(r, m)``, or ``n`` for the right side; dtype and
            device of ``basis``. Use :func:`project`.
        """
        if side == "right":
            outer, inner = _oblique(None if self.right is None else self.right.mT, basis)
            return inner.mT, outer.mT
        return _oblique(self.left, basis)


@dataclass(frozen=True, eq=False)
class Unformed:
    """``M = L^T W S``, never multiplied out, for products with vectors: ``unformed @ v``, ``unformed.mT @ u``."""

    weight: Tensor | Rows | Columns
    metric: Metric

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight."""
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """That of the weight."""
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def mT(self) -> "Unformed":
        """The transpose."""
        left, right = (None if root is None else root.mT for root in (self.metric.left, self.metric.right))
        return Unformed(self.weight.mT, Metric(right, left))

    def __matmul__(self, vector: Tensor) -> Tensor:
        seen = vector if self.metric.right is None else self.metric.right.to(vector) @ vector
        seen = self.weight @ seen
        return seen if self.metric.left is None else self.metric.left.to(vector) @ seen


#: Weights as they are.
IDENTITY = Metric()


def project(weight: Tensor | Rows, side: Side, outer: Tensor, inner: Tensor) -> Tensor:
    """Applies the factors of :meth:`Metric.projector`; the result has their rank.

    Where the rows lie on several processes, those that are here.
    """
    if isinstance(weight, Rows):
        if side == "right":
            return (weight.own @ outer) @ inner
        return weight.take(outer) @ weight.add_up(inner[:, weight.start : weight.start + len(weight.own)] @ weight.own)
    return outer @ (inner @ weight) if side == "left" else (weight @ outer) @ inner


def _oblique(root: Tensor | None, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of ``R^-1 U U^T R``, the first with orthonormal columns."""
    if root is None:
        return basis, basis.mT
    wide, u = to_float64(root), to_float64(basis)
    wide = wide.to(u.device)
    span, triangle = torch.linalg.qr(torch.linalg.solve_ex(wide, u).result)
    return span.to(basis), (triangle @ (u.mT @ wide)).to(basis)


def _inverse(root: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv(to_float64(root))
    return inverse.to(root)
