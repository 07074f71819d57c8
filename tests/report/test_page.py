"""The page, by what a parser finds on it."""

import copy
import re
from dataclasses import replace

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError
from lightning_prehab.plan import timing
from lightning_prehab.report.course import Moment, PrehabCourse
from lightning_prehab.report.figures import FIGURES
from lightning_prehab.report.latency import BatchLatency, ModelLatency, compare_latencies
from lightning_prehab.report.origin import Origin
from lightning_prehab.report.page import build_page
from lightning_prehab.report.scores import Score, Scores
from lightning_prehab.report.style import STYLE
from tests.large_report import BLOCKS, SHAPES, large_report
from tests.report.page_reader import Reader, assert_self_contained, folded

HOSTILE = '<script>alert(1)</script>"onload="x\' & $x_$ ]]> --> \n\x00'


def tiles(text):
    """``{heading: words}``."""
    reader = Reader(text)
    words = re.findall(r'<div class="tile"><h2>(.*?)</h2>(.*?)</div>', text)
    assert [heading for heading, _ in words] == ["Size", "Quality", "Speed", "Keep"]
    assert all(heading in reader.texts["h2"] for heading, _ in words)
    return {heading: re.sub(r"\s+", " ", re.sub("<.*?>", " ", inside)).strip() for heading, inside in words}


def latency(report, seconds):
    counts = report.parameters_before, report.parameters_after
    return ModelLatency("cpu", 2, *counts, (BatchLatency(8, seconds, 0.1),))


def test_everything(mlp, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-6)
    dense = copy.deepcopy(mlp)
    report = lp.compress_(mlp, 0.5)
    assert report.figure_names == ("ranks", "errors", "parameters", "spectra")
    report = report.with_latency(compare_latencies(dense, mlp, [torch.randn(4, 12)]))
    assert report.figure_names == FIGURES
    (tmp_path / "metrics.csv").write_text("step,train_loss\n0,2.0\n1,1.0\n")
    report.save_html(tmp_path / "page.html", tmp_path / "metrics.csv")
    text = (tmp_path / "page.html").read_text()
    assert_self_contained(text, pictures=6)
    assert folded(text) == [*(name.capitalize() for name in FIGURES), "Timeline"]
    headings = Reader(text).texts["h2"]
    assert headings == ["Size", "Quality", "Speed", "Keep", "Layers", "Speed", "Pictures"]
    assert Reader(text).texts["h1"] == ["Sequential"]
    assert f"torch {torch.__version__}" in text


def test_a_large_model_fits(tmp_path):
    """A row for each group; all rows, and all figures, are folded."""
    pytest.importorskip("matplotlib")
    report = large_report()
    report.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert_self_contained(text, pictures=4)
    assert folded(text) == ["All 210 layers", "Ranks", "Errors", "Parameters", "Spectra"]
    reader = Reader(text)
    assert reader.texts["h1"] == ["LlamaForCausalLM (small)"]
    assert reader.texts["h2"] == ["Size", "Quality", "Speed", "Keep", "Where it was cut", "Layers", "Pictures"]
    assert "2026-01-31 12:00 UTC, torch 2.6.0" in text
    outside = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert outside.count("<tr>") == (1 + BLOCKS) + (1 + len(SHAPES))  # map and groups: what is seen at first
    assert len(text) < 900_000


def test_the_map_has_a_cell_for_each_layer():
    text = build_page(large_report(), {})
    table = text.split('<table class="map"')[1].split("</table>")[0]
    cells = re.findall(r'<td class="(.*?)"(?: style="--kept:(.*?)")? title="(.*?)">(.*?)</td>', table)
    assert len(cells) == BLOCKS * len(SHAPES)
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == [str(block) for block in range(BLOCKS)]
    assert [name.rpartition(".")[2] for name in SHAPES] == re.findall(r'<th scope="col">(.*?)</th>', table)[1:]
    kind, kept, words, rank = cells[0]
    assert (kind, rank) == ("kept", "20")
    assert float(kept) == pytest.approx(20 * 2 / 576, abs=0.01)
    assert words == "model.layers.0.self_attn.q_proj, 576x576, keeps 7 %, error 0.100"
    (dense,) = [cell for cell in cells if cell[3] == "dense"]
    assert dense[0] == "kept dense"
    assert dense[2].startswith("model.layers.7.self_attn.o_proj, 576x576, keeps 100 %, every rank below")


def test_empty_parts_are_left_out(mlp):
    text = build_page(replace(lp.compress_(mlp, 0.5), spectra={}, origin=Origin()), {})
    reader = Reader(text)
    assert reader.texts["h2"] == ["Size", "Quality", "Speed", "Keep", "Layers"]
    assert reader.texts["h1"] == ["Compression report"]
    assert folded(text) == []
    assert "<p></p></header>" not in text


