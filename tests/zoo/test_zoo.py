"""Every architecture of the zoo: plan, cut, forward, backward, save, load."""

import pytest
import torch
from architecture import loss_of, output_of
from architectures import ARCHITECTURES

import lightning_prehab as lp

pytestmark = pytest.mark.slow
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.id)


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def low_rank_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, lp.LowRankLinear)}


def factors_of(module):
    return [module.A.weight, module.B.weight]


def full_rank(model):
    """Puts layers of full rank in the place of all targets; plans stop below that, at the rank that saves nothing."""
    for name, layer in lp.find_targets(model).items():
        parent, _, key = name.rpartition(".")
        new = lp.LowRankLinear.from_linear(layer, min(layer.weight.shape))
        setattr(model.get_submodule(parent), key, new)


def relative_difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@every_architecture
def test_full_rank_gives_the_same_output(architecture):
    model, batch = architecture.build(), architecture.batch()
    with torch.no_grad():
        dense = output_of(model, batch)
        targets = lp.find_targets(model)
        full_rank(model)
        assert len(low_rank_layers(model)) == len(targets)
        assert relative_difference(output_of(model, batch), dense) <= 1e-4


@pytest.mark.parametrize("factorization", [lp.SVD(), lp.KroneckerSVD()], ids=["SVD", "KroneckerSVD"])
@every_architecture
def test_plan_cut_forward_backward_save_load(architecture, factorization, tmp_path):
    model, batch = architecture.build(), architecture.batch()
    with torch.no_grad():
        dense = output_of(model, batch)
    before = parameters_of(model)
    targeted = sum(layer.weight.numel() for layer in lp.find_targets(model).values())

    report = lp.compress_(model, 0.5, [batch], factorization=factorization)
    left = targeted - (before - parameters_of(model))
    assert left == report.plan.parameters
    assert targeted == report.plan.dense_parameters
    assert left <= targeted / 2
    layers = low_rank_layers(model)
    assert layers.keys() == {name for name, rank in report.ranks.items() if rank is not None}

    with torch.no_grad():
        cut = output_of(model, batch)
    assert cut.isfinite().all()
    assert relative_difference(cut, dense) > 1e-3

    with torch.random.fork_rng(devices=[]):  # dropout
        loss = loss_of(model.train(), batch)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    for name, layer in layers.items():
        assert all(factor.grad is not None for factor in factors_of(layer)), name

    folder = lp.save_compressed(model.eval(), tmp_path, report)
    fresh = lp.load_compressed(folder, architecture.build())
    assert low_rank_layers(fresh).keys() == layers.keys()
    with torch.no_grad():
        assert torch.equal(output_of(fresh, batch), output_of(model, batch))
