"""What people are told at the start, at a resume and at the end of a run."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, NumericalError, TargetError, UnsupportedError

SVD = lp.SVD()


@pytest.fixture
def said(caplog):
    """The lines that are printed once, by the first process."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    return lambda piece: [text for text in caplog.messages if piece in text]


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        (1, r"after 1 epoch \(0\); .* start of epoch 4, .*max_epochs=5 or more.*CompressionCallback\(epoch=0\)"),
        (2, r"after 2 epochs \(0 and 1\); .* start of epoch 4"),
        (3, r"after 3 epochs \(0 to 2\); .* start of epoch 4, .*CompressionCallback\(epoch=2\)"),
    ],
)
def test_a_cut_that_never_came(epochs, text, lit, loader, make_trainer):
    with pytest.warns(UserWarning, match=text):
        make_trainer(max_epochs=6, callbacks=[lp.CompressionCallback(4), StopAfter(epochs)]).fit(lit, loader)


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        (lambda: [lp.CompressionCallback(1), lp.CompressionCallback(2, 0.2)], "makes all cuts of a run.*epoch=.3, 6"),
        (lambda: [lp.PrehabCallback(), lp.PrehabCallback(lp.StableRank()), lp.CompressionCallback(1)], "Keep one"),
        (lambda: [lp.PaperPrehab(), lp.PrehabCallback(), lp.CompressionCallback(1)], "PaperPrehab and PrehabCallback"),
        (lambda: [lp.RehabSchedule(3), lp.CompressionCallback(1), lp.RehabSchedule(4)], "Keep one of them"),
    ],
)
def test_two_of_a_kind(callbacks, text, lit, loader, make_trainer):
    with pytest.raises(UnsupportedError, match=f"The Trainer has .*{text}"):
        make_trainer(max_epochs=3, callbacks=callbacks()).fit(lit, loader)


def test_keys_in_checkpoints_are_the_names_of_the_classes(lit, lit_class, loader, make_trainer, tmp_path):
    callbacks = [lp.PrehabCallback(), lp.CompressionCallback(1), lp.RehabSchedule()]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks)
    trainer.fit(lit, loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    stored = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    assert {"PrehabCallback", "CompressionCallback", "RehabSchedule"} <= stored.keys()
    again = [lp.PrehabCallback(), lp.CompressionCallback(1), lp.RehabSchedule()]  # and they are found again
    make_trainer(max_epochs=3, callbacks=again).fit(lit_class(fresh()), loader, ckpt_path=tmp_path / "end.ckpt")
    assert again[1].done


@pytest.mark.parametrize(
    "setting", [{"strength": 0.2}, {"ramp_steps": 3}, {"every_n_steps": 2}, {"strength_share": 0.1}]
)
def test_a_setting_that_changes_the_regularizer_says_so(setting, lit, loader, make_trainer):
    given = ", ".join(f"{name}={value}" for name, value in setting.items())
    prehab = lp.PrehabCallback(**setting)
    with pytest.warns(UserWarning, match=rf"PrehabCallback\({given}\) acts with StableRank\(\), not .*TailShrinkage"):
        make_trainer(max_epochs=2, callbacks=[prehab, lp.CompressionCallback(1)]).fit(lit, loader)
    assert prehab.regularizer == lp.StableRank()


def test_a_default_that_depends_on_the_trainer_is_named(lit, loader, make_trainer, said):
    make_trainer(callbacks=[lp.PrehabCallback()]).fit(lit, loader)
    assert len(said("PrehabCallback acts with StableRank(): without a CompressionCallback")) == 1


@pytest.fixture
def files(lit_class, mlp, loader, make_trainer, tmp_path):
    """Checkpoints of before and after a cut at epoch 1."""
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    callbacks = [lp.CompressionCallback(1, 0.5, factorization=SVD), saver]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(lit_class(mlp), loader)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    return {"before": tmp_path / "0.ckpt", "after": tmp_path / "1.ckpt", "weights": tmp_path / "weights.ckpt"}


def fresh():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 6))


@pytest.mark.parametrize("file", ["after", "weights"])
def test_the_structure_of_a_checkpoint_is_told_once(file, files, lit_class, loader, make_trainer, said):
    callback = lp.CompressionCallback(1, 0.5, factorization=SVD)
    module = lit_class(fresh())
    module.validation_step = lambda batch, batch_idx: None
    trainer = make_trainer(callbacks=[callback])
    trainer.validate(module, loader, ckpt_path=files[file], verbose=False)
    cut = sum(isinstance(layer, lp.LowRankLinear) for layer in module.net)
    assert len(said(f"The model follows the checkpoint: {cut} low-rank layers (")) == 1
    trainer.validate(module, loader, ckpt_path=files[file], verbose=False)  # it fits already
    trainer.validate(module, loader, ckpt_path=files["before"], verbose=False)
    assert len(said("The model follows")) == 2
    assert len(said("follows the checkpoint: no low-rank layers (")) == 1


