"""Measures how long dense and low-rank layers take on the device that they are on."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.layers.linear import LowRankLinear
from lightning_prehab.layers.pivot import PivotLinear
from lightning_prehab.linalg.pivot import as_factor
from lightning_prehab.linalg.storage import Layout, largest_saving_rank
from lightning_prehab.progress import counted
from lightning_prehab.targets.locate import Target

#: Ranks that are measured of each shape, spread evenly.
GRID = 6
#: Measurements of each option, taken in turn with the others; the median counts.
REPEATS = 9
#: Seconds that one measurement should last at least; short layers are called several times.
LEAST_SECONDS = 5e-4


def measure_latencies(
    targets: Mapping[str, Target],
    tokens: int,
    ranks: Mapping[str, Sequence[int]] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, dict[int | None, float]]:
    """Seconds of a forward pass of each target, dense and at some ranks, for rank policies that count time.

    Each distinct shape is measured once: dense and low-rank layers of its device and dtype in turn, in eval, without
    autograd, after a warm-up. Numbers are those of this machine under its load of the moment.

    Args:
        targets: ``{name: layer}``; weights are read, hooks are not called.
        tokens: Rows of the input, at least 1.
        ranks: ``{name: ranks that may be chosen}``, out of which about six are measured, the smallest and the largest
            among them; by default all that save parameters.
        layouts: ``{name: how a cut of it is stored}``; by default as two factors.

    Returns:
        ``{name: {rank: seconds}}``, with None for dense.

    Raises:
        ArgumentError: If ``tokens`` is not a positive integer, or a rank is not one of the layer's.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ArgumentError(f"tokens must be at least 1, got {tokens!r}.")
    measured: dict[object, dict[int | None, float]] = {}
    latencies = {}
    for name, layer in counted(targets.items(), "time"):
        view = view_of(layer)
        m, n = view.shape
        layout: Layout = "factors" if layouts is None else layouts[name]
        grid = spread(range(1, largest_saving_rank(m, n, layout) + 1) if ranks is None else ranks[name])
        key = (m, n, view.bias is None, view.parameter.device, view.parameter.dtype, grid, layout)
        if key not in measured:
            measured[key] = _measure(view, tokens, grid, layout)
        latencies[name] = dict(measured[key])
    return latencies


def spread(ranks: Iterable[int]) -> tuple[int, ...]:
    """At most ``GRID`` of the ranks, evenly spread, ascending, with the first and the last.

    >>> spread(range(1, 384))
    (1, 77, 154, 230, 307, 383)
    """
    found = sorted(set(ranks))
    last = len(found) - 1
    return tuple(found[i] for i in sorted({round(step * last / (GRID - 1)) for step in range(GRID)})) if found else ()


@torch.no_grad()
def _measure(view: MatrixView, tokens: int, grid: Sequence[int], layout: Layout) -> dict[int | None, float]:
    generator = torch.Generator().manual_seed(0)
    weight, bias = view.weight.contiguous(), view.bias

    def normal(*shape: int) -> Tensor:  # real numbers, neither zero nor denormal: they can be faster or slower
        return torch.randn(shape, generator=generator, device="cpu").to(weight)

    x = normal(tokens, view.in_features)
    dense = nn.Linear(view.in_features, view.out_features, bias=False, device="meta", dtype=weight.dtype)
    dense.weight = nn.Parameter(weight)
    dense.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    calls: dict[int | None, Callable[[], Tensor]] = {None: partial(nn.functional.linear, x, weight, bias)}
    for rank in grid:
        a, b = normal(rank, view.in_features), normal(view.out_features, rank)
        if layout == "pivot":  # any order will do: nobody looks at the numbers
            order = torch.randperm(view.out_features, generator=generator, device="cpu").to(weight.device)
            calls[rank] = partial(PivotLinear.from_factors(a, as_factor(b[rank:], order), dense, order), x)
        else:
            calls[rank] = partial(LowRankLinear.from_factors(a, b, like=dense), x)
    return time_calls(calls, weight.device)


def time_calls(calls: Mapping[int | None, Callable[[], object]], device: torch.device) -> dict[int | None, float]:
    """Median seconds of each call; the calls take turns, so that a change of load meets all of them alike."""
    repeats = {key: _calls_per_measurement(call, device) for key, call in calls.items()}
    seconds: dict[int | None, list[float]] = {key: [] for key in calls}
    for _ in range(REPEATS):
        for key, call in calls.items():
            seconds[key].append(_seconds(call, repeats[key], device))
    return {key: statistics.median(found) for key, found in seconds.items()}


def _calls_per_measurement(call: Callable[[], object], device: torch.device) -> int:
    """Warms up, and finds how many calls make one measurement long enough."""
    _seconds(call, 2, device)
    return max(1, min(round(LEAST_SECONDS / max(_seconds(call, 2, device), 1e-9)), 100))


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one call, the mean of ``repeats`` in a row."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
