"""What ``rehab_sst2.py`` and ``rehab_gpt.py`` share: runs in a real Trainer, tuning, results, several processes.

Three parts:

- ``recovery``: a trained model is cut before the first step, and trained on. How many steps does it take to come back
  to 99 % of the dense accuracy (SST-2), or to 1.02 times the dense loss (GPT)? With all training data, and with 5 %.
- ``recipe``: all rows have the same number of steps; some are spent before the cut, some between cuts, some after. The
  learning rate falls linearly to zero over all of them. Which ends best?
- ``spike``: trained for a while, cut, trained on. What does the loss do at the first steps after the cut, with the
  optimizer's state carried over, and with a fresh optimizer?

``rehab_rows.py`` says what the rows are, ``rehab_tables.py`` prints the tables.

The learning rate of each row is one of three, that which is best on the *validation* split with seed 99: in the
recovery at keep 0.15 with all training data, by the mean loss over the course; in the recipe at keep 0.1, by the loss
in the end. The ``spike`` has the middle one.

Measured on the test split; the ``spike``, where that is done at every step, on the validation split.

Results are lines of JSON. A run that was stopped goes on where it was, and the same command in several processes at
once shares the work: each takes what no other has in hand.
"""

import argparse
import contextlib
import fcntl
import gc
import hashlib
import io
import json
import logging
import math
import platform
import re
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from prehab_trial import Record, load
from rehab_rows import (
    HIGHER,
    ROWS,
    SHARES,
    TUNED_AT,
    WARM_EPOCHS,
    Job,
    RefinedFirst,
    RehabTask,
    Trial,
    loss_over,
)
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_prehab as lp
from lightning_prehab.__about__ import __version__

SEEDS = (0, 1, 2)
TUNED_ON = 99  # the seed that rates are chosen with
FIRST_STEPS = 20  # after the cut, measured one by one


