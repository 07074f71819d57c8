"""What takes the place of a matrix: two factors, and what is added to their product."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prehab.linalg.pivot import as_factor, pivot_parts
from lightning_prehab.linalg.sparse import Sparse


class Factors(NamedTuple):
    """``W ~ B A``, what to add to the bias, and what to add to the product.

    Attributes:
        A: Shape ``(rank, in_features)``.
        B: Shape ``(out_features, rank)``.
        bias_shift: Shape ``(out_features,)``, or None when the bias stays as it is.
        sparse: Entries that are added, ``W ~ B A + S``, or None.
        order: In the pivot layout, where each row stands in ``[A; C A]``: shape ``(out_features,)``. ``A`` is then rows
            of the matrix, and ``B`` those of the identity and of ``C``; see
            :func:`~lightning_prehab.linalg.pivot.as_factor`.
    """

    A: Tensor
    B: Tensor
    bias_shift: Tensor | None = None
    sparse: Sparse | None = None
    order: Tensor | None = None

    def parts(self) -> list[Tensor | None]:
        """The tensors, with those of the sparse part at the end; None for what there is not."""
        return [self.A, self.B, self.bias_shift, self.order, *((None, None) if self.sparse is None else self.sparse)]

    @classmethod
    def from_parts(cls, parts: Sequence[Tensor | None]) -> "Factors":
        """The factors of :meth:`parts`."""
        a, b, bias_shift, order, indices, values = parts
        assert a is not None
        assert b is not None
        return cls(a, b, bias_shift, None if indices is None or values is None else Sparse(indices, values), order)

    def to(self, device: torch.device) -> "Factors":
        """The factors on a device; themselves if they are there."""
        return Factors.from_parts([part if part is None else part.to(device) for part in self.parts()])

    def pivoted(self) -> "Factors":
        """The same matrix in the pivot layout, in float64 and without a sparse part."""
        parts = pivot_parts(self.A, self.B)
        return self._replace(A=parts.D, B=as_factor(parts.C, parts.order), order=parts.order)

    def product(self, groups: int = 1) -> Tensor:
        """The dense matrix that the parts stand for: ``B A`` of each group, with the sparse part."""
        parts = zip(self.B.chunk(groups), self.A.chunk(groups), strict=True)
        product = torch.cat([b @ a for b, a in parts]) if groups > 1 else self.B @ self.A
        return product if self.sparse is None else product + self.sparse.matrix(*product.shape).to(product)
