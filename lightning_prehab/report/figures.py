"""Figures of a report through matplotlib, without its global state."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_prehab.errors import ArgumentError, PrehabError
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.report.latency import ModelLatency
from lightning_prehab.report.thinned_spectrum import LayerSpectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("ranks", "errors", "parameters", "spectra", "latency")
#: Grey and blue differ in lightness too, for those who do not see colours, and in print.
_BEFORE, _AFTER = "#b6bec8", "#0b5cad"
#: Spectra side by side, and the longest name above one.
_COLUMNS, _LONGEST = 4, 34
#: Width and height of the place of one of them, whose picture is 1 by 1.
_CELL = (1.12, 1.6)
#: Singular values below this share of the largest one are drawn at it.
_LOWEST = 1e-4

_Point = tuple[float, float]


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
    if name not in ("ranks", "errors", "parameters"):
        raise ArgumentError(f"There is no figure {name!r}; choose one of {', '.join(FIGURES)}.")
    layers = plan.layers
    figure = _figure(0.24 * len(layers) + 1.2)
    axes = figure.subplots()
    places = range(len(layers))
    if name == "ranks":
        full = [min(layer.out_features // layer.groups, layer.in_features) for layer in layers]
        axes.barh(places, full, color=_BEFORE, label="full rank (dense where nothing is drawn over it)")
        axes.barh(places, [layer.rank or 0 for layer in layers], color=_AFTER, label="rank after the cut")
        axes.set_xlabel("rank", fontsize=8)
    elif name == "errors":
        errors = [weight_errors.get(layer.name, 0.0) for layer in layers]
        axes.barh(places, errors, color=_AFTER, label="|W - W'| / |W| (Frobenius)")
        axes.set_xlabel("relative error of the weight", fontsize=8)
    else:
        axes.barh(places, [layer.dense_parameters for layer in layers], color=_BEFORE, label="parameters before")
        axes.barh(places, [layer.parameters for layer in layers], height=0.4, color=_AFTER, label="after")
        axes.set_xlabel("parameters of the weight, and of all that replaces it", fontsize=8)
    axes.set_yticks(places, [layer.name for layer in layers], fontsize=7, parse_math=False)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def spectra_figure(spectra: Mapping[str, LayerSpectrum], ranks: Mapping[str, int | None]) -> "Figure":
    """One small picture for each layer: singular values before, and what the cut keeps of them.

    Each layer is seen against its own largest value and its own full rank, so that decays can be compared.

    Args:
        spectra: Of the layers, in model order.
        ranks: The rank of each layer, or None where it stays dense.

    Raises:
        PrehabError: If matplotlib is missing.
    """
    columns = min(_COLUMNS, len(spectra))
    rows = -(-len(spectra) // columns)
    figure = _figure(1.45 * rows + 0.9)
    from matplotlib.collections import PolyCollection

    axes = figure.subplots()  # a single one for all cells: as many axes as layers would take a minute to draw
    before, after, areas, frames = [], [], [], []
    for index, (name, spectrum) in enumerate(spectra.items()):
        x, y = index % columns * _CELL[0], (rows - 1 - index // columns) * _CELL[1]
        rank = ranks.get(name)
        whole, kept = _curves(spectrum, rank)
        frames.append([(x, y + 1), (x, y), (x + 1, y)])
        before.append([(x + u, y + v) for u, v in whole])
        after.append([(x + u, y + v) for u, v in kept])
        areas.append([(after[-1][0][0], y), *after[-1], (after[-1][-1][0], y)])
        cut = f"{'dense' if rank is None else f'rank {rank}'} of {spectrum.indices[-1]}"
        axes.text(x, y + 1.06, f"{_short(name)}\n{cut}", fontsize=6.5, parse_math=False)
    _add_lines(axes, frames, color="black", linewidth=0.6)
    _add_lines(axes, before, color=_BEFORE, linewidth=2.5, label="before the cut")
    axes.add_collection(PolyCollection(areas, color=_AFTER, alpha=0.15, linewidth=0), autolim=False)
    _add_lines(axes, after, color=_AFTER, linewidth=1.2, label="after it: as before up to the rank, zero beyond")
    axes.set(xlim=(-0.02, columns * _CELL[0]), ylim=(-0.02, rows * _CELL[1]))
    xticks = [(column * _CELL[0] + share, f"{share:g}") for column in range(columns) for share in (0.0, 0.5, 1.0)]
    powers = [(_LOWEST, f"{_LOWEST:g}"), (_LOWEST**0.5, f"{_LOWEST**0.5:g}"), (1.0, "1")]
    yticks = [(row * _CELL[1] + _height(share), text) for row in range(rows) for share, text in powers]
    axes.set_xticks(*zip(*xticks, strict=True), fontsize=6)
    axes.set_yticks(*zip(*yticks, strict=True), fontsize=6)
    axes.set_xlabel("place of the singular value / full rank", fontsize=8)
    axes.set_ylabel("singular value in the metric of the cut / largest one", fontsize=8)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _curves(spectrum: LayerSpectrum, rank: int | None) -> tuple[list[_Point], list[_Point]]:
    """All points of a spectrum, and those that a cut keeps with the fall to zero after them; from (0, 0) to (1, 1)."""
    full, top = spectrum.indices[-1], spectrum.values[0] or 1.0
    whole = [(i / full, _height(value / top)) for i, value in zip(spectrum.indices, spectrum.values, strict=True)]
    if rank is None:
        return whole, whole
    kept = whole[: sum(index <= rank for index in spectrum.indices)]
    return whole, [*kept, (kept[-1][0], 0.0)]


def _height(share: float) -> float:
    return 1.0 - math.log10(max(share, _LOWEST)) / math.log10(_LOWEST)


def _add_lines(axes: Any, lines: Sequence[Sequence[_Point]], **style: Any) -> None:
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(lines, **style), autolim=False)


def latency_figure(latency: ModelLatency) -> "Figure":
    """Milliseconds of a forward pass: of the model for each batch, and of the replaced layers for the largest batch.

    Raises:
        PrehabError: If matplotlib is missing.
    """
    layers = latency.largest.layers
    figure = _figure(0.35 * len(latency.batches) + 0.24 * len(layers) + 2.0)
    heights = [0.35 * len(latency.batches) + 0.3, 0.24 * len(layers) + 0.3]
    grid = figure.subplots(2 if layers else 1, squeeze=False, height_ratios=heights if layers else None)[:, 0]
    rows = {f"{one.batch_size} rows": (one.dense_seconds, one.compressed_seconds) for one in latency.batches}
    _draw_pairs(grid[0], rows, f"whole model, {latency.where}")
    if layers:
        _draw_pairs(grid[1], layers, f"each replaced layer alone, {latency.largest.batch_size} rows")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _draw_pairs(axes: Any, pairs: Mapping[str, tuple[float, float]], title: str) -> None:
    places = range(len(pairs))
    before, after = ([1e3 * pair[side] for pair in pairs.values()] for side in (0, 1))
    axes.barh(places, before, color=_BEFORE, label="before")
    axes.barh(places, after, height=0.4, color=_AFTER, label="after")
    axes.set_yticks(places, pairs, fontsize=7, parse_math=False)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_title(title, fontsize=8, loc="left", parse_math=False)
    axes.set_xlabel("milliseconds, median of turns", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    """The end of a name that is too long, from a dot on if there is one: there it differs from the others.

    >>> _short("bert.encoder.layer.10.attention.self.query"), _short("fc1")
    ('…layer.10.attention.self.query', 'fc1')
    """
    if len(name) <= _LONGEST:
        return name
    end = name[1 - _LONGEST :]
    return f"…{end[end.find('.') + 1 :]}"


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
    figure = _figure(1.5 * len(chosen) + 0.5)
    for axes, (name, curve) in zip(figure.subplots(len(chosen), sharex=True, squeeze=False)[:, 0], chosen.items()):  # noqa: B905
        axes.plot(*zip(*curve, strict=True), color=_AFTER, marker="." if len(curve) < 40 else None)
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


def _figure(height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PrehabError("Figures need matplotlib: pip install 'lightning-prehab[plot]'.") from error
    return Figure(figsize=(8, max(height, 2.0)), layout="constrained")