class Module(L.LightningModule):
    """AdamW, at a constant rate or at one that falls to zero; new batches in every epoch."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial, self.model = trial, trial.task.model(trial.job.seed)

    def forward(self, batch: Any) -> Tensor:
        return self.trial.task.logits(self.model, batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.trial.task.loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.trial.job.rate)
        if self.trial.job.part != "recipe":
            return optimizer
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - min(step / self.trial.total, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Any]:
        batches = self.trial.task.batches(self.trial.job.seed, self.trainer.current_epoch, self.trial.job.share)
        return DataLoader(batches, batch_size=None, collate_fn=None)  # type: ignore[arg-type]


class Recorder(L.Callback):
    """Measures right before and after each cut, and at given numbers of steps since the first one.

    With ``least`` a recovery ends once it is back, but not before so many steps; it has no "end" then.
    """

    def __init__(self, trial: Trial, points: Sequence[int], skipped: int, least: float = math.inf) -> None:
        self.trial, self.points, self.skipped, self.least = trial, set(points), skipped, least
        self.cut_at = 0
        self.found: Record = {"keeps": [], "before": [], "after": [], "course": []}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Module, *_: Any) -> None:
        steps = trainer.global_step - self.cut_at + self.skipped
        early = self.trial.job.kind == "run" and self.least < math.inf
        done = early and self.found["after"] and self.is_back()  # what is between is not looked at any more
        if self.found["after"] and steps in self.points and (not done or steps >= self.least):
            self.found["course"].append([steps, self.measure(pl_module)])
            trainer.should_stop = early and steps >= self.least and self.is_back()

    def is_back(self) -> bool:
        """Whether it has been at the goal at any of the points."""
        dense = self.found["before"][0]
        return any(self.trial.task.reached(now, dense) for _, now in self.found["course"])

    def on_before_surgery(self, trainer: L.Trainer, pl_module: Module) -> None:
        self.found["before"].append(self.measure(pl_module))

    def on_surgery(self, trainer: L.Trainer, pl_module: Module, report: lp.CompressionReport) -> None:
        self.found["after"].append(self.measure(pl_module))
        self.found["keeps"].append(round(report.keep, 4))
        if len(self.found["after"]) == 1:
            self.cut_at = trainer.global_step
            self.found["course"].append([0, self.found["after"][0]])

    def on_train_start(self, trainer: L.Trainer, pl_module: Module) -> None:
        if self.skipped:  # the steps of a refinement
            self.found["course"].append([self.skipped, self.measure(pl_module)])

    def on_train_end(self, trainer: L.Trainer, pl_module: Module) -> None:
        last, now = self.found["course"][-1]
        if self.trial.job.part != "recovery":
            self.found["end"] = self.measure(pl_module)
        elif last == self.trial.total:
            self.found["end"] = now

    def measure(self, pl_module: Module) -> Record:
        small = self.trial.job.kind == "tuning" or self.trial.job.part == "spike"  # at every step
        split = "validation" if small else "test"
        found = self.trial.task.measure(pl_module.model, split)
        return {name: round(value, 5) for name, value in found.items()}


def points_of(task: RehabTask, job: Job, total: int) -> list[int]:
    """When to measure: often at first."""
    if job.part == "recovery":
        growing = [*range(5, 40, 5), *range(40, 100, 10), *range(100, 200, 20), *range(200, total, 50), total]
        points = [steps for steps in growing if steps <= total]
        return points if job.share == 1 else points[:: -task.sparse]
    return list(range(1, FIRST_STEPS + 1)) if job.part == "spike" else []


def run(task: RehabTask, job: Job, least: float = math.inf) -> Record:
    """One run."""
    with claimed(task.cache / "locks", f"dense {job.seed}", wait=True):
        dense = task.model(job.seed).eval()
    began = time.perf_counter()
    total = {"recovery": task.recovery, "recipe": task.recipe}.get(job.part, (WARM_EPOCHS + 1) * task.steps)
    trial = Trial(task, job, total, dense)
    torch.manual_seed(job.seed)  # dropout
    callbacks = ROWS[job.part][job.row](trial)
    skipped = sum(one.steps for one in callbacks if isinstance(one, RefinedFirst))
    steps = WARM_EPOCHS * task.steps + FIRST_STEPS if job.part == "spike" else total - skipped
    recorder = Recorder(trial, points_of(task, job, total), skipped, least)
    trainer = L.Trainer(
        accelerator="gpu" if task.device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=math.ceil(steps / task.steps),
        max_steps=steps,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder, *callbacks],
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the table of each cut
        trainer.fit(Module(trial))
    del trainer, callbacks
    gc.collect()
    torch.cuda.empty_cache()  # several processes share a device
    return {**recorder.found, "seconds": round(time.perf_counter() - began, 1)}


def tuning_jobs(task: RehabTask, job: Job) -> list[Job]:
    """The runs that choose the rate of a job."""
    keep = TUNED_AT[job.part]
    rates = [rate * HIGHER.get(job.row, 1.0) for rate in task.rates]
    return [replace(job, kind="tuning", seed=TUNED_ON, keep=keep, share=1.0, rate=rate) for rate in rates]


def cases(part: str, keeps: Sequence[float]) -> list[tuple[float, float]]:
    """Keeps and shares of the training data; little data is looked at where rates are chosen."""
    little = [(TUNED_AT[part], share) for share in SHARES[1:]] if part == "recovery" else []
    return [(keep, SHARES[0]) for keep in keeps] + little


def jobs_of(task: RehabTask, arguments: argparse.Namespace) -> list[Job]:
    """Everything, in the order in which it is wanted: dense models, tuning, then seed by seed."""
    reported = [
        Job("run", seed, part, row, keep, share)
        for seed in arguments.seeds
        for part, keeps in task.parts.items()
        if re.search(arguments.part, part)
        for row in ROWS[part]
        if re.search(arguments.only, row)
        for keep, share in cases(part, keeps)
        if str(share) in arguments.shares
    ]
    tuning = [tuned for job in reported if job.part in TUNED_AT for tuned in tuning_jobs(task, job)]
    return list(dict.fromkeys([*(Job("dense", seed) for seed in (TUNED_ON, *arguments.seeds)), *tuning, *reported]))


def rate_of(task: RehabTask, job: Job, done: dict[tuple[Any, ...], Record]) -> float | None:
    """The rate that was best on the validation split."""
    if job.part not in TUNED_AT:
        return task.rates[1]
    return min(tuning_jobs(task, job), key=lambda one: loss_over(done[one.key], job.part)).rate


def results(task: RehabTask) -> dict[tuple[Any, ...], Record]:
    """What is there, by the key of its job."""
    return {Job(**record["job"]).key: record for record in load(task)}


@contextlib.contextmanager
def claimed(folder: Path, name: str, wait: bool = False) -> Iterator[bool]:
    """Whether no other process has this in hand; it is let go of at the end, also of a process that is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / hashlib.sha256(name.encode()).hexdigest()[:24]).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def add(task: RehabTask, job: Job, found: Record) -> None:
    """Appends one line at once."""
    device = torch.cuda.get_device_name() if task.device.type == "cuda" else platform.machine()
    versions = {"torch": torch.__version__, "lightning": L.__version__, "lightning_prehab": __version__}
    line = json.dumps({"job": asdict(job), **found, "device": device, "versions": versions})
    with task.results.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line + "\n")
    took = f", {found['seconds']:.1f} s" if "seconds" in found else ""
    print(f"{job.kind} {job.part} {job.row!r}, keep {job.keep}, {job.share:.0%}, seed {job.seed}{took}", flush=True)


