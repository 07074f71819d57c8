"""Matrix functions: tensors in, tensors out.

A weight ``W`` has shape ``(m, n) = (out_features, in_features)``. Spectra are returned in descending order. Functions
that decompose work in float64 and return float64; functions for use inside a training step keep the dtype they are
given.
"""

import torch
from torch import Tensor

from lightning_prehab.errors import ArgumentError, NumericalError

#: Eigenvalues below this share of the largest one count as zero when a root is inverted.
RELATIVE_FLOOR = 1e-12


def break_even_rank(out_features: int, in_features: int) -> int:
    """Largest rank at which two factors hold fewer parameters than the dense matrix: ``(mn - 1) // (m + n)``.

    >>> break_even_rank(768, 768), break_even_rank(10, 1)
    (383, 0)
    """
    return (out_features * in_features - 1) // (out_features + in_features)


def require_finite(tensor: Tensor, what: str) -> None:
    """Raises :class:`NumericalError` if ``tensor`` holds NaN or Inf; ``what`` starts the sentence."""
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NumericalError(f"{what} has {bad} NaN or Inf entries out of {tensor.numel()}.")


def symmetric_eigh(gram: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric positive semi-definite matrices.

    The ladder: check that the input is finite, symmetrize, solve on the device of the input, then on the CPU, and raise
    if both fail.

    Args:
        gram: Shape ``(..., k, k)``, any floating dtype.
        dtype: Of the solution: float64, or float32.

    Returns:
        Eigenvalues ``(..., k)``, descending and clamped to >= 0, and eigenvectors ``(..., k, k)`` in columns, on the
        device of the input (on the CPU where the device has no float64).

    Raises:
        NumericalError: If a matrix is not finite or no solver converges.
    """
    require_finite(gram, "The Gram matrix")
    gram = to_float64(gram) if dtype == torch.float64 else gram.detach().to(dtype)
    gram = (gram + gram.mT) / 2
    try:
        values, vectors = torch.linalg.eigh(gram)
    except RuntimeError:
        try:
            values, vectors = (part.to(gram.device) for part in torch.linalg.eigh(gram.cpu()))
        except RuntimeError as error:
            raise NumericalError(f"The eigendecomposition of a {tuple(gram.shape)} matrix did not converge.") from error
    return values.flip(-1).clamp_min(0.0), vectors.flip(-1)


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor, detached, in float64; on the CPU if its device has no float64 (Apple's MPS)."""
    tensor = tensor.detach()
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def gram_root(gram: Tensor, shrinkage: float = 0.0) -> tuple[Tensor, Tensor]:
    """Symmetric root ``L`` of a Gram matrix, ``L L^T = gram``, and its inverse.

    Eigenvalues below ``RELATIVE_FLOOR`` times the largest are raised to that floor, so the inverse exists for
    rank-deficient statistics too, and ``L @ L_inverse`` is the identity.

    Args:
        gram: Positive semi-definite, shape ``(k, k)``.
        shrinkage: In ``[0, 1]``; see :func:`shrink`.

    Returns:
        ``(L, L_inverse)``, each ``(k, k)`` in float64. For a zero matrix both are the identity: no direction is
        preferred.
    """
    values, vectors = symmetric_eigh(shrink(gram, shrinkage))
    if values.numel() == 0 or float(values[0]) == 0.0:
        eye = torch.eye(gram.shape[-1], dtype=values.dtype, device=values.device)
        return eye, eye
    root = values.clamp_min(float(values[0]) * RELATIVE_FLOOR).sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def shrink(gram: Tensor, amount: float) -> Tensor:
    """Pulls a Gram matrix toward a multiple of the identity: ``(1 - a) gram + a (trace / k) I``.

    >>> shrink(torch.diag(torch.tensor([2.0, 0.0])), 0.5)
    tensor([[1.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    if not 0.0 <= amount <= 1.0:
        raise ArgumentError(f"Shrinkage must lie in [0, 1], got {amount}.")
    if amount == 0.0:
        return gram
    size = gram.shape[-1]
    shrunk = gram * (1.0 - amount)
    shrunk.diagonal(dim1=-2, dim2=-1).add_(amount * gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / size)
    return shrunk


def shrinkage_intensity(first: Tensor, second: Tensor, share: float) -> float:
    """How much a second moment should be shrunk, from its two halves: noise over what shrinking would remove.

    The difference of the halves shows the sampling noise of the whole; the distance of the whole from a multiple of the
    identity bounds what there is to gain (Ledoit and Wolf, 2004, https://doi.org/10.1016/S0047-259X(03)00096-4; they
    estimate the noise from single samples, which are not independent here: tokens of a text, patches of an image).

    Args:
        first: Second moment over one part of the data, shape ``(k, k)``.
        second: Second moment over the other part.
        share: Share of the data in the first part, in (0, 1).

    Returns:
        The amount for :func:`shrink`, in [0, 1].

    >>> shrinkage_intensity(torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([3.0, 1.0])), 0.5)
    0.0
    """
    first, second = to_float64(first), to_float64(second)
    whole = share * first + (1.0 - share) * second
    noise = share * (1.0 - share) * (first - second).square().sum()
    spread = (whole - shrink(whole, 1.0)).square().sum()
    return float((noise / spread.clamp_min(torch.finfo(spread.dtype).tiny)).clamp_max(1.0))


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values through the smaller Gram matrix: shape ``(min(m, n),)``, float64, descending.

    Values below about 1e-8 of the largest drown in rounding: the Gram matrix squares the condition number.
    """
    require_finite(matrix, "The matrix")
    matrix = to_float64(matrix)
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return symmetric_eigh(gram)[0].sqrt()


