"""Figures, by what is drawn."""

import json
import math
from dataclasses import replace

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_prehab as lp
from lightning_prehab.cli import main
from lightning_prehab.errors import ArgumentError
from lightning_prehab.report.figures import read_metrics, timeline_figure, to_png
from lightning_prehab.report.latency import BatchLatency, ModelLatency
from lightning_prehab.report.panels import spectra_figure
from tests.large_report import BLOCKS, SHAPES, large_report
from tests.report.page_reader import folded

pytest.importorskip("matplotlib")


@pytest.fixture
def report(mlp):
    return lp.compress_(mlp, 0.5)


def test_bars_are_the_numbers(report):
    layers = report.plan.layers
    axes = report.figure("ranks").axes[0]
    assert [bar.get_width() for bar in axes.containers[1]] == [layer.rank or 0 for layer in layers]
    axes = report.figure("errors").axes[0]
    assert [bar.get_width() for bar in axes.containers[0]] == [report.weight_errors.get(x.name, 0.0) for x in layers]
    axes = report.figure("parameters").axes[0]
    assert [sum(bar.get_width() for bar in bars) for bars in axes.containers] == [
        report.plan.dense_parameters,
        report.plan.parameters,
    ]
    with pytest.raises(ArgumentError, match="no figure 'pie'; choose one of ranks, errors, parameters"):
        report.figure("pie")


def test_page_from_a_real_run(mlp, logging_class, loader, make_trainer, tmp_path, capsys):
    lit = logging_class(mlp)
    logger = CSVLogger(tmp_path, name=None, version="run")
    cut = lp.CompressionCallback(epoch=1, keep=0.5, factorization=lp.SVD())
    make_trainer(max_epochs=2, logger=logger, log_every_n_steps=1, callbacks=[cut]).fit(lit, loader)
    metrics = tmp_path / "run" / "metrics.csv"
    curves = read_metrics(metrics)
    assert [value for _, value in curves["train_loss"]] == pytest.approx(lit.losses)
    per_epoch = len(loader)
    lines = timeline_figure(metrics).axes[0].lines  # losses come first
    assert list(lines[0].get_ydata()) == pytest.approx(lit.losses)
    assert lines[1].get_xdata()[0] == per_epoch  # steps count from 0, the cut is at the start of epoch 1
    cut.report.save_json(tmp_path / "report.json")
    page = tmp_path / "report.html"
    words = ["report", str(tmp_path / "report.json"), "--html", str(page), "--metrics", str(metrics)]
    assert main(words) == 0
    assert folded(page.read_text()) == ["Ranks", "Errors", "Parameters", "Spectra", "Timeline"]


def test_spectra_are_drawn_up_to_the_rank(report):
    report = lp.CompressionReport.from_dict(report.to_dict(), lp.SVD())
    axes = report.figure("spectra").axes[0]
    _, before, _, after = axes.collections
    assert len(before.get_segments()) == len(report.ranks)
    for place, (name, spectrum) in enumerate(report.spectra.items()):
        rank, left = report.ranks[name], 1.12 * (place % 4)
        whole, kept = before.get_segments()[place], after.get_segments()[place]
        full = len(spectrum.values)
        assert [point[0] - left for point in whole] == pytest.approx([(i + 1) / full for i in range(full)])
        heights = [1 + math.log10(max(value / spectrum.values[0], 1e-4)) / 4 for value in spectrum.values]
        assert [point[1] for point in whole] == pytest.approx(heights)
        assert kept[: rank or full].tolist() == whole[: rank or full].tolist()
        if rank is not None:
            assert kept[rank:].flatten().tolist() == pytest.approx([left + rank / full, 0.0])
        words = "dense" if rank is None else f"rank {rank}"
        assert axes.texts[place].get_text() == f"{name}\n{words} of {full}"


def test_full_ranks_are_those_of_a_group():
    """A grouped convolution has factors of its own in each group."""
    model = nn.Sequential(nn.Conv2d(32, 64, 3, groups=2), nn.Conv2d(64, 16, 1))
    report = lp.compress_(model, 0.5)
    full = [bar.get_width() for bar in report.figure("ranks").axes[0].containers[0]]
    assert full == [spectrum.indices[-1] for spectrum in report.spectra.values()] == [32, 16]


def test_many_layers_with_long_names(report):
    """Rows of four, each name cut at its beginning."""
    spectrum = report.spectra["0"]
    names = [f"model.encoder.layers.{i}.attention.self.query_projection" for i in range(9)]
    many = spectra_figure(dict.fromkeys(names, spectrum), dict.fromkeys(names, 3))
    axes = many.axes[0]
    assert [text.get_text().splitlines()[0] for text in axes.texts] == ["…attention.self.query_projection"] * 9
    assert len({text.get_position()[1] for text in axes.texts}) == 3
    assert len({text.get_position()[0] for text in axes.texts}) == 4


