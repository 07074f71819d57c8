"""Several cuts in one run, each deeper than the one before: what each does, and a run that is stopped anywhere."""

import copy
import itertools

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn

import lightning_prehab as lp
from lightning_prehab.callbacks._trainer import find_callback
from lightning_prehab.errors import ArgumentError, NumericalError, TargetError, UnsupportedError
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.targets.find import count_dense_parameters, count_parameters
from tests.integration.test_resume import STEPS, Lit, SaveEverywhere, assert_same_end, fit, loader
from tests.same_model import assert_same_model

CUTS, KEEPS, EPOCHS = [2, 4, 5], [0.7, 0.5, 0.3], 7


def acts(prehab=None, **settings):
    return [
        *([] if prehab is None else [prehab]),
        lp.CompressionCallback(CUTS, KEEPS, calibration_batches=4, **settings),
        lp.RehabSchedule(warmup_steps=4),
    ]


KINDS = {
    "shrinkage": lambda: acts(lp.PrehabCallback(lp.TailShrinkage(refresh=4), update_steps=5)),
    "shrinkage, pivot": lambda: acts(lp.PrehabCallback(lp.TailShrinkage(refresh=4), update_steps=5), layout="pivot"),
    "penalty": lambda: acts(lp.PrehabCallback(lp.StableRank(), 0.1, space="loss", injection="gradient")),
    "penalty in the loss": lambda: acts(lp.PrehabCallback(lp.TailEnergy(refresh=4), 0.1, space="loss", ramp_steps=4)),
    "decay": lambda: acts(lp.PrehabCallback(lp.SpectralWeightDecay(every=4))),
    "no prehab": acts,
    "paper": lambda: acts(lp.PaperPrehab()),
    "everything": lambda: [
        *acts(lp.PrehabCallback(self_distillation=0.3), layout="pivot"),
        lp.RehabDistillation(0.5, module="net", fade_epochs=2),
        lp.FactorTraining(product_decay=0.01, rate_A=0.5),
    ],
    "centered": lambda: acts(factorization=lp.WhitenedSVD(centered=True), layout="pivot"),
}


class Watch(pl.Callback):
    def __init__(self):
        self.calls = []

    def on_before_surgery(self, trainer, pl_module):
        self.calls.append(("before", trainer.current_epoch, count_parameters(pl_module)))

    def on_surgery(self, trainer, pl_module, report):
        self.calls.append(("after", trainer.current_epoch, count_parameters(pl_module)))


def test_what_each_cut_does(tmp_path):
    whole, watch, compression = count_parameters(Lit()), Watch(), acts()[0]
    lit, trainer = fit(tmp_path, [compression, lp.RehabSchedule(warmup_steps=4), watch], epochs=EPOCHS)
    assert [epoch for _, epoch, _ in watch.calls] == [2, 2, 4, 4, 5, 5]
    sizes = [size for _, _, size in watch.calls]
    assert sizes[0] == whole
    assert sizes[1::2] == [report.parameters_after for report in compression.reports]
    assert sizes[1] > sizes[3] > sizes[5] == count_parameters(lit)
    assert compression.report is compression.reports[-1]
    assert compression.done
    dense = sum(one.out_features * one.in_features for one in compression.reports[0].plan.layers)
    for number, (report, keep) in enumerate(zip(compression.reports, KEEPS, strict=True), 1):
        assert report.keep <= keep
        assert report.plan.dense_parameters == dense
        assert report.parameters_before == whole == count_dense_parameters(lit)
        assert f"cut {number} of 3" in str(report)
    for earlier, later in itertools.pairwise(compression.reports):
        for one, other in zip(earlier.plan.layers, later.plan.layers, strict=True):
            assert other.was == one.rank
            assert other.parameters <= one.parameters
    held = [id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in lit.parameters())
    restored = lp.CompressionReport.from_dict(compression.report.to_dict(), lp.KroneckerSVD())
    assert restored.plan.layers == compression.report.plan.layers