def stable_rank(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm; a lower bound of the rank.

    Args:
        matrix: Shape ``(m, n)``.

    Returns:
        Scalar in ``[1, min(m, n)]``, float64; 0 for a zero matrix.

    Reference:
        Rudelson and Vershynin, 2007, https://arxiv.org/abs/math/0503442

    >>> stable_rank(torch.eye(3)).item()
    3.0
    """
    return spectral_ranks(singular_values(matrix))[0]


def effective_rank(matrix: Tensor) -> Tensor:
    """Exponential of the entropy of the normalized singular values.

    Args:
        matrix: Shape ``(m, n)``.

    Returns:
        Scalar in ``[1, min(m, n)]``, float64; 0 for a zero matrix.

    Reference:
        Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    >>> round(effective_rank(torch.eye(3)).item(), 6)
    3.0
    """
    return spectral_ranks(singular_values(matrix))[1]


def spectral_ranks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Stable and effective rank from singular values in descending order, shape ``(k,)``; both 0 for zeros."""
    tiny = torch.finfo(values.dtype).tiny
    stable = values.square().sum() / values[0].square().clamp_min(tiny)
    effective = torch.special.entr(values / values.sum().clamp_min(tiny)).sum().exp()
    zero = torch.zeros_like(stable)
    return torch.where(values[0] > 0, stable, zero), torch.where(values[0] > 0, effective, zero)


def power_iteration(matrix: Tensor, vector: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triple of ``matrix`` by alternating products, from a start vector.

    Args:
        matrix: Shape ``(m, n)``.
        vector: Estimate of the leading right singular vector, shape ``(n,)``; keep it between calls for a warm start.
        steps: Iterations, at least 1. From a cold start about 20 are needed for 1 % in the squared singular value; from
            a warm start 1 per training step is enough.

    Returns:
        ``(sigma, u, v)``: scalar, ``(m,)``, ``(n,)``. For a zero matrix ``sigma`` is 0 and ``v`` is the start vector.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    v = vector / vector.norm().clamp_min(tiny)
    for _ in range(steps):
        u = matrix @ v
        u = u / u.norm().clamp_min(tiny)
        w = matrix.mT @ u
        sigma = w.norm()
        v = torch.where(sigma > 0, w / sigma.clamp_min(tiny), v)
    return sigma, u, v


def polar_factor(matrix: Tensor, steps: int = 12) -> Tensor:
    """Orthogonal polar factor ``U V^T`` of ``matrix = U S V^T`` by Newton-Schulz iterations (matrix products only).

    It is the gradient of the nuclear norm. Directions with a singular value far below the largest converge last:
    every step multiplies a small value by 1.5.

    Args:
        matrix: Shape ``(m, n)``.
        steps: Iterations. 12 bring singular values above about 2 % of the Frobenius norm to 1 within 1e-3.

    Returns:
        Shape and dtype of ``matrix``; zero for a zero matrix.

    Reference:
        Higham, Functions of Matrices, 2008, chapter 8.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    polar: Tensor = x if matrix.shape[0] <= matrix.shape[1] else x.mT
    return polar
