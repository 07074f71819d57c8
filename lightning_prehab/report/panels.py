"""Small pictures side by side: one for each layer, or for each group of layers where there are many."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_prehab.documents.folding import visible
from lightning_prehab.documents.name_groups import common_prefix, group_names
from lightning_prehab.documents.numbers import format_range
from lightning_prehab.plan.layer_groups import FEW
from lightning_prehab.report.drawing import AFTER, BEFORE, new_figure
from lightning_prehab.report.thinned_spectrum import LayerSpectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Pictures side by side, and the longest name above one.
_COLUMNS, _LONGEST = 4, 34
#: Width and height of the place of one of them, whose picture is 1 by 1.
_CELL = (1.12, 1.6)
#: Singular values below this share of the largest one are drawn at it.
_LOWEST = 1e-4

_Point = tuple[float, float]


def spectra_figure(spectra: Mapping[str, LayerSpectrum], ranks: Mapping[str, int | None]) -> "Figure":
    """Singular values before, and what the cut keeps of them.

    In the metric of the cut. Each layer is seen against its own largest value and its own full rank, so that decays can
    be compared. Of many layers those of a group share a picture.

    Args:
        spectra: Of the layers, in model order.
        ranks: The rank of each layer, or None where it stays dense.

    Raises:
        PrehabError: If matplotlib is missing.
    """
    groups = _groups({name: spectrum.indices[-1] for name, spectrum in spectra.items()})
    figure, axes, corners = _grid([(name, _cut_of(names, spectra, ranks)) for name, names in groups])
    from matplotlib.collections import PolyCollection

    before, after, areas = [], [], []
    for (x, y), (_, names) in zip(corners, groups, strict=True):
        for name in names:
            whole, kept = _curves(spectra[name], ranks.get(name))
            before.append([(x + u, y + v) for u, v in whole])
            after.append([(x + u, y + v) for u, v in kept])
            areas.append([(after[-1][0][0], y), *after[-1], (after[-1][-1][0], y)])
    alone = len(groups) == len(spectra)
    strength = 1.0 if alone else 0.5
    _add_lines(axes, before, color=BEFORE, linewidth=2.5 if alone else 1.2, alpha=strength, label="before the cut")
    axes.add_collection(PolyCollection(areas, color=AFTER, alpha=0.15 if alone else 0.02, linewidth=0), autolim=False)
    label = "after it: as before up to the rank, zero beyond"
    _add_lines(axes, after, color=AFTER, linewidth=1.2 if alone else 0.7, alpha=strength, label=label)
    powers = [(_LOWEST, f"{_LOWEST:g}"), (_LOWEST**0.5, f"{_LOWEST**0.5:g}"), (1.0, "1")]
    _add_ticks(axes, corners, [(_height(share), text) for share, text in powers], across=True)
    axes.set_xlabel("place of the singular value / full rank", fontsize=8)
    axes.set_ylabel("singular value / largest one", fontsize=8)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def share_figure(
    shares: Mapping[str, float], kinds: Mapping[str, Any], tell: Callable[[Sequence[str]], str], label: str, axis: str
) -> "Figure":
    """A picture for each group of layers, in it a bar for each layer.

    Args:
        shares: ``{name: height of its bar, in [0, 1]}``, in model order.
        kinds: ``{name: kind}``: layers of one group are of one kind.
        tell: What stands above the picture of these layers.
        label: What a bar is.
        axis: What its height is.

    Raises:
        PrehabError: If matplotlib is missing.
    """
    groups = group_names(kinds)
    figure, axes, corners = _grid([(name, tell(names)) for name, names in groups])
    from matplotlib.collections import PolyCollection

    bars = []
    for (x, y), (_, names) in zip(corners, groups, strict=True):
        width = 1.0 / max(len(names), 8)
        for place, name in enumerate(names):
            left, right, top = x + place * width, x + (place + 0.8) * width, y + min(shares[name], 1.0)
            bars.append([(left, y), (left, top), (right, top), (right, y)])
    axes.add_collection(PolyCollection(bars, color=AFTER, linewidth=0, label=label), autolim=False)
    _add_ticks(axes, corners, [(0.0, "0"), (0.5, "0.5"), (1.0, "1")], across=False)
    axes.set_xlabel("layers of a group, in model order", fontsize=8)
    axes.set_ylabel(axis, fontsize=8)
    figure.legend(loc="outside upper right", frameon=False, fontsize=8)
    return figure


def _groups(kinds: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Each layer alone where there are few of them."""
    return [(name, [name]) for name in kinds] if len(kinds) <= FEW else group_names(kinds)


def _cut_of(names: Sequence[str], spectra: Mapping[str, LayerSpectrum], ranks: Mapping[str, int | None]) -> str:
    found = sorted(rank for name in names if (rank := ranks.get(name)) is not None)
    cut = f"rank {format_range(str(found[0]), str(found[-1]))}" if found else "dense"
    return f"{cut} of {spectra[names[0]].indices[-1]}"


def _grid(texts: Sequence[tuple[str, str]]) -> tuple["Figure", Any, list[_Point]]:
    """A figure with a frame for each picture, the name and a line of text above it; the lower left corners."""
    columns = min(_COLUMNS, len(texts))
    rows = -(-len(texts) // columns)
    figure = new_figure(1.45 * rows + 0.9)
    axes = figure.subplots()  # a single one for all pictures: as many axes would take a minute to draw
    corners = [(index % columns * _CELL[0], (rows - 1 - index // columns) * _CELL[1]) for index in range(len(texts))]
    _add_lines(axes, [[(x, y + 1), (x, y), (x + 1, y)] for x, y in corners], color="black", linewidth=0.6)
    prefix = common_prefix([name for name, _ in texts]) if len(texts) > 1 else ""
    for (x, y), (name, text) in zip(corners, texts, strict=True):
        shown = _short(visible(name.removeprefix(prefix) if len(name) > _LONGEST else name))
        axes.text(x, y + 1.06, f"{shown}\n{text}", fontsize=6.5, parse_math=False)
    axes.set(xlim=(-0.02, columns * _CELL[0]), ylim=(-0.02, rows * _CELL[1]))
    axes.spines[:].set_visible(False)
    return figure, axes, corners


def _add_ticks(axes: Any, corners: Sequence[_Point], heights: Sequence[tuple[float, str]], across: bool) -> None:
    """Ticks at heights of each row of pictures, and at shares of the width of each column if asked."""
    lefts, feet = ({corner[side] for corner in corners} for side in (0, 1))
    xticks = [(left + share, f"{share:g}") for left in lefts for share in (0.0, 0.5, 1.0)] if across else []
    axes.set_xticks([place for place, _ in xticks], [text for _, text in xticks], fontsize=6)
    yticks = [(foot + height, text) for foot in feet for height, text in heights]
    axes.set_yticks(*zip(*yticks, strict=True), fontsize=6)


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


def _short(name: str) -> str:
    """The end of a name that is too long, from a dot on if there is one: there it differs from the others.

    >>> _short("bert.encoder.layer.10.attention.self.query"), _short("fc1")
    ('…layer.10.attention.self.query', 'fc1')
    """
    if len(name) <= _LONGEST:
        return name
    end = name[1 - _LONGEST :]
    return f"…{end[end.find('.') + 1 :]}"