def test_layers_of_a_group_share_a_picture():
    report = large_report()
    for name, text in (("ranks", "20 to 49 of 576"), ("errors", "0.200"), ("parameters", "26.5M -> 2.2M")):
        axes = report.figure(name).axes[0]
        shown = [text.get_text().split("\n") for text in axes.texts]
        assert [title for title, _ in shown] == [f"model.layers.*.{kind}" for kind in SHAPES]
        assert dict(map(tuple, shown))["model.layers.*.mlp.up_proj"] == text
        heights = [path.get_extents().height for path in axes.collections[1].get_paths()]
        assert len(heights) == BLOCKS * len(SHAPES)
        if name == "ranks":  # group by group, the dense layer whole
            assert heights[:BLOCKS] == pytest.approx([(20 + block) / 576 for block in range(BLOCKS)])
            assert heights[3 * BLOCKS + 7] == pytest.approx(1.0)
    axes = report.figure("spectra").axes[0]
    assert len(axes.texts) == len(SHAPES)
    assert len(axes.collections[1].get_segments()) == BLOCKS * len(SHAPES)
    assert axes.texts[3].get_text() == "model.layers.*.self_attn.o_proj\nrank 20 to 49 of 576"


def test_latencies_of_many_layers_are_added_up():
    report = large_report()
    cut = {name: (0.002, 0.001) for name, rank in report.ranks.items() if rank is not None}
    batch = BatchLatency(8, 0.9, 0.5, cut)
    counts = report.parameters_before, report.parameters_after
    axes = report.with_latency(ModelLatency("cpu", 1, *counts, (batch,))).figure("latency").axes[1]
    assert len(axes.get_yticklabels()) == len(SHAPES)
    assert axes.get_yticklabels()[3].get_text() == "model.layers.*.self_attn.o_proj (all 29)"
    assert axes.containers[0][3].get_width() == pytest.approx(58.0)


def test_errors_of_rounding_are_drawn_as_nothing(report):
    tiny = replace(report, weight_errors=dict.fromkeys(report.weight_errors, 5e-8))
    axes = tiny.figure("errors").axes[0]
    assert {bar.get_width() for bar in axes.containers[0]} == {0.0}
    assert axes.get_xlim() == (0.0, 1.0)


def test_latencies_are_drawn_in_milliseconds(report):
    counts = report.parameters_before, report.parameters_after
    batches = BatchLatency(1, 0.002, 0.001), BatchLatency(8, 0.012, 0.006, {"0": (0.004, 0.003), "2": (0.002, 0.005)})
    full = report.with_latency(ModelLatency("cpu", 1, *counts, batches))
    whole, layers = full.figure("latency").axes
    assert [bar.get_width() for bar in (*whole.containers[0], *whole.containers[1])] == [2.0, 12.0, 1.0, 6.0]
    assert [bar.get_width() for bar in (*layers.containers[0], *layers.containers[1])] == [4.0, 2.0, 3.0, 5.0]
    alone = report.with_latency(ModelLatency("cpu", 1, *counts, batches[:1]))
    assert len(alone.figure("latency").axes) == 1


def test_every_key_of_the_file_is_documented(report, tmp_path):
    batch = BatchLatency(1, 0.5, 0.5, {"0": (1.0, 1.0)})
    counts = report.parameters_before, report.parameters_after
    report.with_latency(ModelLatency("cpu", 1, *counts, (batch,))).save_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    row = data["latency"]["latency"][0]
    for key in (*data, *data["layers"][0], *data["layers"][0]["spectrum"], *data["latency"], *row, *row["layers"][0]):
        assert f"``{key}``" in lp.CompressionReport.save_json.__doc__


def test_one_picture(report, tmp_path, capsys):
    report.save_json(tmp_path / "report.json")
    words = ["report", str(tmp_path / "report.json"), "--png"]
    assert main([*words, f"ranks={tmp_path / 'a=b.png'}", f"errors={tmp_path / 'errors.png'}"]) == 0
    assert (tmp_path / "a=b.png").read_bytes() == to_png(report.figure("ranks"))
    assert (tmp_path / "errors.png").read_bytes() == to_png(report.figure("errors"))
    for wrong in ("pie=x.png", "ranks", "ranks=", "=x.png"):
        with pytest.raises(SystemExit, match="2"):
            main([*words, f"parameters={tmp_path / 'no.png'}", wrong])
        assert "NAME=FILE with a NAME of ranks, errors, parameters" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "step,loss\n1,x\n", "step,acc\n1,2\n"])
def test_wrong_metrics(text, tmp_path):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ArgumentError, match="metrics.csv"):
        timeline_figure(tmp_path / "metrics.csv")
