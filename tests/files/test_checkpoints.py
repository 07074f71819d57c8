"""What people are told of a checkpoint, a folder or a report that cannot be loaded."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, CheckpointError


class Lit(pl.LightningModule):
    def __init__(self, place=None):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 8))


class Mine:
    """Of a user's own module."""


def write(path, place=None):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(Lit(place))
    trainer.save_checkpoint(path)
    return path


def test_a_damaged_checkpoint_is_named(tmp_path):
    whole = write(tmp_path / "whole.ckpt").read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "zeros": bytes(200),
        "half": whole[len(whole) // 2 :],
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}.ckpt' is damaged, .*earlier checkpoint"):
            lp.load_from_checkpoint(Lit, tmp_path / f"{name}.ckpt")


@pytest.mark.parametrize("place", [Path("here"), Mine(), {"nested": [Mine()]}], ids=["path", "mine", "nested"])
def test_hyperparameters_of_other_classes(place, tmp_path):
    file = write(tmp_path / "odd.ckpt", place)
    for settings in ({}, {"weights_only": None}, {"weights_only": True}):
        with pytest.raises(
            CheckpointError, match=r"odd.ckpt' holds more than weights \(.*(Path|Mine).*weights_only=False"
        ):
            lp.load_from_checkpoint(Lit, file, **settings)
    assert isinstance(lp.load_from_checkpoint(Lit, file, weights_only=False), Lit)


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_plain_hyperparameters_need_nothing(weights_only, tmp_path):
    file = write(tmp_path / "plain.ckpt", {"depth": [1, 2.5, "three", None, True]})
    assert lp.load_from_checkpoint(Lit, file, weights_only=weights_only).hparams.place["depth"][2] == "three"


def test_what_is_no_checkpoint_of_lightning(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="weights.pt' was not written by a Trainer.*load_state_dict"):
        lp.load_from_checkpoint(Lit, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="is a folder, not a .ckpt file.*load_compressed"):
        lp.load_from_checkpoint(Lit, tmp_path)
    for wrong in (Lit(), "model.ckpt", nn.Linear):
        with pytest.raises(ArgumentError, match=r"load_from_checkpoint\(LitModel, path\)"):
            lp.load_from_checkpoint(wrong, tmp_path / "weights.pt")


def test_errors_of_the_module_are_its_own(tmp_path):
    class Broken(Lit):
        def __init__(self, place=None):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lp.load_from_checkpoint(Broken, write(tmp_path / "good.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"missing.ckpt"):
        lp.load_from_checkpoint(Lit, tmp_path / "missing.ckpt")


def model():
    return nn.Sequential(nn.Linear(8, 8))


def test_what_is_no_folder_of_ours(tmp_path, monkeypatch):
    hub, empty, ours = tmp_path / "hub", tmp_path / "empty", tmp_path / "ours"
    hub.mkdir()
    empty.mkdir()
    (hub / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (hub / "model.safetensors").write_bytes(b"")
    (tmp_path / "a.ckpt").write_bytes(b"")
    (tmp_path / "a.bin").write_bytes(b"")
    lp.save_compressed(model(), ours)
    weights = next(ours.glob("*.safetensors"))
    for path, text in {
        tmp_path / "nowhere": r"There is no folder '.*nowhere'. Check the path .*save_compressed",
        hub: "holds no structure.json: .*from_pretrained",
        empty: "holds no structure.json: it was not written by save_compressed",
        tmp_path / "a.ckpt": r"is a file, not a folder; .*load_from_checkpoint\(LitModel",
        tmp_path / "a.bin": "is a file, not a folder; .*save_compressed",
        weights: "is a file, not a folder; give the folder that it lies in, '.*ours'",
    }.items():
        with pytest.raises(CheckpointError, match=text) as caught:
            lp.load_compressed(path, model())
        assert "again" not in str(caught.value)  # nothing is wrong with what was saved
    with pytest.raises(CheckpointError, match="is a file; give the path of a folder"):
        lp.save_compressed(model(), tmp_path / "a.bin")
    structure = json.loads((ours / "structure.json").read_text())
    (ours / "structure.json").write_text(json.dumps({**structure, "version": 9}))
    with pytest.raises(CheckpointError, match="has version 9, .* install the version that wrote it"):
        lp.load_compressed(ours, model())


def test_what_is_no_report(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    lp.save_compressed(model(), tmp_path / "ours")
    for path, text in {
        tmp_path / "nowhere.json": "nowhere.json.* cannot be read: No such file or directory",
        tmp_path: "is a folder, and a report is a file that save_json has written; there is no report.json in it",
        tmp_path / "config.json": "this is JSON, but not a compression report",
        tmp_path / "ours" / "structure.json": "this is JSON, but not a compression report",
    }.items():
        with pytest.raises(CheckpointError, match=text):
            lp.CompressionReport.load_json(path)
    lp.compress_(model(), 0.5).save_json(tmp_path / "report.json")
    with pytest.raises(CheckpointError, match="read '.*report.json'"):
        lp.CompressionReport.load_json(tmp_path)
