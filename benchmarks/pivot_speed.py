"""How fast is a layer in the pivot layout, beside two factors of as many numbers, and dense?

    python benchmarks/pivot_speed.py                         # measures what is missing in pivot_speed.json
    python benchmarks/pivot_speed.py --model SMOLLM2_FOLDER  # the rounding of real layers instead, a minute
    python benchmarks/pivot_speed.py --device cuda           # on a GPU, into pivot_speed.cuda.json
    python benchmarks/pivot_speed.py --table                 # prints the stored results only

Random layers with a bias, one thread, float32. The three of a cell are called in turn, medians; "training" is forward
and backward. At an equal number of numbers the pivot layout has the higher rank, so it is as large as the factors and
closer to the dense matrix. Rounding: the relative error of the product when all parts are rounded to bfloat16.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from on_device import add_device_, device_name, print_tables, timed
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.linalg.storage import Layout, rank_within

RESULTS = Path(__file__).with_suffix(".json")
ON_CUDA = Path(__file__).with_suffix(".cuda.json")
SHAPES = ((576, 576), (1536, 576), (4096, 4096))
KEEPS, TOKENS = (0.8, 0.6, 0.4), (1, 32, 2048)
WAYS = ("eager", "training", "compiled")
#: Of SmolLM2-135M.
LAYERS = ("3.self_attn.q_proj", "10.mlp.down_proj", "20.mlp.up_proj", "29.self_attn.o_proj")


def layers(rows: int, columns: int, keep: float, device: torch.device) -> dict[str, nn.Module]:
    """One of each kind, of random numbers."""
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {"dense": nn.Linear(columns, rows)}
    for layout, kind in (("factors", lp.LowRankLinear), ("pivot", lp.PivotLinear)):
        as_layout: Layout = layout  # type: ignore[assignment]
        made[layout] = kind(columns, rows, rank_within(keep * rows * columns, rows, columns, as_layout))
    torch.randperm(rows, out=made["pivot"].order)
    return {name: layer.to(device) for name, layer in made.items()}


def call(layer: Callable[[Tensor], Tensor], x: Tensor, way: str) -> None:
    if way == "training":
        x = x.requires_grad_()
        layer(x).sum().backward()
    else:
        with torch.no_grad():
            layer(x)


def seconds(made: dict[str, nn.Module], tokens: int, columns: int, way: str) -> dict[str, float]:
    device = made["dense"].weight.device
    x = torch.randn(tokens, columns, device=device)
    run = {name: torch.compile(layer) if way == "compiled" else layer for name, layer in made.items()}
    taken: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(-2, 40):  # the first two warm up
        if turn >= 5 and sum(map(sum, taken.values())) > 3.0:
            break
        for name, layer in run.items():
            second = timed(lambda layer=layer: call(layer, x, way), device)
            if turn >= 0:
                taken[name].append(second)
    return {name: median(times) for name, times in taken.items()}


def rounding(weight: Tensor, keep: float) -> dict[str, float]:
    """Relative error of the product when the parts are rounded to bfloat16, of a matrix that is cut by SVD."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(weight.float())
    errors = {}
    for name, kind in (("factors", lp.LowRankLinear), ("pivot", lp.PivotLinear)):
        as_layout: Layout = name  # type: ignore[assignment]
        layer = kind.from_linear(linear, rank_within(keep * rows * columns, rows, columns, as_layout))
        exact = layer.weight.detach().clone()
        errors["dense"] = float((exact.bfloat16() - exact).norm() / exact.norm())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(parameter.bfloat16())
        errors[name] = float((layer.weight.detach() - exact).norm() / exact.norm())
    return errors


def stored(path: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    return json.loads(path.read_text()) if path.exists() else {"speed": [], "rounding": []}


def store(results: dict[str, list[dict[str, Any]]], path: Path = RESULTS) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def measure_rounding(folder: str) -> None:
    results, weights = stored(), load_file(Path(folder) / "model.safetensors")
    results["rounding"] = [
        {"layer": name, "keep": keep, **rounding(weights[f"model.layers.{name}.weight"].float(), keep)}
        for name in LAYERS
        for keep in KEEPS
    ]
    store(results)


def measure_speed(device: torch.device) -> None:
    path = ON_CUDA if device.type == "cuda" else RESULTS
    where = {"device": device_name(device)} if device.type == "cuda" else {}
    results = stored(path)
    rows = results["speed"]
    done = {(*row["shape"], row["keep"]) for row in rows}
    for m, n in SHAPES:
        for keep in KEEPS:
            if (m, n, keep) in done:
                continue
            row: dict[str, Any] = {"shape": [m, n], "keep": keep, "torch": torch.__version__, **where}
            for way in WAYS:
                for tokens in TOKENS:
                    torch._dynamo.reset()
                    row[f"{way} {tokens}"] = seconds(layers(m, n, keep, device), tokens, n, way)
            rows.append(row)
            store(results, path)
            print(row, flush=True)


def print_table(path: Path) -> None:
    for name in dict.fromkeys(
        f"{row['device']}, torch {row['torch']}" for row in stored(path)["speed"] if "device" in row
    ):
        print(f"{name}\n")
    print("| layer | keep | way | 1 token | 32 tokens | 2,048 tokens |")
    print("|---" * 6 + "|")
    for row in stored(path)["speed"]:
        for way in WAYS:
            times = [row[f"{way} {tokens}"] for tokens in TOKENS]
            cells = [" / ".join(f"{one['dense'] / one[name]:.2f}" for name in ("factors", "pivot")) for one in times]
            print(f"| {'x'.join(map(str, row['shape']))} | {row['keep']} | {way} | {' | '.join(cells)} |")
    if not stored(path)["rounding"]:
        return  # that is no matter of the device
    print("\n| layer | keep | dense | two factors | pivot layout |")
    print("|---" * 5 + "|")
    for row in stored(path)["rounding"]:
        errors = [f"{100 * row[name]:.2f} %" for name in ("dense", "factors", "pivot")]
        print(f"| {row['layer']} | {row['keep']} | {' | '.join(errors)} |")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--model", metavar="FOLDER")
    add_device_(arguments)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    if given.model is not None:
        measure_rounding(given.model)
    elif not given.table:
        measure_speed(given.device)
    print_tables(print_table, RESULTS, ON_CUDA)


if __name__ == "__main__":
    main()
