"""Figures of a report through matplotlib, without its global state."""

import csv
import io
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lightning_prehab.errors import ArgumentError, PrehabError
from lightning_prehab.plan import CompressionPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("ranks", "errors", "parameters")
_BEFORE, _AFTER = "#c9d1d9", "#1f6feb"


def layer_figure(plan: CompressionPlan, weight_errors: Mapping[str, float], name: str) -> "Figure":
    """One bar for each target, in model order.

    Args:
        plan: What was carried out.
        weight_errors: ``{name: relative error}`` of the layers that were cut.
        name: ``"ranks"``: rank against full rank; ``"errors"``: relative error of the weight; ``"parameters"``: before
            and after.

    Raises:
        ArgumentError: If there is no figure of this name.
        PrehabError: If matplotlib is missing.
    """
    if name not in FIGURES:
        raise ArgumentError(f"There is no figure {name!r}; choose one of {', '.join(FIGURES)}.")
    layers = plan.layers
    figure = _figure(0.24 * len(layers) + 1.2)
    axes = figure.subplots()
    places = range(len(layers))
    if name == "ranks":
        full = [min(layer.out_features, layer.in_features) for layer in layers]
        axes.barh(places, full, color=_BEFORE, label="full rank (dense where nothing is drawn over it)")
        axes.barh(places, [layer.rank or 0 for layer in layers], color=_AFTER, label="rank after the cut")
    elif name == "errors":
        errors = [weight_errors.get(layer.name, 0.0) for layer in layers]
        axes.barh(places, errors, color=_AFTER, label="|W - W'| / |W| (Frobenius)")
    else:
        axes.barh(places, [layer.dense_parameters for layer in layers], color=_BEFORE, label="parameters before")
        axes.barh(places, [layer.parameters for layer in layers], height=0.5, color=_AFTER, label="after")
    axes.set_yticks(places, [layer.name for layer in layers], fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def timeline_figure(path: str | os.PathLike[str]) -> "Figure":
    """Loss, penalty, forecast and learning rate over the steps, out of the ``metrics.csv`` of Lightning's CSVLogger.

    A dashed line marks the first logged step after the surgery: the first one of the epoch in which
    ``compression/keep`` stands, which Lightning writes at the end of that epoch.

    Raises:
        ArgumentError: If the file cannot be read or holds none of these.
        PrehabError: If matplotlib is missing.
    """
    curves = read_metrics(path)
    chosen = {name: curve for name, curve in curves.items() if "loss" in name or name.startswith(("prehab/", "lr"))}
    if not chosen:
        raise ArgumentError(f"{os.fspath(path)} holds no loss, prehab/... or learning rate to draw.")
    epochs = curves.get("epoch", [])
    cut_at = {dict(epochs).get(step) for step, _ in curves.get("compression/keep", [])}
    cuts = [min(step for step, epoch in epochs if epoch == cut) for cut in cut_at if cut is not None]
    figure = _figure(1.5 * len(chosen) + 0.5)
    for axes, (name, curve) in zip(figure.subplots(len(chosen), sharex=True, squeeze=False)[:, 0], chosen.items()):  # noqa: B905
        axes.plot(*zip(*curve, strict=True), color=_AFTER, marker="." if len(curve) < 40 else None)
        axes.set_title(name, fontsize=8, loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        for step in cuts:
            axes.axvline(step, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("step" + ("; dashed: first logged step after the surgery" if cuts else ""))
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


def _figure(height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PrehabError("Figures need matplotlib: pip install 'lightning-prehab[plot]'.") from error
    return Figure(figsize=(8, max(height, 2.0)), layout="constrained")
