import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError


@pytest.fixture
def report(mlp):
    plan = lp.make_plan(lp.find_targets(mlp, exclude_modules="4"), 0.5, lp.SVD()).with_ranks({"0": "dense"})
    layers = tuple(replace(layer, loss_increase=0.125 if layer.rank else None) for layer in plan.layers)
    return lp.apply_plan_(mlp, replace(plan, layers=layers))


def test_round_trip_through_json(report):
    data = json.loads(json.dumps(report.to_dict()))
    assert data["loss_increase"] == 0.125
    assert [layer["loss_increase"] for layer in data["layers"]] == [None, 0.125]
    assert lp.CompressionReport.from_dict(data, lp.SVD()) == report


def test_parts_beside_the_factors(report):
    layers = (report.plan.layers[0], replace(report.plan.layers[1], new_bias=14, nonzeros=9, relative_error=None))
    other = replace(report, plan=replace(report.plan, layers=layers))
    assert lp.CompressionReport.from_dict(other.to_dict(), lp.SVD()) == other


def test_reports_without_the_new_keys(report):
    data = report.to_dict()
    del data["loss_increase"]
    for layer in data["layers"]:
        del layer["loss_increase"], layer["new_bias"], layer["nonzeros"]
    data["layers"][1]["parameters_after"] += 14
    old = lp.CompressionReport.from_dict(data, lp.SVD())
    assert old.plan.loss_increase is None
    assert [layer.new_bias for layer in old.plan.layers] == [0, 14]
    assert old.ranks == report.ranks


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_unknown_version(report, version):
    with pytest.raises(CheckpointError, match=f"version {version!r} cannot be read, only version 1; update"):
        lp.CompressionReport.from_dict({**report.to_dict(), "version": version}, lp.SVD())


def test_text(report):
    text = str(report)
    assert "predicted loss increase" in text.splitlines()[0]
    assert text.endswith("; predicted loss increase 0.125")
    assert "chosen by hand" in text
    assert "excluded by exclude_modules" in text
    assert f"{report.weight_errors['2']:.3f}" in text
    unknown = replace(report.plan, layers=tuple(replace(layer, loss_increase=None) for layer in report.plan.layers))
    assert "loss increase" not in str(replace(report, plan=unknown))


def test_rich(report):
    console = Console(file=io.StringIO(), record=True, width=160)
    console.print(report)
    text = console.export_text()
    for piece in ("Compression report", "14x16", "224 -> ", "chosen by hand", "excluded by exclude_modules", "0.125"):
        assert piece in text
    assert f"keep {report.keep:.3f}" in text
    assert f"{report.weight_errors['2']:.3f}" in text
