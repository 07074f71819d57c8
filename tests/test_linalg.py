import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prehab import linalg
from lightning_prehab.errors import ArgumentError, NumericalError

SHAPES = [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)]


def spd(size: int, seed: int = 0) -> torch.Tensor:
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT / size


@given(st.integers(1, 300), st.integers(1, 300))
def test_break_even_is_the_last_rank_that_saves(m, n):
    rank = linalg.break_even_rank(m, n)
    assert rank * (m + n) < m * n or rank == 0
    assert (rank + 1) * (m + n) >= m * n


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_equal_numpy(shape):
    matrix = torch.randn(shape)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    torch.testing.assert_close(linalg.singular_values(matrix), torch.from_numpy(expected), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_weighted_low_rank_is_the_truncated_svd_in_the_metric(shape, left, right):
    m, n = shape
    weight = torch.randn(m, n, dtype=torch.float64)
    g = spd(m, 1) if left else None
    c = spd(n, 2) if right else None
    lt = np.linalg.cholesky(g.numpy()).T if left else np.eye(m)
    r = np.linalg.cholesky(c.numpy()) if right else np.eye(n)
    u, s, vt = np.linalg.svd(lt @ weight.numpy() @ r, full_matrices=False)
    values = linalg.weighted_singular_values(weight, g, c)
    torch.testing.assert_close(values, torch.from_numpy(s), atol=1e-7, rtol=1e-7)
    for rank in range(1, min(m, n) + 1):
        a, b = linalg.weighted_low_rank(weight, rank, g, c)
        expected = np.linalg.inv(lt) @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(r)
        torch.testing.assert_close(b @ a, torch.from_numpy(expected), atol=1e-9, rtol=1e-8)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces_the_matrix_under_rank_deficient_metrics(shape):
    m, n = shape
    weight = torch.randn(m, n)
    thin_left, thin_right = torch.randn(m, max(m // 2, 1)), torch.randn(n, max(n // 2, 1))
    a, b = linalg.weighted_low_rank(weight, min(m, n), thin_left @ thin_left.mT, thin_right @ thin_right.mT)
    torch.testing.assert_close((b @ a).float(), weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.ones(4, 6), torch.zeros(6, 4)])
def test_degenerate_weights_give_finite_factors(weight):
    for rank in (1, 4):
        a, b = linalg.weighted_low_rank(weight, rank)
        assert torch.isfinite(a).all()
        assert torch.isfinite(b).all()
        torch.testing.assert_close((b @ a).float(), weight, atol=1e-6, rtol=0)


def test_ill_conditioned_metric():
    scales = torch.logspace(0, -8, 12, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    gram = (basis * scales) @ basis.mT
    weight = torch.randn(8, 12, dtype=torch.float64)
    a, b = linalg.weighted_low_rank(weight, 3, None, gram)
    error = weight - b @ a
    expected = np.linalg.svd((weight @ (basis * scales.sqrt())).numpy(), compute_uv=False)
    torch.testing.assert_close(
        (error @ gram * error).sum().sqrt().item(), float(np.sqrt((expected[3:] ** 2).sum())), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(bad):
    weight = torch.randn(4, 5)
    weight[1, 2] = bad
    with pytest.raises(NumericalError, match="1 NaN or Inf entries out of 20"):
        linalg.weighted_low_rank(weight, 2)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        linalg.weighted_low_rank(torch.randn(4, 5), 2, None, torch.full((5, 5), bad))


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_rank_out_of_range(rank):
    with pytest.raises(ArgumentError, match=rf"Rank {rank} is outside \[1, 4\]"):
        linalg.weighted_low_rank(torch.randn(4, 5), rank)


def test_eigh_falls_back_to_the_cpu_then_gives_up(monkeypatch):
    real, calls = torch.linalg.eigh, []

    def flaky(matrix, failures=1):
        calls.append(matrix)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", flaky)
    values, _ = linalg.symmetric_eigh(torch.diag(torch.tensor([1.0, 3.0])))
    assert values.tolist() == [3.0, 1.0]
    calls.clear()
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: flaky(matrix, failures=9))
    with pytest.raises(NumericalError, match="did not converge"):
        linalg.symmetric_eigh(torch.eye(2))


def test_gram_root_and_its_inverse():
    gram = spd(6)
    root, inverse = linalg.gram_root(gram)
    torch.testing.assert_close(root @ root.mT, gram)
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=torch.float64))
    for matrix in linalg.gram_root(torch.zeros(3, 3)):
        torch.testing.assert_close(matrix, torch.eye(3, dtype=torch.float64))


@given(st.floats(0, 1), st.integers(1, 8))
def test_shrinkage_keeps_the_trace(amount, size):
    gram = spd(size)
    shrunk = linalg.shrink(gram, amount)
    torch.testing.assert_close(shrunk.trace(), gram.trace())
    off = ~torch.eye(size, dtype=torch.bool)
    torch.testing.assert_close(shrunk[off], gram[off] * (1 - amount))


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan")])
def test_shrinkage_out_of_range(amount):
    with pytest.raises(ArgumentError, match="Shrinkage must lie in"):
        linalg.shrink(torch.eye(2), amount)


@pytest.mark.parametrize("shape", SHAPES)
def test_stable_and_effective_rank_equal_numpy(shape):
    matrix = torch.randn(shape)
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    p = s / s.sum()
    assert linalg.stable_rank(matrix).item() == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-6)
    assert linalg.effective_rank(matrix).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_ranks_of_zero():
    assert linalg.stable_rank(torch.zeros(3, 4)).item() == 0.0
    assert linalg.effective_rank(torch.zeros(3, 4)).item() == 0.0


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_power_iteration_warm_start_reaches_the_leading_triple(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vt = np.linalg.svd(matrix.numpy())
    v = torch.randn(shape[1], dtype=torch.float64)
    for _ in range(300):  # one iteration per call, carried over
        sigma, left, v = linalg.power_iteration(matrix, v, 1)
    assert sigma.item() == pytest.approx(s[0], rel=1e-8)
    torch.testing.assert_close(torch.outer(left, v), torch.from_numpy(np.outer(u[:, 0], vt[0])), atol=1e-5, rtol=0)


def test_power_iteration_of_zero_is_finite():
    sigma, u, v = linalg.power_iteration(torch.zeros(3, 4), torch.ones(4), 3)
    assert sigma.item() == 0.0
    assert torch.isfinite(u).all()
    torch.testing.assert_close(v.norm().item(), 1.0)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (6, 6)])
def test_polar_factor_equals_the_svd(shape):
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.05, min(shape), dtype=torch.float64)
    assert s[-1] / s.norm() > 0.02
    torch.testing.assert_close(linalg.polar_factor((u * s) @ vt), u @ vt, atol=1e-3, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 1000))
def test_error_falls_as_the_rank_grows(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    g, c = spd(m, seed), spd(n, seed + 1)
    errors = []
    for rank in range(1, min(m, n) + 1):
        a, b = linalg.weighted_low_rank(weight, rank, g, c)
        error = weight - b @ a
        errors.append(float(torch.trace(g @ error @ c @ error.mT)))
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
