"""How long does it take to factorize every layer of a model, against the loops that others use?

    python benchmarks/factorization_speed.py            # measures, writes factorization_speed.json, prints the table
    python benchmarks/factorization_speed.py --device cuda    # on a GPU, into factorization_speed.cuda.json
    python benchmarks/factorization_speed.py --table    # prints the tables only

Rivals, layer by layer: ``torch.linalg.svd`` of the weight whitened by a Cholesky factor, multiplied back by the
explicit inverse, as SVD-LLM does (https://arxiv.org/abs/2403.07378), in float32 and float64; and the same with a factor
on both sides, the metric of KroneckerSVD. Ours: ``WhitenedSVD().decompose`` and ``KroneckerSVD().decompose`` and the
factors at keep 0.4, for all layers at once. The sides alternate; ratios are of medians.
The truncation losses are measured in
float64. Weights are random, metrics have power-law spectra in a random basis. Peak memory is that of
the process, measured on Linux only; on a GPU that of its allocator.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from on_device import add_device_, device_name, print_tables, timed
from torch import Tensor

import lightning_prehab as lp
from lightning_prehab.progress import counted, naming_items, shown
from lightning_prehab.statistics.sums import Wanted, statistics_bytes

RESULTS = Path(__file__).with_suffix(".json")
ON_CUDA = Path(__file__).with_suffix(".cuda.json")
KEEP = 0.4
BLOCKS = {
    "ViT-B": ([(2304, 768), (768, 768), (3072, 768), (768, 3072)], 12),
    "BERT-base": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 12),
    "LLaMA-1B": ([(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)], 1),
}


def metric(size: int, decay: float, generator: torch.Generator) -> Tensor:
    """A second moment with eigenvalues ``i^-decay`` in a random basis (three reflections), float32."""
    moment = torch.diag(torch.arange(1, size + 1, dtype=torch.float64) ** -decay)
    for _ in range(3):
        v = torch.randn(size, generator=generator, dtype=torch.float64)
        v /= v.norm()
        moment -= 2.0 * torch.outer(v, v @ moment)
        moment -= 2.0 * torch.outer(moment @ v, v)
    return ((moment + moment.mT) / 2).float()


def layers(shapes: list[tuple[int, int]], blocks: int, device: torch.device) -> list[tuple[Tensor, lp.LayerStatistics]]:
    generator = torch.Generator().manual_seed(0)
    cache = {size: metric(size, 1.0, generator).to(device) for size in {n for _, n in shapes}}
    cache |= {-size: metric(size, 1.0, generator).to(device) for size in {m for m, _ in shapes}}
    found = []
    for m, n in shapes * blocks:
        layer = lp.LayerStatistics(1, 1, gradients=True, device=device)
        layer.in_features, layer.out_features = n, m
        layer.input_gram, layer.gradient_gram = cache[n], cache[-m]
        layer.tokens += 1
        layer.samples += 1
        found.append(((torch.randn(m, n, generator=generator) * 0.02).to(device), layer))
    return found


def rank_of(weight: Tensor) -> int:
    m, n = weight.shape
    return int(KEEP * m * n / (m + n))


def svd_loop(
    items: list[tuple[Tensor, lp.LayerStatistics]], dtype: torch.dtype, both: bool
) -> list[tuple[Tensor, Tensor]]:
    factors = []
    for weight, layer in items:
        right = torch.linalg.cholesky(layer.input_second_moment().to(dtype))
        matrix, rank = weight.to(dtype) @ right, rank_of(weight)
        if both:
            gradient = layer.gradient_second_moment().to(dtype)
            gradient.diagonal().add_(1e-4 * gradient.diagonal().mean())
            left = torch.linalg.cholesky(gradient)
            matrix = left.mT @ matrix
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        b, a = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vt[:rank] @ torch.linalg.inv(right)
        factors.append((a, torch.linalg.inv(left).mT @ b if both else b))
    return factors


def ours(items: list[tuple[Tensor, lp.LayerStatistics]], method: object) -> list[tuple[Tensor, Tensor]]:
    decomposed = method.decompose(items)
    return [tuple(d.factors(rank_of(w))[:2]) for d, (w, _) in zip(decomposed, items, strict=True)]


def losses(
    items: list[tuple[Tensor, lp.LayerStatistics]], factors: list[tuple[Tensor, Tensor]], both: bool
) -> list[float]:
    found = []
    for (weight, layer), (a, b) in zip(items, factors, strict=True):
        error = weight.double() - b.double() @ a.double()
        left = error
        if both:
            left = lp.KroneckerSVD().metric(layer)[0].double() @ error
        found.append(float((left * (error @ layer.input_second_moment().double())).sum()))
    return found


def peak_extra(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that were taken at the highest while ``run`` ran; None where Linux's counters are not there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held

    def read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = read("VmRSS")
    except OSError:
        return None
    run()
    return read("VmHWM") - before


def measure(name: str, repeats: int, device: torch.device) -> dict[str, object]:
    shapes, blocks = BLOCKS[name]
    items = layers(shapes, blocks, device)
    whitened, kronecker = lp.WhitenedSVD(), lp.KroneckerSVD()
    sides: dict[str, Callable[[], list[tuple[Tensor, Tensor]]]] = {
        "WhitenedSVD": lambda: ours(items, whitened),
        "svd float32": lambda: svd_loop(items, torch.float32, False),
        "svd float64": lambda: svd_loop(items, torch.float64, False),
        "KroneckerSVD": lambda: ours(items, kronecker),
        "two-sided svd float32": lambda: svd_loop(items, torch.float32, True),
    }
    peak = peak_extra(sides["WhitenedSVD"], device)
    peak_kronecker = peak_extra(sides["KroneckerSVD"], device)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for _ in range(repeats):
        for side, run in sides.items():
            seconds[side].append(timed(lambda side=side, run=run: results.update({side: run()}), device))
    median = {side: statistics.median(times) for side, times in seconds.items()}
    exact, fast = (losses(items, results[side], False) for side in ("svd float64", "WhitenedSVD"))
    both, fast_both = (losses(items, results[side], True) for side in ("two-sided svd float32", "KroneckerSVD"))
    return {
        "command": " ".join(["python benchmarks/factorization_speed.py", *sys.argv[1:]])
        if device.type == "cuda"
        else (f"python benchmarks/factorization_speed.py --models {name} --repeats {repeats}"),
        "layers": len(items),
        "seconds": {side: [round(t, 3) for t in times] for side, times in seconds.items()},
        "faster than svd float32": median["svd float32"] / median["WhitenedSVD"],
        "faster than svd float64": median["svd float64"] / median["WhitenedSVD"],
        "two-sided, faster than svd float32": median["two-sided svd float32"] / median["KroneckerSVD"],
        "largest relative loss difference": max(abs(f / e - 1) for e, f in zip(exact, fast, strict=True)),
        "two-sided, largest relative loss excess": max(f / e - 1 for e, f in zip(both, fast_both, strict=True)),
        "statistics, estimated MB": statistics_bytes(shapes * blocks, Wanted(inputs=True)) / 1e6,
        "peak extra MB": None if peak is None else peak / 1e6,
        "Kronecker statistics, estimated MB": statistics_bytes(shapes * blocks, Wanted(True, True)) / 1e6,
        "Kronecker peak extra MB": None if peak_kronecker is None else peak_kronecker / 1e6,
        "largest layer's work MB": max(4 * (2 * m * n + 3 * min(m, n) ** 2) for m, n in shapes) / 1e6,
    }


def print_table(path: Path) -> None:
    results: dict[str, dict[str, object]] = json.loads(path.read_text())
    if path == ON_CUDA:
        print("; ".join(dict.fromkeys(str(row["machine"]) for row in results.values())) + "\n")
    columns = [key for key in next(iter(results.values())) if key not in ("command", "seconds", "machine")]
    lines = ["| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for column in columns:
        cells = [value if isinstance(value := row[column], int | None) else f"{value:.3g}" for row in results.values()]
        lines.append(f"| {column} | " + " | ".join(map(str, cells)) + " |")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored results only")
    parser.add_argument("--repeats", type=int, default=3)
    add_device_(parser)
    parser.add_argument("--models", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    arguments = parser.parse_args()
    path = ON_CUDA if arguments.device.type == "cuda" else RESULTS
    results = json.loads(path.read_text()) if path.exists() else {}
    models = [] if arguments.table else arguments.models
    with shown(), naming_items("run", models):
        for name in counted(models, "run"):
            results[name] = measure(name, arguments.repeats, arguments.device)
            about = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
            on_gpu = f"{device_name(arguments.device)}, torch {torch.__version__}"
            results[name]["machine"] = on_gpu if arguments.device.type == "cuda" else about
            path.write_text(json.dumps(results, indent=1) + "\n")
    print_tables(print_table, RESULTS, ON_CUDA)


if __name__ == "__main__":
    main()
