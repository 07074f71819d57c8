import pytest
import torch

from lightning_prehab.linalg.cumulated import running_sum, sum_by_doubling


@pytest.mark.parametrize("size", [0, 1, 2, 3, 8, 100, 1025])
@pytest.mark.parametrize("way", [running_sum, sum_by_doubling])
def test_running_sums_are_those_of_torch(way, size):
    values = torch.rand(3, size, dtype=torch.float64)
    before = values.clone()
    torch.testing.assert_close(way(values), values.cumsum(-1))
    assert torch.equal(values, before)
