"""Kills real training processes with SIGKILL and resumes them.

    python tests/integration/faults.py --processes 1 --fixed --random 4 --seed 0 FOLDER

A parent imports everything once and forks the processes of each run, so a run costs a second, not ten. A run is killed
at a point, started again from the newest checkpoint, and must end bit by bit as the run that was never killed. Prints a
line for each point and a JSON line at the end.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.callbacks import compression
from lightning_prehab.files.distributed import check_complete

EPOCHS, STEPS, SURGERY = 6, 6, 3
#: Named moments; the part before the colon is a hook below, the number says which call of it.
FIXED = [
    "step:3",  # prehab collects its statistics
    "step:9",  # mid-prehab
    "calibrate:2",  # the surgery's statistics ride along
    "plan:1",
    "factorize:2",  # between two layers
    "swapped:1",  # right after the swap
    "step:20",  # rehab
    "saving:2",  # while a checkpoint is being written, before the surgery
    "saving:4",  # ... the first one after it
    "step:33",
]


class Lit(pl.LightningModule):
    """Logs what has to be equal in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 6))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict:
        decay = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": decay}], lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Killer:
    """Kills its own process at the n-th call of a moment."""

    def __init__(self, point: str | None) -> None:
        self.moment, self.count = (None, 0) if point is None else (point.split(":")[0], int(point.split(":")[1]))

    def at(self, moment: str) -> None:
        if moment == self.moment:
            self.count -= 1
            if self.count == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class KillCallback(pl.Callback):
    def __init__(self, killer: Killer) -> None:
        self.killer = killer

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Lit, batch: object, batch_idx: int) -> None:
        self.killer.at("step")
        if trainer.current_epoch == SURGERY - 1:
            self.killer.at("calibrate")

    def on_surgery(self, trainer: pl.Trainer, pl_module: Lit, report: lp.CompressionReport) -> None:
        self.killer.at("swapped")


class FragileKronecker(lp.KroneckerSVD):
    """The default factorization, on which the power may fail."""

    killer = Killer(None)

    def __call__(self, *arguments: object) -> object:
        self.killer.at("factorize")
        return super().__call__(*arguments)


