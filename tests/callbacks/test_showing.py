"""Progress of a surgery beside the progress bar of the Trainer, or in its log."""

import sys

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

import lightning_prehab as lp
from lightning_prehab.callbacks import _showing
from lightning_prehab.callbacks._showing import showing
from lightning_prehab.progress import counted, display


@pytest.fixture
def slow(monkeypatch):
    """Every phase is worth a line."""
    monkeypatch.setattr(display, "QUIET", 0.0)
    monkeypatch.setattr(display, "LEAST", 0.0)


class OfSomebody(ProgressBar):
    """Prints with its own print, as the base class says it should."""

    def __init__(self):
        super().__init__()
        self.printed = []
        self.is_enabled = True

    def disable(self):
        pass

    def print(self, *args, **settings):
        self.printed.append(" ".join(map(str, args)))


def fit(make_trainer, module, loader, *callbacks, epoch=1, **settings):
    cut = lp.CompressionCallback(epoch, 0.5, calibration_batches=6)
    prehab = [lp.PrehabCallback(update_steps=0)] if epoch else []
    trainer = make_trainer(max_epochs=2, callbacks=[*prehab, cut, *callbacks], **settings)
    trainer.fit(module, loader)
    assert cut.done


#: What each phase ends with, in order: of the preparation of the regularizer, and of the surgery.
ENDS = ["decomposing: 3 layers", "preparing the regularizer: 3 layers", "decomposing: 3 layers", "factorizing: "]


def assert_told(lines, ends=ENDS):
    said = [line.strip() for line in lines if " in 0:" in line and not line.startswith("Epoch")]
    for end in ends:
        found = next((number for number, line in enumerate(said) if line.startswith(end)), None)
        assert found is not None, (end, said)
        said = said[found + 1 :]


@pytest.mark.parametrize("epoch", [0, 1])
def test_lines_stand_above_the_bar_of_tqdm(epoch, make_trainer, lit, loader, slow, capsys):
    fit(make_trainer, lit, loader, TQDMProgressBar(), epoch=epoch, enable_progress_bar=True)
    written = capsys.readouterr()
    assert_told(written.err.replace("\r", "\n").splitlines(), ENDS if epoch else ENDS[2:])
    assert "100%" in written.out + written.err  # its own bar went on to the end


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar, OfSomebody, None])
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_report_is_printed_whatever_the_bar_and_the_epoch(bar, epoch, make_trainer, lit, loader, capsys):
    bars = [] if bar is None else [bar()]
    fit(make_trainer, lit, loader, *bars, epoch=epoch, enable_progress_bar=bar is not None)
    written = capsys.readouterr().out + "".join(getattr(one, "printed", [""])[-1] for one in bars)
    assert written.count("times smaller") == 1


def test_lines_stand_above_the_bar_of_rich(make_trainer, lit, loader, slow, capsys):
    fit(make_trainer, lit, loader, RichProgressBar(), enable_progress_bar=True)
    written = capsys.readouterr().out
    assert_told(written.splitlines())
    assert "Epoch 1/1" in written


def test_the_bar_of_somebody_prints_itself(make_trainer, lit, loader, slow):
    bar = OfSomebody()
    fit(make_trainer, lit, loader, bar, enable_progress_bar=True)
    assert_told(bar.printed)


@pytest.mark.parametrize("bars", [[], [TQDMProgressBar(refresh_rate=0)]])
def test_without_a_bar_the_lines_are_log_messages(bars, make_trainer, lit, loader, slow, monkeypatch, capsys):
    logged = []
    monkeypatch.setattr(_showing, "rank_zero_info", logged.append)
    fit(make_trainer, lit, loader, *bars, enable_progress_bar=bool(bars))
    assert_told(logged)
    written = capsys.readouterr()
    assert "decomposing" not in written.out + written.err


def test_a_process_that_is_not_the_first_says_nothing(make_trainer, slow, monkeypatch):
    bar = OfSomebody()
    trainer = make_trainer(callbacks=[bar], enable_progress_bar=True)
    for first in (True, False):
        bar.printed.clear()
        monkeypatch.setattr(pl.Trainer, "is_global_zero", first)
        with showing(trainer):
            list(counted([1, 2], "decompose"))
        assert bool(bar.printed) == first


def test_a_quick_surgery_says_nothing(make_trainer, lit, loader, monkeypatch):
    monkeypatch.setattr(display, "QUIET", sys.float_info.max)  # quick, however busy the machine is
    bar = OfSomebody()
    fit(make_trainer, lit, loader, bar, enable_progress_bar=True)
    assert not any(" in 0:" in line or "layer 1" in line for line in bar.printed)
