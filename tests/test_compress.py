import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import PlanError


def test_defaults(mlp, data):
    x, _ = data.tensors
    report = lp.compress_(mlp, keep=0.4, batches=x.split(16))
    assert isinstance(report.plan.factorization, lp.KroneckerSVD)
    assert report.keep <= 0.4
    assert any(isinstance(module, lp.LowRankLinear) for module in mlp.modules())


def test_without_batches_only_svd_works(mlp):
    with pytest.raises(PlanError, match="KroneckerSVD.*needs calibration statistics; pass batches, or choose SVD"):
        lp.compress_(mlp, factorization=lp.KroneckerSVD())
    assert isinstance(lp.compress_(mlp, keep=0.5).plan.factorization, lp.SVD)


def test_loss_policy_and_names_are_used(mlp, data):
    calls = []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    report = lp.compress_(
        mlp, batches=[data.tensors], loss=loss, policy=lp.RankRatio(0.3), target_modules=["0", "2"], exclude_modules="2"
    )
    assert calls == [96]
    assert report.ranks == {"0": int(0.3 * 192 / 28)}


def test_kronecker_beats_the_others_on_the_loss_it_was_made_for():
    """The loss sees one output direction; the inputs live in a few directions that SVD does not see."""
    torch.manual_seed(1)
    x = torch.randn(512, 24) * torch.logspace(1, -2, 24)
    y = torch.randn(24, 1)
    weight = torch.randn(24, 24) * torch.logspace(-1, 1, 24)
    losses = {}
    for factorization in (lp.KroneckerSVD(), lp.WhitenedSVD(), lp.SVD()):
        model = nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight)
            model[1].weight.copy_(y.mT)
        target = model(x).detach() + 0.1 * torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
        lp.compress_(
            model,
            batches=[(x, target)],
            loss=lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]),
            factorization=factorization,
            policy=lp.RankRatio(0.1),
            target_modules="0",
        )
        losses[type(factorization).__name__] = nn.functional.mse_loss(model(x), target).item()
    assert losses["KroneckerSVD"] < losses["WhitenedSVD"] < losses["SVD"]
