"""Digits on one device, under DDP or sharded by FSDP2, as the YAML says: ``python train.py --config ddp.yaml``.

Started again it goes on from the newest checkpoint. The order of the data does not depend on the number of processes.
"""

import logging
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_prehab  # noqa: F401  (the YAML can then name its classes without their module)


class Block(nn.Module):
    """A residual block, and a unit of FSDP2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Classifier(L.LightningModule):
    """An ordinary classifier; it knows nothing of lightning_prehab.

    Args:
        width: Hidden size.
        depth: Number of blocks.
        lr: Learning rate of AdamW.
    """

    def __init__(self, width: int = 64, depth: int = 2, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.net is not None:  # Lightning calls it again, for validate and test
            return
        width = self.hparams.width
        blocks = [Block(width) for _ in range(self.hparams.depth)]
        self.net = nn.Sequential(nn.Linear(64, width), *blocks, nn.Linear(width, 10))
        if self.device_mesh is not None:  # ModelParallelStrategy has made one
            from torch.distributed.fsdp import fully_shard

            for part in (*blocks, self.net):  # from the inside outwards
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        right = (self.net(images).argmax(-1) == labels).float().mean()
        self.log("val_accuracy", right, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Loader(DataLoader):
    """A DataLoader that goes on inside an epoch: checkpoints keep how many batches it has given."""

    given = skipped = 0

    def __iter__(self) -> Iterator[Any]:
        self.given, self.skipped = self.skipped, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= self.given:
                self.given = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["given"]


class Digits(L.LightningDataModule):
    """1,200 digits to train on, 592 to validate.

    Args:
        batch_size: Images of a step, on all processes together.
    """

    def __init__(self, batch_size: int = 48) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        images, labels = torch.tensor(digits.data, dtype=torch.float32) / 8.0 - 1.0, torch.tensor(digits.target)
        self.train = TensorDataset(images[:1200], labels[:1200])
        self.val = TensorDataset(images[1200:1792], labels[1200:1792])

    def loader(self, data: TensorDataset, *, shuffle: bool) -> Loader:
        place = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(data, **place, shuffle=shuffle)
        return Loader(data, self.batch_size // place["num_replicas"], sampler=sampler)

    def train_dataloader(self) -> Loader:
        return self.loader(self.train, shuffle=True)

    def val_dataloader(self) -> Loader:
        return self.loader(self.val, shuffle=False)


class RequeueAfterStep(L.Callback):
    """Lightning's requeue of a SLURM job, put off to the end of the step, on all processes together.

    Lightning saves inside of the signal handler: perhaps between a gradient and its step, while another process waits
    for a sum. Put it last, so that what it saves has been seen by all other callbacks.
    """

    asked = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.requeue = signal.getsignal(signal.SIGUSR1)
        if callable(self.requeue):  # Lightning has found SLURM
            signal.signal(signal.SIGUSR1, self.note)

    def note(self, *_: Any) -> None:
        self.asked = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            self.requeue(signal.SIGUSR1, None)  # saves, and calls scontrol on one process
            trainer.strategy.barrier()
            raise SystemExit(0)


def newest_checkpoint(folder: Path) -> Path | None:
    """What was written last, and to the end: by ModelCheckpoint, or at a signal."""
    whole = [path for path in folder.rglob("*.ckpt") if path.is_file() or (path / "meta.pt").exists()]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    cli = LightningCLI(
        Classifier,
        Digits,
        run=False,
        seed_everything_default=0,
        save_config_callback=None,
        trainer_defaults={"callbacks": [RequeueAfterStep()]},
    )
    start = newest_checkpoint(Path(cli.trainer.default_root_dir))
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=start)
    if cli.trainer.is_global_zero:
        kept = sum(parameter.numel() for parameter in cli.model.parameters())
        accuracy = cli.trainer.callback_metrics.get("val_accuracy")
        found = f"nothing left to train after {start}" if accuracy is None else f"validation accuracy {accuracy:.1%}"
        print(f"{kept:,} parameters, {found}.")
