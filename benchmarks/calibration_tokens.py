"""What is lost when statistics are taken from fewer tokens? A small LLaMA on tiny Shakespeare, right after the cut.

    python benchmarks/calibration_tokens.py input.txt    # runs what is missing in calibration_tokens.jsonl
    python benchmarks/calibration_tokens.py --table      # prints the stored results only

One model (width 192, 512 in the MLP) is trained for 900 steps of 2,048 characters, AdamW at 2e-3. Each draw of batches
is calibrated in several ways, cut by the default method, and measured on 8 batches of the last tenth of the text, the
same for all. The text is tinyshakespeare/input.txt of https://github.com/karpathy/char-rnn.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from calibration_overhead import Language, llama
from torch import Tensor

import lightning_prehab as lp
from lightning_prehab.progress import counted, shown
from lightning_prehab.statistics import collector
from lightning_prehab.statistics.sums import LayerStatistics, Wanted

RESULTS = Path(__file__).with_suffix(".jsonl")
DRAWS, KEEPS, STEPS, LENGTH = (0, 1, 2), (0.5, 0.3, 0.2), 900, 128
WANTED = Wanted(inputs=True, gradients=True)
#: Batches and sequences of each, and constants of the collector; the defaults are without.
WAYS = {
    "own pass, all tokens": (2, 32, {"OWN_PASS_PRODUCTS": 1e9}),
    "own pass (default)": (2, 32, {}),
    "training steps, all tokens": (64, 16, None),
    "training steps, some tokens of each batch": (64, 16, {"MANY_BATCHES": math.inf}),
    "training steps (default), some tokens of a quarter of the batches": (64, 16, {}),
}


class Text:
    """Batches of characters: the first nine tenths for training and calibration, the last for what is reported."""

    def __init__(self, path: str) -> None:
        text = Path(path).read_text()
        known = {character: number for number, character in enumerate(sorted(set(text)))}
        self.tokens = torch.tensor([known[character] for character in text])
        self.border = len(text) * 9 // 10

    def batch(self, sequences: int, source: torch.Generator, last: bool = False) -> Tensor:
        low, high = (self.border, len(self.tokens)) if last else (0, self.border)
        starts = torch.randint(low, high - LENGTH, (sequences,), generator=source)
        return torch.stack([self.tokens[start : start + LENGTH] for start in starts])


def trained(text: Text, steps: int) -> Language:
    torch.manual_seed(0)
    model, source = llama(width=192, hidden=512, length=LENGTH), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(text.batch(16, source)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@contextmanager
def constants(changed: dict[str, float]) -> Iterator[None]:
    before = {name: getattr(collector, name) for name in changed}
    try:
        vars(collector).update(changed)
        yield
    finally:
        vars(collector).update(before)


def calibrated(model: Language, batches: list[Tensor], way: str) -> dict[str, LayerStatistics]:
    changed, targets = WAYS[way][2], lp.find_targets(model)
    with constants(changed or {}):
        if way.startswith("own pass"):
            return lp.collect_statistics(model, targets, batches, lambda net, x: net(x), wanted=WANTED)
        seen = collector.Collector(targets, WANTED, batches=None if changed is None else len(batches))
        seen.attach()
        for number, batch in enumerate(batches):
            seen.begin_batch(batch, number)
            model(batch).backward()
            seen.end_batch()
        seen.detach()
        model.zero_grad()
        return seen.statistics


@torch.no_grad()
def loss(model: Language, measured: list[Tensor]) -> float:
    return statistics.fmean(float(model(batch)) for batch in measured)


def run(path: str, steps: int, done: set[tuple[str, int]]) -> Iterator[dict[str, object]]:
    text = Text(path)
    model, source = trained(text, steps), torch.Generator().manual_seed(1)
    measured = [text.batch(16, source, last=True) for _ in range(8)]
    if ("dense", 0) not in done:
        yield {"way": "dense", "draw": 0, "keep": 1.0, "loss": loss(model, measured)}
    for draw in DRAWS:
        for way, (count, sequences, _) in counted([one for one in WAYS.items() if (one[0], draw) not in done], "run"):
            source = torch.Generator().manual_seed(100 + draw)
            sums = calibrated(model, [text.batch(sequences, source) for _ in range(count)], way)
            for keep in KEEPS:
                cut = copy.deepcopy(model)
                plan = lp.make_plan(lp.find_targets(cut), keep, statistics=sums)
                lp.apply_plan_(cut, plan, sums)
                yield {"way": way, "draw": draw, "keep": keep, "loss": loss(cut, measured)}


def stored() -> list[dict[str, Any]]:
    """One row for each; a way that was stopped between two budgets is made again."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = (json.loads(line) for line in lines)
    return list({(row["way"], row["draw"], row["keep"]): row for row in rows}.values())


def print_table() -> None:
    rows = stored()
    print(f"| loss right after the cut, {len(DRAWS)} draws | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |")
    print("|---" * (len(KEEPS) + 1) + "|")
    dense = next(row["loss"] for row in rows if row["way"] == "dense")
    print(f"| dense (not cut) | {dense:.3f}" + " |" * len(KEEPS))
    for way in WAYS:
        found = [[row["loss"] for row in rows if row["way"] == way and row["keep"] == keep] for keep in KEEPS]
        print(
            f"| {way} | " + " | ".join(f"{statistics.fmean(x):.3f} ± {statistics.stdev(x):.3f}" for x in found) + " |"
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("text", nargs="?")
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--steps", type=int, default=STEPS)
    given = arguments.parse_args()
    if not given.table:
        if given.text is None:
            sys.exit("Give the path of input.txt, or --table.")
        torch.set_num_threads(1)
        wholes = {(row["way"], row["draw"]) for row in stored() if row["keep"] in (KEEPS[-1], 1.0)}
        with shown(), RESULTS.open("a") as file:
            for row in run(given.text, given.steps, wholes):
                print(row, flush=True)
                file.write(json.dumps({**row, "steps": given.steps, "torch": torch.__version__}) + "\n")
                file.flush()
    print_table()


if __name__ == "__main__":
    main()
