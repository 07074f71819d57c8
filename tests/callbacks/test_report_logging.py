"""The report in loggers: real ones where they are installed, and ones that record their calls."""

import csv
import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

import lightning_prehab as lp
from lightning_prehab.callbacks._report_logging import log_report

STEPS = 6  # of an epoch


class Recorder(Logger):
    """A logger that keeps what it is told; ``experiment`` has the given methods only."""

    name, version = "recorder", "0"

    def __init__(self, *methods, own=()):
        super().__init__()
        self.calls = []
        self.experiment_ = SimpleNamespace(**{method: self.note(method) for method in methods})
        for method in own:
            setattr(self, method, self.note(method))

    def note(self, method):
        return lambda *words, **named: self.calls.append((method, words, named))

    @property
    def experiment(self):
        return self.experiment_

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *_, **__):
        pass


def train(lit, loader, make_trainer, *loggers):
    cut = lp.CompressionCallback(epoch=1, keep=0.5, factorization=lp.SVD())
    make_trainer(max_epochs=2, logger=list(loggers), log_every_n_steps=1, callbacks=[cut]).fit(lit, loader)
    return cut.report


def test_each_logger_gets_what_it_can_take(lit, loader, make_trainer, tmp_path):
    pytest.importorskip("matplotlib")
    board = Recorder("add_text", "add_figure")
    flow = Recorder("log_text", "log_figure")
    flow.run_id = "run7"
    wand = Recorder(own=("log_text", "log_image"))
    plain = Recorder("log_text")
    table = CSVLogger(tmp_path, name=None, version="run")
    report = train(lit, loader, make_trainer, board, table, flow, wand, plain)

    (_, (tag, text, step), _), *figures = board.calls
    assert (tag, step) == ("compression/report", STEPS)
    assert [line.removeprefix("    ") for line in text.splitlines()] == str(report).splitlines()
    names = [f"compression/{name}" for name in ("ranks", "errors", "parameters", "spectra")]
    assert [(method, words[0], words[2]) for method, words, _ in figures] == [("add_figure", n, STEPS) for n in names]
    ranks = [bar.get_width() for bar in figures[0][1][1].axes[0].containers[1]]
    assert ranks == [rank or 0 for rank in report.ranks.values()]

    assert flow.calls[0] == ("log_text", ("run7", f"{report}\n", "compression/report.txt"), {})
    assert [(words[0], words[2]) for _, words, _ in flow.calls[1:]] == [("run7", f"{name}.png") for name in names]

    (_, (key,), named), *images = wand.calls
    assert (key, named["step"]) == ("compression/report", STEPS)
    assert [row[0] for row in named["data"]] == [*report.ranks, "total"]
    assert {len(row) for row in named["data"]} == {len(named["columns"])}
    assert [words[0] for _, words, _ in images] == names
    pixels = images[0][1][1][0]
    assert pixels.ndim == 3
    assert pixels.std() > 0

    assert plain.calls == []
    assert [path.name for path in (tmp_path / "run").iterdir() if path.suffix != ".yaml"] == ["metrics.csv"]
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [float(row["compression/keep"]) for row in rows if row["compression/keep"]] == [pytest.approx(report.keep)]


def test_without_matplotlib_only_the_table(lit, loader, make_trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    board = Recorder("add_text", "add_figure")
    train(lit, loader, make_trainer, board)
    assert [method for method, _, _ in board.calls] == ["add_text"]


def test_a_logger_that_fails_costs_a_warning(lit, loader, make_trainer):
    broken, after = Recorder("add_text", "add_figure"), Recorder("add_text", "add_figure")

    def fail(*_):
        raise ConnectionError("server is gone")

    broken.experiment_.add_text = fail
    with pytest.warns(UserWarning, match=r"to Recorder \(ConnectionError: server is gone\)"):
        report = train(lit, loader, make_trainer, broken, after)
    assert report is not None
    assert after.calls


def test_only_rank_zero_writes(mlp):
    board = Recorder("add_text", "add_figure")
    trainer = SimpleNamespace(is_global_zero=False, loggers=[board], global_step=3)
    log_report(trainer, lp.compress_(mlp, 0.5))
    assert board.calls == []


def test_a_real_tensorboard(lit, loader, make_trainer, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    report = train(lit, loader, make_trainer, TensorBoardLogger(tmp_path, name=None, version="run"))
    found = accumulators.EventAccumulator(str(tmp_path / "run")).Reload()
    (event,) = found.Tensors("compression/report/text_summary")
    assert event.step == STEPS
    assert str(report).splitlines()[0] in event.tensor_proto.string_val[0].decode()
    assert [image.step for image in found.Images("compression/ranks")] == [STEPS]