def test_an_old_report(mlp, tmp_path):
    pytest.importorskip("matplotlib")
    data = lp.compress_(mlp, 0.5).to_dict()
    for layer in data["layers"]:
        del layer["spectrum"]
    old = lp.CompressionReport.from_dict(data, lp.SVD())
    with pytest.raises(ArgumentError, match="'spectra' cannot be drawn. This report holds no spectra: it was written"):
        old.figure("spectra")
    with pytest.raises(ArgumentError, match="'latency' cannot be drawn. Latencies were not measured"):
        old.figure("latency")
    old.save_html(tmp_path / "page.html")
    assert folded((tmp_path / "page.html").read_text()) == ["Ranks", "Errors", "Parameters"]


@pytest.mark.parametrize(
    ("settings", "quality"),
    [
        ({}, "+0.209 loss, as predicted compress with --data measures it"),
        (
            {"scores": Scores(Score(3.2347, 9, "tokens", data="34 rows"), Score(3.5056, 9, "tokens"))},
            "25.4 → 33.3 perplexity on 34 rows",
        ),
        (
            {"scores": Scores(Score(0.31, 5, "labels", 0.9), Score(0.4, 5, "labels", 0.85))},
            "90.0 → 85.0 % accuracy loss 0.310 → 0.400",
        ),
        (
            {"scores": Scores(Score(None, 5, output_error=0.0), Score(None, 5, output_error=0.123))},
            "12.3 % the outputs differ",
        ),
        (
            {
                "prehab": PrehabCourse(
                    Moment(0), Moment(5, validation={"val_acc": 0.9}), Moment(9, validation={"val_acc": 0.88})
                )
            },
            "0.900 → 0.880 val_acc before the cut → after all training",
        ),
    ],
)
def test_quality(settings, quality):
    assert tiles(build_page(large_report(**settings), {}))["Quality"] == quality


def test_nothing_is_known_of_quality(mlp):
    assert tiles(build_page(lp.compress_(mlp, 0.5), {}))["Quality"] == "? not measured compress with --data measures it"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "2.00 times as fast 8"), (0.1, "1.00 times as fast, no gain"), (0.05, "0.50 times as fast: slower")],
)
def test_speed(seconds, words):
    report = large_report()
    assert tiles(build_page(report, {}))["Speed"] == "? not measured bench measures it"
    text = build_page(report.with_latency(latency(report, seconds)), {})
    assert tiles(text)["Speed"].startswith(words)
    assert Reader(text).texts["h2"][-1] == "Speed"


def test_what_prehab_took():
    course = PrehabCourse(Moment(3, 0.5, {}, 9.0, 12.0, 0.3), Moment(50, 0.4, {"val_loss": 0.6}, 2.0, 3.0, 1e-15))
    text = build_page(large_report(prehab=course), {})
    table = text.split("What prehab took")[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert rows == [
        ["", "at its start", "at the cut"],
        ["training loss", "0.500", "0.400"],
        ["val_loss", "", "0.600"],
        ["stable rank", "9.00", "2.00"],
        ["effective rank", "12.0", "3.00"],
        ["energy beyond the ranks", "0.300", "0"],
        ["step", "3", "50"],
    ]


def test_hostile_names(tmp_path):
    """Of layers, reasons, forms, the model, versions, metrics, data and devices."""
    pytest.importorskip("matplotlib")
    report = large_report(
        origin=Origin(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}),
        scores=Scores(Score(1.0, 5, data=HOSTILE), Score(2.0, 5)),
        prehab=PrehabCourse(Moment(0), Moment(1, validation={f"val{HOSTILE}": 1.0})),
    )
    layers = [replace(one, name=one.name.replace("q_proj", HOSTILE), form=HOSTILE) for one in report.plan.layers]
    layers[3] = replace(layers[3], rank=None, reason=HOSTILE)
    plan = replace(report.plan, layers=tuple(layers), skipped={HOSTILE: HOSTILE, f"a.{HOSTILE}": HOSTILE})
    report = replace(report, plan=plan, weight_errors={one.name: 0.1 for one in layers}, spectra={})
    batch = BatchLatency(1, 0.1, 0.2, {HOSTILE: (1.0, 2.0)})
    counts = report.parameters_before, report.parameters_after
    report = report.with_latency(ModelLatency(HOSTILE, 1, *counts, (batch,)))
    report.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert_self_contained(text, pictures=4)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;onload=&quot;x&#x27; &amp; $x_$" in text
    assert "\x00" not in text


def test_light_and_dark_and_narrow():
    """Tables scroll in boxes of their own; every colour of the light page has one for the dark page."""
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in STYLE.split("@media(prefers-color-scheme:dark)")[:2])
    assert light
    assert light == dark & light
    assert 'name="viewport"' in build_page(large_report(), {})
    text = build_page(large_report(), {})
    assert text.count("<table") == text.count('<div class="box" tabindex="0"><table')
