"""Does factor-aware training recover faster than plain training of the factors? A small GPT on tiny Shakespeare.

    python benchmarks/factor_training.py input.txt            # runs what is missing in factor_training.jsonl
    python benchmarks/factor_training.py --table              # prints the tables of the stored results only

The model, the texts and the cut are those of ``prehab_gpt.py``, which says what ``input.txt`` is: pretrained for 1,000
steps, cut without prehab (``compress_``, 24 batches), then trained for 120 steps with AdamW, its weight decay 0.01, at
a rate that rises for 15 steps and falls to zero. Every row sees the same batches. "plain" trains everything; each other
row differs from it in one setting of FactorTraining, at each value that is listed: nothing is chosen per row. The
learning rate is tuned for plain training alone (seed 0, for each keep, loss on the validation split), in its favour; a
larger rate for both factors stands beside a larger rate for one.

Two rows are not settings of the callback: "bounded update" scales the updates of both factors of a matrix down until
the spectral norm of the update of the product is at most 1 % of ``|B| |A|``; "Spectron" steps the factors as in Janson
et al., 2026, https://arxiv.org/abs/2602.12429, as far as its abstract and formula go: orthogonalized momentum (0.95),
both of norm ``rate / (|A| + |B| + 1)``, at two rates; the rest is stepped by AdamW.
"""

import argparse
import copy
import json
import math
import platform
import re
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from prehab_gpt import DEFAULT_CACHE, Shakespeare
from prehab_trial import Record
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_prehab as lp
from lightning_prehab.__about__ import __version__
from lightning_prehab.layers.pairs import FactorPair, factor_pairs
from lightning_prehab.progress import counted, shown

RESULTS = Path(__file__).with_suffix(".jsonl")
SEEDS, KEEPS = (0, 1, 2), (0.3, 0.15)
STEPS, WARMUP, CALIBRATION = 120, 15, 24
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
PLAIN = "plain"
#: Of Student's distribution with two degrees of freedom: half a 95 % interval of the mean of three.
T = 4.303
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "rate_B=2": {"rate_B": 2.0},
    "rate_A=2": {"rate_A": 2.0},
    "rate_A=2, rate_B=2": {"rate_A": 2.0, "rate_B": 2.0},
    "no weight decay on the factors": {"product_decay": 0.0},
    "product_decay=0.1": {"product_decay": 0.1},
    "product_decay=1": {"product_decay": 1.0},
    "rebalance_every=10": {"rebalance_every": 10},
    "alternate=1": {"alternate": 1},
    "alternate=60: B, then A": {"alternate": 60},
    'train="factors_norms_biases"': {"train": "factors_norms_biases"},
    'train="factors"': {"train": "factors"},
    "rate_B=4": {"rate_B": 4.0},
    "product_decay=1e-4, gradient": {"product_decay": 1e-4, "decay_form": "gradient"},
    "alternate=10": {"alternate": 10},
    "bounded update, 1 %": {"bound": 0.01},
    "Spectron, 0.2": {"spectron": 0.2},
    "Spectron, 0.05": {"spectron": 0.05},
}


class Spectron(torch.optim.AdamW):
    """AdamW, but for factors, whose momentum is made orthogonal and as large as both of them allow."""

    def __init__(self, parameters: Any, lr: float, pairs: list[FactorPair], share: float) -> None:
        super().__init__(parameters, lr=lr)
        self.pairs, self.peak, self.largest = pairs, share, lr
        self.momenta: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        rate = self.peak * self.param_groups[0]["lr"] / self.largest
        for pair in self.pairs:
            size = rate / (1 + sum(float(torch.linalg.matrix_norm(one, 2)) for one in pair.both))
            for parameter in pair.both:
                assert parameter.grad is not None
                momentum = self.momenta.setdefault(id(parameter), torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                left, _, right = torch.linalg.svd(momentum, full_matrices=False)
                parameter.sub_(left @ right, alpha=size)
                parameter.grad = None
        super().step()
        return loss


class Bounded(L.Callback):
    """Scales the update of both factors down, to first order, until that of the product is small enough."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.before: list[tuple[FactorPair, list[Tensor]]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        pairs = factor_pairs(pl_module)
        self.before = [(pair, [one.detach().clone() for one in pair.both]) for pair in pairs]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for pair, olds in self.before:
            sizes = [float(torch.linalg.matrix_norm(old, 2)) for old in olds]
            moved = [now - old for now, old in zip(pair.both, olds, strict=True)]
            steps = [float(torch.linalg.matrix_norm(one, 2)) for one in moved]
            bound = steps[0] * sizes[1] + steps[1] * sizes[0]
            factor = min(1.0, self.share * sizes[0] * sizes[1] / max(bound, 1e-30))
            for now, old, change in zip(pair.both, olds, moved, strict=True):
                now.copy_(old + factor * change)


class Trial(Shakespeare):
    """The cut model, and what is measured of it, on a device."""

    def __init__(self, file: str | None, cache: str | Path, device: str) -> None:
        super().__init__(file, cache, device)
        self.cuts: dict[tuple[int, float], nn.Module] = {}
        self.scores: dict[tuple[int, float, str], float] = {}  # right after the cut

    def cut(self, seed: int, keep: float) -> nn.Module:
        """A copy of the compressed model."""
        if (seed, keep) not in self.cuts:
            model = self.model(seed)
            batches = self.draw(5000 + seed, CALIBRATION)
            lp.compress_(
                model,
                batches=batches,
                loss=self.loss,
                policy=lp.ParameterBudget(keep, min_rank=8),
                target_modules="blocks.*",
                progress=False,
            )
            self.cuts[seed, keep] = model.train()
        return copy.deepcopy(self.cuts[seed, keep])

    def score(self, model: nn.Module, split: str) -> float:
        """Cross-entropy per character."""
        model.to(self.device)
        return round(self.measure(model, split)["loss"], 5)


class Module(L.LightningModule):
    """AdamW; what Spectron steps is not AdamW's."""

    def __init__(self, task: Trial, model: nn.Module, seed: int, rate: float, spectron: float | None) -> None:
        super().__init__()
        self.task, self.model, self.seed, self.rate, self.spectron = task, model, seed, rate, spectron

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.task.loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        if self.spectron is None:
            optimizer = torch.optim.AdamW(parameters, lr=self.rate)
        else:
            optimizer = Spectron(parameters, self.rate, factor_pairs(self.model), self.spectron)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, 1 - step / STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.task.draw(9000 + self.seed, STEPS), batch_size=None)  # type: ignore[arg-type]


