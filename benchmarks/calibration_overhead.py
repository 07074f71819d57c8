"""What does collecting statistics cost an ordinary training step, while it is on and while it is off?

    python benchmarks/calibration_overhead.py            # measures, writes calibration_overhead.json, prints the table
    python benchmarks/calibration_overhead.py --table    # prints the table only

A training step (forward, backward, AdamW) of two ViT-B blocks (768 wide, 197 tokens, batch 32) on random images. Plain
steps and steps with a collector alternate; the cost is the median of the paired ratios minus one. "every token" is what
collect_statistics does in a pass of its own; on training steps CompressionCallback takes a sample of the tokens.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lightning_prehab as lp
from lightning_prehab.statistics.collector import Collector
from lightning_prehab.statistics.sums import Wanted

RESULTS = Path(__file__).with_suffix(".json")
BATCHES = 64
CASES: dict[str, tuple[Wanted, int | None]] = {
    "off: hooks attached, not counting": (Wanted(True, True), BATCHES),
    "inputs (WhitenedSVD)": (Wanted(True), BATCHES),
    "inputs and output gradients (KroneckerSVD, default)": (Wanted(True, True), BATCHES),
    "the same, halves apart (KroneckerSVD('auto'))": (Wanted(True, True, False, True), BATCHES),
    "the same, and weight gradients (FisherSVD, ZeroSum)": (Wanted(True, True, True), BATCHES),
    "inputs and output gradients, every token": (Wanted(True, True), None),
}


def measure(repeats: int, batch: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = VisionTransformer(depth=2, embed_dim=768, num_heads=12, num_classes=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    targets = lp.find_targets(model, "blocks.*")

    def step(collector: Collector | None = None, count: bool = True) -> float:
        if collector is not None:
            collector.attach()
        start = time.perf_counter()
        if collector is not None and count:
            collector.begin_batch(images)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if collector is not None:
            collector.end_batch()
        seconds = time.perf_counter() - start
        if collector is not None:
            collector.detach()
        return seconds

    collectors = {name: Collector(targets, wanted, batches=batches) for name, (wanted, batches) in CASES.items()}
    step()
    ratios: dict[str, list[float]] = {name: [] for name in CASES}
    plain = []
    for _ in range(repeats):
        for name, collector in collectors.items():
            before = step()
            ratios[name].append(step(collector, count=not name.startswith("off")) / before)
            plain.append(before)
    return {
        "command": " ".join(["python", "benchmarks/calibration_overhead.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "step seconds": statistics.median(plain),
        "cost": {name: statistics.median(values) - 1 for name, values in ratios.items()},
        "ratios": {name: [round(value, 3) for value in values] for name, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored results only")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    if not arguments.table:
        RESULTS.write_text(json.dumps(measure(arguments.repeats, arguments.batch), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    print("| statistics | cost of a step |\n|---|---|")
    for name, cost in results["cost"].items():
        print(f"| {name} | {100 * cost:+.1f} % |")


if __name__ == "__main__":
    main()
