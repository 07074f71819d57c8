"""Factors that share the size of their product evenly."""

import pytest
import torch

from lightning_prehab.linalg.balance import balanced, even_scales


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


def test_even_scales_are_powers_of_two_that_make_rows_and_columns_alike():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, 7, generator=generator) * 10.0 ** torch.arange(-6, 6).reshape(3, 4, 1)
    b = torch.randn(3, 5, 4, generator=generator)
    scales = even_scales(a, b)
    assert torch.equal(scales.log2(), scales.log2().round())
    ratio = (scales[..., None] * a).norm(dim=-1) / (b / scales[..., None, :]).norm(dim=-2)
    assert 0.5 <= float(ratio.min()) < float(ratio.max()) <= 2.0
    assert torch.equal((b / scales[..., None, :]) @ (scales[..., None] * a), b @ a)
    for dead in (torch.zeros_like(b), torch.full_like(b, torch.inf), torch.full_like(b, torch.nan)):
        assert torch.equal(even_scales(a, dead), torch.ones(3, 4))
