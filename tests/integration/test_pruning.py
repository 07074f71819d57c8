"""Lightning's ModelPruning on a compressed module."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(6, 12, 3, padding=1), nn.Flatten(), nn.Linear(48, 16), nn.Linear(16, 6))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("names", [None, ["weight"]])
def test_a_run_prunes_the_factors(names, whole, tmp_path):
    lit = Lit()
    lp.compress_(lit, 0.5)
    assert sum(isinstance(module, lp.LowRankLinear | lp.LowRankConv1d) for module in lit.modules()) == 3
    pruning = ModelPruning(
        "l1_unstructured",
        parameter_names=names,
        amount=0.5,
        use_global_unstructured=whole,
        use_lottery_ticket_hypothesis=False,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[pruning],
    )
    trainer.fit(lit, DataLoader(TensorDataset(torch.randn(8, 6, 4)), batch_size=4))
    factors = [value for name, value in lit.named_parameters() if name.endswith(("A.weight", "B.weight"))]
    assert len(factors) == 6
    zeros = [float((factor == 0).float().mean()) for factor in factors]
    assert sum(zeros) / 6 > 0.2 if whole else min(zeros) > 0.4


@pytest.mark.filterwarnings("ignore")
def test_to_torchscript():
    lit = Lit().eval()
    lp.compress_(lit, 0.5)
    x = torch.randn(3, 6, 4)
    torch.testing.assert_close(lit.to_torchscript()(x), lit(x))
