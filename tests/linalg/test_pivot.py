"""The pivot layout of a matrix: the same product, small entries, the right numbers of them."""

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.linalg.pivot import LARGEST_ENTRY, as_factor, balanced_factors, from_factor, is_order, pivot_parts


def random_factors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    m, n = torch.randint(1, 40, (2,), generator=generator).tolist()
    top = min(m, n)
    rank = {0: top, 1: 1}.get(seed % 4, int(torch.randint(1, top + 1, (), generator=generator)))
    a = torch.randn(rank, n, generator=generator, dtype=dtype)
    return a, torch.randn(m, rank, generator=generator, dtype=dtype)


@pytest.mark.parametrize("block", range(4))
def test_it_is_the_same_matrix(block):
    for seed in range(50 * block, 50 * block + 50):
        a, b = random_factors(seed)
        (rank, n), m = a.shape, len(b)
        parts = pivot_parts(a, b)
        assert parts.D.numel() + parts.C.numel() == rank * (m + n - rank)
        product = b @ a
        rebuilt = torch.empty_like(product)
        rebuilt[parts.rows[:rank]] = parts.D
        rebuilt[parts.rows[rank:]] = parts.C @ parts.D
        torch.testing.assert_close(rebuilt, product, atol=1e-10 * float(product.abs().max()), rtol=0)
        assert not parts.C.numel() or parts.C.abs().max() <= LARGEST_ENTRY
        assert is_order(parts.order, m)
        factor = as_factor(parts.C, parts.order)
        assert torch.equal(from_factor(factor, parts.order), parts.C)
        torch.testing.assert_close(factor @ parts.D, product)
        back = balanced_factors(parts.D, parts.C, parts.order)
        torch.testing.assert_close(back[1] @ back[0], product)
        torch.testing.assert_close(back[0].norm(dim=1), back[1].norm(dim=0))


@pytest.mark.parametrize(
    "b",
    [
        torch.zeros(9, 4),
        torch.randn(9, 2) @ torch.randn(2, 4),
        torch.ones(9, 4),
        torch.randn(9, 4) * torch.logspace(-18, 18, 4),
        torch.randn(9, 4) * torch.logspace(-18, 18, 9)[:, None],
    ],
    ids=["zero", "deficient", "ones", "scaled columns", "scaled rows"],
)
def test_degenerate_matrices_have_finite_parts(b):
    a = torch.randn(4, 7)
    parts = pivot_parts(a, b)
    assert all(part.isfinite().all() for part in parts[:2])
    product = b.double() @ a.double()
    found = as_factor(parts.C, parts.order) @ parts.D
    torch.testing.assert_close(found, product, atol=1e-12 * float(product.abs().max()), rtol=0)
    back = balanced_factors(parts.D, parts.C, parts.order)
    torch.testing.assert_close(back[1] @ back[0], product, atol=1e-10 * float(product.abs().max()), rtol=0)


def test_entries_stay_small_where_elimination_lets_them_grow():
    """Wilkinson's matrix, on which partial pivoting doubles entries with every step."""
    size = 24
    b = torch.eye(size) - torch.ones(size, size).tril(-1)
    b = torch.cat([b, torch.randn(size, size).sign()])
    parts = pivot_parts(torch.eye(size), b)
    assert parts.C.abs().max() <= LARGEST_ENTRY


def test_what_is_no_number_is_refused():
    with pytest.raises(lp.PrehabError, match="The factor B has 1 NaN or Inf"):
        pivot_parts(torch.ones(1, 2), torch.tensor([[1.0], [float("nan")]]))


@pytest.mark.parametrize(
    "order",
    [torch.tensor([0, 0, 1]), torch.tensor([0, 1, 3]), torch.tensor([-1, 0, 1]), torch.rand(3), torch.arange(4)],
)
def test_what_is_no_order_is_told(order):
    assert not is_order(order, 3)
    assert is_order(torch.tensor([2, 0, 1]), 3)
