"""Figures and the page, by what is drawn and what a parser finds."""

import base64
import json
from html.parser import HTMLParser

import pytest
from lightning.pytorch.loggers import CSVLogger

import lightning_prehab as lp
from lightning_prehab.cli import main
from lightning_prehab.errors import ArgumentError
from lightning_prehab.figures import read_metrics, timeline_figure, to_png

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


def test_page_from_a_real_run(lit, loader, make_trainer, tmp_path, capsys):
    logger = CSVLogger(tmp_path, name=None, version="run")
    cut = lp.CompressionCallback(epoch=1, keep=0.5, factorization=lp.SVD())
    make_trainer(max_epochs=2, logger=logger, log_every_n_steps=1, callbacks=[cut]).fit(lit, loader)
    metrics = tmp_path / "run" / "metrics.csv"
    curves = read_metrics(metrics)
    assert [value for _, value in curves["train_loss"]] == pytest.approx(lit.losses)
    per_epoch = len(loader)
    lines = timeline_figure(metrics).axes[0].lines
    assert list(lines[0].get_ydata()) == pytest.approx(lit.losses)
    assert lines[1].get_xdata()[0] == per_epoch  # steps count from 0, the cut is at the start of epoch 1
    cut.report.save_json(tmp_path / "report.json")
    page = tmp_path / "report.html"
    words = ["report", str(tmp_path / "report.json"), "--html", str(page), "--metrics", str(metrics)]
    assert main(words) == 0
    found = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    Finder().feed(page.read_text())
    images = [attributes["src"] for tag, attributes in found if tag == "img"]
    assert len(images) == 4
    for image in images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert not {tag for tag, _ in found} & {"script", "link", "iframe", "object"}
    text = page.read_text()
    for image in images:
        text = text.replace(image, "")
    assert "http" not in text
    assert "url(" not in text


def test_every_key_of_the_file_is_documented(report, tmp_path):
    report.save_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    for key in (*data, *data["layers"][0]):
        assert f"``{key}``" in lp.CompressionReport.save_json.__doc__


def test_one_picture(report, tmp_path, capsys):
    report.save_json(tmp_path / "report.json")
    words = ["report", str(tmp_path / "report.json"), "--png"]
    assert main([*words, f"ranks={tmp_path / 'a=b.png'}", f"errors={tmp_path / 'errors.png'}"]) == 0
    assert (tmp_path / "a=b.png").read_bytes() == to_png(report.figure("ranks"))
    assert (tmp_path / "errors.png").read_bytes() == to_png(report.figure("errors"))
    for wrong in ("pie=x.png", "ranks", "ranks=", "=x.png"):
        assert main([*words, f"parameters={tmp_path / 'no.png'}", wrong]) == 1
        assert "NAME=FILE with a NAME of ranks, errors, parameters" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_names_are_escaped(report, tmp_path):
    data = report.to_dict()
    data["layers"][0]["name"] = "<script>$x_$"
    lp.CompressionReport.from_dict(data, lp.SVD()).save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;$x_$" in text


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "step,loss\n1,x\n", "step,acc\n1,2\n"])
def test_wrong_metrics(text, tmp_path):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ArgumentError, match="metrics.csv"):
        timeline_figure(tmp_path / "metrics.csv")
