"""What does a regularizer cost an ordinary training step, and how much did the authors' way cost?

    python benchmarks/penalty_overhead.py            # measures what is missing in its .json, prints the table
    python benchmarks/penalty_overhead.py --only "TailShrinkage.*loss|authors"
    python benchmarks/penalty_overhead.py --device cuda    # on a GPU, into penalty_overhead.cuda.json
    python benchmarks/penalty_overhead.py --table    # prints the tables only

One transformer block of each size; its linear layers are the targets, ranks are those of keep 0.2. A step is forward,
backward and AdamW of that block at batch 32; a regularizer's time is that of its value and gradient (or of the
shrinkage) for all layers, the mean of 20 calls in a row after the first one, so that what is refreshed every few calls
is in it. Both alternate; the table has the median over repeats of the ratios. "the authors' way" is, for the stable
rank, 50 power iterations in float64 from a random start for each matrix at each step, and for the nuclear norm two
eigendecompositions in float64 (one for the value, one in the backward pass), both on W S, as their published code does.
"""

import argparse
import json
import platform
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from on_device import add_device_, device_name, print_tables, timed
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.kinds import view_of
from lightning_prehab.progress import counted, shown
from lightning_prehab.regularizers import Metric, Penalty

RESULTS = Path(__file__).with_suffix(".json")
ON_CUDA = Path(__file__).with_suffix(".cuda.json")
CALLS, BATCH, KEEP = 20, 32, 0.2
SIZES = {"ViT-S": (384, 1536, 197), "ViT-B": (768, 3072, 197), "BERT-base": (768, 3072, 128)}  # width, MLP, tokens
REGULARIZERS = {
    "TailShrinkage (default in the loss space)": lp.TailShrinkage(),
    "StableRank": lp.StableRank(),
    "TailEnergy": lp.TailEnergy(),
    "NuclearNorm": lp.NuclearNorm(),
    "EffectiveRank": lp.EffectiveRank(),
    "SpectralWeightDecay": lp.SpectralWeightDecay(),
}
SPACES = ("weight", "activation", "loss")


