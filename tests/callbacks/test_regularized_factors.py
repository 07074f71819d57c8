"""A layer that has been cut is regularized by its factors as its product would be."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_prehab as lp
from lightning_prehab.callbacks._injection import add_to_gradients_, pull_of
from lightning_prehab.callbacks._regularized import RegularizedLayer, matrices
from lightning_prehab.kinds import view_of
from lightning_prehab.kinds.linear import LinearView
from lightning_prehab.linalg.products import Product
from lightning_prehab.regularizers import Metric
from lightning_prehab.regularizers.metric import IDENTITY

LAYERS = {
    "linear": (lambda: nn.Linear(20, 14), "factors"),
    "wide": (lambda: nn.Linear(14, 20), "factors"),
    "pivot": (lambda: nn.Linear(20, 14), "pivot"),
    "convolution": (lambda: nn.Conv2d(4, 12, 3), "factors"),
    "packed convolution": (lambda: nn.Conv2d(4, 12, 3), "pivot"),
    "groups": (lambda: nn.Conv2d(8, 16, 3, groups=2), "factors"),
    "attention": (lambda: nn.MultiheadAttention(16, 2), "factors"),
}
SPACES = ["weight", "activation", "loss"]
RANK = 3


def made(name, space):
    """Each matrix of a layer that has been cut, and a dense layer that holds the same matrix, in the same metric."""
    build, layout = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(build())
    lp.compress_(model, 0.75, factorization=lp.SVD(), layout=layout, progress=False)
    found = []
    for view in matrices(lp.find_targets(model, cut_again=True)).values():
        if view.rank is None or view.rank <= RANK:
            continue
        m, n = view.shape
        dense = nn.Linear(n, m)
        dense.weight = nn.Parameter(view.weight.detach().clone())
        roots = [torch.linalg.cholesky(torch.cov(torch.randn(size, 4 * size))).mT for size in (m, n)]
        metric = {"weight": IDENTITY, "activation": Metric(right=roots[1].mT), "loss": Metric(roots[0], roots[1].mT)}[
            space
        ]
        ours = RegularizedLayer("ours", view, RANK, metric)
        found.append((ours, RegularizedLayer("dense", LinearView(dense), RANK, metric)))
    assert found
    return found


def same_matrix(ours, dense, tolerance=2e-4):
    assert_close(ours.view.weight, dense.view.weight, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_shrinkage_of_the_first_factor_is_one_of_the_product(name, space, monkeypatch):
    for ours, dense in made(name, space):
        with monkeypatch.context() as patch:
            patch.setattr(Product, "dense", None)  # nothing is multiplied out
            for progress in (0.3, 0.7, 1.0):
                shrinkage = lp.TailShrinkage(start=0.05, every=1)
                ours.shrink_(shrinkage, progress, 0.1)
                dense.shrink_(shrinkage, progress, 0.1)
                same_matrix(ours, dense)
        values = torch.linalg.svdvals(ours.view.weight)
        assert values[RANK] < 1e-5 * values[0]


@pytest.mark.parametrize("space", SPACES)
def test_another_shrinkage_does_the_same(space):
    """Of the directions that are there; a polar factor has others where the product has none."""
    for ours, dense in made("linear", space):
        before, rank = ours.view.weight.detach().clone(), ours.view.rank
        decay = lp.SpectralWeightDecay(0.5, every=1, steps=12)
        ours.shrink_(decay, 1.0, 0.05)
        seen, old = (dense.metric.view(one) for one in (ours.view.weight.detach(), before))
        values, were = torch.linalg.svdvals(seen)[:rank], torch.linalg.svdvals(old)[:rank]
        assert_close(were - values, torch.full_like(values, 0.025), atol=2e-3, rtol=0.0)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", LAYERS)
def test_tails_and_spectra_are_those_of_the_product(name, space):
    for ours, dense in made(name, space):
        for one, other in zip(ours.tail(), dense.tail(), strict=True):
            assert_close(one, other, atol=1e-4, rtol=1e-3)
        assert_close(ours.cut(), dense.cut(), atol=2e-4, rtol=2e-3)
        for one, other in zip(ours.spectrum(), dense.spectrum(), strict=True):
            assert_close(one.double(), other.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("penalty", [lp.TailEnergy(), lp.StableRank(), lp.NuclearNorm(), lp.EffectiveRank()], ids=repr)
@pytest.mark.parametrize("name", ["linear", "pivot", "convolution"])
def test_the_gradient_of_a_penalty_reaches_both_factors(name, penalty):
    ours, dense = made(name, "loss")[0]
    value = dense.penalty(penalty)
    (gradient,) = torch.autograd.grad(value, [dense.parameter])
    expected = torch.autograd.grad((ours.view.weight * gradient).sum(), list(ours.parameters))
    assert_close(ours.penalty(penalty), value, atol=1e-4, rtol=1e-4)
    optimizer = torch.optim.SGD(ours.parameters, lr=0.0)
    for parameter in ours.parameters:
        parameter.grad = torch.ones_like(parameter)
    ours.memory.clear()
    add_to_gradients_(optimizer, [ours], lambda layers: pull_of(None, penalty, layers, layers)[0], 0.5, 1.0, 1.0)
    for parameter, one in zip(ours.parameters, expected, strict=True):
        assert_close(parameter.grad, 1.0 + 0.5 * one, atol=1e-3, rtol=1e-3)


def test_memories_go_through_a_checkpoint():
    ours, _ = made("pivot", "loss")[0]
    shrinkage = lp.TailShrinkage(refresh=5, every=1)
    ours.shrink_(shrinkage, 0.2, 0.1)
    again = RegularizedLayer.from_state_dict("ours", ours.view, ours.state_dict())
    before = [parameter.detach().clone() for parameter in ours.parameters]
    ours.shrink_(shrinkage, 0.3, 0.1)
    once = [parameter.detach().clone() for parameter in ours.parameters]
    with torch.no_grad():
        for parameter, value in zip(ours.parameters, before, strict=True):
            parameter.copy_(value)
    again.shrink_(shrinkage, 0.3, 0.1)
    assert all(torch.equal(parameter, value) for parameter, value in zip(ours.parameters, once, strict=True))


def test_what_a_low_rank_view_says():
    model = nn.Sequential(nn.Linear(12, 10))
    lp.compress_(model, 0.5, factorization=lp.SVD(), progress=False)
    view = view_of(lp.find_targets(model, cut_again=True)["0"])
    assert view.shape == (10, 12)
    assert view.rank == model[0].rank
    assert [id(one) for one in view.parameters] == [id(model[0].A.weight), id(model[0].B.weight)]
    target = 0.5 * view.weight.detach()
    view.write_(target)
    assert_close(view.weight, target)
