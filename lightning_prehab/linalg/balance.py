"""Two factors that share the size of their product evenly."""

import torch
from torch import Tensor


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product, both with the square roots of its singular values: ``B = U S^1/2, A = S^1/2 V^T``.

    Computed in float64 from a QR decomposition of each factor and an SVD of a small matrix.

    Args:
        a: Shape ``(rank, n)``.
        b: Shape ``(m, rank)``.

    Returns:
        ``A`` and ``B`` of the same shapes, dtypes and devices.

    >>> a, b = balanced(torch.tensor([[8.0, 0.0]]), torch.tensor([[0.0], [2.0]]))
    >>> a.abs(), b.abs()
    (tensor([[4., 0.]]), tensor([[0.],
            [4.]]))
    """
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    q_a, r_a = torch.linalg.qr(a.mT.to(wide))
    q_b, r_b = torch.linalg.qr(b.to(wide))
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s.sqrt()
    new_a, new_b = root[:, None] * (vt @ q_a.mT), (q_b @ u) * root
    return new_a.to(a), new_b.to(b)
