"""Does the model from before prehab help as a teacher, before the cut and after it? A small GPT on tiny Shakespeare.

    python benchmarks/self_distillation.py input.txt          # runs what is missing in self_distillation.jsonl
    python benchmarks/self_distillation.py --table            # prints the table of the stored results only

The model, the data and the steps are those of ``prehab_gpt.py``: 120 steps of the default prehab (or none: the
equal-step control), the cut at keep 0.1, 60 steps after it; ``cut first`` takes all of them after the cut. Crossed with
``PrehabCallback(self_distillation=...)`` before the cut and ``RehabDistillation(...)`` after it.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from prehab_gpt import DEFAULT_CACHE, Shakespeare
from prehab_trial import SEEDS, Module, Record, Recorder, add, load

import lightning_prehab as lp

KEEP = 0.1
CUT_FIRST = "cut first"
#: Strengths after the cut with the task_strength there, each with those before it (None: no prehab).
ROWS = {
    (0.0, 1.0): (CUT_FIRST, None, 0.0, 1.0),
    (1.0, 1.0): (CUT_FIRST, 0.0, 1.0),
}
RESULTS = Path(__file__).with_suffix(".jsonl")


class Trial(Shakespeare):
    keeps = (KEEP,)
    results = RESULTS


def rows() -> Iterator[Record]:
    """All settings."""
    for (strength, task), befores in ROWS.items():
        for before in befores:
            yield {"before": before, "after": strength, "task": task}


def fit(task: Trial, row: Record, seed: int) -> Record:
    """One run: what is measured."""
    first = row["before"] == CUT_FIRST
    epoch, total = (0 if first else task.prehab), task.prehab + task.rehab
    recorder = Recorder(task, "test", None if first else epoch - 1, {total - 1: "end"})
    policy = lp.ParameterBudget(KEEP, min_rank=8)
    surgery = lp.CompressionCallback(
        epoch, policy=policy, calibration_batches=task.calibration_batches, target_modules=task.targets
    )
    callbacks: list[L.Callback] = [surgery, lp.RehabSchedule(warmup_steps=task.steps // 4), recorder]
    if not first and row["before"] is not None:
        callbacks.append(lp.PrehabCallback(self_distillation=row["before"]))
    if row["after"] > 0:
        callbacks.append(lp.RehabDistillation(row["after"], task_strength=row["task"]))
    with torch.random.fork_rng(devices=[]):
        module = Module(task, seed)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=total,
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        trainer.fit(module)
    return recorder.found


def print_table(records: list[Record]) -> None:
    """Markdown: mean over seeds, and the paired difference to the row without a teacher."""
    print("| before the cut | after it | before | right after | end | end, paired difference | seeds |")
    print("|---|---|---|---|---|---|---|")

    def of(row: Record, moment: str) -> dict[int, float]:
        return {r["seed"]: r[moment]["loss"] for r in records if r["setting"] == row and moment in r}

    for row in rows():
        if not of(row, "end"):
            continue
        plain = of(
            {"before": 0.0 if isinstance(row["before"], float) else row["before"], "after": 0.0, "task": 1.0}, "end"
        )
        end = of(row, "end")
        pairs = [end[seed] - plain[seed] for seed in end if seed in plain]
        spread = f" ± {statistics.stdev(pairs):.3f}" if len(pairs) > 1 else ""
        names = {None: "no prehab", CUT_FIRST: CUT_FIRST, 0.0: "PrehabCallback()"}
        before = names.get(row["before"], f"self_distillation={row['before']}")
        after = f"strength={row['after']}, task_strength={row['task']}" if row["after"] else "no teacher"
        cells = [
            f"{statistics.mean(of(row, m).values()):.3f}" if of(row, m) else "" for m in ("before", "after", "end")
        ]
        print(f"| {before} | {after} | {' | '.join(cells)} | {statistics.mean(pairs):+.3f}{spread} | {len(end)} |")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("data", nargs="?", help="input.txt of tiny Shakespeare")
    options.add_argument("--table", action="store_true", help="print the table of the stored results only")
    options.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options.add_argument("--cache", default=DEFAULT_CACHE, help="folder for the pretrained models")
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if given.table:
        print_table(records)
        return
    if given.data is None:
        options.error("the file input.txt is missing")
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = Trial(given.data, given.cache)
    for seed in given.seeds:
        for row in rows():
            if not any(r["setting"] == row and r["seed"] == seed for r in load(task)):
                add(task, {"kind": "run", "setting": row, "keep": KEEP, "seed": seed, **fit(task, row, seed)})


if __name__ == "__main__":
    main()
