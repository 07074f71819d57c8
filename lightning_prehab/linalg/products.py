"""A matrix that is known as a product ``B A`` of a small inner size, and never multiplied out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prehab.linalg.decomposition import WeightedSVD, decompose
from lightning_prehab.linalg.matrices import require_finite, to_float64


@dataclass(frozen=True, eq=False)
class Product:
    """``W = B A``, to be looked at by its two factors.

    Args:
        b: Shape ``(m, r)``.
        a: Shape ``(r, n)``.

    >>> product = Product(torch.ones(3, 1), torch.tensor([[1.0, 2.0]]))
    >>> product.shape, product @ torch.tensor([1.0, 1.0]), float(product.norm())
    (torch.Size([3, 2]), tensor([3., 3., 3.]), 3.872983346207417)
    """

    b: Tensor
    a: Tensor

    @property
    def shape(self) -> torch.Size:
        """``(m, n)``."""
        return torch.Size((self.b.shape[0], self.a.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors."""
        return self.b.dtype

    def detach(self) -> "Product":
        """The same without a graph."""
        return Product(self.b.detach(), self.a.detach())

    def to(self, like: Tensor) -> "Product":
        """In the dtype and on the device of another tensor."""
        return Product(self.b.to(like), self.a.to(like))

    def __matmul__(self, vector: Tensor) -> Tensor:
        return self.b @ (self.a @ vector)

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.b @ self.a

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(P, K, Q)`` with ``W = P K Q``, in float64.

        ``P`` has orthonormal columns and ``Q`` orthonormal rows; ``K`` has the singular values of ``W``, but for zeros,
        and at most ``r`` rows and columns.
        """
        left, by_rows = torch.linalg.qr(to_float64(self.b.detach()))
        right, by_columns = torch.linalg.qr(to_float64(self.a.detach()).mT)
        return left, by_rows @ by_columns.mT, right.mT

    def norm(self) -> Tensor:
        """The Frobenius norm."""
        norm: Tensor = torch.linalg.matrix_norm(self.core()[1])
        return norm

    def minus(self, other: "Product") -> "Product":
        """The difference, as a product of the inner size of both."""
        return Product(torch.cat([self.b, -other.b.to(self.b)], 1), torch.cat([self.a, other.a.to(self.a)]))


@dataclass(eq=False)
class ProductSVD:
    """The truncated SVD of a product in a metric, for all ranks at once; see :func:`decompose_product`.

    Attributes:
        singular_values: Shape ``(min(m, n),)``, float64, descending; zero beyond the inner size.
    """

    singular_values: Tensor
    _inside: WeightedSVD
    _left: Tensor
    _right: Tensor

    def compact_(self, rank: int, dtype: torch.dtype) -> None:
        """Keeps the factors up to a rank alone."""
        self._inside.compact_(min(rank, len(self._inside.singular_values)), dtype)

    def low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors of a rank, balanced; those beyond the inner size are zero.

        Returns:
            ``A`` of shape ``(rank, n)`` and ``B`` of shape ``(m, rank)``.
        """
        known = min(rank, len(self._inside.singular_values))
        a, b = self._inside.low_rank(known)
        a, b = a @ self._right.to(a), self._left.to(b) @ b
        if known == rank:
            return a, b
        missing = rank - known
        return torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)


def decompose_product(product: Product, left: Tensor | None = None, right: Tensor | None = None) -> ProductSVD:
    """Decomposes a product in the metric ``trace(G (W - W') C (W - W')^T)``, without multiplying it out.

    With ``W = P K Q`` (:meth:`Product.core`) the best ``W'`` has its columns in the span of ``P`` and its rows in that
    of ``Q``, so ``W' = P K' Q``, and ``K'`` is the best matrix of the rank for ``K`` in the metric of ``P^T G P`` and
    ``Q C Q^T``: a problem of the inner size. Its conditions are no worse than those of ``G`` and ``C``.

    Args:
        product: ``W = B A``.
        left: ``G`` of shape ``(m, m)``; a vector stands for a diagonal matrix, None for the identity.
        right: ``C`` of shape ``(n, n)``, likewise.

    Raises:
        NumericalError: If an input is not finite or a decomposition does not converge.
    """
    for factor, what in ((product.b, "The factor B"), (product.a, "The factor A")):
        require_finite(factor, what)
    span, core, rows = product.core()
    inside = decompose(core, _restricted(left, span), _restricted(right, rows.mT))
    size = min(product.shape)
    values = inside.singular_values.new_zeros(size)
    values[: len(inside.singular_values)] = inside.singular_values
    return ProductSVD(values, inside, span, rows)


def _restricted(gram: Tensor | None, span: Tensor) -> Tensor | None:
    """``U^T G U`` for orthonormal columns ``U``."""
    if gram is None:
        return None
    require_finite(gram, "The metric")
    wide = to_float64(gram).to(span.device)
    seen = wide[:, None] * span if wide.dim() == 1 else wide @ span
    return span.mT @ seen
