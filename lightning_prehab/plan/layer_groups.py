"""Layers of a plan by groups: alike but for numbers in their names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from lightning_prehab.documents.name_groups import common_prefix, group_names
from lightning_prehab.documents.numbers import format_count, format_error, format_increase, format_range
from lightning_prehab.documents.tables import Table
from lightning_prehab.plan.layer_plan import LayerPlan

#: Rows that are read one by one; where there are more layers, tables have a row for each group.
FEW = 20
#: Names, or patterns of names, that a note lists.
_LISTED = 8
#: Names that may begin otherwise than all others, whose beginning is left out all the same.
_OTHERS = 3


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one shape whose names differ in numbers alone.

    Attributes:
        name: Theirs, with a ``*`` for each number that differs.
        layers: At least one, in model order.
    """

    name: str
    layers: tuple[LayerPlan, ...]

    @property
    def cut(self) -> tuple[LayerPlan, ...]:
        """Those that do not stay dense."""
        return tuple(layer for layer in self.layers if layer.rank is not None)

    def cells(self) -> dict[str, str]:
        """What a table says of the group, by column; predictions are about the layers that are cut."""
        before = sum(layer.dense_parameters for layer in self.layers)
        after = sum(layer.parameters for layer in self.layers)
        count = len(self.layers)
        cells = {
            "layer": self.name,
            "layers": str(count) if len(self.cut) in (0, count) else f"{len(self.cut)}/{count}",
            "shape": self.layers[0].cells()["shape"],
            "rank": "dense",
            "parameters": f"{format_count(before)} -> {format_count(after)}",
        }
        if not self.cut:
            return {**cells, "parameters": format_count(before), "why": self.layers[0].reason or "left dense"}
        ranks = sorted(layer.rank for layer in self.cut if layer.rank is not None)
        errors = [layer.relative_error for layer in self.cut]
        known = [error for error in errors if error is not None]
        losses = [layer.loss_increase for layer in self.cut]
        cells["rank"] = format_range(str(ranks[0]), str(ranks[-1]))
        cells["median"] = str(median_low(ranks)) if ranks[0] != ranks[-1] else ""
        cells["predicted error"] = "?"
        if len(known) == len(errors):
            cells["predicted error"] = format_range(
                *(format_error(error, digits=2) for error in (min(known), max(known)))
            )
        increase = None if None in losses else sum(loss for loss in losses if loss is not None)
        worst = max(known) if len(known) == len(errors) else None
        cells["loss"] = format_increase(increase, worst)
        return cells


def group_layers(layers: Sequence[LayerPlan]) -> list[LayerGroup]:
    """The groups, in the order of their first layers."""
    named = {layer.name: layer for layer in layers}
    kinds = {layer.name: (layer.out_features, layer.in_features, layer.form, layer.groups) for layer in layers}
    return [LayerGroup(name, tuple(named[one] for one in names)) for name, names in group_names(kinds)]


def table_of_groups(
    title: str, summary: Sequence[str], layers: Sequence[LayerPlan], skipped: Mapping[str, str]
) -> Table:
    """A row for each group, their names without what all of them begin with.

    Args:
        title: Of the table.
        summary: What stands above it.
        layers: Of the plan.
        skipped: ``{name: reason}`` of the layers that are no targets.
    """
    groups = group_layers(layers)
    prefix, others = _prefix_and_others(groups, [layer.name for layer in layers], skipped)
    rows = [{**group.cells(), "layer": group.name.removeprefix(prefix)} for group in groups]
    columns = ["layer", "layers", "shape", "rank", "median", "parameters", "predicted error"]
    if not any(row.get("median") for row in rows):
        columns.remove("median")
    if any(layer.loss_increase is not None for layer in layers):
        columns.append("loss")
    notes = notes_of_left(layers, skipped, prefix=prefix)
    if prefix:
        but = f", but not {', '.join(others)}" if others else ""
        notes.append(f'All names begin with "{prefix}"{but}.')
    return Table(title, columns, rows, {}, summary, notes, spare=("median", "shape", "predicted error", "parameters"))


def _prefix_and_others(
    groups: Sequence[LayerGroup], names: Sequence[str], skipped: Iterable[str]
) -> tuple[str, list[str]]:
    """The longest beginning of names that no more than a few are without, and those."""
    every = [*names, *skipped]
    prefix = common_prefix([group.name for group in groups if len(group.layers) > 1] or every)
    while prefix:
        others = [name for name in every if not name.startswith(prefix)]
        if len(others) <= _OTHERS:
            return prefix, others
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    return "", []


def notes_of_left(
    layers: Sequence[LayerPlan], skipped: Mapping[str, str], every_name: bool = False, prefix: str = ""
) -> list[str]:
    """One line for each reason to leave layers as they are, or to cut them otherwise: how many, why, which.

    Args:
        layers: Of the plan; those that stay dense are told of, and those whose rank has a reason.
        skipped: ``{name: reason}`` of the layers that are no targets.
        every_name: List them one by one, all of them.
        prefix: Left out of the names.
    """
    reasons: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if layer.rank is None:
            reasons.setdefault(("dense", layer.reason or "no rank was planned"), []).append(layer.name)
        elif layer.reason is not None:
            how = "cut" if layer.rank != layer.was else "not cut now"
            reasons.setdefault((how, layer.reason), []).append(layer.name)
    for name, reason in skipped.items():
        reasons.setdefault(("left", reason), []).append(name)
    return [f"{len(names)} {how}: {why}: {_list(names, every_name, prefix)}" for (how, why), names in reasons.items()]


def _list(names: Sequence[str], every_name: bool, prefix: str) -> str:
    if every_name or len(names) <= _LISTED:
        return ", ".join(name.removeprefix(prefix) for name in names)
    groups = [
        group.removeprefix(prefix) + (f" ({len(found)})" if len(found) > 1 else "")
        for group, found in group_names(dict.fromkeys(names))
    ]
    more = len(groups) - _LISTED
    return ", ".join(groups[:_LISTED]) + (f" and {more} more" if more > 0 else "")
