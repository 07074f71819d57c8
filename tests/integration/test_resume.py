"""A run that is stopped and resumed ends bit by bit like one that is not, wherever the checkpoint was written."""

import contextlib
import copy
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError, UnsupportedError
from lightning_prehab.report.origin import Origin
from tests.same_model import assert_same_model

EPOCHS, STEPS, SURGERY = 5, 6, 2


class Lit(pl.LightningModule):
    def __init__(self, grouping="flat", bias=True):
        super().__init__()
        self.grouping = grouping
        self.net = nn.Sequential(nn.Linear(12, 16, bias=bias), nn.LayerNorm(16), nn.Linear(16, 14), nn.Linear(14, 6))
        self.rows = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.rows.append((loss.item(), self.trainer.optimizers[0].param_groups[0]["lr"]))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        if self.grouping == "flat":
            groups = list(self.parameters())
        elif self.grouping == "name":
            groups = [
                {"params": [p for n, p in self.named_parameters() if n.endswith("weight")], "weight_decay": 0.1},
                {"params": [p for n, p in self.named_parameters() if not n.endswith("weight")], "weight_decay": 0.0},
            ]
        else:
            inside = [p for m in self.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
            outside = [p for p in self.parameters() if all(p is not q for q in inside)]
            groups = [{"params": inside, "lr": 0.02}, {"params": outside}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 12, generator=generator)
    return DataLoader(TensorDataset(x, torch.tanh(x @ torch.randn(12, 6, generator=generator))), 16)


def acts(space="loss", **settings):
    return [
        lp.PrehabCallback(lp.TailEnergy(refresh=4), 0.1, space=space, ramp_steps=8),
        lp.CompressionCallback(SURGERY, 0.5, calibration_batches=4, **settings),
        lp.RehabSchedule(warmup_epochs=1.5),
    ]


def fit(folder, callbacks, ckpt_path=None, lit=None, epochs=EPOCHS, **arguments):
    torch.manual_seed(0)
    lit = Lit(**arguments) if lit is None else lit
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        max_epochs=epochs,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    trainer.fit(lit, loader(), loader(), ckpt_path=ckpt_path)
    return lit, trainer


def assert_same_end(one, other, steps=None):
    (lit, trainer), (reference, reference_trainer) = one, other
    assert str(lit) == str(reference)
    for (name, ours), (_, theirs) in zip(lit.state_dict().items(), reference.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    ours, theirs = trainer.optimizers[0].state_dict(), reference_trainer.optimizers[0].state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert lit.rows == reference.rows[-len(lit.rows) :] if lit.rows else True
    assert steps is None or len(lit.rows) == steps


class SaveEverywhere(pl.Callback):
    """One checkpoint at each kind of moment of each epoch's end."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, moment):
        trainer.save_checkpoint(self.folder / f"{moment}-{trainer.current_epoch}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == STEPS - 1:
            self.save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch")


GROUPINGS = ["flat", "name", "type"]


@pytest.fixture(scope="module", params=GROUPINGS)
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, request.param, fit(folder, [*acts(), SaveEverywhere(folder)], grouping=request.param)


MOMENTS = ["batch", "validation", "epoch"]
#: Every pair of a grouping, a moment and an epoch is there.
SAVED = [
    (GROUPINGS[(i + epoch) % len(GROUPINGS)], moment, epoch)
    for i, moment in enumerate(MOMENTS)
    for epoch in range(EPOCHS - 1)
]


@pytest.mark.parametrize(("uninterrupted", "moment", "epoch"), SAVED, indirect=["uninterrupted"])
def test_resume_from_every_kind_of_checkpoint(uninterrupted, moment, epoch, tmp_path):
    folder, grouping, reference = uninterrupted
    file = folder / f"{moment}-{epoch}.ckpt"
    resumed = fit(tmp_path, acts(), file, grouping=grouping)
    assert_same_end(resumed, reference, steps=(EPOCHS - 1 - epoch) * STEPS)
    assert resumed[1].callbacks[1].report is not None


PREHABS = {
    "shrinkage": lambda: lp.PrehabCallback(lp.TailShrinkage(refresh=4), space="loss", update_steps=5),
    "decay": lambda: lp.PrehabCallback(lp.SpectralWeightDecay(every=4)),
    "share": lambda: lp.PrehabCallback(lp.NuclearNorm(refresh=4), strength_share=0.2, space="activation"),
    "effective rank": lambda: lp.PrehabCallback(lp.EffectiveRank(refresh=4), space="loss", update_steps=5),
    "stable rank": lambda: lp.PrehabCallback(lp.StableRank(), 0.1, space="loss", update_steps=5),
}


FORECASTING = ("shrinkage", "effective rank")


@pytest.mark.parametrize(
    ("kind", "when"), [*((kind, 4) for kind in PREHABS), *((kind, "auto") for kind in FORECASTING)]
)
def test_every_regularizer_resumes(kind, when, tmp_path):
    """In the middle of prehab, of a new plan, of calibration, and after an automatic surgery."""

    def callbacks():
        compression = lp.CompressionCallback(when, 0.5, calibration_batches=4, forecast_below=2e-4)
        return [PREHABS[kind](), compression, lp.RehabSchedule(warmup_steps=5)]

    reference = fit(tmp_path, [*callbacks(), SaveEverywhere(tmp_path)], epochs=6)
    assert any(isinstance(module, lp.LowRankLinear) for module in reference[0].modules())
    for moment in ("batch-0", "epoch-1", "validation-2", "batch-3", "epoch-3", "epoch-4"):
        resumed = fit(tmp_path, callbacks(), tmp_path / f"{moment}.ckpt", epochs=6)
        assert_same_end(resumed, reference)


def test_the_report_survives(uninterrupted, tmp_path):
    folder, grouping, reference = uninterrupted
    ours = next(c.report for c in reference[1].callbacks if isinstance(c, lp.CompressionCallback))
    callbacks = acts()
    fit(tmp_path, callbacks, folder / "epoch-3.ckpt", grouping=grouping)
    assert str(callbacks[1].report) == str(ours)
    assert callbacks[1].report.to_dict() == ours.to_dict()


@pytest.mark.parametrize("epoch", [0, 3])
def test_resume_with_the_same_objects_goes_back_and_forth(epoch, tmp_path):
    """A compressed module takes a dense checkpoint (and is cut again), or an earlier compressed one."""
    callbacks = acts()
    lit, trainer = fit(tmp_path, [*callbacks, SaveEverywhere(tmp_path)])
    reference = copy.deepcopy(lit), trainer
    lit.rows = []
    again = fit(tmp_path, callbacks, tmp_path / f"epoch-{epoch}.ckpt", lit=lit)
    assert_same_end(again, reference, steps=(EPOCHS - 1 - epoch) * STEPS)


def test_surgery_at_epoch_zero_and_a_new_bias(tmp_path):
    def callbacks():
        return [lp.CompressionCallback(0, 0.6, factorization=lp.WhitenedSVD(centered=True)), lp.RehabSchedule(9)]

    reference = fit(tmp_path, [*callbacks(), SaveEverywhere(tmp_path)], bias=False)
    assert reference[0].net[0].bias is not None
    assert_same_end(fit(tmp_path, callbacks(), tmp_path / "epoch-1.ckpt", bias=False), reference)


def sparse_acts():
    return acts(factorization=lp.LowRankPlusSparse(0.1, steps=2))


def pivot_acts():
    return acts(layout="pivot")


def without_losses(report):
    """What the cut does to the loss is measured on batches that a resumed run has seen, which are others.

    So is what prehab took: after a checkpoint of the last batch of an epoch Lightning leaves out the end of
    that epoch, and its validation.
    """
    layers = [replace(layer, loss_increase=None) for layer in report.plan.layers]
    return replace(report, plan=replace(report.plan, layers=tuple(layers)), origin=Origin(), prehab=None).to_dict()


@pytest.mark.parametrize(
    ("own_acts", "kind", "said"),
    [
        (sparse_acts, lp.LowRankPlusSparseLinear, "factorization=None"),
        (pivot_acts, lp.PivotLinear, "layout='factors'"),
    ],
)
def test_other_layers_resume_and_are_followed(own_acts, kind, said, tmp_path):
    """Killed before, at and after the surgery; evaluated, loaded and taken back by a module of any structure."""
    lit, trainer = reference = fit(tmp_path, [*own_acts(), SaveEverywhere(tmp_path)])
    assert any(isinstance(m, kind) for m in lit.modules())
    for moment, epoch in (("batch", 1), ("epoch", 1), ("batch", 2), ("validation", 3), ("epoch", 3)):
        callbacks = own_acts()
        resumed = fit(tmp_path / "again", callbacks, tmp_path / f"{moment}-{epoch}.ckpt")
        assert_same_end(resumed, reference, steps=(EPOCHS - 1 - epoch) * STEPS)
        assert without_losses(callbacks[1].report) == without_losses(trainer.callbacks[1].report)

    x, file = loader().dataset.tensors[0], tmp_path / "epoch-4.ckpt"
    assert_same_model(lp.load_from_checkpoint(Lit, file).eval().net, lit.eval().net, x)
    others = tmp_path / "others"
    fit(others, [*acts(), SaveEverywhere(others)])
    module, evaluation = (
        Lit(),
        pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[lp.CompressionCallback(SURGERY)]
        ),
    )
    for path in (file, others / "epoch-4.ckpt", file, tmp_path / "epoch-0.ckpt", file):
        evaluation.validate(module, loader(), ckpt_path=path, verbose=False)
        stored = torch.load(path, weights_only=True)["state_dict"]
        assert list(module.state_dict()) == list(stored)
        assert all(torch.equal(value, stored[name]) for name, value in module.state_dict().items())
    assert_same_model(module.eval().net, lit.net, x)

    callbacks = own_acts()
    with pytest.warns(UserWarning, match=f"from after a cut with {said}: the model stays as it was cut"):
        again = fit(tmp_path / "again", callbacks, others / "epoch-3.ckpt")  # the stored structure counts
    assert not any(isinstance(m, kind) for m in again[0].modules())
    again[0].rows = []
    assert_same_end(fit(tmp_path / "again", callbacks, tmp_path / "epoch-0.ckpt", lit=again[0]), reference)


def test_damaged_places_in_a_checkpoint_are_named(tmp_path):
    fit(tmp_path, [*sparse_acts(), SaveEverywhere(tmp_path)])
    checkpoint = torch.load(tmp_path / "epoch-3.ckpt", weights_only=True)
    name = next(key for key in checkpoint["state_dict"] if key.endswith(".indices")).removesuffix(".indices")
    checkpoint["state_dict"][f"{name}.indices"][-1] = 10**6
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(CheckpointError, match=f"Layer '{name}': the checkpoint holds"):
        fit(tmp_path, sparse_acts(), tmp_path / "damaged.ckpt")


def test_a_loader_of_unknown_length_keeps_both_windows(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    def run(callbacks, ckpt_path=None):
        torch.manual_seed(0)
        lit = Lit()
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3,
            enable_checkpointing=False, limit_val_batches=0, callbacks=callbacks, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(lit, DataLoader(Stream(), 16), ckpt_path=ckpt_path)
        return lit, trainer

    def callbacks():
        return [lp.CompressionCallback(2, 0.5, calibration_batches=4)]

    reference = run([*callbacks(), SaveEverywhere(tmp_path)])
    assert torch.load(tmp_path / "epoch-1.ckpt", weights_only=True)["callbacks"]["CompressionCallback"]["older"]
    assert_same_end(run(callbacks(), tmp_path / "epoch-1.ckpt"), reference)


def test_files_are_plain_data(uninterrupted):
    folder, _, _ = uninterrupted
    for file in folder.glob("*.ckpt"):
        states = torch.load(file, weights_only=True)["callbacks"]
        assert {"PrehabCallback", "CompressionCallback", "RehabSchedule"} <= set(states)
        assert all(states[name]["version"] == 1 for name in ("PrehabCallback", "CompressionCallback", "RehabSchedule"))


def logits(lit):
    with torch.no_grad():
        return lit.eval().net(loader().dataset.tensors[0])


@pytest.mark.parametrize("callbacks", [0, 1, 2], ids=["all", "compression only", "fresh"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_follows_the_checkpoint_in_both_directions(stage, callbacks, tmp_path):
    lit, trainer = fit(tmp_path, [*acts(), SaveEverywhere(tmp_path)])
    others = tmp_path / "others"
    other, _ = fit(tmp_path, [lp.CompressionCallback(1, 0.3), SaveEverywhere(others)])
    files = {
        "dense": tmp_path / "epoch-0.ckpt",
        "compressed": tmp_path / "epoch-4.ckpt",
        "other ranks": others / "epoch-4.ckpt",
    }
    expected = {"compressed": logits(lit), "other ranks": logits(other)}
    lit.test_step = lit.validation_step
    if callbacks:
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[lp.CompressionCallback(SURGERY)]
        )
    module = lit if callbacks < 2 else Lit()
    module.test_step = module.validation_step
    for name in ("dense", "compressed", "other ranks", "compressed", "other ranks", "dense"):
        getattr(trainer, stage)(module, loader(), ckpt_path=files[name])
        low = any(isinstance(m, lp.LowRankLinear) for m in module.modules())
        assert low == (name != "dense")
        assert not module._load_state_dict_pre_hooks
        saved = torch.load(files[name], weights_only=True)["state_dict"]
        assert all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())
        if name != "dense":
            torch.testing.assert_close(logits(module), expected[name])


def test_best_may_be_dense(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="val", mode="max")  # the first epoch is "best"
    lit, trainer = fit(tmp_path, [*acts(), checkpoint])
    assert any(isinstance(m, lp.LowRankLinear) for m in lit.modules())
    trainer.validate(lit, loader(), ckpt_path="best", verbose=False)
    assert not any(isinstance(m, lp.LowRankLinear) for m in lit.modules())


@pytest.mark.parametrize("reset", [False, True])
def test_scores_across_the_surgery(reset, tmp_path):
    """Without the option a dense score stays "best" and patience counts on; with it both start anew at the surgery."""

    class Watch(pl.Callback):
        def on_surgery(self, trainer, pl_module, report):
            best.append(checkpoint.best_model_score)
            waits.append(stopping.wait_count)

    best, waits = [], []
    checkpoint = ModelCheckpoint(tmp_path, monitor="val", mode="max", save_top_k=2)
    stopping = EarlyStopping("val", mode="max", patience=9)
    compression = lp.CompressionCallback(SURGERY, reset_scores=reset)
    _, trainer = fit(tmp_path, [compression, Watch(), checkpoint, stopping])
    assert waits == [0 if reset else 1]
    assert (best == [None]) == reset
    compressed = [m for m in torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"] if ".A." in m]
    assert bool(compressed) == reset
    assert trainer.current_epoch == EPOCHS


def test_learning_rate_finder_beside_us(tmp_path):
    lit, _ = fit(tmp_path, [LearningRateFinder(num_training_steps=5, attr_name="lr"), *acts()], lit=WithRate())
    assert any(isinstance(m, lp.LowRankLinear) for m in lit.modules())
    assert len(lit.rows) >= EPOCHS * STEPS


class WithRate(Lit):
    lr = 0.01


def test_learning_rate_finder_on_a_compressed_checkpoint_is_refused(tmp_path):
    fit(tmp_path, [*acts(), SaveEverywhere(tmp_path)], lit=WithRate())
    finder = LearningRateFinder(num_training_steps=5, attr_name="lr")
    with pytest.raises(UnsupportedError, match="LearningRateFinder trains and rolls back.*remove it"):
        fit(tmp_path, [finder, *acts()], tmp_path / "epoch-3.ckpt", lit=WithRate())


@pytest.mark.parametrize("source", ["dense", "compressed", "other ranks"])
@pytest.mark.parametrize("target", ["fresh", "compressed"])
def test_fit_takes_the_structure_of_any_checkpoint(source, target, tmp_path):
    """The stored ranks count, not those that the callback would choose now."""
    other = tmp_path / "other"
    lit, _ = fit(tmp_path, [*acts(), SaveEverywhere(tmp_path)])
    fit(other, [lp.PrehabCallback(), lp.CompressionCallback(1, 0.3), lp.RehabSchedule(9), SaveEverywhere(other)])
    file = {
        "dense": tmp_path / "epoch-0.ckpt",
        "compressed": tmp_path / "epoch-3.ckpt",
        "other ranks": other / "epoch-3.ckpt",
    }
    stored = torch.load(file[source], weights_only=True)["state_dict"]
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    callbacks = acts() if target == "fresh" else None
    if callbacks is None:
        callbacks, lit = acts(), Lit()
        fit(tmp_path, callbacks, lit=lit)
    with contextlib.ExitStack() as stack:
        if source == "other ranks":
            stack.enter_context(pytest.warns(UserWarning, match="after a cut with epoch=1, keep=0.3: .* stays"))
        fit(tmp_path, [*callbacks, Look()], file[source], lit=Lit() if target == "fresh" else lit)
    assert list(seen[0]) == list(stored)
    assert all(torch.equal(value, stored[name]) for name, value in seen[0].items())


def test_a_checkpoint_that_does_not_fit(tmp_path):
    fit(tmp_path, [*acts(), SaveEverywhere(tmp_path)])
    file = tmp_path / "epoch-4.ckpt"

    class Wider(Lit):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.Linear(13, 16)

    with pytest.raises(CheckpointError, match=r"Layer 'net.0': the checkpoint holds factors .* has a 16x13 layer"):
        fit(tmp_path, acts(), file, lit=Wider())
    module = Wider()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=acts())
    with pytest.raises(CheckpointError, match=r"Layer 'net.0'"):
        trainer.validate(module, loader(), ckpt_path=file)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module._load_state_dict_pre_hooks

    checkpoint = torch.load(file, weights_only=True)
    for name in ("CompressionCallback", "PrehabCallback", "RehabSchedule"):
        changed = copy.deepcopy(checkpoint)
        changed["callbacks"][name]["version"] = 99
        torch.save(changed, tmp_path / "future.ckpt")
        with pytest.raises(CheckpointError, match=f"a {name} state of version 99, this is version 1"):
            fit(tmp_path, acts(), tmp_path / "future.ckpt")


def test_a_prehab_layer_that_is_gone_is_named(tmp_path):
    fit(tmp_path, [*acts(), SaveEverywhere(tmp_path)])
    with pytest.raises(CheckpointError, match="'net.0', which is not a target now"):
        fit(tmp_path, acts(exclude_modules="net.0"), tmp_path / "epoch-1.ckpt")


@pytest.mark.parametrize("kind", ["compiled", "shared", "checkpointed"])
def test_resume_of_compiled_shared_and_wrapped_modules(kind, tmp_path):
    def make():
        lit = Lit()
        if kind == "compiled":
            lit.net = torch.compile(lit.net, backend="eager")
        elif kind == "checkpointed":  # names of modules have the wrapper in them, names in state dicts have not
            lit.net = nn.Sequential(
                checkpoint_wrapper(lit.net[:2]), checkpoint_wrapper(lit.net[2]), nn.Sequential(lit.net[3])
            )
        else:
            shared = nn.Linear(16, 16)
            lit.net = nn.Sequential(lit.net[0], shared, nn.Tanh(), shared, nn.Linear(16, 6))
        return lit

    torch._dynamo.reset()
    torch.manual_seed(0)
    start = make()
    reference = fit(tmp_path, [*acts(), SaveEverywhere(tmp_path)], lit=copy.deepcopy(start))
    resumed = fit(tmp_path, acts(), tmp_path / "epoch-3.ckpt", lit=copy.deepcopy(start))
    assert_same_end(resumed, reference, steps=STEPS)
    evaluated = make()
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[lp.CompressionCallback(SURGERY)])
    trainer.validate(evaluated, loader(), ckpt_path=tmp_path / "epoch-3.ckpt", verbose=False)
    stored = torch.load(tmp_path / "epoch-3.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(evaluated.state_dict()), dict(stored), rtol=0, atol=0)
    assert any(isinstance(module, lp.LowRankLinear) for module in evaluated.modules())
    assert not any("_checkpoint" in name or "_orig_mod" in name for name in lp.find_targets(start))


@pytest.mark.parametrize("change", ["epoch", "factorization"])
def test_stored_sums_of_another_plan_are_collected_anew(change, tmp_path):
    fit(tmp_path, [lp.CompressionCallback(SURGERY, calibration_batches=4), SaveEverywhere(tmp_path)])

    class Spy(lp.WhitenedSVD):
        def metric(self, statistics):
            seen.add(int(statistics.tokens))
            return super().metric(statistics)

    seen = set()
    epoch = SURGERY + 1 if change == "epoch" else SURGERY
    other = lp.CompressionCallback(epoch, calibration_batches=4, factorization=Spy())
    fit(tmp_path, [other], tmp_path / f"epoch-{SURGERY - 1}.ckpt")
    assert seen == {64}