def test_the_structure_at_a_resume_is_told_with_its_keep(files, lit_class, loader, make_trainer, said):
    callback = lp.CompressionCallback(1, 0.5, factorization=SVD)
    make_trainer(max_epochs=3, callbacks=[callback]).fit(lit_class(fresh()), loader, ckpt_path=files["after"])
    assert len(said(f"low-rank layers, keep {callback.report.keep:.3f} (")) == 1
    assert len(said("follows the checkpoint")) == 1
    assert not said("was going to cut")


def test_other_settings_after_the_cut_are_without_effect(files, lit_class, loader, make_trainer):
    callback = lp.CompressionCallback(2, 0.9, factorization=SVD, exclude_modules=["net.4"])
    text = r"after a cut with epoch=1, keep=0.5, exclude_modules=None: .*, and epoch=2, keep=0.9, exclude.*no effect"
    with pytest.warns(UserWarning, match=text):
        make_trainer(max_epochs=3, callbacks=[callback]).fit(lit_class(fresh()), loader, ckpt_path=files["after"])
    assert callback.report.keep <= 0.5


def test_other_settings_before_the_cut_count(files, lit_class, loader, make_trainer, said):
    callback = lp.CompressionCallback(2, 0.9, factorization=SVD)
    make_trainer(max_epochs=3, callbacks=[callback]).fit(lit_class(fresh()), loader, ckpt_path=files["before"])
    assert len(said("was going to cut with epoch=1, keep=0.5; from now on epoch=2, keep=0.9 counts")) == 1
    assert callback.report.keep > 0.5


@pytest.mark.parametrize("prehab", [[], [lp.PrehabCallback()]])
def test_a_run_that_has_diverged(prehab, lit, loader, make_trainer):
    step = lit.training_step
    lit.training_step = lambda batch, batch_idx: step(batch, batch_idx) * float("nan")
    trainer = make_trainer(max_epochs=3, callbacks=[*prehab, lp.CompressionCallback(1, factorization=SVD)])
    with pytest.raises(NumericalError, match=r"Layer .net.0.*Training has diverged, .*gradient_clip_val"):
        trainer.fit(lit, loader)
    assert not any(isinstance(layer, lp.LowRankLinear) for layer in lit.net)


def test_a_model_that_is_compressed_already(lit, loader, make_trainer):
    lp.compress_(lit, 0.5)
    trainer = make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1)])
    with pytest.raises(
        TargetError, match=r"compressed already \(low-rank layers: .*, the first 'net.0'\).*smaller keep"
    ):
        trainer.fit(lit, loader)


def test_the_forecast_leaves_the_progress_bar_with_the_cut(lit, loader, make_trainer):
    seen = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen[trainer.current_epoch] = "prehab/forecast" in trainer.progress_bar_metrics

    callbacks = [lp.PrehabCallback(forecast_every_n_steps=1), lp.CompressionCallback(2, calibration_batches=2), Look()]
    with pytest.warns(UserWarning, match="fewer calibration tokens"):
        make_trainer(max_epochs=4, callbacks=callbacks).fit(lit, loader)
    assert seen == {0: True, 1: True, 2: False, 3: False}


def test_a_regularizer_that_never_acts_is_refused(lit, loader, make_trainer):
    trainer = make_trainer(max_epochs=3, callbacks=[lp.PrehabCallback(start_epoch=1), lp.CompressionCallback(1)])
    with pytest.raises(ArgumentError, match="start_epoch=1.* never acts: the surgery is at epoch 1"):
        trainer.fit(lit, loader)
    several = [lp.CompressionCallback([0, 2], [0.6, 0.4], factorization=lp.SVD()) for _ in range(2)]
    with pytest.raises(ArgumentError, match=r"PaperPrehab\(start_epoch=0\) never acts: the surgery is at epoch 0"):
        make_trainer(max_epochs=3, callbacks=[lp.PaperPrehab(), several[0]]).fit(lit, loader)
    trainer = make_trainer(max_epochs=3, callbacks=[lp.PrehabCallback(update_steps=0), several[1]])
    trainer.fit(lit, loader)  # before epoch 2
    assert "prehab/progress" in trainer.callback_metrics
