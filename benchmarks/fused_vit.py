"""Fused queries, keys and values: cut as three matrices or as one? The ViT of ``examples/vit_digits.py``, real digits.

    python benchmarks/fused_vit.py            # runs what is missing in fused_vit.jsonl
    python benchmarks/fused_vit.py --table    # prints the stored results only

Each seed trains one dense model (16 epochs); copies of it are cut both ways by the default method at the same share of
parameters, and measured on the 597 validation images right after the cut.
"""

import argparse
import copy
import json
import statistics
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.progress import counted, shown

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from vit_digits import Digits, DigitsViT

RESULTS = Path(__file__).with_suffix(".jsonl")
SEEDS, KEEPS, EPOCHS = (0, 1, 2), (0.4, 0.2, 0.1, 0.05), 16
WAYS = {"one matrix": False, "three blocks": True}


def dense_model(seed: int) -> tuple[nn.Module, Digits]:
    L.seed_everything(seed, verbose=False)
    data = Digits(seed)
    module = DigitsViT(steps=EPOCHS * len(data.train_dataloader()))
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    return module.model.eval(), data


@torch.no_grad()
def measure(model: nn.Module, data: Digits) -> dict[str, float]:
    [(images, labels)] = list(data.val_dataloader())
    logits = model(images)
    return {
        "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        "loss": float(nn.functional.cross_entropy(logits, labels)),
    }


def run(seed: int) -> list[dict[str, object]]:
    model, data = dense_model(seed)
    batches = list(data.train_dataloader())[:64]
    rows: list[dict[str, object]] = [{"seed": seed, "way": "dense", "keep": 1.0, **measure(model, data)}]
    for keep in KEEPS:
        for way, split in WAYS.items():
            cut = copy.deepcopy(model)
            report = lp.compress_(
                cut,
                keep,
                batches,
                loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
                exclude_modules="head",
                split_fused=split,
            )
            increase = sum(layer.loss_increase or 0.0 for layer in report.plan.layers)
            found = {"achieved_keep": report.keep, "predicted_increase": increase, **measure(cut.eval(), data)}
            rows.append({"seed": seed, "way": way, "keep": keep, **found})
    return rows


def table(rows: list[dict[str, float]]) -> str:
    lines = ["| keep | way | accuracy in % | cross-entropy | predicted increase | seeds |", "|---|---|---|---|---|---|"]
    for keep in (1.0, *KEEPS):
        for way in ("dense", *WAYS):
            found = [row for row in rows if row["keep"] == keep and row["way"] == way]
            if found:
                cells = [
                    spread([100 * row["accuracy"] for row in found], 1),
                    spread([row["loss"] for row in found], 3),
                    spread([row["predicted_increase"] for row in found], 4) if way != "dense" else "",
                ]
                lines.append(f"| {keep} | {way} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored results only")
    warnings.filterwarnings("ignore")
    stored = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if not parser.parse_args().table:
        done = {row["seed"] for row in stored}
        with shown():
            for seed in counted([seed for seed in SEEDS if seed not in done], "run"):
                new = run(seed)
                stored += new
                with RESULTS.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
    print(table(stored))
