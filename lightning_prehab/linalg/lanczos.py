"""The leading singular vector of a matrix that is only multiplied by vectors."""

from typing import Any

import torch
from torch import Tensor

from lightning_prehab.linalg.matrices import Operator

#: Steps between two looks at how far the vector has come; each look decomposes a small matrix on the CPU.
_BETWEEN_LOOKS = 10


@torch.no_grad()
def leading_right_vector(matrix: Operator, start: Tensor, at_most: int, tolerance: float = 1e-5) -> Tensor:
    """Leading right singular vector by Lanczos bidiagonalization with full reorthogonalization.

    Random square matrices have leading singular values that differ by far less than 1 %: a power iteration needs
    thousands of steps there, this some dozens, since it takes the best vector of all that it has seen.

    Args:
        matrix: Shape ``(m, n)``, of the dtype of ``start``; products with vectors are all that is asked of it.
        start: Any vector of shape ``(n,)`` with a share of the one that is looked for; float64 is advised.
        at_most: Steps, at least 1. ``min(m + 1, n)`` always suffice in exact arithmetic.
        tolerance: Of the sine of the angle to the exact vector, as the residual and the gap to the second singular
            value bound it.

    Returns:
        Unit vector of shape ``(n,)``; ``start`` itself, scaled, if the matrix is zero or not finite.

    Reference:
        Golub and Kahan, 1965, https://doi.org/10.1137/0702016; the bound: Wedin, 1972,
        https://doi.org/10.1007/BF01932678
    """
    tiny = torch.finfo(start.dtype).tiny  # a length of 0 ends the chain: what follows are zeros
    first: Tensor = start / start.norm()
    transposed: Any = matrix.mT
    right: list[Tensor] = [first]
    left: list[Tensor] = []
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    best: Tensor = first
    while True:
        u = matrix @ right[-1]
        u = _orthogonal_to(left, u - betas[-1] * left[-1] if left else u)
        alphas.append(u.norm())
        left.append(u / alphas[-1].clamp_min(tiny))
        v = _orthogonal_to(right, transposed @ left[-1] - alphas[-1] * right[-1])
        betas.append(v.norm())
        steps = len(alphas)
        ends = steps >= at_most or steps >= min(len(left[-1]) + 1, len(first))
        if ends or steps % _BETWEEN_LOOKS == 0:
            small = torch.diag(torch.stack(alphas)).cpu()
            small.diagonal(1).copy_(torch.stack(betas)[:-1])
            if not bool(torch.isfinite(small).all()):
                return best
            p, values, qt = torch.linalg.svd(small)
            best = qt[0].to(first) @ torch.stack(right)
            best = best / best.norm()
            gap = float(values[0] - (values[1] if steps > 1 else 0.0))
            if ends or float(betas[-1]) * abs(float(p[-1, 0])) <= tolerance * gap:
                return best
        right.append(v / betas[-1].clamp_min(tiny))


def _orthogonal_to(basis: list[Tensor], vector: Tensor) -> Tensor:
    """The vector less its parts along an orthonormal basis, taken off twice: once leaves what rounding brings in."""
    if not basis:
        return vector
    rows = torch.stack(basis)
    for _ in range(2):
        vector = vector - rows.mT @ (rows @ vector)
    return vector