def fit(task: Trial, row: str, keep: float, seed: int, rate: float, split: str) -> Record:
    """One run: the loss right after the cut, after half of the steps, and in the end."""
    setting = dict(SETTINGS[row])
    bound, spectron = setting.pop("bound", None), setting.pop("spectron", None)
    module = Module(task, task.cut(seed, keep), seed, rate, spectron)
    callbacks: list[L.Callback] = [lp.FactorTraining(**setting)] if setting else []
    halfway = Halfway(task, split)
    callbacks += [halfway, *([] if bound is None else [Bounded(bound)])]
    key = seed, keep, split
    if key not in task.scores:
        task.scores[key] = task.score(module.model, split)
    trainer = L.Trainer(
        accelerator="cpu" if task.device.type == "cpu" else "gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    with torch.random.fork_rng():
        trainer.fit(module)
    return {"after": task.scores[key], "half": halfway.found, "end": task.score(module.model, split)}


class Halfway(L.Callback):
    def __init__(self, task: Trial, split: str) -> None:
        self.task, self.split, self.found = task, split, math.nan

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == STEPS // 2 - 1:
            self.found = self.task.score(pl_module.model, self.split)


class Results:
    """Lines of JSON, appended one by one."""

    path: ClassVar[Path] = RESULTS

    def all(self) -> list[Record]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def get(self, task: Trial, kind: str, row: str, keep: float, seed: int, rate: float) -> Record:
        """What is stored, or a new run."""
        wanted = {"kind": kind, "row": row, "keep": keep, "seed": seed, "rate": rate}
        for record in self.all():
            if wanted.items() <= record.items():
                return record
        found = fit(task, row, keep, seed, rate, "validation" if kind == "tuning" else "test")
        versions = {"torch": torch.__version__, "lightning": L.__version__, "lightning_prehab": __version__}
        device = "cpu" if task.device.type == "cpu" else torch.cuda.get_device_name(task.device)
        record = {**wanted, **found, "versions": versions, "device": device, "cpu": platform.machine()}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        return record


def run_missing(task: Trial, rows: list[str], seeds: list[int]) -> None:
    results = Results()
    tuned = {
        keep: min(RATES, key=lambda rate, keep=keep: results.get(task, "tuning", PLAIN, keep, 0, rate)["end"])
        for keep in KEEPS
    }
    wanted = [(row, keep, seed) for row in rows for keep in KEEPS for seed in seeds]
    for row, keep, seed in counted(wanted, "run"):
        results.get(task, "run", row, keep, seed, tuned[keep])


def table(records: list[Record]) -> Iterator[str]:
    """Lines of a markdown table: the loss of plain training, and how far the others are from it, paired by seed."""
    ends = {(one["row"], one["keep"], one["seed"]): one for one in records if one["kind"] == "run"}
    header = [f"{title}, keep {keep}" for keep in KEEPS for title in ("half way", "in the end")]
    yield f"| setting | {' | '.join(header)} |"
    yield "|" + "---|" * (1 + len(header))
    for row in SETTINGS:
        cells = []
        for keep, key in ((keep, key) for keep in KEEPS for key in ("half", "end")):
            ours = {seed: ends[row, keep, seed][key] for seed in SEEDS if (row, keep, seed) in ends}
            plain = {seed: ends[PLAIN, keep, seed][key] for seed in ours if (PLAIN, keep, seed) in ends}
            cells.append(cell([ours[seed] - (0.0 if row == PLAIN else plain[seed]) for seed in plain], row == PLAIN))
        if any(cells):
            yield f"| {f'`{row}`' if '=' in row else row} | {' | '.join(cells)} |"


def cell(values: list[float], absolute: bool) -> str:
    """The mean with a 95 % interval; without it, and with their number, if seeds are missing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3f}" if absolute else f"{statistics.mean(values):+.3f}"
    if len(values) < len(SEEDS):
        return f"{mean} (seeds: {len(values)})"
    return f"{mean} ± {T * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="input.txt of tiny Shakespeare")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored results only")
    parser.add_argument("--only", default="", metavar="REGEX", help="the rows whose name the pattern fits")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default=DEFAULT_CACHE, help="folder for the pretrained models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    options = parser.parse_args()
    Results.path = options.results
    if not options.table:
        if options.data is None:
            parser.error("the file input.txt is missing")
        torch.set_num_threads(options.threads)
        warnings.filterwarnings("ignore")
        with shown():
            run_missing(
                Trial(options.data, options.cache, options.device),
                [row for row in SETTINGS if re.search(options.only, row)],
                options.seeds,
            )
    rows = Results().all()
    print("\n".join(table(rows)))
    print("\nThe learning rate, plain training (validation split):")
    tried = [one for one in rows if one["kind"] == "tuning"]
    print(", ".join(f"{one['rate']} at keep {one['keep']}: {one['end']:.3f}" for one in tried))
