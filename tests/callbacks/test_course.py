"""What a run with prehab went through, in its report."""

import io
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_prehab as lp
from lightning_prehab.callbacks._printing import show
from tests.conftest import LitRegressor


class Validated(LitRegressor):
    """Logs a validation loss, and something that is not validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def on_train_epoch_end(self):
        self.log("other", 1.0)


class Watch(pl.Callback):
    """Weights at the start and at the surgery, values of validation, by hand."""

    def __init__(self):
        self.start, self.cut, self.validation = None, None, {}

    def on_train_start(self, trainer, pl_module):
        self.start = weights(pl_module)

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validation[trainer.global_step] = float(trainer.callback_metrics["val_loss"])

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.cut = trainer.global_step, weights(pl_module)


def weights(pl_module):
    return {
        name: layer.weight.detach().clone()
        for name, layer in pl_module.net.named_children()
        if hasattr(layer, "weight")
    }


def stable_rank(matrices):
    norms = [(w.norm() / torch.linalg.matrix_norm(w, 2)) ** 2 for w in matrices.values()]
    return float(sum(norms) / len(norms))


def fit(mlp, data, make_trainer, *, settings=None, ckpt_path=None, prehab=None, **trainer):
    prehab = lp.PrehabCallback(**(settings or {})) if prehab is None else prehab
    cut = lp.CompressionCallback(epoch=2, keep=0.5, factorization=lp.SVD())
    watch = Watch()
    lit = Validated(mlp)
    loader, val = DataLoader(data, batch_size=16), DataLoader(data, batch_size=96)
    fitted = make_trainer(max_epochs=4, callbacks=[prehab, cut, watch], **trainer)
    fitted.fit(lit, loader, val, ckpt_path=ckpt_path)
    return cut, watch, lit


def test_start_cut_and_end(mlp, data, make_trainer):
    cut, watch, lit = fit(mlp, data, make_trainer)
    course = cut.report.prehab
    assert course.start.step == 0
    assert course.start.stable_rank == pytest.approx(stable_rank(watch.start), rel=1e-4)
    assert (course.cut.step, course.end.step) == (12, 24)
    assert course.cut.stable_rank == pytest.approx(stable_rank(watch.cut[1]), rel=1e-4)
    tails = [torch.linalg.svdvals(watch.cut[1][name.removeprefix("net.")]).square() for name in cut.report.ranks]
    shares = [float(s[rank:].sum() / s.sum()) for s, rank in zip(tails, cut.report.ranks.values(), strict=True) if rank]
    assert course.cut.tail_energy == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert course.cut.loss == pytest.approx(sum(lit.losses[:12]) / 12, rel=1e-5)
    assert course.end.loss == pytest.approx(sum(lit.losses[12:]) / 12, rel=1e-5)  # counted anew after the cut
    assert course.start.validation == {}
    assert course.cut.validation == {"val_loss": pytest.approx(watch.validation[12])}
    assert course.end.validation == {"val_loss": pytest.approx(watch.validation[24])}
    assert course.end.stable_rank is None
    assert f"prehab: {course.summary()}" in " ".join(str(cut.report).split()).replace("  ", " ")


def test_the_report_at_the_surgery_has_no_end_yet(mlp, data, make_trainer):
    seen = []

    class Listener(lp.PrehabCallback):
        def on_surgery(self, trainer, pl_module, report):
            super().on_surgery(trainer, pl_module, report)
            seen.append(report)

    cut, *_ = fit(mlp, data, make_trainer, prehab=Listener())
    assert seen[0].prehab.end is None
    assert seen[0].prehab.cut == cut.report.prehab.cut
    assert cut.report.prehab.end is not None


def test_losses_are_those_of_the_user(mlp, data, make_trainer):
    """Not the share of one accumulated step, nor with the penalty."""
    settings = {"regularizer": lp.StableRank(), "strength": 3.0}
    cut, _, lit = fit(mlp, data, make_trainer, settings=settings, accumulate_grad_batches=2)
    assert cut.report.prehab.cut.loss == pytest.approx(sum(lit.losses[:12]) / 12, rel=1e-5)


def test_a_loss_that_is_known_late(mlp, data, make_trainer):
    """A penalty that is ready before the first step has no loss to tell yet."""
    settings = {"regularizer": lp.StableRank(), "space": "weight", "forecast_every_n_steps": 0}
    cut, _, lit = fit(mlp, data, make_trainer, settings=settings)
    start = cut.report.prehab.start
    assert (start.step, start.loss) == (0, pytest.approx(lit.losses[0]))


def test_without_prehab_there_is_no_course(lit, loader, make_trainer):
    cut = lp.CompressionCallback(epoch=1, keep=0.5, factorization=lp.SVD())
    make_trainer(max_epochs=2, callbacks=[cut]).fit(lit, loader)
    assert cut.report.prehab is None
    assert "prehab" not in str(cut.report)


def test_a_step_without_a_loss_is_passed_over(data, mlp, make_trainer):
    class Sometimes(Validated):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    cut = lp.CompressionCallback(epoch=2, keep=0.5, factorization=lp.SVD())
    lit = Sometimes(mlp)
    callbacks = [lp.PrehabCallback(), cut]
    make_trainer(max_epochs=3, callbacks=callbacks).fit(lit, DataLoader(data, 16), DataLoader(data, 96))
    assert cut.report.prehab.cut.loss == pytest.approx(sum(lit.losses[:6]) / 6, rel=1e-5)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_run_tells_the_same(mlp, data, make_trainer, tmp_path, epoch):
    """Killed before the cut or after it."""

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    class SavingPrehab(lp.PrehabCallback, Save):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            Save.on_train_epoch_end(self, trainer, pl_module)

    start = {name: value.clone() for name, value in mlp.state_dict().items()}
    torch.manual_seed(0)
    cut, *_ = fit(mlp, data, make_trainer, prehab=SavingPrehab())
    again = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 6))
    again.load_state_dict(start)
    torch.manual_seed(0)
    resumed, *_ = fit(again, data, make_trainer, prehab=SavingPrehab(), ckpt_path=tmp_path / f"{epoch}.ckpt")
    assert resumed.report.prehab == cut.report.prehab
    assert lp.CompressionReport.from_dict(resumed.report.to_dict(), lp.SVD()) == resumed.report


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Printing:
    """Prints as a LightningModule does."""

    trainer = SimpleNamespace(progress_bar_callback=None)

    def print(self, *words):
        print(*words)


@pytest.fixture
def report(mlp):
    return lp.compress_(mlp, 0.5)


def test_a_terminal_gets_colours_and_its_own_width(report, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    show(Printing(), report)
    text = sys.stdout.getvalue()
    assert "\x1b[1mCompression report\x1b[0m" in text
    assert "\x1b[36m" in text  # ranks


@pytest.mark.parametrize("place", ["no terminal", "no rich"])
def test_elsewhere_plain_text(report, monkeypatch, place):
    monkeypatch.setattr(sys, "stdout", io.StringIO() if place == "no terminal" else Terminal())
    if place == "no rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    show(Printing(), report)
    assert sys.stdout.getvalue() == f"\n{report}\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_callback_prints_its_report_so(lit, loader, make_trainer, monkeypatch, terminal):
    cut = lp.CompressionCallback(epoch=1, keep=0.5, factorization=lp.SVD())
    trainer = make_trainer(max_epochs=2, callbacks=[cut])
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    trainer.fit(lit, loader)
    assert ("Compression report" in stream.getvalue()) == terminal
    assert (str(cut.report) in stream.getvalue()) != terminal