@pytest.mark.parametrize("layout", ["factors", "pivot"])
def test_prehab_aims_at_each_cut(layout, tmp_path):
    """At the last batch before a cut nothing is left of what the cut drops."""
    callbacks = acts(lp.PrehabCallback(forecast_every_n_steps=1), layout=layout)
    lit, _ = fit(tmp_path, callbacks, epochs=EPOCHS)
    found = [layer for layer in lit.modules() if isinstance(layer, LowRankLayer)]
    assert found
    assert all(isinstance(layer, PivotLayer) for layer in found) == (layout == "pivot")
    for report in callbacks[1].reports:
        cut = [layer for layer in report.plan.layers if layer.rank not in (None, layer.was)]
        assert cut
        for layer in cut:
            assert layer.relative_error < 1e-3, layer
            assert report.weight_errors[layer.name] < 1e-3
        assert report.prehab is not None
        assert report.prehab.end is not None


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuts")
    return folder, request.param, fit(folder, [*KINDS[request.param](), SaveEverywhere(folder)], epochs=EPOCHS)


@pytest.mark.parametrize("moment", ["batch-0", "epoch-1", "validation-2", "epoch-3", "batch-4", "epoch-4", "epoch-5"])
def test_resume_before_between_and_after(uninterrupted, moment, tmp_path):
    folder, kind, reference = uninterrupted
    callbacks = KINDS[kind]()
    resumed = fit(tmp_path, callbacks, folder / f"{moment}.ckpt", epochs=EPOCHS)
    assert_same_end(resumed, reference, steps=(EPOCHS - 1 - int(moment[-1])) * STEPS)
    ours, theirs = (find_callback(trainer, lp.CompressionCallback) for _, trainer in (resumed, reference))
    assert [one.ranks for one in ours.reports] == [one.ranks for one in theirs.reports]
    assert [one.plan.note for one in ours.reports] == [one.plan.note for one in theirs.reports]
    assert ours.done


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dense checkpoint, and one of after each cut."""
    folder = tmp_path_factory.mktemp("saved")
    callbacks = [*acts(), SaveEverywhere(folder)]
    lit, trainer = fit(folder, callbacks, epochs=EPOCHS)
    reference = copy.deepcopy(lit), trainer
    return [folder / f"epoch-{epoch}.ckpt" for epoch in (1, 3, 4, 6)], callbacks, lit, reference


def test_the_same_objects_go_back_and_forth(saved, tmp_path):
    files, callbacks, lit, reference = saved
    for file in (files[2], files[0], files[1]):
        lit.rows = []
        assert_same_end(fit(tmp_path, callbacks[:2], file, lit=lit, epochs=EPOCHS), reference)


def test_new_objects_take_a_module_that_is_cut(saved, tmp_path):
    """The module of one run, cut three times, in the hands of callbacks that know nothing of it."""
    files, _, _, reference = saved
    for file in (files[1], files[0], files[2], files[3].with_name("epoch-5.ckpt")):
        ours = copy.deepcopy(reference[0])
        ours.rows = []
        assert_same_end(fit(tmp_path, acts(), file, lit=ours, epochs=EPOCHS), reference)


def test_all_loading_follows_the_structure(saved, tmp_path):
    files, *_ = saved
    x = next(iter(loader()))[0]
    states = [torch.load(file, weights_only=True)["state_dict"] for file in files]
    expected = []
    for file, state in zip(files, states, strict=True):
        lit = lp.load_from_checkpoint(Lit, file)
        assert {name: value.shape for name, value in lit.state_dict().items()} == {
            name: value.shape for name, value in state.items()
        }
        expected.append(lit.net(x))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(**quiet, default_root_dir=tmp_path, callbacks=acts(), enable_checkpointing=False)
    lit = Lit()
    for place in (0, 1, 2, 3, 1, 3, 2, 0):
        found = trainer.predict(lit, loader(), ckpt_path=files[place])
        torch.testing.assert_close(found[0], expected[place])
        trainer.validate(lit, loader(), ckpt_path=files[place], verbose=False)


def test_folders_of_any_stage(saved, tmp_path):
    files, *_ = saved
    x = next(iter(loader()))[0]
    for place, file in enumerate(files[1:]):
        lit = lp.load_from_checkpoint(Lit, file)
        lp.save_compressed(lit, tmp_path / str(place))
    for first, second in itertools.permutations(range(3), 2):
        lit = Lit()
        lp.load_compressed(tmp_path / str(first), lit)
        lp.load_compressed(tmp_path / str(second), lit)
        assert_same_model(lit.net, lp.load_from_checkpoint(Lit, files[1 + second]).net, x)


class AtStart(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        compression = find_callback(trainer, lp.CompressionCallback)
        self.seen = len(compression.reports), compression._cuts.made


def test_weights_alone_tell_how_many_cuts_are_behind(saved, tmp_path):
    files, *_ = saved
    for made, file in enumerate(files[1:], 1):
        torch.save({**torch.load(file, weights_only=True), "callbacks": {}}, tmp_path / "weights.ckpt")
        look = AtStart()
        fit(tmp_path, [*acts(), look], tmp_path / "weights.ckpt", epochs=EPOCHS)
        assert look.seen == (1, made)


def test_more_cuts_than_the_checkpoint_has_known(saved, tmp_path):
    """A run that was to be cut once goes on to be cut three times, and the other way round."""
    one = lp.CompressionCallback(2, 0.7, calibration_batches=4)
    fit(tmp_path, [one, ModelCheckpoint(tmp_path, "once")], epochs=3)
    callbacks = acts()
    fit(tmp_path, callbacks, tmp_path / "once.ckpt", epochs=EPOCHS)
    assert [report.keep <= keep for report, keep in zip(callbacks[0].reports, KEEPS, strict=True)] == [True] * 3
    files, *_ = saved
    once = lp.CompressionCallback(2, 0.7, calibration_batches=4)
    lit, _ = fit(tmp_path, [once], files[2], epochs=EPOCHS)
    assert len(once.reports) == 2
    assert once.done
    assert count_parameters(lit) == once.report.parameters_after


def test_cuts_that_are_due_at_once(saved, tmp_path, caplog):
    files, *_ = saved
    late = lp.CompressionCallback([0, 1, 5], KEEPS, calibration_batches=4)
    fit(tmp_path, [late], files[0], epochs=EPOCHS)
    assert [report.keep <= keep for report, keep in zip(late.reports, KEEPS[1:], strict=True)] == [True, True]
    assert "cut 2 of 3" in late.reports[0].plan.note


class Fails(pl.Callback):
    """Breaks the weights, or the run, right before one of the cuts."""

    def __init__(self, epoch, how):
        self.epoch, self.how = epoch, how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch - 1 and batch_idx == STEPS - 1:
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
            if self.how == "nan":
                with torch.no_grad():
                    next(iter(pl_module.net.parameters()))[0, 0] = float("nan")

    def on_before_surgery(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch and self.how == "hook":
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("how", ["nan", "hook"])
@pytest.mark.parametrize("epoch", CUTS[:2])
def test_a_cut_that_fails_changes_nothing(how, epoch, tmp_path):
    fails, compression, lit = Fails(epoch, how), acts()[0], Lit()
    with pytest.raises(
        NumericalError if how == "nan" else RuntimeError, match="net.0.*diverged" if how == "nan" else "purpose"
    ):
        fit(tmp_path, [compression, fails], lit=lit, epochs=EPOCHS)
    assert len(compression.reports) == CUTS.index(epoch)
    after = lit.state_dict()
    assert list(after) == list(fails.state)
    changed = [name for name, value in after.items() if not torch.equal(value, fails.state[name])]
    assert len(changed) == (how == "nan")


@pytest.mark.parametrize(
    ("epochs", "keeps"),
    [
        (numpy.array([1, 2]), numpy.array([0.6, 0.4])),
        (range(1, 3), (0.6, 0.4)),
        ((1, 2), (keep for keep in (0.6, 0.4))),
    ],
    ids=["numpy", "range", "generator"],
)
def test_epochs_and_keeps_may_come_in_any_sequence(epochs, keeps):
    cuts = lp.CompressionCallback(epochs, keeps)._cuts
    assert [(cut.epoch, cut.recipe.keep) for cut in cuts] == [(1, 0.6), (2, 0.4)]
    assert all(type(cut.epoch) is int for cut in cuts)


WRONG = {
    "other lengths": (lambda: lp.CompressionCallback([2, 4], [0.5]), r"as many epochs as keeps.*epoch=\[2, 4\]"),
    "one keep": (lambda: lp.CompressionCallback([2, 4], 0.5), "as many epochs as keeps"),
    "one epoch": (lambda: lp.CompressionCallback(2, [0.5, 0.4]), "as many epochs as keeps"),
    "auto": (lambda: lp.CompressionCallback("auto", [0.5, 0.4]), "as many epochs as keeps"),
    "no epochs": (lambda: lp.CompressionCallback([], []), "as many epochs as keeps"),
    "auto among others": (lambda: lp.CompressionCallback([2, "auto"], [0.5, 0.4]), "each epoch is a whole number"),
    "epochs that fall": (lambda: lp.CompressionCallback([4, 2], [0.5, 0.4]), "epochs of several cuts must ascend"),
    "one epoch twice": (lambda: lp.CompressionCallback([2, 2], [0.5, 0.4]), "epochs of several cuts must ascend"),
    "keeps that rise": (lambda: lp.CompressionCallback([2, 4], [0.4, 0.5]), "must descend, .*got 0.4, 0.5"),
    "one keep twice": (lambda: lp.CompressionCallback([2, 4], [0.4, 0.4]), "must descend"),
    "a share of 60": (
        lambda: lp.CompressionCallback([2, 4], [60, 40]),
        r"must lie in \(0, 1\], got 60. For 60 % write 0.6",
    ),
    "recipes that rise": (
        lambda: lp.CompressionCallback([2, 4], [lp.Recipe(0.4), lp.Recipe(policy=lp.RankRatio(0.5))]),
        "must descend",
    ),
    "a policy without a keep": (
        lambda: lp.CompressionCallback([2, 4], [0.5, 0.4], policy=lp.EnergyThreshold(0.9)),
        "has no keep.*list of recipes",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_lists_that_do_not_fit(what):
    wrong, text = WRONG[what]
    with pytest.raises(ArgumentError, match=text):
        wrong()


def test_a_policy_and_recipes_for_each_cut():
    callback = lp.CompressionCallback((1, 2), (0.6, 0.3), policy=lp.RankRatio(0.9, min_rank=2), rank_multiple_of=2)
    assert [cut.recipe.policy for cut in callback._cuts] == [
        lp.RankRatio(0.6, min_rank=2),
        lp.RankRatio(0.3, min_rank=2),
    ]
    callback.rank_multiple_of = 4
    assert [cut.recipe.rank_multiple_of for cut in callback._cuts] == [4, 4]
    recipes = [lp.Recipe(policy=lp.EnergyThreshold(0.9)), lp.Recipe(0.3, layout="pivot")]
    callback = lp.CompressionCallback([1, 2], recipes)
    assert callback.recipe is recipes[0]
    with pytest.raises(ArgumentError, match="beside a whole recipe"):
        lp.CompressionCallback([1, 2], recipes, rank_multiple_of=2)


def test_what_fit_refuses_before_training(tmp_path):
    def refuses(error, match, callbacks, lit=None):
        lit = lit or Lit()
        state = {name: value.clone() for name, value in lit.state_dict().items()}
        with pytest.raises(error, match=match):
            fit(tmp_path, callbacks, lit=lit, epochs=4)
        assert all(torch.equal(value, state[name]) for name, value in lit.state_dict().items())

    refuses(ArgumentError, "epoch=9.*never reached", [lp.CompressionCallback([1, 9], [0.5, 0.3])])
    refuses(
        UnsupportedError, "one callback makes all cuts", [lp.CompressionCallback(1), lp.CompressionCallback(2, 0.2)]
    )
    twice = lp.CompressionCallback([1, 2], [0.5, 0.3], factorization=lp.LowRankPlusSparse(0.05))
    refuses(UnsupportedError, "sparse part.*not cut a second time", [twice])
    cut = Lit()
    lp.compress_(cut, 0.4, factorization=lp.SVD())
    refuses(TargetError, r"compressed already .*keep 0\.2.*smaller keep", [lp.CompressionCallback(1, 0.6)], cut)
    refuses(
        TargetError, "matches no layer", [lp.CompressionCallback([1, 2], [0.5, 0.3], rank_overrides={"nothing": 3})]
    )


def test_patterns_and_ranks_by_hand_in_each_cut(tmp_path):
    overrides = {"net.0": 4, "net.3": "dense"}
    callback = lp.CompressionCallback([1, 2], [0.6, 0.5], calibration_batches=4, rank_overrides=overrides)
    fit(tmp_path, [callback], epochs=3)
    assert [report.ranks["net.0"] for report in callback.reports] == [4, 4]
    assert [report.ranks["net.3"] for report in callback.reports] == [None, None]
    assert "not cut now: the rank stays as it was: net.0" in str(callback.report)
    callback = lp.CompressionCallback([1, 2], [0.6, 0.3], calibration_batches=4, target_modules=["net.2", "*.0"])
    fit(tmp_path, [callback], epochs=3)
    assert [list(report.ranks) for report in callback.reports] == [["net.0", "net.2"]] * 2


def test_a_compressed_model_is_cut_deeper_in_a_run(tmp_path):
    lit = Lit()
    lp.compress_(lit, 0.7, factorization=lp.SVD())
    start = {name: value.clone() for name, value in lit.state_dict().items()}
    callbacks = [lp.PrehabCallback(), lp.CompressionCallback(2, 0.4, calibration_batches=4)]
    reference = fit(tmp_path, [*callbacks, SaveEverywhere(tmp_path)], lit=lit)
    assert callbacks[1].report.keep <= 0.4
    for moment in ("epoch-0", "epoch-1", "epoch-2"):
        again = Lit()
        lp.compress_(again, 0.7, factorization=lp.SVD())
        assert {name: value.shape for name, value in again.state_dict().items()} == {
            n: v.shape for n, v in start.items()
        }
        callbacks = [lp.PrehabCallback(), lp.CompressionCallback(2, 0.4, calibration_batches=4)]
        assert_same_end(fit(tmp_path, callbacks, tmp_path / f"{moment}.ckpt", lit=again), reference)


def test_lists_in_a_yaml_file(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(
        """\
