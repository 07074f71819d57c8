"""What a cut costs a small ResNet on digits: methods and schemes, right after the cut, over several seeds.

    python benchmarks/resnet_digits.py            # runs what is missing in resnet_digits.json, then prints the table
    python benchmarks/resnet_digits.py --table    # prints the table only

Each seed trains one network on 1,198 of the 1,797 digits of scikit-learn; every method cuts a copy of it, calibrated on
the training digits, and is measured on the other 599. Nothing is trained after the cut.
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.__about__ import __version__
from lightning_prehab.kinds import ConvKind, register_kind
from lightning_prehab.progress import counted, shown

RESULTS = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
KEEPS = (0.5, 0.25, 0.1)
EPOCHS, BATCH = 20, 64
SCHEMES = ("auto", "channel", "spatial")
METHODS: dict[str, Callable[[float], dict[str, Any]]] = {
    "SVD, uniform": lambda keep: {"factorization": lp.SVD(), "policy": lp.RankRatio(keep)},
    "SVD, global budget": lambda keep: {"factorization": lp.SVD(), "policy": lp.ParameterBudget(keep)},
    "WhitenedSVD, uniform": lambda keep: {"factorization": lp.WhitenedSVD(), "policy": lp.RankRatio(keep)},
    "WhitenedSVD, global budget": lambda keep: {"factorization": lp.WhitenedSVD(), "policy": lp.ParameterBudget(keep)},
    "KroneckerSVD, uniform": lambda keep: {"policy": lp.RankRatio(keep)},
    "KroneckerSVD, global budget (default)": lambda keep: {},
}


class Block(nn.Module):
    """Two 3x3 convolutions beside an identity, or beside a 1x1 convolution where the size changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet() -> nn.Sequential:
    """Five blocks of 16, 32 and 64 channels: 170,000 parameters."""
    sizes = [(16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *(Block(*size) for size in sizes), *head)


def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held, used = order[:599], order[599:]
    return images[used], labels[used], images[held], labels[held]


def train(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    """AdamW with a one-cycle learning rate; digits are shifted by up to one pixel."""
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    model.train()
    for _ in range(EPOCHS):
        for part in torch.randperm(len(labels), generator=generator).split(BATCH):
            shifts = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = nn.functional.cross_entropy(model(torch.roll(images[part], shifts, (2, 3))), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    logits = model(images)
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    return {"loss": nn.functional.cross_entropy(logits, labels).item(), "accuracy": accuracy}


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run(seed: int) -> list[dict[str, object]]:
    torch.manual_seed(seed)
    images, labels, *held = split(seed)
    dense = resnet()
    train(dense, images, labels, seed)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    records: list[dict[str, object]] = [{"method": "dense", "seed": seed, **measure(dense, *held)}]
    for scheme, keep, method in itertools.product(SCHEMES, KEEPS, METHODS):
        register_kind(ConvKind(scheme))
        model = copy.deepcopy(dense)
        report = lp.compress_(model, keep, batches, objective, **METHODS[method](keep))
        found = {"method": method, "scheme": scheme, "keep": keep, "seed": seed, "achieved_keep": round(report.keep, 4)}
        found["spatial"] = sum(layer.form == "spatial" for layer in report.plan.layers)
        records.append({**found, **measure(model, *held)})
        print(json.dumps(records[-1]), flush=True)
    return records


def load() -> dict[str, Any]:
    if RESULTS.exists():
        return json.loads(RESULTS.read_text())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning_prehab": __version__}
    return {
        "command": "python benchmarks/resnet_digits.py",
        "device": "cpu, 1 thread",
        "versions": versions,
        "runs": [],
    }


def table(results: dict[str, Any]) -> str:
    columns = " | ".join(f"loss, keep {keep} | accuracy" for keep in KEEPS)
    lines = [f"| scheme, method | {columns} |", "|---|" + "---|" * (2 * len(KEEPS))]
    for name in ("dense", *(f"{scheme}: {method}" for scheme in SCHEMES for method in METHODS)):
        cells = []
        for keep in KEEPS:
            runs = [r for r in results["runs"] if _row(r) == name and r.get("keep", keep) == keep]
            for what, scale, digits in (("loss", 1, 3), ("accuracy", 100, 1)):
                values = [r[what] * scale for r in runs]
                cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(record: dict[str, Any]) -> str:
    return f"{record['scheme']}: {record['method']}" if "scheme" in record else record["method"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cuts of a small ResNet on digits.")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results only")
    args = parser.parse_args()
    results = load()
    if not args.table:
        torch.set_num_threads(1)
        done = {r["seed"] for r in results["runs"]}
        with shown():
            for seed in counted([seed for seed in SEEDS if seed not in done], "run"):
                results["runs"] += run(seed)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
