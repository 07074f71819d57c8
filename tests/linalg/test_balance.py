"""Factors that share the size of their product evenly."""

import pytest
import torch

from lightning_prehab.linalg.balance import balanced


@pytest.mark.parametrize(("m", "n", "rank"), [(8, 5, 3), (5, 8, 5), (6, 6, 1), (7, 7, 7)])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_the_product_stays_and_both_have_the_roots_of_its_singular_values(m, n, rank, scale):
    a, b = torch.randn(rank, n).double() * scale, torch.randn(m, rank).double() / scale
    new_a, new_b = balanced(a, b)
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=1e-9, atol=1e-9)
    values = torch.linalg.svdvals(b @ a)[:rank]
    for factor in (new_a, new_b):
        torch.testing.assert_close(torch.linalg.svdvals(factor), values.sqrt(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(new_a @ new_a.mT, torch.diag(values), rtol=1e-5, atol=1e-6)


def test_a_product_of_lower_rank_is_balanced_too():
    a, b = torch.randn(4, 6), torch.randn(5, 1) @ torch.randn(1, 4)
    new_a, new_b = balanced(a, b)
    assert torch.isfinite(new_a).all()
    torch.testing.assert_close((new_b @ new_a).float(), b @ a, rtol=1e-5, atol=1e-5)
