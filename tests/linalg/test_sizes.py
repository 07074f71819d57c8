import pytest
import torch

from lightning_prehab.linalg.sizes import pivot_gradients, product_gradients


def factors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("batch", [(), (3,)])
def test_product_gradients_are_those_of_autograd(batch):
    a, b = factors((*batch, 2, 7), (*batch, 5, 2))
    expected = torch.autograd.grad(0.5 * (b @ a).square().sum(), (a, b))
    torch.testing.assert_close(product_gradients(a, b), expected)


def test_pivot_gradients_are_those_of_autograd():
    d, c = factors((2, 7), (5, 2))
    expected = torch.autograd.grad(0.5 * torch.cat([d, c @ d]).square().sum(), (d, c))
    torch.testing.assert_close(pivot_gradients(d, c), expected)
