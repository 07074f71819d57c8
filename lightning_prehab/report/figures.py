"""Figures of a report through matplotlib, without its global state."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_prehab.documents.folding import visible
from lightning_prehab.documents.name_groups import group_names
from lightning_prehab.documents.numbers import ROUNDING, format_count, format_error, format_range
from lightning_prehab.errors import ArgumentError
from lightning_prehab.plan.compression_plan import CompressionPlan, LayerPlan
from lightning_prehab.plan.layer_groups import FEW
from lightning_prehab.report.drawing import AFTER, BEFORE, new_figure
from lightning_prehab.report.latency import ModelLatency
from lightning_prehab.report.panels import share_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("ranks", "errors", "parameters", "spectra", "latency")


def layer_figure(plan: CompressionPlan, weight_errors: Mapping[str, float], name: str) -> "Figure":
    """One bar for each target, in model order; many of them in a picture for each group.

    Args:
        plan: What was carried out.
        weight_errors: ``{name: relative error}`` of the layers that were cut.
        name: ``"ranks"``: rank against full rank; ``"errors"``: relative error of the weight; ``"parameters"``: before
            and after.

    Raises:
        ArgumentError: If there is no figure of this name.
        PrehabError: If matplotlib is missing.
    """
    if name not in ("ranks", "errors", "parameters"):
        raise ArgumentError(f"There is no figure {name!r}; choose one of {', '.join(FIGURES)}.")
    layers = plan.layers
    if len(layers) > FEW:
        return _by_group(plan, weight_errors, name)
    figure = new_figure(0.24 * len(layers) + 1.2)
    axes = figure.subplots()
    places = range(len(layers))
    if name == "ranks":
        full = list(map(_full_rank, layers))
        axes.barh(places, full, color=BEFORE, label="full rank (dense where nothing is drawn over it)")
        axes.barh(places, [layer.rank or 0 for layer in layers], color=AFTER, label="rank after the cut")
        axes.set_xlabel("rank", fontsize=8)
    elif name == "errors":
        errors = [_beyond_rounding(weight_errors.get(layer.name, 0.0)) for layer in layers]
        axes.barh(places, errors, color=AFTER, label="|W - W'| / |W| (Frobenius)")
        axes.set_xlim(0.0, None if any(errors) else 1.0)
        axes.set_xlabel("relative error of the weight", fontsize=8)
    else:
        axes.barh(places, [layer.dense_parameters for layer in layers], color=BEFORE, label="parameters before")
        axes.barh(places, [layer.parameters for layer in layers], height=0.4, color=AFTER, label="after")
        axes.set_xlabel("parameters of the weight, and of all that replaces it", fontsize=8)
    axes.set_yticks(places, [visible(layer.name) for layer in layers], fontsize=7, parse_math=False)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _by_group(plan: CompressionPlan, weight_errors: Mapping[str, float], name: str) -> "Figure":
    """Shares of what each layer had, so that groups of all sizes can be compared."""
    layers = {layer.name: layer for layer in plan.layers}
    kinds = {layer.name: (layer.out_features, layer.in_features, layer.form) for layer in plan.layers}

    def ranks(names: Sequence[str]) -> str:
        found = sorted(rank for one in names if (rank := layers[one].rank) is not None)
        whole = _full_rank(layers[names[0]])
        return f"{format_range(str(found[0]), str(found[-1]))} of {whole}" if found else f"dense, {whole}"

    def errors(names: Sequence[str]) -> str:
        found = sorted(weight_errors[one] for one in names if one in weight_errors)
        return format_range(format_error(found[0]), format_error(found[-1])) if found else "dense"

    def parameters(names: Sequence[str]) -> str:
        before, after = (
            sum(getattr(layers[one], side) for one in names) for side in ("dense_parameters", "parameters")
        )
        return f"{format_count(before)} -> {format_count(after)}"

    if name == "ranks":
        shares = {one: 1.0 if layer.rank is None else layer.rank / _full_rank(layer) for one, layer in layers.items()}
        return share_figure(shares, kinds, ranks, "rank after the cut, of a layer", "rank / full rank")
    if name == "errors":
        shares = {one: _beyond_rounding(weight_errors.get(one, 0.0)) for one in layers}
        return share_figure(shares, kinds, errors, "|W - W'| / |W| (Frobenius), of a layer", "relative error")
    shares = {one: layer.parameters / layer.dense_parameters for one, layer in layers.items()}
    return share_figure(shares, kinds, parameters, "parameters after the cut, of a layer", "parameters / before")


def _beyond_rounding(error: float) -> float:
    return error if error > ROUNDING else 0.0


def _full_rank(layer: LayerPlan) -> int:
    return min(layer.out_features // layer.groups, layer.in_features)


def latency_figure(latency: ModelLatency) -> "Figure":
    """Milliseconds of a forward pass: of the model for each batch, and of the replaced layers for the largest batch.

    Raises:
        PrehabError: If matplotlib is missing.
    """
    layers = _few(latency.largest.layers)
    figure = new_figure(0.35 * len(latency.batches) + 0.24 * len(layers) + 2.0)
    heights = [0.35 * len(latency.batches) + 0.3, 0.24 * len(layers) + 0.3]
    grid = figure.subplots(2 if layers else 1, squeeze=False, height_ratios=heights if layers else None)[:, 0]
    rows = {f"{one.batch_size} rows": (one.dense_seconds, one.compressed_seconds) for one in latency.batches}
    _draw_pairs(grid[0], rows, f"whole model, {latency.where}")
    if layers:
        _draw_pairs(grid[1], layers, f"each replaced layer alone, {latency.largest.batch_size} rows")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _few(seconds: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """As they are, or where there are many the sums of groups, with their numbers."""
    if len(seconds) <= FEW:
        return dict(seconds)
    return {
        f"{name} (all {len(names)})": (sum(seconds[one][0] for one in names), sum(seconds[one][1] for one in names))
        for name, names in group_names(dict.fromkeys(seconds))
    }


def _draw_pairs(axes: Any, pairs: Mapping[str, tuple[float, float]], title: str) -> None:
    places = range(len(pairs))
    before, after = ([1e3 * pair[side] for pair in pairs.values()] for side in (0, 1))
    axes.barh(places, before, color=BEFORE, label="before")
    axes.barh(places, after, height=0.4, color=AFTER, label="after")
    axes.set_yticks(places, list(map(visible, pairs)), fontsize=7, parse_math=False)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_title(visible(title), fontsize=8, loc="left", parse_math=False)
    axes.set_xlabel("milliseconds, median of turns", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def timeline_figure(path: str | os.PathLike[str]) -> "Figure":
    """Loss, penalty, forecast and learning rate over the steps, out of the ``metrics.csv`` of Lightning's CSVLogger.

    A dashed line marks the first logged step after the surgery: the first one of the epoch in which
    ``compression/keep`` stands, which Lightning writes at the end of that epoch.

    Raises:
        ArgumentError: If the file cannot be read or holds none of these.
        PrehabError: If matplotlib is missing.
    """
    curves = read_metrics(path)
    kinds = (
        lambda name: "loss" in name,
        lambda name: name.startswith("prehab/"),
        lambda name: name.startswith("lr"),
    )
    chosen = {name: curve for is_one in kinds for name, curve in curves.items() if is_one(name)}
    if not chosen:
        raise ArgumentError(f"{os.fspath(path)} holds no loss, prehab/... or learning rate to draw.")
    epochs = curves.get("epoch", [])
    cut_at = {dict(epochs).get(step) for step, _ in curves.get("compression/keep", [])}
    cuts = [min(step for step, epoch in epochs if epoch == cut) for cut in cut_at if cut is not None]
    figure = new_figure(1.5 * len(chosen) + 0.5)
    for axes, (name, curve) in zip(figure.subplots(len(chosen), sharex=True, squeeze=False)[:, 0], chosen.items()):  # noqa: B905
        axes.plot(*zip(*curve, strict=True), color=AFTER, marker="." if len(curve) < 40 else None)
        axes.set_title(name, fontsize=8, loc="right", parse_math=False)
        axes.tick_params(labelsize=7)
        axes.yaxis.get_offset_text().set_fontsize(7)
        axes.spines[["top", "right"]].set_visible(False)
        for step in cuts:
            axes.axvline(step, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("step" + ("; dashed: first logged step after the surgery" if cuts else ""), fontsize=8)
    return figure


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[tuple[int, float]]]:
    """``{name: [(step, value)]}`` of a ``metrics.csv``; empty and not finite values are left out.

    Raises:
        ArgumentError: If the file cannot be read, has no steps, or a value is not a number.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(row["step"])
                for name, text in row.items():
                    if name != "step" and text and math.isfinite(value := float(text)):
                        curves.setdefault(name, []).append((step, value))
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        text = f"{os.fspath(path)} cannot be read as the metrics.csv of a CSVLogger ({type(error).__name__}: {error})."
        raise ArgumentError(text) from error
    return curves


def to_png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def to_pixels(figure: "Figure") -> Any:
    """The figure as a numpy array of bytes, (height, width, 4)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    canvas.draw()
    width, height = canvas.get_width_height()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).reshape(height, width, 4).numpy()
