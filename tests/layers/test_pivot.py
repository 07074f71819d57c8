"""What the pivot layout has that two factors have not: an order of rows."""

import pytest
import torch

import lightning_prehab as lp


@pytest.mark.parametrize("order", [[0, 0, 1, 2], [0, 1, 2, 4], [-1, 0, 1, 2]])
def test_a_damaged_order_is_not_loaded(order):
    layer = lp.PivotLinear(5, 4, 2)
    before = layer.order.clone()
    damaged = layer.state_dict() | {"order": torch.tensor(order)}
    with pytest.raises(RuntimeError, match="order must name each of 4 rows once"):
        layer.load_state_dict(damaged)
    assert torch.equal(layer.order, before)


def test_another_order_is():
    layer, other = (lp.PivotLinear(5, 4, 2) for _ in range(2))
    other.order = torch.tensor([3, 1, 0, 2])
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), other(x))
