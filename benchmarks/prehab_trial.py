"""What the scripts ``prehab_*.py`` share: rows, tuning, runs in a real Trainer, results, tables.

Every row sees the same number of optimizer steps: ``prehab`` epochs before the cut and ``rehab`` epochs after it. The
controls: the same steps without a regularizer (equal-step control), and all of them after the cut (cut first; that run
on the way also gives "no prehab": the cut, then the rehab epochs alone). Every cut is the default one (KroneckerSVD,
one budget).

Tuning, the same for every regularizer: five runs with seed 0 at the keep ``Task.tuned_at``; what has the lowest loss on
the *validation* split right after the cut is used in all reported runs. Three runs choose the space, two more the value
in it; SpectralWeightDecay, whose decay has no scale that spaces share, tries five values on the weights themselves. The
paper's preset is taken as published, the default of PrehabCallback as it is.

Results are lines of JSON, appended one by one: a run that was stopped goes on where it was, and several processes may
share the work (``--only``, ``--seeds``).
"""

import argparse
import copy
import json
import logging
import platform
import re
import statistics
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lightning_prehab as lp
from lightning_prehab.__about__ import __version__
from lightning_prehab.progress import counted, shown

Setting = dict[str, Any]
Record = dict[str, Any]

SEEDS = (0, 1, 2)
SPACES = ("weight", "activation", "loss")
SHARES = (0.3, 0.1, 1.0)  # of the task gradient's norm; the first one is used to choose the space
ANNEALS = (0.8, 0.5, 1.0)
DECAYS = (1.0, 3.0, 10.0, 30.0, 100.0)
PENALTIES = ("StableRank", "NuclearNorm", "EffectiveRank", "TailEnergy")
AIMED = ("TailEnergy", "TailShrinkage")  # at the planned ranks: another prehab for each keep
TUNED = (*PENALTIES, "TailShrinkage", "SpectralWeightDecay")
CONTROL, CUT_FIRST, PAPER = "equal-step control", "cut first", "the paper's preset"
UNCUT = "not cut, all the steps"
DEFAULT = "PrehabCallback(), not tuned"
ROWS = (CUT_FIRST, CONTROL, PAPER, DEFAULT, *TUNED)


class Task(ABC):
    """A pretrained model with its data. ``steps`` optimizer steps are one epoch here."""

    keeps: ClassVar[Sequence[float]]
    rows: ClassVar[Sequence[str]] = ROWS
    steps: ClassVar[int]
    prehab: ClassVar[int]
    rehab: ClassVar[int]
    lr: ClassVar[float]
    tuned_at: ClassVar[float] = 0.1
    calibration_batches: ClassVar[int] = 24
    device: torch.device = torch.device("cpu")
    trainer: ClassVar[Setting] = {}  # more settings of the Trainer
    targets: ClassVar[str]
    results: Path
    metrics: ClassVar[dict[str, str]]  # name -> title; the first one is shown first

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """The dense model to start from."""

    @abstractmethod
    def batches(self, seed: int, epoch: int) -> list[Any]:
        """At least ``steps`` training batches."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The training loss of a batch."""

    @abstractmethod
    def measure(self, model: nn.Module, split: str) -> Record:
        """Metrics on the "validation" or the "test" split."""


