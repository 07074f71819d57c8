import pytest
import torch

from lightning_prehab.linalg.matrices import gram_root
from lightning_prehab.regularizers import IDENTITY, Metric
from lightning_prehab.regularizers.metric import project


def spd(size, seed):
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT / size


def unsymmetric(size, seed):
    """A root need not be symmetric: a Cholesky factor is one too."""
    return torch.linalg.cholesky(spd(size, seed))


@pytest.mark.parametrize("left", [None, unsymmetric(5, 1).mT])
@pytest.mark.parametrize("right", [None, unsymmetric(8, 2)])
class TestMetric:
    def test_there_and_back(self, left, right):
        w, metric = torch.randn(5, 8, dtype=torch.float64), Metric(left, right)
        torch.testing.assert_close(metric.back(metric.view(w)), w)
        torch.testing.assert_close(metric.view(metric.back(w)), w)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_projector_is_the_projection_of_what_is_seen(self, left, right, side):
        w, metric = torch.randn(5, 8, dtype=torch.float64), Metric(left, right)
        basis = torch.linalg.qr(torch.randn(5 if side == "left" else 8, 2, dtype=torch.float64)).Q
        outer, inner = metric.projector(side, basis)
        assert outer.shape == basis.shape
        assert inner.shape == basis.mT.shape
        seen = metric.view(w)
        projected = basis @ basis.mT @ seen if side == "left" else seen @ basis @ basis.mT
        torch.testing.assert_close(metric.view(project(w, side, outer, inner)), projected)
        once = project(w, side, outer, inner)
        torch.testing.assert_close(project(once, side, outer, inner), once)
        spanning = outer if side == "left" else inner.mT
        torch.testing.assert_close(spanning.mT @ spanning, torch.eye(2, dtype=torch.float64))


def test_from_grams_is_the_metric_of_the_cut():
    g, c, w = spd(5, 1), spd(8, 2), torch.randn(5, 8, dtype=torch.float64)
    seen = Metric.from_grams(g, c).view(w)
    torch.testing.assert_close(seen.square().sum(), torch.trace(g @ w @ c @ w.mT))
    torch.testing.assert_close(Metric.from_grams(None, c, shrinkage=0.3).right, gram_root(c, 0.3)[0])
    assert Metric.from_grams() is not None
    assert Metric.from_grams().left is None


def test_float32_weights_in_a_float64_metric_stay_float32():
    metric, w = Metric.from_grams(spd(5, 1), spd(8, 2)), torch.randn(5, 8)
    assert metric.view(w).dtype == metric.back(w).dtype == torch.float32
    torch.testing.assert_close(metric.back(metric.view(w)), w, rtol=1e-3, atol=1e-4)


def test_the_identity():
    w = torch.randn(5, 8)
    assert IDENTITY.view(w) is w
    assert IDENTITY.back(w) is w
    assert IDENTITY.is_identity_on("left")
    assert not Metric(right=torch.eye(8)).is_identity_on("right")
    assert Metric(right=torch.eye(8)).is_identity_on("left")


def test_inverses_are_computed_once():
    metric = Metric(left=torch.eye(3) * 2)
    assert metric.left_inverse is metric.left_inverse
    torch.testing.assert_close(metric.left_inverse, torch.eye(3) / 2)
