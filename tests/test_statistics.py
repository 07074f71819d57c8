import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.errors import StatisticsError


def filled(x, g, samples):
    statistics = lp.LayerStatistics(x.shape[1], g.shape[1], gradients=True)
    statistics.update_inputs(x)
    statistics.update_gradients(g)
    statistics.add_samples(samples)
    return statistics


def test_moments_equal_their_definition():
    x, g = torch.randn(40, 5) + 1, torch.randn(40, 3)
    statistics = filled(x, g, samples=10)
    torch.testing.assert_close(
        statistics.input_second_moment(), torch.cov(x.mT, correction=0) + torch.outer(x.mean(0), x.mean(0))
    )
    torch.testing.assert_close(statistics.input_mean(), x.mean(0))
    torch.testing.assert_close(statistics.gradient_second_moment(), torch.einsum("ti,tj->ij", g, g) / 10)


def test_merging_parts_in_any_order_equals_the_whole():
    x, g = torch.randn(60, 5), torch.randn(60, 3)
    whole = filled(x, g, 60)
    for order in ([0, 1, 2], [2, 0, 1]):
        parts = [filled(x[i * 20 : i * 20 + 20], g[i * 20 : i * 20 + 20], 20) for i in order]
        merged = parts[0].merge_(parts[1]).merge_(parts[2])
        for (_, ours), (_, theirs) in zip(merged.tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_half_types_are_summed_in_float32():
    statistics = lp.LayerStatistics(1, 1)
    statistics.update_inputs(torch.full((4096, 1), 1.0, dtype=torch.bfloat16))
    statistics.update_inputs(torch.full((1, 1), 1.0, dtype=torch.bfloat16))
    assert statistics.input_gram.item() == 4097.0


def test_empty_and_incomplete_statistics_say_so():
    empty = lp.LayerStatistics(4, 3, gradients=True)
    with pytest.raises(StatisticsError, match="No input was seen"):
        empty.input_second_moment()
    with pytest.raises(StatisticsError, match="without output gradients"):
        lp.LayerStatistics(4, 3).update_gradients(torch.zeros(1, 3))
    with pytest.raises(StatisticsError, match="gradients=True"):
        lp.LayerStatistics(4, 3).gradient_second_moment()
    with pytest.raises(StatisticsError, match="different layers"):
        empty.merge_(lp.LayerStatistics(4, 4, gradients=True))
    with pytest.raises(StatisticsError, match="different layers"):
        empty.merge_(lp.LayerStatistics(4, 3))


def test_missing_names_what_is_missing():
    statistics = lp.LayerStatistics(4, 3, gradients=True)
    assert "no input" in statistics.missing(gradients=False)
    statistics.update_inputs(torch.zeros(5, 4))
    assert "was zero" in statistics.missing(gradients=False)
    statistics.update_inputs(torch.ones(5, 4))
    assert statistics.missing(gradients=False) is None
    assert "no output gradient" in statistics.missing(gradients=True)
    statistics.update_gradients(torch.ones(5, 3))
    assert statistics.missing(gradients=True) is None
