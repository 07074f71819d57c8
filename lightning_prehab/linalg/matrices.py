"""Matrix functions: tensors in, tensors out.

A weight ``W`` has shape ``(m, n) = (out_features, in_features)``. Spectra are returned in descending order. Functions
that decompose work in float64 and return float64; functions for use inside a training step keep the dtype they are
given.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_prehab.errors import ArgumentError, NumericalError

#: Eigenvalues below this share of the largest one count as zero when a root is inverted.
RELATIVE_FLOOR = 1e-12


def break_even_rank(out_features: int, in_features: int, groups: int = 1) -> int:
    """Largest rank at which two factors hold fewer parameters than the dense matrix: ``(mn - 1) // (m + n)``.

    Of a stack of ``groups`` matrices of ``m / groups`` rows, which have factors each: ``(mn - 1) // (m + groups n)``.

    >>> break_even_rank(768, 768), break_even_rank(10, 1)
    (383, 0)
    """
    return (out_features * in_features - 1) // (out_features + groups * in_features)


def require_finite(tensor: Tensor, what: str) -> None:
    """Raises :class:`NumericalError` if ``tensor`` holds NaN or Inf; ``what`` starts the sentence."""
    if bool(torch.isfinite(tensor.sum())):
        return  # one bad entry would have made the sum bad; a sum that overflows is looked at more closely
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
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
        device of the input (on the CPU where the device has no float64). The largest entry of each vector is positive:
        a solver leaves the sign to rounding, and factors on other processes and machines would differ by it.

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
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)) if vectors.numel() else vectors
    vectors = torch.where(largest < 0.0, -vectors, vectors)
    return values.flip(-1).clamp_min(0.0), vectors.flip(-1)


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor, detached, in float64; on the CPU if its device has no float64 (Apple's MPS)."""
    tensor = tensor.detach()
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and products of tensors of a dtype are computed in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in its :func:`working_dtype`; differentiable.

    >>> widened(torch.zeros(1, dtype=torch.bfloat16)).dtype, widened(torch.zeros(1, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return tensor.to(working_dtype(tensor.dtype))


def is_quantized(weight: Tensor) -> bool:
    """Whether a quantizer (torchao, for one) has put a tensor of its own class there, which can dequantize itself.

    >>> is_quantized(torch.zeros(2, 2))
    False
    """
    return type(weight).dequantize is not Tensor.dequantize


def dequantized(weight: Tensor) -> Tensor:
    """The weight itself, or the ordinary tensor that a quantized one stands for."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return weight
    else:  # noqa: RET505  # TorchScript skips it: it knows ordinary tensors only
        return weight.dequantize() if is_quantized(weight) else weight


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


class Operator(Protocol):
    """What can be multiplied by vectors from both sides; tensors can."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""

    @property
    def mT(self) -> Any:
        """The transpose."""

    def __matmul__(self, vector: Tensor, /) -> Tensor: ...


def power_iteration(matrix: Operator, vector: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triple of ``matrix`` by alternating products, from a start vector.

    Args:
        matrix: Shape ``(m, n)``; products with vectors are all that is asked of it.
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


#: Odd quintics ``a x + b x^3 + c x^5``, one per step. Each is the best uniform approximation of 1 on the interval that
#: the one before maps the singular values to, beginning with [0.003, 1]; computed with the Remez algorithm, again in
#: tests/regularizers/test_polar.py. The last one (the limit, of cubic convergence) is repeated.
POLAR_SCHEDULE = (
    (8.383673612923165, -24.76590585797452, 18.357081892887585),
    (4.04342043370043, -3.0114049938415346, 0.5695121503191826),
    (3.5055706172438965, -2.626653835618105, 0.525719404820323),
    (2.4901159394442596, -1.8342750827526746, 0.4368347068954251),
    (1.9177762487314511, -1.2967501911246457, 0.37970487539858566),
    (1.875, -1.25, 0.375),
)


def polar_factor(matrix: Tensor, steps: int = 8) -> Tensor:
    """Orthogonal polar factor ``U V^T`` of ``matrix = U S V^T`` by polynomial iterations (matrix products only).

    It is the gradient of the nuclear norm. Nothing is read back from the device, and the scale of the matrix does not
    matter: it is divided by its Schatten-8 norm, which bounds the largest singular value within a factor ``k^(1/8)``
    and falls out of the products of the first step.

    Args:
        matrix: Shape ``(m, n)``, a floating dtype.
        steps: Iterations of three products each. 5 bring all singular values above 0.3 % of the Schatten-8 norm to 1
            within 0.5 %; 6 within 1e-6 in exact arithmetic; 8 those above 0.1 % within 1e-5. Smaller ones end between
            0 and 1.

    Returns:
        Shape and dtype of ``matrix``; zero for a zero matrix.

    Reference:
        Amsel et al., "The Polar Express", 2025, https://arxiv.org/abs/2505.16932, for the greedy choice of
        polynomials; Higham, Functions of Matrices, 2008, chapter 8, for the classical iteration.

    >>> polar_factor(torch.tensor([[0.0, -2.0], [0.5, 0.0]])).round(decimals=3) + 0.0
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    tiny = torch.finfo(matrix.dtype).tiny
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / x.abs().amax().clamp_min(tiny)  # so that no square over- or underflows
    x = x / x.norm().clamp_min(1.0)
    for step in range(steps):
        a, b, c = POLAR_SCHEDULE[min(step, len(POLAR_SCHEDULE) - 1)]
        gram = x @ x.mT
        square = gram @ gram
        if step == 0:  # 1.001: rounding must not push a singular value out of the interval
            bound = 1.001 * square.norm().sqrt().sqrt().clamp_min(1e-4)
            a, b, c = a / bound, b / bound**3, c / bound**5
        x = a * x + (b * gram + c * square) @ x
    polar: Tensor = x if matrix.shape[0] <= matrix.shape[1] else x.mT
    return polar


def leading_subspace(matrix: Tensor, rank: int, warm: Tensor | None = None, steps: int = 1) -> Tensor:
    """Orthonormal basis of the span of the leading left singular vectors.

    Cold, from the eigenvectors of ``M M^T`` in float64. Warm, ``steps`` rounds of subspace iteration from an earlier
    basis, in the dtype of the matrix and without reading anything back from the device; each round shrinks the angle to
    the true span by ``(s_(r+1) / s_r)^2``. Both half-steps are orthogonalized, so directions are resolved down to
    machine precision times ``s_1``, not to its root.

    Args:
        matrix: ``M`` of shape ``(m, n)`` with ``m <= n``.
        rank: Number of directions; more than ``m`` means ``m``.
        warm: Basis of shape ``(m, min(rank, m))`` to start from; one of another shape (of another rank) is ignored.
        steps: Rounds from the warm start.

    Returns:
        Shape ``(m, min(rank, m))``, dtype and device of ``matrix``; cold, the vectors themselves in descending order.

    Reference:
        Bauer, 1957, "Das Verfahren der Treppeniteration"; Golub and Van Loan, Matrix Computations, section 8.2.4.
    """
    matrix = matrix.detach()
    if warm is None or warm.shape != (matrix.shape[0], min(rank, matrix.shape[0])):
        wide = to_float64(matrix)
        return symmetric_eigh(wide @ wide.mT)[1][:, :rank].to(matrix)
    return subspace_iteration(matrix, warm.to(matrix), steps)


def subspace_iteration(matrix: Operator, basis: Tensor, steps: int = 1) -> Tensor:
    """The warm part of :func:`leading_subspace`: products with the matrix are all that is asked of it."""
    for _ in range(steps):
        right = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ right).Q
    return basis
