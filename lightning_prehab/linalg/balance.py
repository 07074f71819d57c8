"""Two factors that share the size of their product evenly."""

import torch
from torch import Tensor

from lightning_prehab.linalg.matrices import symmetric_eigh, to_float64


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product, ordered by size, each pair of a row of ``A`` and a column of ``B`` of equal norm.

    Both have the square roots of the product's singular values: ``B = U S^1/2, A = S^1/2 V^T``. One factor is turned
    into the basis of the other, so that the product stays to rounding, however small its last singular values are.

    Args:
        a: Shape ``(r, n)``, ``r`` at most ``n``.
        b: Shape ``(m, r)``, ``r`` at most ``m``.

    Returns:
        ``A`` and ``B`` of the same shapes, in float64.

    >>> a, b = balanced(torch.tensor([[8.0, 0.0]]), torch.tensor([[0.0], [2.0]]))
    >>> a.abs(), b.abs()
    (tensor([[4., 0.]], dtype=torch.float64), tensor([[0.],
            [4.]], dtype=torch.float64))
    """
    basis, triangle = torch.linalg.qr(to_float64(b))
    rows = triangle @ to_float64(a)
    vectors = symmetric_eigh(rows @ rows.mT)[1].to(rows.device)
    a, b = vectors.mT @ rows, basis @ vectors
    scale = a.norm(dim=1).sqrt()  # columns of B have length 1
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return a / scale[:, None], b * scale
