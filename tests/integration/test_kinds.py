"""All three acts on layers that are not plain linear ones: trained, cut, killed, resumed, loaded."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

import lightning_prehab as lp
from lightning_prehab.layers.linear import LowRankLayer
from tests.same_model import assert_same_model

EPOCHS, SURGERY = 4, 2


class Fused(nn.Module):
    """A fused projection and one after it."""

    def __init__(self, transposed):
        super().__init__()
        self.qkv = Conv1D(24, 12) if transposed else nn.Linear(12, 24)
        self.out = Conv1D(12, 8) if transposed else nn.Linear(8, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(torch.softmax(q * k, -1) * v)


NETS = {
    "fused": lambda: nn.Sequential(Fused(False), nn.Linear(12, 6)),
    "transposed": lambda: nn.Sequential(Fused(True), nn.Linear(12, 6)),
}


class Lit(pl.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.save_hyperparameters()
        self.net = NETS[name]()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader(name):
    generator = torch.Generator().manual_seed(1)
    shape = (64, 12)
    x = torch.randn(shape, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(6, (64,), generator=generator)), 16)


def acts(**settings):
    return [
        lp.PrehabCallback(lp.TailShrinkage(every=2)),
        lp.CompressionCallback(SURGERY, 0.5, calibration_batches=4, **settings),
        lp.RehabSchedule(warmup_epochs=1),
    ]


def fit(folder, name, ckpt_path=None, extra=(), **settings):
    torch.manual_seed(0)
    lit = Lit(name)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        max_epochs=EPOCHS,
        num_sanity_val_steps=0,
        callbacks=[*acts(**settings), *extra],
        enable_checkpointing=bool(extra),
    )
    trainer.fit(lit, loader(name), ckpt_path=ckpt_path)
    return lit, trainer


@pytest.mark.parametrize("name", NETS)
def test_a_run_that_is_resumed_ends_like_one_that_is_not(name, tmp_path):
    fused = name in ("fused", "transposed")
    settings = {"rank_overrides": {"*.k": "dense"}, "split_fused": True} if fused else {}
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    whole, trainer = fit(tmp_path, name, extra=[saver], **settings)
    assert any(isinstance(module, LowRankLayer) for module in whole.modules())
    report = trainer.callbacks[1].report or next(c.report for c in trainer.callbacks if hasattr(c, "report"))
    assert report.keep <= (0.5 if not settings else 1)
    for epoch in range(EPOCHS - 1):
        again, _ = fit(tmp_path, name, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **settings)
        for (key, ours), (_, theirs) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
            assert torch.equal(ours, theirs), (epoch, key)
    last = tmp_path / f"epoch={EPOCHS - 1}.ckpt"
    loaded = lp.load_from_checkpoint(Lit, last)
    x = loader(name).dataset.tensors[0]
    whole.eval()
    assert_same_model(loaded.eval().net, whole.net, x)
    dense = Lit(name)  # evaluation follows a checkpoint in both directions
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        callbacks=acts(**settings),
    )
    trainer.validate(dense, loader(name), ckpt_path=last, verbose=False)
    assert_same_model(dense.eval().net, whole.net, x)
    trainer.validate(dense, loader(name), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert not any(isinstance(module, LowRankLayer) for module in dense.modules())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "prehab",
    [
        lambda: lp.PrehabCallback(lp.StableRank(), strength_share=0.1, space="loss"),
        lambda: lp.PrehabCallback(lp.NuclearNorm(), 0.1, space="weight", injection="gradient"),
        lambda: lp.PrehabCallback(lp.SpectralWeightDecay(1.0)),
        lp.PaperPrehab,
    ],
)
def test_every_prehab_trains_every_kind(name, prehab, tmp_path):
    torch.manual_seed(0)
    lit = Lit(name)
    before = {key: tensor.clone() for key, tensor in lit.state_dict().items()}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        max_epochs=2,
        callbacks=[prehab(), lp.CompressionCallback(1, 0.6, calibration_batches=4, split_fused=True)],
    )
    trainer.fit(lit, loader(name))
    assert any(isinstance(module, LowRankLayer) for module in lit.modules())
    assert all(torch.isfinite(tensor).all() for tensor in lit.state_dict().values())
    changed = [not torch.equal(before[key], tensor) for key, tensor in lit.state_dict().items() if key in before]
    assert all(changed)
