import gc
import weakref

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.cli import commands, main
from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.plan.spectra import Solver
from lightning_prehab.road import operate
from lightning_prehab.sites import KnownSite, ProcessSite
from lightning_prehab.statistics.sums import Wanted
from lightning_prehab.targets.find import Targets
from tests.before_the_house.make import Lit, Loader, batches, trainer_of


def net(width=12, layers=5):
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def inputs(width=12):
    return [torch.randn(40, width) for _ in range(2)]


@pytest.mark.parametrize(("size", "expected"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_blocks(size, expected):
    model = net()
    targets = lp.find_targets(model)
    blocks = list(ProcessSite(model, layers_at_once=size).blocks(targets))
    assert [len(block) for block in blocks] == expected
    assert [name for block in blocks for name in block] == list(targets)


def test_what_calibration_sees():
    model = net()
    targets = lp.find_targets(model)
    assert not ProcessSite(model).calibrates
    assert ProcessSite(model).observe(targets, Wanted(inputs=True)) is None
    site = ProcessSite(model, inputs())
    assert site.calibrates
    assert site.observe(targets, Wanted()) is None
    assert {name: int(found.tokens) for name, found in site.observe(targets, Wanted(inputs=True)).items()} == (
        dict.fromkeys(targets, 80)
    )


def test_of_a_layer_that_is_done_only_small_ranks_stay():
    """One block after the other: what only ranks above break-even need is let go of at once."""
    model = net()
    targets = lp.find_targets(model)
    for size in (None, 2):
        site = ProcessSite(model, inputs(), layers_at_once=size)
        spectra = site.decompose(Solver(targets, lp.SVD()))
        assert list(spectra) == list(targets)
        full = site._decompositions["0"].factors
        if size is None:
            assert full(12).A.shape == (12, 12)
        else:
            assert full(5).A.shape == (5, 12)
            with pytest.raises(ArgumentError, match="Only ranks up to 5 were kept"):
                full(12)


def test_nothing_large_stays_behind(monkeypatch):
    """Sums and decompositions are gone when the report is there, though the site is not."""
    kept = weakref.WeakSet()
    model, solver = net(), Solver.__call__

    def watch(self, names):
        solved = solver(self, names)
        kept.update(statistics for statistics in self.statistics.values())
        kept.update(decomposition.factors for decomposition, _ in solved.values())
        return solved

    monkeypatch.setattr(Solver, "__call__", watch)
    site = ProcessSite(model, inputs())
    report = operate(lp.Recipe(0.5), site)
    assert report.keep <= 0.5
    gc.collect()
    assert list(kept) == []
    assert site._decompositions == {}


def test_a_site_of_known_things_plans_and_has_no_model(mlp, data):
    targets = lp.find_targets(mlp)
    statistics = lp.collect_statistics(mlp, targets, [data.tensors[0]], gradients=True)
    site = KnownSite(targets, statistics)
    assert site.calibrates
    assert site.find(lp.Recipe(target_modules="nothing")) is targets
    assert site.observe(targets, Wanted()) is statistics
    assert site.probe(targets, 0.9) is None
    with pytest.raises(PlanError, match="the model has nothing"):
        operate(lp.Recipe(0.5), site)
    without = KnownSite(targets, None)
    with pytest.raises(PlanError, match="KroneckerSVD.* needs calibration statistics"):
        operate(lp.Recipe(0.5), without)


def test_targets_are_added_with_what_was_left_out():
    found = Targets({"a": nn.Linear(4, 4)}, {"b": "why"}, 16)
    found.add(Targets({"c": nn.Linear(4, 4)}, {"d": "because"}, None))
    assert (list(found), found.skipped, found.model_parameters) == (["a", "c"], {"b": "why", "d": "because"}, 16)


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_the_command_line_hands_on_how_many_at_once(command, tmp_path, monkeypatch):
    given = []

    class Watched(ProcessSite):
        def __init__(self, *args, layers_at_once=None, **more):
            super().__init__(*args, layers_at_once=layers_at_once, **more)
            given.append(layers_at_once)

    monkeypatch.setattr(commands, "ProcessSite", Watched)
    trainer = trainer_of(tmp_path, max_epochs=0)
    trainer.fit(Lit("mlp"), Loader("mlp"))
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    torch.save([x for x, _ in batches("mlp")], tmp_path / "batches.pt")
    words = [command, tmp_path / "dense.ckpt", "--model", f"{Lit.__module__}.Lit", "--data", tmp_path / "batches.pt"]
    words += ["--layers-at-once", 2, *(["--output", tmp_path / "small"] if command == "compress" else [])]
    assert main([str(word) for word in words]) == 0
    assert given == [2]