trainer:
  callbacks:
    - class_path: lightning_prehab.CompressionCallback
      init_args: {epoch: [3, 6, 9], keep: [0.6, 0.4, 0.2]}
    - class_path: lightning_prehab.PrehabCallback
"""
    )
    monkeypatch.setattr("sys.argv", ["run", "--config", str(tmp_path / "run.yaml")])
    cli = LightningCLI(Lit, run=False, save_config_callback=None)
    callback = find_callback(cli.trainer, lp.CompressionCallback)
    assert [cut.epoch for cut in callback._cuts] == [3, 6, 9]
    assert [cut.recipe.keep for cut in callback._cuts] == [0.6, 0.4, 0.2]


class Mixed(Lit):
    """Attention, a fused projection and convolutions in one module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(_Images(), nn.Linear(24, 6))


class _Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3, padding=1)
        self.groups = nn.Conv1d(12, 24, 4, groups=2)
        self.qkv = nn.Linear(24, 72)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x):
        y = torch.tanh(self.conv(x.view(-1, 1, 3, 4)))
        y = torch.tanh(self.groups(y.flatten(2))).mT
        q, k, v = self.qkv(y).chunk(3, -1)
        return self.attention(q, k, v, need_weights=False)[0].mean(1)


@pytest.mark.filterwarnings("ignore:.*fewer calibration tokens.*")
@pytest.mark.parametrize("layout", ["factors", "pivot"])
def test_all_kinds_of_layers_resume_between_cuts(layout, tmp_path):
    def callbacks():
        compression = lp.CompressionCallback([1, 3], [0.7, 0.4], calibration_batches=4, layout=layout, split_fused=True)
        return [lp.PrehabCallback(lp.TailShrinkage(refresh=3)), compression, lp.RehabSchedule(warmup_steps=3)]

    ours = callbacks()
    reference = fit(tmp_path, [*ours, SaveEverywhere(tmp_path)], lit=Mixed(), epochs=5)
    assert len(ours[1].report.ranks) == 10
    assert {layer.was is None for layer in ours[1].report.plan.layers} == {False, True}
    for moment in ("epoch-0", "batch-1", "epoch-2", "epoch-3"):
        torch.manual_seed(0)
        assert_same_end(fit(tmp_path, callbacks(), tmp_path / f"{moment}.ckpt", lit=Mixed(), epochs=5), reference)


def test_the_time_between_two_cuts_is_what_prehab_prepares_in(tmp_path):
    """Half of it at most, though the surgery would have statistics of more batches than an epoch has."""
    callbacks = [lp.PrehabCallback(), lp.CompressionCallback(CUTS, KEEPS)]
    fit(tmp_path, callbacks, epochs=EPOCHS)
    for report in callbacks[1].reports:
        assert max(report.weight_errors.values()) < 1e-3


@pytest.mark.parametrize("first", [0, 1])
def test_nothing_is_watched_twice(first, tmp_path):
    seen = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(len(trainer.optimizers[0]._optimizer_step_pre_hooks))

    prehab, compression = lp.PrehabCallback(), lp.CompressionCallback([first, 3], [0.7, 0.4], calibration_batches=2)
    _, trainer = fit(tmp_path, [prehab, compression, Count()], epochs=4)
    assert set(seen[: 3 * STEPS]) == {1}
    assert set(seen[3 * STEPS :]) == {0}
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
