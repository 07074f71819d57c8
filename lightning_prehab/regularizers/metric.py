"""The space in which singular values are meant: a weight seen through two roots, and the way back."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_prehab.linalg import gram_root, to_float64

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
        """The metric of ``G`` and ``C``, in float64; ``shrinkage`` as in :func:`~lightning_prehab.linalg.shrink`."""
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


#: Weights as they are.
IDENTITY = Metric()


def project(weight: Tensor, side: Side, outer: Tensor, inner: Tensor) -> Tensor:
    """Applies the factors of :meth:`Metric.projector`; the result has their rank."""
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
