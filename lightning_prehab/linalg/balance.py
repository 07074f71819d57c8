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


def even_scales(a: Tensor, b: Tensor) -> Tensor:
    """Powers of two ``t``, so that the rows of ``t A`` and the columns of ``B / t`` are as long within a factor of 2.

    A power of two changes no digit of a number: the product of the scaled factors is the same, bit by bit.

    Args:
        a: Shape ``(*, r, n)``.
        b: Shape ``(*, m, r)``.

    Returns:
        Shape ``(*, r)`` in float32; 1 where one of the two is zero or not finite.

    >>> even_scales(torch.tensor([[8.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.5, 1.0]]))
    tensor([0.2500, 1.0000])
    """
    rows, columns = a.float().norm(dim=-1), b.float().norm(dim=-2)
    half = (0.5 * (columns.log2() - rows.log2())).round()
    exponent = torch.where(half.isfinite(), half, torch.zeros_like(half)).clamp(-60, 60).to(torch.int32)
    return ((exponent + 127) << 23).view(torch.float32)  # the bits of 2^exponent
