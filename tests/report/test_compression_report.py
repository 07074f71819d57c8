import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError
from lightning_prehab.report.origin import Origin


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
    for key in ("loss_increase", "latency", "scores", "prehab", "model", "created", "versions"):
        del data[key]
    for layer in data["layers"]:
        del layer["loss_increase"], layer["new_bias"], layer["nonzeros"], layer["spectrum"]
    data["layers"][1]["parameters_after"] += 14
    old = lp.CompressionReport.from_dict(data, lp.SVD())
    assert old.plan.loss_increase is None
    assert [layer.new_bias for layer in old.plan.layers] == [0, 14]
    assert old.ranks == report.ranks
    assert old.spectra == {}
    assert (old.prehab, old.origin) == (None, Origin())


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_unknown_version(report, version):
    with pytest.raises(CheckpointError, match=f"version {version!r} cannot be read, only version 1; update"):
        lp.CompressionReport.from_dict({**report.to_dict(), "version": version}, lp.SVD())


def test_text(report):
    text = str(report)
    assert text.startswith(report.summary() + "\n")
    assert "\npredicted loss increase 0.125\n" in text
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


def singular_values(layer: nn.Linear) -> np.ndarray:
    return np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)


def test_spectra_are_those_before_the_cut(mlp):
    """Of all targets after compress_, of the cut ones after apply_plan_, from a file of the plan too."""
    layers = dict(mlp.named_children())
    names = ("0", "2", "4")
    expected = {name: singular_values(layers[name]) for name in names}
    plan = lp.make_plan(lp.find_targets(mlp), 0.6, lp.SVD()).with_ranks({"4": "dense"})
    copies = [
        nn.Sequential(*(nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in mlp))
    ]
    copies[0].load_state_dict(mlp.state_dict())
    applied = lp.apply_plan_(copies[0], lp.CompressionPlan.from_yaml(plan.to_yaml()))
    report = lp.compress_(mlp, 0.6)
    assert list(report.spectra) == list(names)
    assert list(applied.spectra) == ["0", "2"]
    for found in (report.spectra, applied.spectra):
        for name, spectrum in found.items():
            assert spectrum.indices == tuple(range(1, len(expected[name]) + 1))
            np.testing.assert_allclose(spectrum.values, expected[name], rtol=1e-5)


def test_spectra_are_in_the_metric_of_the_cut(mlp):
    """What lies beyond the ranks is shared out as the plan predicts the loss to rise."""
    report = lp.compress_(mlp, 0.4, [torch.randn(64, 12) for _ in range(3)])
    assert report.plan.factorization == lp.KroneckerSVD()
    cut = [layer for layer in report.plan.layers if layer.rank is not None]
    assert cut
    dropped = {layer.name: np.square(report.spectra[layer.name].values[layer.rank :]).sum() for layer in cut}
    for layer in cut:
        squares = np.square(report.spectra[layer.name].values)
        share = dropped[layer.name] / sum(dropped.values())
        assert layer.loss_increase == pytest.approx(share * report.plan.loss_increase, rel=1e-4)
        assert (squares[layer.rank :].sum() / squares.sum()) ** 0.5 == pytest.approx(layer.relative_error, rel=1e-4)


def test_spectra_of_a_surgery_in_training(lit, loader, make_trainer):
    expected = singular_values(lit.net[0])
    cut = lp.CompressionCallback(epoch=0, keep=0.5, factorization=lp.SVD())
    make_trainer(max_epochs=1, limit_train_batches=1, callbacks=[cut]).fit(lit, loader)
    np.testing.assert_allclose(cut.report.spectra["net.0"].values, expected, rtol=1e-5)
    assert list(cut.report.spectra) == list(cut.report.ranks)
    assert cut.report.latency is None
    restored = lp.CompressionReport.from_dict(cut.state_dict()["report"], lp.SVD())
    assert restored == cut.report


def test_the_time_of_day_is_kept_and_not_compared():
    one, other = Origin("Net", "2026-01-31T12:00:05Z"), Origin("Net", "2026-01-31T12:00:06Z")
    assert one == other != Origin("Other")
    assert Origin.from_dict(one.to_dict()).created == one.created
