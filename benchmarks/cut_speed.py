"""How much smaller and faster is a cut model, with the ranks that the default chooses?

    python benchmarks/cut_speed.py DATA_FOLDER   # measures anew and replaces cut_speed.json
    python benchmarks/cut_speed.py --table       # prints the stored results only

MiniLM (real weights, a fresh head) on sentences of SST-2, see ``sst2.py``; timm's ViT-S/16 on random images (random
weights, so that only its time means something); ``smollm2.py`` has the language model. Whole forward passes in eval
mode, dense and cut in turn, one thread, medians; also with ranks that are multiples of 32.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sst2
import timm
import torch
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.plan.timing import time_calls

RESULTS = Path(__file__).with_suffix(".json")
KEEPS, MULTIPLES, ROWS = (0.8, 0.6, 0.4, 0.2), (1, 32), (1, 8)
Batch = Mapping[str, Tensor] | Tensor


def call(model: nn.Module, batch: Batch) -> Any:
    return model(batch) if isinstance(batch, Tensor) else model(**batch)


def minilm(folder: str) -> tuple[nn.Module, Callable[[int], Batch], str]:
    sentences = sst2.load_data(folder).train.sample(64, seed=0)
    return sst2.pretrained_model(0).eval(), lambda rows: sentences.batch(range(rows), labels=False), sst2.TARGETS


def vit() -> tuple[nn.Module, Callable[[int], Batch], str]:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 224, 224)
    return timm.create_model("vit_small_patch16_224").eval(), lambda rows: images[:rows], "blocks.*"


@torch.no_grad()
def speed(dense: nn.Module, cut: nn.Module, batch: Batch) -> float:
    seconds = time_calls({None: lambda: call(dense, batch), 1: lambda: call(cut, batch)}, torch.device("cpu"))
    return seconds[None] / seconds[1]


def measure(name: str, made: tuple[nn.Module, Callable[[int], Batch], str]) -> list[dict[str, object]]:
    dense, rows_of, pattern = made
    targets = lp.find_targets(dense, pattern)
    sums = lp.collect_statistics(dense, targets, [rows_of(32)], gradients=True)
    rows: list[dict[str, object]] = []
    for keep in KEEPS:
        for multiple in MULTIPLES:
            cut = copy.deepcopy(dense)
            plan = lp.make_plan(lp.find_targets(cut, pattern), keep, statistics=sums, rank_multiple_of=multiple)
            report = lp.apply_plan_(cut, plan, sums)
            size = {"before": report.parameters_before, "after": report.parameters_after}
            speeds = {f"speed {count}": speed(dense, cut, rows_of(count)) for count in ROWS}
            rows.append({"model": name, "keep": keep, "multiple": multiple, **size, **speeds})
            print(rows[-1], flush=True)
    return rows


def print_table() -> None:
    print("| model | keep | ranks | parameters, millions | times as fast, 1 row | 8 rows |")
    print("|---" * 6 + "|")
    for row in json.loads(RESULTS.read_text()):
        ranks = "any" if row["multiple"] == 1 else f"multiples of {row['multiple']}"
        size = f"{row['before'] / 1e6:.1f} -> {row['after'] / 1e6:.1f}"
        times = " | ".join(f"{row[f'speed {count}']:.2f}" for count in ROWS)
        print(f"| {row['model']} | {row['keep']} | {ranks} | {size} | {times} |")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?")
    arguments.add_argument("--table", action="store_true")
    given = arguments.parse_args()
    if not given.table:
        if given.folder is None:
            sys.exit("Give the folder of SST-2 (see sst2.py), or --table.")
        torch.set_num_threads(1)
        rows = measure("MiniLM", minilm(given.folder))
        rows += measure("ViT-S/16", vit())
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print_table()


if __name__ == "__main__":
    main()