class Module(L.LightningModule):
    """AdamW at a constant rate; new batches in every epoch."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        self.task, self.seed, self.model = task, seed, task.model(seed)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.task.loss(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.task.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        batches = self.task.batches(self.seed, self.trainer.current_epoch)[: self.task.steps]
        return DataLoader(batches, batch_size=None, collate_fn=None)  # type: ignore[arg-type]


class Recorder(L.Callback):
    """Measures right before the cut, right after it, and at the end of given epochs."""

    def __init__(self, task: Task, split: str, before: int | None, ends: dict[int, str]) -> None:
        self.task, self.split, self.before, self.ends = task, split, before, ends
        self.found: Record = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Module) -> None:
        if trainer.current_epoch == self.before:
            self.found["before"] = self.measure(pl_module)
        if trainer.current_epoch in self.ends:
            self.found[self.ends[trainer.current_epoch]] = self.measure(pl_module)

    def on_surgery(self, trainer: L.Trainer, pl_module: Module, report: lp.CompressionReport) -> None:
        self.found["achieved_keep"] = round(report.keep, 4)
        self.found["after"] = self.measure(pl_module)

    def measure(self, pl_module: Module) -> Record:
        return {name: round(value, 5) for name, value in self.task.measure(pl_module.model, self.split).items()}


def regularizer(setting: Setting) -> list[L.Callback]:
    """The callback of a setting; none for a control."""
    name = setting["row"]
    if name in (CONTROL, CUT_FIRST, UNCUT):
        return []
    if name == PAPER:
        return [lp.PaperPrehab()]
    if name == DEFAULT:
        return [lp.PrehabCallback()]
    space = setting["space"]
    if name == "TailShrinkage":
        return [lp.PrehabCallback(lp.TailShrinkage(anneal=setting["anneal"]), space=space)]
    if name == "SpectralWeightDecay":
        return [lp.PrehabCallback(lp.SpectralWeightDecay(decay=setting["decay"]), space=space)]
    return [lp.PrehabCallback(getattr(lp, name)(), space=space, strength_share=setting["share"])]


def fit(
    task: Task, setting: Setting, keep: float, seed: int, *, tuning: bool = False, keep_file: Path | None = None
) -> Record:
    """One run. With a ``keep_file``, what stands right before the cut is taken from there, or put there."""
    first = setting["row"] == CUT_FIRST
    epoch = 0 if first else task.prehab
    total = epoch + 1 if tuning else task.prehab + task.rehab
    ends = {total - 1: "end", **({task.rehab - 1: "rehab"} if first else {})}
    recorder = Recorder(task, "validation" if tuning else "test", None if first else epoch - 1, {} if tuning else ends)
    stored = keep_file is not None and keep_file.exists()
    cut = lp.CompressionCallback(
        epoch,
        policy=lp.ParameterBudget(keep, min_rank=8),
        calibration_batches=task.calibration_batches,
        target_modules=task.targets,
    )
    callbacks: list[L.Callback] = [
        *regularizer(setting),
        *([] if setting["row"] == UNCUT else [cut, lp.RehabSchedule(warmup_steps=task.steps // 4)]),
        recorder,
        *([_StopAfterSurgery()] if tuning else []),  # nothing after the cut is looked at
    ]
    if keep_file is not None and not stored:
        callbacks.append(_OnceBefore(keep_file.parent, keep_file.stem, every_n_epochs=task.prehab, save_top_k=-1))
    with torch.random.fork_rng(devices=[]):
        module = Module(task, seed)
        torch.manual_seed(seed)  # dropout; not before, since building a model draws numbers too
        trainer = L.Trainer(
            accelerator="gpu" if task.device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=total,
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=keep_file is not None and not stored,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
            **task.trainer,
        )
        trainer.fit(module, ckpt_path=keep_file if stored else None)
    return recorder.found


class _OnceBefore(ModelCheckpoint):
    """Keeps what stands right before the cut, and nothing later."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.best_model_path:
            super().on_train_epoch_end(trainer, pl_module)


class _StopAfterSurgery(L.Callback):
    done = False

    def on_surgery(self, trainer: L.Trainer, pl_module: Module, report: lp.CompressionReport) -> None:
        self.done = True

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Module, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.done else None


def load(task: Task) -> list[Record]:
    lines = task.results.read_text().splitlines() if task.results.exists() else []
    return [json.loads(line) for line in lines]


def add(task: Task, record: Record) -> None:
    device = torch.cuda.get_device_name() if task.device.type == "cuda" else platform.machine()
    versions = {"torch": torch.__version__, "lightning": L.__version__, "lightning_prehab": __version__}
    line = json.dumps({**record, "versions": versions, "device": device, "threads": torch.get_num_threads()})
    with task.results.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def describe(setting: Setting) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items() if key != "row")


def tuning_loss(task: Task, setting: Setting) -> float:
    """Loss on the validation split right after the cut, from the results or a new run."""
    for record in load(task):
        if record["kind"] == "tuning" and record["setting"] == setting:
            return float(record["after"]["loss"])
    found = fit(task, setting, task.tuned_at, 0, tuning=True)
    add(task, {"kind": "tuning", "setting": setting, "keep": task.tuned_at, "seed": 0, **found})
    return float(found["after"]["loss"])


def tune(task: Task, row: str) -> Setting:
    """The best of five settings."""
    if row == "SpectralWeightDecay":
        return min(({"row": row, "space": "weight", "decay": d} for d in DECAYS), key=lambda s: tuning_loss(task, s))
    name, values = ("anneal", ANNEALS) if row == "TailShrinkage" else ("share", SHARES)
    best = min(({"row": row, "space": s, name: values[0]} for s in SPACES), key=lambda s: tuning_loss(task, s))
    return min(({**best, name: value} for value in values), key=lambda s: tuning_loss(task, s))


