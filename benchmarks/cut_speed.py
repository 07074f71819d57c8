"""How much smaller and faster is a cut model, with the ranks that the default chooses?

    python benchmarks/cut_speed.py DATA_FOLDER   # measures anew and replaces cut_speed.json
    python benchmarks/cut_speed.py DATA_FOLDER --device cuda   # on a GPU, into cut_speed.cuda.json
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
from on_device import add_device_, device_name, print_tables
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.plan.timing import time_calls
from lightning_prehab.statistics.batches import to_device

RESULTS = Path(__file__).with_suffix(".json")
ON_CUDA = Path(__file__).with_suffix(".cuda.json")
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
    device = next(dense.parameters()).device
    batch = to_device(batch, device)
    seconds = time_calls({None: lambda: call(dense, batch), 1: lambda: call(cut, batch)}, device)
    return seconds[None] / seconds[1]


def measure(
    name: str, made: tuple[nn.Module, Callable[[int], Batch], str], device: torch.device
) -> list[dict[str, object]]:
    dense, rows_of, pattern = made
    dense = dense.to(device)
    where = {} if device.type == "cpu" else {"device": device_name(device), "torch": torch.__version__}
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
            rows.append({"model": name, "keep": keep, "multiple": multiple, **size, **speeds, **where})
            print(rows[-1], flush=True)
    return rows


def print_table(path: Path) -> None:
    stored = json.loads(path.read_text())
    for name in dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in stored if "device" in row):
        print(f"{name}\n")
    print("| model | keep | ranks | parameters, millions | times as fast, 1 row | 8 rows |")
    print("|---" * 6 + "|")
    for row in stored:
        ranks = "any" if row["multiple"] == 1 else f"multiples of {row['multiple']}"
        size = f"{row['before'] / 1e6:.1f} -> {row['after'] / 1e6:.1f}"
        times = " | ".join(f"{row[f'speed {count}']:.2f}" for count in ROWS)
        print(f"| {row['model']} | {row['keep']} | {ranks} | {size} | {times} |")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?")
    arguments.add_argument("--table", action="store_true")
    add_device_(arguments)
    given = arguments.parse_args()
    if not given.table:
        if given.folder is None:
            sys.exit("Give the folder of SST-2 (see sst2.py), or --table.")
        torch.set_num_threads(1)
        rows = measure("MiniLM", minilm(given.folder), given.device)
        rows += measure("ViT-S/16", vit(), given.device)
        results = ON_CUDA if given.device.type == "cuda" else RESULTS
        results.write_text(json.dumps(rows, indent=1) + "\n")
    print_tables(print_table, RESULTS, ON_CUDA)


if __name__ == "__main__":
    main()
