"""Tiny models that differ in the shape of their trouble, and a quiet Trainer."""

import gc
import logging
import os
from typing import Any

import hypothesis
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

#: Started by torchrun, and no modules of tests.
collect_ignore_glob = ["sharded/*_worker.py"]
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# One thread, here and in the processes that tests start: with small matrices threads only wait for each other, for
# minutes where the cores are busy.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# An example that is given 200 ms can take longer on a busy machine.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


#: Each takes about 1 GB, and imports for itself all that the tests need.
MOST_PROCESSES = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Shares the whole suite among processes, one for each core, file by file; what is named runs in this process.

    ``-n 0`` runs all of it in one process.
    """
    options = config.option
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and getattr(options, "numprocesses", 0) is None and not options.usepdb:
        options.numprocesses, options.maxprocesses = "logical", MOST_PROCESSES
        options.dist, options.loadscopereorder = "loadfile", False


def pytest_collection_finish() -> None:
    """What was imported is no garbage: who searches for what holds a weight need not go through all of it each time."""
    gc.collect()
    gc.freeze()


class LitRegressor(pl.LightningModule):
    """A plain module that knows nothing of this package."""

    def __init__(self, net: nn.Module, optimizer: Any = None) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class LitLogger(LitRegressor):
    """Logs its loss too, which takes a third of a step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rounded_by_address(monkeypatch):
    """A machine whose products are rounded by where a weight lies in memory: their sums begin elsewhere."""
    linear = nn.functional.linear

    def begun_elsewhere(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        start = weight.data_ptr() % 64 // weight.element_size()
        return linear(x.roll(start, -1), weight.roll(start, -1), bias)

    monkeypatch.setattr(nn.functional, "linear", begun_elsewhere)


@pytest.fixture
def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 6))


@pytest.fixture
def data() -> TensorDataset:
    x = torch.randn(96, 12) @ torch.diag(torch.linspace(2, 0.1, 12))
    return TensorDataset(x, torch.tanh(x @ torch.randn(12, 6)))


@pytest.fixture
def loader(data: TensorDataset) -> DataLoader:
    return DataLoader(data, batch_size=16)


@pytest.fixture
def make_trainer(tmp_path):
    def make(**settings: Any) -> pl.Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            "max_epochs": 1,
        }
        return pl.Trainer(**{**defaults, **settings})

    return make


@pytest.fixture
def lit(mlp: nn.Sequential) -> LitRegressor:
    return LitRegressor(mlp)


@pytest.fixture
def lit_class() -> type[LitRegressor]:
    return LitRegressor


@pytest.fixture
def logging_class() -> type[LitRegressor]:
    return LitLogger


@pytest.fixture
def scaled_precision():
    """The loss scaling of fp16 training around float32 arithmetic."""

    def make(scale: float) -> MixedPrecision:
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        return plugin

    return make