def attempt(task: RehabTask, job: Job, least: float) -> bool:
    """Runs a job; what fails is told, and the others go on."""
    try:
        if job.kind == "dense":
            with claimed(task.cache / "locks", f"dense {job.seed}", wait=True):
                found = {"end": {k: round(v, 5) for k, v in task.measure(task.model(job.seed), "test").items()}}
        else:
            found = run(task, job, least)
    except Exception:
        print(f"{job} failed:\n{traceback.format_exc()}", flush=True)
        return False
    add(task, job, found)
    return True


def needs(task: RehabTask, job: Job) -> list[Job]:
    """What has to be done before a job."""
    dense = [Job("dense", job.seed)] if job.kind != "dense" else []
    return dense + (tuning_jobs(task, job) if job.kind == "run" and job.part in TUNED_AT else [])


def work(task: RehabTask, jobs: Sequence[Job], seconds: float, least: float = math.inf) -> None:
    """Does what is missing and what nobody else does, until nothing is left or no time; what has failed is left out."""
    began, longest = time.perf_counter(), 0.0
    failed: set[tuple[Any, ...]] = set()
    while True:
        idle, waiting = True, False
        for job in jobs:
            start = time.perf_counter()
            done = results(task)
            first = [one.key for one in needs(task, job)]
            if job.key in done or job.key in failed or failed & {*first}:
                continue
            if start - began + longest > seconds:
                return
            waiting = True
            if not done.keys() >= {*first}:
                continue
            with claimed(task.cache / "locks", f"{task.results} {job.key}") as mine:
                if mine and job.key not in results(task):
                    idle = False
                    rated = replace(job, rate=rate_of(task, job, done)) if job.kind == "run" else job
                    if not attempt(task, rated, least):
                        failed.add(job.key)
                    longest = max(longest, time.perf_counter() - start)
        if not waiting:
            return
        if idle:
            time.sleep(1.0)


def parser(description: str, data: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("data", nargs="?", help=data)
    made.add_argument("--table", action="store_true", help="print the tables of the stored results only")
    made.add_argument("--part", default="", metavar="REGEX", help="recovery, recipe or spike")
    made.add_argument("--only", default="", metavar="REGEX", help="the rows whose name the pattern fits")
    made.add_argument("--shares", nargs="+", default=[str(share) for share in SHARES], help="of the training data")
    made.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--minutes", type=float, default=math.inf, help="begin nothing that would end later")
    made.add_argument("--least", type=float, default=math.inf, metavar="STEPS", help="end what is back, after so many")
    made.add_argument("--results", type=Path, help="a file of results other than the stored one")
    return made


def main(task: RehabTask, arguments: argparse.Namespace) -> None:
    """Runs what is missing."""
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    work(task, jobs_of(task, arguments), 60 * arguments.minutes, arguments.least)
