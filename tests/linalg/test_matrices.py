import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prehab.errors import ArgumentError, NumericalError
from lightning_prehab.linalg import matrices

SHAPES = [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)]


def spd(size: int, seed: int = 0) -> torch.Tensor:
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT / size


@given(st.integers(1, 300), st.integers(1, 300))
def test_break_even_is_the_last_rank_that_saves(m, n):
    rank = matrices.break_even_rank(m, n)
    assert rank * (m + n) < m * n or rank == 0
    assert (rank + 1) * (m + n) >= m * n


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_equal_numpy(shape):
    matrix = torch.randn(shape)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    torch.testing.assert_close(matrices.singular_values(matrix), torch.from_numpy(expected), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(bad):
    matrix = torch.randn(4, 5)
    matrix[1, 2] = bad
    with pytest.raises(NumericalError, match="1 NaN or Inf entries out of 20"):
        matrices.singular_values(matrix)


def test_eigh_falls_back_to_the_cpu_then_gives_up(monkeypatch):
    real, calls = torch.linalg.eigh, []

    def flaky(matrix, failures=1):
        calls.append(matrix)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", flaky)
    values, _ = matrices.symmetric_eigh(torch.diag(torch.tensor([1.0, 3.0])))
    assert values.tolist() == [3.0, 1.0]
    calls.clear()
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: flaky(matrix, failures=9))
    with pytest.raises(NumericalError, match="did not converge"):
        matrices.symmetric_eigh(torch.eye(2))


def test_gram_root_and_its_inverse():
    gram = spd(6)
    root, inverse = matrices.gram_root(gram)
    torch.testing.assert_close(root @ root.mT, gram)
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=torch.float64))
    for matrix in matrices.gram_root(torch.zeros(3, 3)):
        torch.testing.assert_close(matrix, torch.eye(3, dtype=torch.float64))


@given(st.floats(0, 1), st.integers(1, 8))
def test_shrinkage_keeps_the_trace(amount, size):
    gram = spd(size)
    shrunk = matrices.shrink(gram, amount)
    torch.testing.assert_close(shrunk.trace(), gram.trace())
    off = ~torch.eye(size, dtype=torch.bool)
    torch.testing.assert_close(shrunk[off], gram[off] * (1 - amount))


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan")])
def test_shrinkage_out_of_range(amount):
    with pytest.raises(ArgumentError, match="Shrinkage must lie in"):
        matrices.shrink(torch.eye(2), amount)


@pytest.mark.parametrize("shape", SHAPES)
def test_stable_and_effective_rank_equal_numpy(shape):
    matrix = torch.randn(shape)
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    p = s / s.sum()
    assert matrices.stable_rank(matrix).item() == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-6)
    assert matrices.effective_rank(matrix).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_ranks_of_zero():
    assert matrices.stable_rank(torch.zeros(3, 4)).item() == 0.0
    assert matrices.effective_rank(torch.zeros(3, 4)).item() == 0.0


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_power_iteration_warm_start_reaches_the_leading_triple(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vt = np.linalg.svd(matrix.numpy())
    v = torch.randn(shape[1], dtype=torch.float64)
    for _ in range(300):  # one iteration per call, carried over
        sigma, left, v = matrices.power_iteration(matrix, v, 1)
    assert sigma.item() == pytest.approx(s[0], rel=1e-8)
    torch.testing.assert_close(torch.outer(left, v), torch.from_numpy(np.outer(u[:, 0], vt[0])), atol=1e-5, rtol=0)


def test_power_iteration_of_zero_is_finite():
    sigma, u, v = matrices.power_iteration(torch.zeros(3, 4), torch.ones(4), 3)
    assert sigma.item() == 0.0
    assert torch.isfinite(u).all()
    torch.testing.assert_close(v.norm().item(), 1.0)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (6, 6)])
def test_polar_factor_equals_the_svd(shape):
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.05, min(shape), dtype=torch.float64)
    assert s[-1] / s.norm() > 0.02
    torch.testing.assert_close(matrices.polar_factor((u * s) @ vt), u @ vt, atol=1e-3, rtol=0)


def test_shrinkage_intensity_is_the_share_of_noise():
    """Over many samples it equals the known ratio of the sampling variance to the spread of the estimate."""
    torch.manual_seed(1)
    root = torch.diag(torch.linspace(2.0, 0.2, 10, dtype=torch.float64))
    truth = root @ root
    found, wanted = [], []
    for _ in range(200):
        x = torch.randn(60, 10, dtype=torch.float64) @ root
        first, second = x[:20].mT @ x[:20] / 20, x[20:].mT @ x[20:] / 40
        whole = x.mT @ x / 60
        found.append(matrices.shrinkage_intensity(first, second, 1 / 3))
        spread = (whole - torch.eye(10, dtype=torch.float64) * whole.trace() / 10).square().sum()
        wanted.append(float((whole - truth).square().sum() / spread))
    assert np.mean(found) == pytest.approx(np.mean(wanted), rel=0.1)
    assert matrices.shrinkage_intensity(truth, truth, 0.5) == 0.0
    assert matrices.shrinkage_intensity(torch.eye(3), torch.eye(3), 0.5) == 0.0


def test_finite_entries_whose_sum_overflows_are_finite():
    matrices.require_finite(torch.full((4, 4), 6e4, dtype=torch.float16), "The matrix")
    matrices.require_finite(torch.full((4, 4), 3e38), "The matrix")
    matrices.require_finite(torch.zeros(0), "Nothing")
    for pair in ([float("inf"), -float("inf")], [float("nan"), 1.0]):
        with pytest.raises(NumericalError, match="The matrix has [12] NaN or Inf entries out of 2"):
            matrices.require_finite(torch.tensor(pair), "The matrix")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_of_eigenvectors_are_not_left_to_the_solver(dtype, monkeypatch):
    rows = torch.randn(3, 12, 20, dtype=dtype)
    gram = rows @ rows.mT
    values, vectors = matrices.symmetric_eigh(gram, dtype)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, gram, rtol=1e-4, atol=1e-4)
    assert matrices.symmetric_eigh(torch.zeros(0, 0, dtype=dtype), dtype)[1].shape == (0, 0)
    solve = torch.linalg.eigh

    def turned(matrix):
        values, vectors = solve(matrix)
        return values, vectors * torch.tensor([1.0, -1.0]).repeat(6).to(vectors)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    assert torch.equal(matrices.symmetric_eigh(gram, dtype)[1], vectors)