class Block(nn.Module):
    """Attention and MLP as in BERT (four square matrices) or ViT (queries, keys and values in one)."""

    def __init__(self, width: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        sizes = [(width, 3 * width)] if fused else [(width, width)] * 3
        self.inputs = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm1(x)
        q, k, v = torch.cat([layer(seen) for layer in self.inputs], -1).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        x = x + self.output(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def root(size: int, device: torch.device) -> Tensor:
    """A symmetric positive definite matrix with a decaying spectrum, scaled as that of a Gram matrix."""
    q = torch.linalg.qr(torch.randn(size, size)).Q
    return ((q * torch.logspace(0, -2, size)) @ q.T).to(device)


def calls(regularizer: object, layers: list[RegularizedLayer]) -> Callable[[], None]:
    """All layers once."""

    def penalized() -> None:
        total = torch.stack([layer.penalty(regularizer) for layer in layers]).mean()
        torch.autograd.grad(total, [layer.parameter for layer in layers])

    def shrunk() -> None:
        for layer in layers:
            layer.shrink_(regularizer, 0.5, 1e-5)

    return penalized if isinstance(regularizer, Penalty) else shrunk


def authors_stable_rank(layers: list[RegularizedLayer]) -> None:
    total = torch.zeros((), dtype=torch.float64, device=layers[0].parameter.device)
    for layer in layers:
        seen = (layer.parameter @ layer.metric.right).double()
        vector = torch.randn(seen.shape[1], dtype=torch.float64, device=seen.device)
        with torch.no_grad():
            for _ in range(50):
                u = seen @ vector
                vector = seen.T @ (u / u.norm())
                vector = vector / vector.norm()
        total = total + seen.square().sum() / (seen @ vector).square().sum()
    torch.autograd.grad(total / len(layers), [layer.parameter for layer in layers])


def authors_nuclear_norm(layers: list[RegularizedLayer]) -> None:
    for layer in layers:
        seen = (layer.parameter.detach() @ layer.metric.right).double()
        for _ in range(2):
            values, vectors = torch.linalg.eigh(seen.T @ seen)
        inverse = (vectors / values.clamp_min(1e-12).sqrt()) @ vectors.T
        _ = (seen @ inverse) @ layer.metric.right.double().T


AUTHORS = {
    "the authors' way, stable rank | activation": authors_stable_rank,
    "the authors' way, nuclear norm | activation": authors_nuclear_norm,
}
NAMES = [*(f"{name} | {space}" for space in SPACES for name in REGULARIZERS), *AUTHORS]


def layers_of(block: Block, space: str) -> list[RegularizedLayer]:
    found = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            (m, n), device = module.weight.shape, module.weight.device
            left = root(m, device) if space == "loss" else None
            metric = Metric(left, root(n, device) if space in ("activation", "loss") else None)
            found.append(RegularizedLayer(name, view_of(module), int(KEEP * m * n / (m + n)), metric))
    return found


def measure(size: str, repeats: int, wanted: Callable[[str], bool], device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    width, hidden, tokens = SIZES[size]
    block = Block(width, hidden, fused=size.startswith("ViT")).to(device)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-5)
    x = torch.randn(BATCH, tokens, width, device=device)

    def step() -> None:
        block(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    works: dict[str, tuple[int, Callable[[], object]]] = {}
    for space in SPACES:
        for name, regularizer in REGULARIZERS.items():
            if not wanted(f"{name} | {space}"):
                continue
            work = calls(regularizer, layers_of(block, space))
            work()
            works[f"{name} | {space}"] = CALLS, work
    layers = layers_of(block, "activation")
    for name, authors in AUTHORS.items():
        if wanted(name):
            works[name] = 1, lambda authors=authors: authors(layers)
    if not works:
        return {}
    step()
    ratios: dict[str, list[float]] = {name: [] for name in works}
    steps = []
    for _ in counted(range(repeats), "run"):
        for name, (count, work) in works.items():
            if len(steps) < 2 or name.startswith(("TailShrinkage", "the authors")):
                steps.append(timed(step, device))
            spent = timed(work, device, count)
            ratios[name].append(spent / statistics.median(steps[-5:]))
    return {name: round(statistics.median(values), 5) for name, values in ratios.items()}


def print_table(path: Path) -> None:
    stored = json.loads(path.read_text()) if path.exists() else {"ratios": {}}
    if "device" in stored:
        print(f"{stored['device']}, torch {stored['torch']}\n")
    results: dict[str, dict[str, float]] = {size: stored["ratios"].get(size, {}) for size in SIZES}
    print("| cost of a step in % | space | " + " | ".join(SIZES) + " |")
    print("|---|---|" + "---|" * len(SIZES))
    for key in NAMES:
        cells = [results[size].get(key) for size in SIZES]
        name, space = key.split(" | ")
        if any(cell is not None for cell in cells):
            print(f"| {name} | {space} | " + " | ".join("" if c is None else f"{100 * c:.1f}" for c in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored table only")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows to measure, as 'name | space'")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_device_(parser)
    args = parser.parse_args()
    results = ON_CUDA if args.device.type == "cuda" else RESULTS
    stored = json.loads(results.read_text()) if results.exists() else {"ratios": {}}
    if not args.table:
        torch.set_num_threads(args.threads)
        about = {"torch": torch.__version__, "machine": platform.machine(), "batch": BATCH}
        about |= {"device": device_name(args.device)} if args.device.type == "cuda" else {}
        for size in SIZES:
            done = stored["ratios"].setdefault(size, {})

            def wanted(key: str, done: dict[str, float] = done) -> bool:
                return key not in done and re.search(args.only, key) is not None

            with shown():
                done.update(measure(size, args.repeats, wanted, args.device))
            results.write_text(json.dumps({**about, **stored}, indent=1) + "\n")
    print_tables(print_table, RESULTS, ON_CUDA)


if __name__ == "__main__":
    main()
