"""Checkpoints from after the surgery, loaded by people who were not there."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError
from tests.same_model import assert_same_model


class Lit(pl.LightningModule):
    def __init__(self, width: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 6))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class LitWithMixin(lp.LowRankCheckpointMixin, Lit):
    seen = 0

    def on_load_checkpoint(self, checkpoint):
        self.seen = len(checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)


def fit(folder, lit, callbacks, **settings):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        enable_checkpointing=False, callbacks=callbacks, **{"max_epochs": 2, **settings},
    )  # fmt: skip
    data = TensorDataset(torch.randn(128, 12), torch.randn(128, 6))
    trainer.fit(lit, DataLoader(data, 16))
    trainer.save_checkpoint(folder / "all.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return lit.eval()


@pytest.mark.parametrize("file", ["all.ckpt", "weights.ckpt"])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", [Lit, LitWithMixin])
def test_without_a_trainer(kind, compressed, file, tmp_path):
    lit = fit(tmp_path, kind(width=20), [lp.CompressionCallback(1, 0.5)] if compressed else [])
    x = torch.randn(5, 12)
    methods = set(vars(kind)), set(vars(pl.LightningModule))
    loaders = [lambda path: lp.load_from_checkpoint(kind, path, map_location="cpu")]
    if kind is LitWithMixin:
        loaders.append(kind.load_from_checkpoint)
    for load in loaders:
        loaded = load(tmp_path / file)
        assert type(loaded) is kind
        assert isinstance(loaded.net[0], lp.LowRankLinear) == compressed
        assert_same_model(loaded.eval().net, lit.net, x)
    assert (set(vars(kind)), set(vars(pl.LightningModule))) == methods


def test_without_our_help_the_load_is_an_error_not_a_random_model(tmp_path):
    fit(tmp_path, Lit(), [lp.CompressionCallback(1, 0.5)])
    with pytest.raises(RuntimeError, match="Missing key"):
        Lit.load_from_checkpoint(tmp_path / "all.ckpt")


def test_a_module_of_another_size(tmp_path):
    fit(tmp_path, Lit(), [lp.CompressionCallback(1, 0.5)])
    with pytest.raises(CheckpointError, match=r"Layer 'net.0'.*has a 17x12 layer"):
        lp.load_from_checkpoint(Lit, tmp_path / "all.ckpt", width=17)
    assert "load_state_dict" not in vars(Lit)


def test_the_mixin_does_not_disturb_a_resume(tmp_path):
    torch.manual_seed(0)
    fit(tmp_path, LitWithMixin(), [lp.CompressionCallback(1, 0.5)])
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3,
        enable_checkpointing=False, callbacks=[lp.CompressionCallback(1, 0.5)], default_root_dir=tmp_path,
    )  # fmt: skip
    lit = LitWithMixin()
    data = TensorDataset(torch.randn(128, 12), torch.randn(128, 6))
    trainer.fit(lit, DataLoader(data, 16), ckpt_path=tmp_path / "all.ckpt")
    assert isinstance(lit.net[0], lp.LowRankLinear)


def test_checkpoints_of_the_command_line(tmp_path):
    """Saved by LightningCLI in subclass mode, where the class is named in the file."""
    from lightning.pytorch.cli import LightningCLI

    cli = LightningCLI(
        pl.LightningModule, subclass_mode_model=True, run=False, save_config_callback=None,
        args=["--model", f"{__name__}.Lit", "--model.width=18"],
    )  # fmt: skip
    lit = fit(tmp_path, cli.model, [lp.CompressionCallback(1, 0.5)])
    loaded = lp.load_from_checkpoint(pl.LightningModule, tmp_path / "all.ckpt").eval()
    assert_same_model(loaded.net, lit.net, torch.randn(5, 12))
    assert loaded.hparams.width == 18
