"""Does prehab help a small Vision Transformer on digits? Every recipe, with its controls, over several seeds.

    python benchmarks/digits_vit.py            # runs what is missing in digits_vit.json, then prints the table
    python benchmarks/digits_vit.py --table    # prints the table only

All recipes share 16 epochs of ordinary training. Then come 6 epochs with the penalty (or without: the equal-step
control), the cut, and 6 epochs of rehab. "cut first" makes the cut before those 12 epochs: the hardest control.
"""

import argparse
import contextlib
import io
import json
import logging
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.progress import counted, shown

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from vit_digits import Digits, DigitsViT

RESULTS = Path(__file__).with_suffix(".json")
PRETRAIN, PREHAB, REHAB = 16, 6, 6
SEEDS = (0, 1, 2)
KEEPS = (0.1, 0.05)


def cut(keep: float, epoch: int = PRETRAIN + PREHAB, **settings: object) -> list[L.Callback]:
    """Surgery and warm-up; the classifier head stays dense."""
    return [lp.CompressionCallback(epoch, keep, exclude_modules="head", **settings), lp.RehabSchedule(warmup_epochs=1)]


def prehab(regularizer: object, strength: float, space: str = "weight") -> lp.PrehabCallback:
    return lp.PrehabCallback(regularizer, strength, space=space, start_epoch=PRETRAIN)


RECIPES: dict[str, Callable[[float], list[L.Callback]]] = {
    "equal-step control": cut,
    "cut first": lambda keep: cut(keep, PRETRAIN),
    "SVD, uniform": lambda keep: cut(keep, factorization=lp.SVD()),
    "WhitenedSVD, uniform": lambda keep: cut(keep, factorization=lp.WhitenedSVD()),
    "SVD, global budget": lambda keep: cut(keep, factorization=lp.SVD(), policy=lp.ParameterBudget(keep)),
    "WhitenedSVD, global budget": lambda keep: cut(
        keep, factorization=lp.WhitenedSVD(), policy=lp.ParameterBudget(keep)
    ),
    "KroneckerSVD, uniform": lambda keep: cut(keep, policy=lp.RankRatio(keep)),
    "StableRank 0.01, weight": lambda keep: [prehab(lp.StableRank(), 0.01), *cut(keep)],
    "StableRank 0.1, weight": lambda keep: [prehab(lp.StableRank(), 0.1), *cut(keep)],
    "TailEnergy 1, weight": lambda keep: [prehab(lp.TailEnergy(), 1.0), *cut(keep)],
    "TailEnergy 1, loss": lambda keep: [prehab(lp.TailEnergy(), 1.0, "loss"), *cut(keep)],
    "TailEnergy 10, loss": lambda keep: [prehab(lp.TailEnergy(), 10.0, "loss"), *cut(keep)],
}


class Measure(L.Callback):
    """Validation accuracy and cross-entropy before the cut, right after it, and at the end."""

    def __init__(self, data: Digits) -> None:
        self.images, self.labels = next(iter(data.val_dataloader()))
        self.found: dict[str, list[float]] = {}
        self.latest: list[float] = []

    @torch.no_grad()
    def measure(self, module: DigitsViT) -> list[float]:
        module.eval()
        logits = module.model(self.images)
        module.train()
        loss = nn.functional.cross_entropy(logits, self.labels).item()
        return [(logits.argmax(-1) == self.labels).float().mean().item(), loss]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: DigitsViT) -> None:
        self.latest = self.measure(pl_module)

    def on_surgery(self, trainer: L.Trainer, pl_module: DigitsViT, report: lp.CompressionReport) -> None:
        self.found = {"before": self.latest, "right after": self.measure(pl_module)}


def run(recipe: str, keep: float, seed: int) -> dict[str, object]:
    L.seed_everything(seed, verbose=False)
    data = Digits(seed)
    epochs = PRETRAIN + PREHAB + REHAB
    measure, callbacks = Measure(data), RECIPES[recipe](keep)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[*callbacks, measure],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(DigitsViT(steps=epochs * len(data.train_dataloader())), data)
    report = next(c.report for c in callbacks if isinstance(c, lp.CompressionCallback))
    found = {**measure.found, "after rehab": measure.latest}
    return {"recipe": recipe, "keep": keep, "seed": seed, "achieved_keep": round(report.keep, 4), **found}


def load() -> dict[str, object]:
    if RESULTS.exists():
        return json.loads(RESULTS.read_text())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__}
    return {"command": "python benchmarks/digits_vit.py", "device": "cpu, 1 thread", "versions": versions, "runs": []}


def table(results: dict[str, object]) -> str:
    lines = [
        "| keep | recipe | accuracy before | right after | after rehab | loss before | right after | after rehab |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for keep in KEEPS:
        for recipe in RECIPES:
            runs = [r for r in results["runs"] if (r["recipe"], r["keep"]) == (recipe, keep)]
            if not runs:
                continue
            cells = []
            for index, digits in ((0, 1), (1, 3)):
                for moment in ("before", "right after", "after rehab"):
                    values = [r[moment][index] * (100 if index == 0 else 1) for r in runs]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
            lines.append(f"| {keep} | {recipe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prehab and its controls on digits.")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results only")
    parser.add_argument("--part", default="0/1", help="i/n: run every n-th job, starting at i, into a file of its own")
    args = parser.parse_args()
    results = load()
    if not args.table:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        part, parts = map(int, args.part.split("/"))
        done = {(r["recipe"], r["keep"], r["seed"]) for r in results["runs"]}
        jobs = [(recipe, keep, seed) for keep in KEEPS for seed in SEEDS for recipe in RECIPES]
        output = RESULTS if parts == 1 else RESULTS.with_suffix(f".part{part}.json")
        with shown():
            for job in counted([job for job in jobs[part::parts] if job not in done], "run"):
                results["runs"].append(run(*job))
                output.write_text(json.dumps(results, indent=1) + "\n")
                print(json.dumps(results["runs"][-1]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
