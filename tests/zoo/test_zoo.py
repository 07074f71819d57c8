"""Every architecture of the zoo: plan, cut, forward, backward, save, load."""

import runpy
from pathlib import Path

import pytest
import torch
from architecture import loss_of, output_of
from architectures import ARCHITECTURES

import lightning_prehab as lp
from lightning_prehab.kinds import view_of
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.plan.spectra import decompose_targets
from lightning_prehab.targets.find import find_targets
from lightning_prehab.targets.locate import locate
from lightning_prehab.targets.names import join
from tests.same_model import assert_same_weights

pytestmark = pytest.mark.slow
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.id)


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def low_rank_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def factors_in(model):
    """The factors of all low-rank matrices, by name."""
    layers = low_rank_layers(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith((".A.weight", ".B.weight")) and any(name.startswith(f"{layer}.") for layer in layers)
    }


def to_full_rank_(model, targets):
    """Puts layers of full rank in the place of all targets; plans stop below that, at the rank that saves nothing."""
    decompositions = decompose_targets(targets, lp.SVD(), None)
    replacements = {}
    for name, (layer, views) in locate(model, targets).items():
        wanted = {part: join(name, part) for part in views if join(name, part) in targets}
        sizes = {part: min(views[part].groups()[0].shape) for part in wanted}
        factors = {part: decompositions[target].factors(sizes[part]) for part, target in wanted.items()}
        replacements[id(layer.module)] = layer.kind.low_rank(layer.module, views, factors)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            parent._modules[key] = replacements.get(id(child), child)
    return replacements


def relative_difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@every_architecture
def test_full_rank_gives_the_same_output(architecture):
    batch, seen = architecture.batch(), set()
    for split_fused in (False, True):
        model = architecture.build()
        targets = find_targets(model, split_fused=split_fused)
        if frozenset(targets) in seen:  # no fused projections
            continue
        seen.add(frozenset(targets))
        with torch.no_grad():
            dense = output_of(model, batch)
            replaced = to_full_rank_(model, targets)
            assert {id(layer) for layer in low_rank_layers(model).values()} >= {id(new) for new in replaced.values()}
            assert relative_difference(output_of(model, batch), dense) <= 1e-4


@pytest.mark.parametrize("factorization", [lp.SVD(), lp.KroneckerSVD()], ids=["SVD", "KroneckerSVD"])
@every_architecture
def test_plan_cut_forward_backward_save_load(architecture, factorization, tmp_path):
    model, batch = architecture.build(), architecture.batch()
    with torch.no_grad():
        dense = output_of(model, batch)
    before = parameters_of(model)
    targets = find_targets(model)

    report = lp.compress_(model, 0.5, [batch], factorization=factorization)
    targeted = sum(view_of(targets[name]).weight.numel() for name in report.ranks)
    left = targeted - (before - parameters_of(model))
    assert left == report.plan.parameters
    assert targeted == report.plan.dense_parameters
    assert left <= targeted / 2
    factors = factors_in(model)
    assert len(factors) == 2 * sum(rank is not None for rank in report.ranks.values())

    with torch.no_grad():
        cut = output_of(model, batch)
    assert cut.isfinite().all()
    if factorization == lp.SVD():  # the other is exact on a few samples where they need no more than the rank
        assert relative_difference(cut, dense) > 1e-3

    with torch.random.fork_rng(devices=[]):  # dropout
        loss = loss_of(model.train(), batch)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert [name for name, factor in factors.items() if factor.grad is None] == []

    folder = lp.save_compressed(model.eval(), tmp_path, report)
    fresh = lp.load_compressed(folder, architecture.build(seed=1))
    assert factors_in(fresh).keys() == factors.keys()
    assert_same_weights(fresh, model)
    with torch.no_grad():
        assert relative_difference(output_of(fresh, batch), output_of(model, batch)) <= 1e-5


def test_the_page_of_the_docs_is_what_the_benchmark_writes():
    root = Path(__file__).parents[2]
    table = runpy.run_path(str(root / "benchmarks" / "zoo_table.py"))
    page = (root / "docs" / "models.md").read_text(encoding="utf-8")
    for architecture in ARCHITECTURES:
        assert f"| {architecture.name}<br>`{architecture.size}`, {architecture.library} |" in page
    if table["installed"]() not in page:
        pytest.skip("docs/models.md was made with other versions of the libraries")
    assert page == table["page"]()
