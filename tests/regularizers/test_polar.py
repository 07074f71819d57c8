import math

import pytest
import torch

from lightning_prehab.linalg.matrices import POLAR_SCHEDULE, leading_subspace, polar_factor


def best_quintic(low, high):
    """Remez: the odd quintic closest to 1 on [low, high], whose error alternates between four points."""
    inner = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(100):
        x = torch.tensor([low, *inner, high], dtype=torch.float64)
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, sign], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = (9 * b * b - 20 * a * c) ** 0.5  # of the derivative a + 3 b x^2 + 5 c x^4
        inner = ((-3 * b - root) / (10 * c)) ** 0.5, ((-3 * b + root) / (10 * c)) ** 0.5
    return (a, b, c), error


def test_the_schedule_is_the_greedy_minimax_one():
    low, high = 0.003, 1.0
    for polynomial in POLAR_SCHEDULE[:-1]:
        expected, error = best_quintic(low, high)
        assert polynomial == pytest.approx(expected, rel=1e-9)
        low, high = 1 - error, 1 + error
    assert low > 0.995
    assert POLAR_SCHEDULE[-1] == (15 / 8, -10 / 8, 3 / 8)


@pytest.mark.parametrize(("steps", "error"), [(5, 6e-3), (6, 1e-6), (8, 1e-12)])
def test_what_the_docstring_says_of_the_scalar_map(steps, error):
    x = torch.logspace(-2.52, 0, 5000, dtype=torch.float64)
    for step in range(steps):
        a, b, c = POLAR_SCHEDULE[min(step, len(POLAR_SCHEDULE) - 1)]
        x = a * x + b * x**3 + c * x**5
    assert (x - 1).abs().max() < error


def spectrum(shape, values, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return ((u * values) @ vt).to(dtype), (u @ vt).to(dtype)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (40, 40), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_polar_factor_equals_the_svd_at_every_scale(shape, scale):
    m, expected = spectrum(shape, torch.logspace(0, -2, min(shape), dtype=torch.float64))
    torch.testing.assert_close(polar_factor(m * scale), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(polar_factor((m * scale).float()), expected.float(), atol=1e-4, rtol=0)


def test_polar_factor_of_a_flat_and_of_a_rank_deficient_matrix():
    m, expected = spectrum((30, 50), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close(polar_factor(m), expected, atol=1e-7, rtol=0)
    u, _, vt = torch.linalg.svd(m)
    thin = u[:, :3] @ vt[:3]
    # Rounding leaves about eps in the null space, which every step multiplies by its linear coefficient.
    growth = math.prod(POLAR_SCHEDULE[min(step, len(POLAR_SCHEDULE) - 1)][0] for step in range(8))
    bound = torch.finfo(torch.float32).eps * growth
    assert bound < 1e-3
    torch.testing.assert_close(polar_factor(thin.float()), thin.float(), atol=bound, rtol=0)


def test_polar_factor_of_a_random_matrix_is_the_nuclear_norm_within_a_thousandth():
    m = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    nuclear = torch.linalg.svdvals(m.double()).sum().item()
    assert (m * polar_factor(m, 6)).sum().item() == pytest.approx(nuclear, rel=1e-3)


def test_polar_factor_of_zero_is_zero():
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(polar_factor(torch.zeros(3, 4, dtype=dtype)), torch.zeros(3, 4, dtype=dtype))


def test_six_steps_of_three_products_beat_eighteen_of_two():
    """The classical iteration x (3 - x^2) / 2, twice as many products, from the Frobenius norm."""
    m, expected = spectrum((60, 60), torch.logspace(0, -2, 60, dtype=torch.float64))
    x = m / m.norm()
    for _ in range(9):  # 18 products, as many as our 6 steps
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    assert (x - expected).norm() > 100 * (polar_factor(m, 6) - expected).norm()


@pytest.mark.parametrize("shape", [(6, 9), (7, 7), (1, 4)])
def test_leading_subspace_cold_is_exact(shape):
    m, _ = spectrum(shape, torch.logspace(0.5, -0.5, shape[0], dtype=torch.float64))
    u = torch.linalg.svd(m)[0]
    for rank in (1, 3, 20):
        basis = leading_subspace(m, rank)
        k = min(rank, shape[0])
        assert basis.shape == (shape[0], k)
        torch.testing.assert_close(basis @ basis.mT, u[:, :k] @ u[:, :k].mT, atol=1e-8, rtol=0)


def test_leading_subspace_warm_converges_at_the_rate_of_the_gap():
    values = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.9, 0.5], dtype=torch.float64)
    m, _ = spectrum((6, 9), values)
    exact = leading_subspace(m, 3)
    next_one = leading_subspace(m, 4)[:, 3:]  # what the gap is to; a start without it would come nearer sooner
    basis, distances = torch.linalg.qr(exact + 0.1 * next_one).Q, []
    for _ in range(8):
        basis = leading_subspace(m, 3, basis)
        distances.append((basis @ basis.mT - exact @ exact.mT).norm().item())
        torch.testing.assert_close(basis.mT @ basis, torch.eye(3, dtype=torch.float64))
    assert distances[7] / distances[4] == pytest.approx(0.25**3, rel=0.01)
    again = leading_subspace(m, 3, leading_subspace(m, 3, exact), steps=2)
    torch.testing.assert_close(again @ again.mT, exact @ exact.mT)


def test_leading_subspace_warm_keeps_weak_directions_in_float32():
    """A plain product with M M^T would lose all below 3e-4 of the largest singular value."""
    values = torch.logspace(0, -5, 8, dtype=torch.float64)
    m, _ = spectrum((8, 12), values, torch.float32)
    exact = leading_subspace(m, 6)
    warm = leading_subspace(m, 6, exact, steps=5)
    torch.testing.assert_close(warm @ warm.mT, exact @ exact.mT, atol=1e-2, rtol=0)


def test_leading_subspace_of_a_rank_deficient_matrix_is_still_a_basis():
    exact = leading_subspace(torch.zeros(4, 6), 2)
    basis = leading_subspace(torch.zeros(4, 6), 2, exact)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(2))


def test_a_basis_of_another_rank_is_not_a_warm_start():
    m = torch.randn(5, 8)
    torch.testing.assert_close(leading_subspace(m, 3, torch.eye(5)[:, :2]), leading_subspace(m, 3))
