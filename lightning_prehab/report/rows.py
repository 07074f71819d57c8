"""The table of a report: what stands above it, and a row for each layer or for each group of layers."""

from lightning_prehab.documents.numbers import format_error, format_increase, format_times
from lightning_prehab.documents.tables import Table
from lightning_prehab.plan.layer_groups import FEW, notes_of_left, table_of_groups
from lightning_prehab.report.facts import Facts

TITLE = "Compression report"


def headlines(facts: Facts) -> list[str]:
    """What stands above the table, the most important first; what is not known is left out."""
    plan, before, after = facts.plan, facts.parameters_before, facts.parameters_after
    first = format_times(before, after)
    lines = [
        f"{first}, {facts.scores.summary()}" if facts.scores is not None else first,
        f"whole model {before:,} -> {after:,} parameters (keep {facts.model_keep:.3f})",
        plan.headline(),
        *plan.method_lines(),
    ]
    if facts.refinement is not None:
        lines.append(facts.refinement.summary())
    if facts.latency is not None:
        lines.append(facts.latency.summary())
    if facts.prehab is not None and facts.prehab.summary():
        lines.append(f"prehab: {facts.prehab.summary()}")
    return lines


def table_of_layers(facts: Facts, every_layer: bool = False) -> Table:
    """The table of a report.

    Args:
        facts: Of the surgery.
        every_layer: A row for each target, however many there are, and the names of all layers that are left out.
    """
    plan = facts.plan
    if len(plan.layers) > FEW and not every_layer:
        return table_of_groups(TITLE, headlines(facts), plan.layers, plan.skipped)
    columns = ["layer", "shape", "rank", "parameters", "error (metric)"]
    columns += ["predicted loss increase"] if any(layer.loss_increase is not None for layer in plan.layers) else []
    seconds = {} if facts.latency is None else facts.latency.largest.layers
    columns += ["error (weight)", *(["ms"] if seconds else [])]
    rows = []
    for layer in plan.layers:
        cells = layer.cells()
        cells["parameters"] = f"{cells['before']} -> {cells['after']}"
        cells["error (metric)"] = cells.get("predicted error", "")
        if layer.rank is not None:
            cells["error (weight)"] = format_error(facts.weight_errors[layer.name])
        if layer.name in seconds:
            cells["ms"] = " -> ".join(f"{1e3 * value:.3f}" for value in seconds[layer.name])
        rows.append(cells)
    footer = {
        "layer": "total",
        "parameters": f"{plan.dense_parameters:,} -> {plan.parameters:,}",
        "predicted loss increase": format_increase(plan.loss_increase, plan.worst_error),
    }
    notes = notes_of_left(plan.layers, plan.skipped, every_layer)
    spare = ("ms", "error (weight)", "shape", "error (metric)", "parameters")
    return Table(TITLE, columns, rows, footer, headlines(facts), notes, spare)
