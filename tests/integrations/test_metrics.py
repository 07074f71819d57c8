import pytest
import torch
from torch import nn

from lightning_prehab.errors import ArgumentError, NumericalError, TargetError
from lightning_prehab.integrations.metrics import EffectiveRankMetric, StableRankMetric
from lightning_prehab.layers.linear import LowRankLinear
from lightning_prehab.linalg.matrices import effective_rank, stable_rank

CASES = [(StableRankMetric, stable_rank), (EffectiveRankMetric, effective_rank)]
pytestmark = pytest.mark.parametrize(("kind", "function"), CASES, ids=lambda case: getattr(case, "__name__", None))


def test_mean_over_matrices_batches_and_modules(kind, function):
    metric, single, batch = kind(), torch.randn(4, 6), torch.randn(2, 3, 5, 4)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4)))
    for given in (single, batch, net):
        metric.update(given)
    matrices = [single, *batch.flatten(0, 1), net[0].weight, net[2][0].weight]
    torch.testing.assert_close(metric.compute(), torch.stack([function(m) for m in matrices]).mean())
    assert metric.count == 9
    metric.reset()
    assert metric.count == 0


def test_low_rank_layers_count_once_with_their_product(kind, function):
    layer, metric = LowRankLinear(8, 6, rank=2), kind()
    metric.update(nn.Sequential(layer))
    assert metric.count == 1
    torch.testing.assert_close(metric.compute(), function(layer.weight))


def test_shared_weights_count_once(kind, function):
    one, two, metric = nn.Linear(4, 4), nn.Linear(4, 4), kind()
    two.weight = one.weight
    metric.update(nn.Sequential(one, two, one))
    assert metric.count == 1


def test_processes_are_averaged_by_their_counts(kind, function):
    """What torchmetrics does with dist_reduce_fx="sum"."""
    whole, parts, matrices = kind(), [kind(), kind()], torch.randn(5, 4, 6)
    whole.update(matrices)
    parts[0].update(matrices[:1])
    parts[1].update(matrices[1:])
    merged = kind()
    for part in parts:
        for name, reduction in merged._reductions.items():
            setattr(merged, name, reduction(torch.stack([getattr(merged, name), getattr(part, name)])))
    torch.testing.assert_close(merged.total / merged.count, whole.compute())


def test_half_precision_and_forward(kind, function):
    m = torch.randn(4, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(kind()(m), function(m))


def test_nothing_is_nan_and_zero_is_zero(kind, function):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert torch.isnan(kind().compute())
    assert kind()(torch.zeros(3, 4)) == 0


def test_refusals(kind, function):
    with pytest.raises(ArgumentError, match=r"shape \(3,\)"):
        kind().update(torch.ones(3))
    with pytest.raises(TargetError, match="ReLU has no linear layer"):
        kind().update(nn.ReLU())
    with pytest.raises(NumericalError, match="NaN or Inf"):
        kind().update(torch.full((2, 2), float("nan")))
