"""Layers in rows and columns: their blocks, and their places in a block."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_prehab.documents.name_groups import common_prefix
from lightning_prehab.plan.layer_plan import LayerPlan

#: Blocks in one map, at most, where there is a coarser one.
_ROWS = 48
#: A finer map has at least this share of the filled cells that a coarser one has.
_FILLED = 0.7


@dataclass(frozen=True)
class HeatMap:
    """What was kept of each layer, by block and kind.

    Attributes:
        blocks: ``{beginning of the names: what the row is called}``, in model order.
        kinds: ``{rest of the names: what the column is called}``, in model order.
        cells: ``{(block, kind): layers}``: several where blocks repeat inside of blocks, as experts do.
    """

    blocks: Mapping[str, str]
    kinds: Mapping[str, str]
    cells: Mapping[tuple[str, str], Sequence[LayerPlan]]


def heat_map(layers: Iterable[LayerPlan]) -> HeatMap | None:
    """The layers that stand in numbered blocks, or None if there are not two blocks and two kinds.

    >>> found = heat_map(LayerPlan(f"h.{i}.{fc}", 4, 4, 1) for i in range(2) for fc in ("mlp.up", "mlp.down"))
    >>> dict(found.blocks), dict(found.kinds)
    ({'h.0': '0', 'h.1': '1'}, {'mlp.up': 'up', 'mlp.down': 'down'})
    """
    layers = list(layers)
    depth = max((len(_numbered(layer.name)) for layer in layers), default=0)
    best: tuple[float, dict[tuple[str, str], list[LayerPlan]]] | None = None
    for level in range(depth):
        cells: dict[tuple[str, str], list[LayerPlan]] = {}
        for layer in layers:
            place = _place(layer.name, level)
            if place is not None:
                cells.setdefault(place, []).append(layer)
        rows, columns = (len({place[side] for place in cells}) for side in (0, 1))
        filled = len(cells) / (rows * columns)
        if min(rows, columns) > 1 and (best is None or (rows <= _ROWS and filled >= _FILLED * best[0])):
            best = filled, cells
    if best is None:
        return None
    cells = best[1]
    blocks, kinds = (list(dict.fromkeys(place[side] for place in cells)) for side in (0, 1))
    return HeatMap(_call_blocks(blocks), {kind: _shortest(kind, kinds) for kind in kinds}, cells)


def _numbered(name: str) -> list[int]:
    """Places of the parts that end in a number, but for the last part."""
    return [place for place, part in enumerate(name.split(".")[:-1]) if re.search("[0-9]$", part)]


def _place(name: str, level: int) -> tuple[str, str] | None:
    """Block and kind, if the block ends with the numbered part of this level, or the last one above it."""
    numbered, parts = _numbered(name), name.split(".")
    if not numbered:
        return None
    end = numbered[min(level, len(numbered) - 1)] + 1
    rest = ["*" if part.isdigit() else part for part in parts[end:-1]]
    return ".".join(parts[:end]), ".".join([*rest, parts[-1]])


def _call_blocks(blocks: Sequence[str]) -> dict[str, str]:
    """The number alone, where that tells them apart; else without what all begin with."""
    numbers = {block: block.rpartition(".")[2] for block in blocks}
    if len({block.rpartition(".")[0] for block in blocks}) == 1 and all(map(str.isdigit, numbers.values())):
        return numbers
    prefix = common_prefix(blocks)
    return {block: block.removeprefix(prefix) for block in blocks}


def _shortest(kind: str, kinds: Sequence[str]) -> str:
    """The shortest end of a name that no other has."""
    parts = kind.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1) if not parts[start].isdigit())
    alone = (
        end for end in ends if not any(other.endswith(f".{end}") or other == end for other in kinds if other != kind)
    )
    return next(alone, kind)