def install(killer: Killer) -> None:
    """Puts the moments that are no hooks of Lightning into place; this process alone."""
    FragileKronecker.killer = killer
    make_plan, save = compression.make_plan, torch.save

    def killing_plan(*arguments: object, **settings: object) -> object:
        killer.at("plan")
        return make_plan(*arguments, **settings)

    def killing_save(content: object, file: object, *arguments: object, **settings: object) -> None:
        save(content, file, *arguments, **settings)
        if hasattr(file, "getvalue"):  # Lightning's own: half of it reaches the disk
            killer.count -= killer.moment == "saving"
            if killer.moment == "saving" and killer.count == 0:
                file.truncate(len(file.getvalue()) // 2)

    compression.make_plan, torch.save = killing_plan, killing_save


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that can be read; a torn one is what a killed writer leaves."""
    for file in sorted(folder.glob("*.ckpt"), key=lambda f: f.stat().st_mtime_ns, reverse=True):
        try:
            check_complete(file) if file.is_dir() else torch.load(file, weights_only=True)
        except Exception:
            continue
        return file
    return None


def train(folder: Path, point: str | None, processes: int, rank: int, sharded: bool) -> None:
    """One process of one run; ends by itself or by SIGKILL."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    killer = Killer(point)
    install(killer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96 * processes, 12, generator=generator)
    data = TensorDataset(x, torch.tanh(x @ torch.randn(12, 6, generator=generator)))
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)

    class KillWhileSaving(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Lit) -> None:
            if killer.moment == "saving" and killer.count <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    lit = Lit()
    ddp = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=ModelParallelStrategy(processes, 1) if sharded else ddp,
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            lp.PrehabCallback(lp.TailEnergy(refresh=4), 0.1, space="loss"),
            lp.CompressionCallback(SURGERY, 0.5, calibration_batches=4, factorization=FragileKronecker()),
            lp.RehabSchedule(warmup_epochs=1.5),
            KillCallback(killer),
            KillWhileSaving(),
            checkpoint,
        ],
    )
    trainer.fit(lit, DataLoader(data, 16), ckpt_path=latest(folder))
    states = {"weights": whole(lit.state_dict()), "optimizer": whole(trainer.optimizers[0].state_dict())}
    torch.save(
        {**states, "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict()}, folder / f"end{rank}.pt"
    )


def whole(value: object) -> object:
    """The same with whole tensors in the place of sharded ones."""
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def start(folder: Path, point: str | None, processes: int, victim: int, sharded: bool) -> list[int]:
    """Forks the processes of a run; the exit codes, negative for signals. When one has died, the others are stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                sys.stdout.flush()
                os.dup2(os.open(folder / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
                os.dup2(1, 2)
                if processes > 1:
                    os.environ.update(
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes), RANK=str(rank),
                        LOCAL_RANK=str(rank), NODE_RANK="0", LOCAL_WORLD_SIZE=str(processes), GROUP_RANK="0",
                        TORCHELASTIC_RUN_ID="faults",
                    )  # fmt: skip
                train(folder, point if rank == victim else None, processes, rank, sharded)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes: dict[int, int] = {}
    while len(codes) < processes:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] != 0:
            for other in children:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def equal(one: object, other: object) -> bool:
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


def check(folder: Path, point: str, processes: int, victim: int, sharded: bool, reference: dict) -> str | None:
    """Kills a run at a point and resumes it; what went wrong, or None."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    codes = start(folder, point, processes, victim, sharded)
    if codes[victim] != -signal.SIGKILL:
        return f"was not killed: exit codes {codes}; {(folder / f'log{victim}.txt').read_text()[-1500:]}"
    codes = start(folder, None, processes, victim, sharded)
    if any(codes):
        return f"did not resume: exit codes {codes}; {(folder / 'log0.txt').read_text()[-1500:]}"
    for rank in range(processes):
        if not equal(torch.load(folder / f"end{rank}.pt", weights_only=True), reference):
            return f"rank {rank} ends with other weights"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill training runs and resume them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--fixed", action="store_true", help="the named moments")
    parser.add_argument("--points", nargs="*", default=[], help="some of the named moments")
    parser.add_argument("--sharded", action="store_true", help="FSDP2, which saves a folder")
    parser.add_argument("--random", type=int, default=0, help="this many random steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    begun = time.monotonic()

    folder = args.folder / "uninterrupted"
    folder.mkdir(parents=True)
    codes = start(folder, None, args.processes, 0, args.sharded)
    if any(codes):
        print((folder / "log0.txt").read_text()[-3000:])
        return 1
    reference = torch.load(folder / "end0.pt", weights_only=True)
    generator = random.Random(args.seed)
    points = list(FIXED) if args.fixed else args.points
    points += [f"step:{generator.randrange(1, EPOCHS * STEPS + 1)}" for _ in range(args.random)]
    failures = 0
    for index, planned in enumerate(points):
        # Only rank 0 plans and writes; with two ranks each has few layers to factorize.
        victim = 0 if planned.split(":")[0] in ("plan", "saving") else index % args.processes
        point = "factorize:1" if planned.startswith("factorize") and args.processes > 1 else planned
        problem = check(args.folder / "killed", point, args.processes, victim, args.sharded, reference)
        failures += problem is not None
        print(f"{point} (rank {victim}): {'ok' if problem is None else problem}", flush=True)
    seconds = round(time.monotonic() - begun)
    summary = {"processes": args.processes, "points": len(points), "failures": failures, "seed": args.seed}
    print(json.dumps({**summary, "seconds": seconds, "torch": torch.__version__, "lightning": pl.__version__}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