def run_missing(task: Task, rows: Sequence[str], seeds: Sequence[int]) -> None:
    """Runs what is not among the results yet."""
    for seed in seeds:
        for row in counted(rows, "run"):
            done = {(r["setting"]["row"], r["keep"], r["seed"]) for r in load(task) if r["kind"] == "run"}
            keeps = [keep for keep in ((1.0,) if row == UNCUT else task.keeps) if (row, keep, seed) not in done]
            if not keeps:
                continue
            setting = tune(task, row) if row in TUNED else {"row": row}
            with tempfile.TemporaryDirectory() as folder:
                shared = None if row in (*AIMED, DEFAULT, CUT_FIRST, UNCUT) else Path(folder) / "before.ckpt"
                before: Record = {}
                for keep in keeps:
                    found = fit(task, setting, keep, seed, keep_file=shared)
                    before = {"before": found["before"]} if "before" in found else before
                    add(task, {"kind": "run", "setting": setting, "keep": keep, "seed": seed, **before, **found})
    for seed in seeds:
        if not any(r["kind"] == "dense" and r["seed"] == seed for r in load(task)):
            measured = task.measure(task.model(seed).to(task.device), "test")
            add(task, {"kind": "dense", "seed": seed, "before": {k: round(v, 5) for k, v in measured.items()}})


def cell(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(task: Task, metric: str, records: list[Record]) -> Iterator[str]:
    """Lines of a markdown table: before the cut, right after it and at the end, for each keep."""
    scale, digits = {"accuracy": (100, 1), "loss": (1, 3)}.get(metric, (1, 1))
    moments = [("before", "before"), ("after", "right after"), ("end", "end")]
    header = ["row", *(f"{title}, keep {keep}" for keep in task.keeps for _, title in moments), "seeds"]
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    dense = cell([scale * r["before"][metric] for r in records if r["kind"] == "dense"], digits)
    yield f"| dense | {' | '.join([dense, '', ''] * len(task.keeps))} | |"
    runs = [r for r in records if r["kind"] == "run"]
    for row in ("no prehab", *task.rows):
        named = [r for r in runs if r["setting"]["row"] == (CUT_FIRST if row == "no prehab" else row)]
        if not named:
            continue
        cells = []
        for keep in task.keeps:
            for moment, _ in moments:
                key = "rehab" if row == "no prehab" and moment == "end" else moment
                found = [scale * r[key][metric] for r in named if r["keep"] in (keep, 1.0) and key in r]
                cells.append("" if row == CUT_FIRST and moment == "after" else cell(found, digits))
        settings = {describe(r["setting"]) for r in named} - {""}
        title = row + (f" ({'; '.join(sorted(settings))})" if settings else "")
        seeds = len({r["seed"] for r in named})
        yield f"| {title} | {' | '.join(cells)} | {seeds} |"


def tuning_table(records: list[Record]) -> Iterator[str]:
    """Lines of a markdown table of everything that was tried."""
    yield "| row | setting | validation loss right after the cut |"
    yield "|---|---|---|"
    for r in (r for r in records if r["kind"] == "tuning"):
        yield f"| {r['setting']['row']} | {describe(r['setting'])} | {r['after']['loss']:.4f} |"


def print_tables(task: Task) -> None:
    records = load(task)
    for metric, title in task.metrics.items():
        print(f"{title}\n")
        print("\n".join(table(task, metric, records)) + "\n")
    if any(record["kind"] == "tuning" for record in records):
        print("Tuning\n")
        print("\n".join(tuning_table(records)))


def parser(description: str, data: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("data", nargs="?", help=data)
    made.add_argument("--table", action="store_true", help="print the tables of the stored results only")
    made.add_argument("--only", default="", metavar="REGEX", help="the rows whose name the pattern fits")
    made.add_argument("--tune", action="store_true", help="tune these rows, and no more")
    made.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    made.add_argument("--threads", type=int, default=1)
    return made


def main(task: Task, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [row for row in task.rows if re.search(args.only, row)]
    with shown():
        if args.tune:
            for row in counted([row for row in rows if row in TUNED], "run"):
                tune(task, row)
        else:
            run_missing(task, rows, args.seeds)


def copied(model: nn.Module) -> nn.Module:
    """A copy in training mode."""
    return copy.deepcopy(model).train()
