"""A report as one HTML page, without scripts and with nothing to load; its long parts are folded."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median_low

from lightning_prehab.documents.folding import visible
from lightning_prehab.documents.numbers import format_count, format_error, format_increase
from lightning_prehab.plan.layer_groups import FEW
from lightning_prehab.plan.layer_plan import LayerPlan
from lightning_prehab.report.facts import Facts
from lightning_prehab.report.heat_map import HeatMap, heat_map
from lightning_prehab.report.latency import NO_DIFFERENCE
from lightning_prehab.report.rows import TITLE, table_of_layers
from lightning_prehab.report.style import STYLE

#: What stands below the pictures.
_CAPTIONS = {
    "ranks": "The rank of each layer after the cut, against its full rank.",
    "errors": "How far each weight is from what it was, relative to its size: 0 is exact, 1 is nothing left.",
    "parameters": "Parameters of each layer before and after the cut.",
    "spectra": "Singular values of each layer in the metric of the cut. What lies beyond the rank was dropped.",
    "latency": "Milliseconds of a forward pass, before and after, measured in turn on this machine.",
    "timeline": "What the run has logged; dashed lines mark the surgery.",
}


def build_page(facts: Facts, figures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        facts: Of the surgery.
        figures: PNG files by the name of the figure; they stand on the page in this order.
    """
    title = facts.origin.model or TITLE
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}: compression</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>',
        f'<body><main><header><p class="kicker">{TITLE}</p><h1>{_name(title)}</h1>',
        f"<p>{_text(facts.origin.summary())}</p></header>" if facts.origin.summary() else "</header>",
        f'<div class="tiles">{"".join(_tiles(facts))}</div>',
        f"<p>{_text(_method(facts))}</p>",
        *_prehab(facts),
        *_map(facts.plan.layers),
        *_layers(facts),
        *_speed(facts),
        *_pictures(figures),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _tiles(facts: Facts) -> Iterable[str]:
    """Size, quality, speed, keep: each a number, and a few words to it."""
    plan, before, after = facts.plan, facts.parameters_before, facts.parameters_after
    sizes = f"{format_count(before)} → {format_count(after)} parameters"
    yield _tile("Size", f"{before / after:.{2 if before < 2 * after else 1}f}", "times smaller", sizes)
    yield _quality(facts)
    if facts.latency is None:
        yield _tile("Speed", "?", "not measured", "bench measures it")
    else:
        batch = facts.latency.largest
        times = batch.dense_seconds / batch.compressed_seconds
        gain = "" if times > 1 + NO_DIFFERENCE else ", no gain" if times >= 1 / (1 + NO_DIFFERENCE) else ": slower"
        seconds = f"{1e3 * batch.dense_seconds:.3g} → {1e3 * batch.compressed_seconds:.3g} ms"
        rows = f"{batch.batch_size} row{'' if batch.batch_size == 1 else 's'}"
        yield _tile("Speed", f"{times:.2f}", f"times as fast{gain}", f"{rows}: {seconds}, {facts.latency.where}")
    cut = sum(layer.rank is not None for layer in plan.layers)
    whole = f"{cut} of {len(plan.layers)} layers cut; {100 * facts.model_keep:.0f} % of the whole model"
    yield _tile("Keep", f"{100 * facts.keep:.0f} %", "of what could be cut", whole)


def _quality(facts: Facts) -> str:
    """What was measured, in the order of what it tells; else what is predicted; else how to measure it."""
    plan, scores, how = facts.plan, facts.scores, "compress with --data measures it"
    found = {} if scores is None else scores.lines()
    if scores is not None and found:
        (name, pair), *others = found.items()
        words = [f"{other} {' → '.join(one)}" for other, one in others] + [f"on {scores.data}"] * bool(scores.data)
        return _tile("Quality", _arrow(*pair), name, "; ".join(words))
    if scores is not None and scores.after.output_error is not None:
        number = f"{100 * scores.after.output_error:.1f} %"
        return _tile("Quality", number, "the outputs differ", f"on {scores.data}" if scores.data else "")
    course = facts.prehab
    for name, values in {} if course is None else course.rows().items():
        if course is not None and name in course.cut.validation and all(values[1:]):
            return _tile("Quality", _arrow(*values[1:]), name, "before the cut → after all training")
    if plan.loss_increase is not None:
        return _tile("Quality", format_increase(plan.loss_increase, plan.worst_error), "loss, as predicted", how)
    return _tile("Quality", "?", "not measured", how)


def _arrow(before: str, after: str) -> str:
    """Both numbers, their unit once.

    >>> _arrow("91.2 %", "90.8 %"), _arrow("25.4", "33.3")
    ('91.2 → 90.8 %', '25.4 → 33.3')
    """
    return f"{before.removesuffix(' %') if after.endswith(' %') else before} → {after}"


def _tile(heading: str, number: str, unit: str, words: str) -> str:
    return (
        f'<div class="tile"><h2>{_text(heading)}</h2><p><b>{_text(number)}</b> {_text(unit)}</p>'
        f"<p>{_text(words)}</p></div>"
    )


def _method(facts: Facts) -> str:
    plan = facts.plan
    text = (
        f"Cut with {plan.factorization}. Targets: {plan.dense_parameters:,} → {plan.parameters:,} parameters; "
        f"whole model: {facts.parameters_before:,} → {facts.parameters_after:,}."
    )
    if plan.loss_increase is not None:
        text += f" Predicted loss increase: {format_increase(plan.loss_increase, plan.worst_error).lstrip('+')}."
    return f"{text} {plan.note[0].upper()}{plan.note[1:]}." if plan.note else text


def _prehab(facts: Facts) -> Iterable[str]:
    if facts.prehab is None:
        return
    moments = {"at its start": facts.prehab.start, "at the cut": facts.prehab.cut, "at the end": facts.prehab.end}
    columns = ["", *(name for name, moment in moments.items() if moment is not None)]
    rows = [dict(zip(columns, [what, *values], strict=False)) for what, values in facts.prehab.rows().items()]
    rows.append(dict(zip(columns, ["step", *(str(one.step) for one in moments.values() if one)], strict=True)))
    yield f"<h2>What prehab took</h2>{_table(columns, rows)}"


def _map(layers: Sequence[LayerPlan]) -> Iterable[str]:
    found = heat_map(layers)
    if found is None:
        return
    head = "".join(f'<th scope="col">{_name(name)}</th>' for name in found.kinds.values())
    body = "\n".join(
        f'<tr><th scope="row">{_name(name)}</th>' + "".join(_cell(found, block, kind) for kind in found.kinds) + "</tr>"
        for block, name in found.blocks.items()
    )
    legend = "".join(
        f'<span class="kept" style="--kept:{share / 100}">{share} %</span>' for share in (10, 30, 50, 70, 90)
    )
    yield (
        "<h2>Where it was cut</h2><p>Each cell is a layer: its rank, on a colour that says how many of its parameters "
        f'were kept.</p><p class="legend">{legend}<span class="kept dense">dense</span></p>'
        f'<div class="box" tabindex="0"><table class="map" style="min-width:{5 * len(found.kinds) + 5}rem" '
        f'aria-label="Ranks by block and kind of layer"><tr><th scope="col">block</th>{head}</tr>\n{body}</table></div>'
    )


def _cell(found: HeatMap, block: str, kind: str) -> str:
    layers = found.cells.get((block, kind), ())
    if not layers:
        return "<td></td>"
    ranks = sorted(layer.rank for layer in layers if layer.rank is not None)
    kept = sum(layer.parameters for layer in layers) / sum(layer.dense_parameters for layer in layers)
    first = layers[0]
    words = [f"{block}.{kind}", f"{first.out_features}x{first.in_features}", f"keeps {100 * kept:.0f} %"]
    if len(layers) > 1:
        words.insert(1, f"{len(layers)} layers, median rank")
    if not ranks:
        return f'<td class="kept dense" title="{_text(", ".join([*words, first.reason or "dense"]))}">dense</td>'
    if len(layers) == 1 and first.relative_error is not None:
        words.append(f"error {format_error(first.relative_error)}")
    return f'<td class="kept" style="--kept:{kept:.2f}" title="{_text(", ".join(words))}">{median_low(ranks)}</td>'


def _layers(facts: Facts) -> Iterable[str]:
    """Groups of layers, with the layers themselves folded; few layers at once."""
    table = table_of_layers(facts)
    yield f"<h2>Layers</h2>{_table(table.columns, table.rows, table.footer)}"
    yield "".join(f"<p>{_text(note)}</p>" for note in table.notes)
    if len(facts.plan.layers) > FEW:
        whole = table_of_layers(facts, every_layer=True)
        count = f"All {len(whole.rows)} layers"
        yield _folded(count, _table(whole.columns, whole.rows, whole.footer))


def _speed(facts: Facts) -> Iterable[str]:
    if facts.latency is not None:
        table = facts.latency.table()
        yield f"<h2>Speed</h2>{_table(table.columns, table.rows)}"
        yield "".join(f"<p>{_text(note)}</p>" for note in table.notes)


def _pictures(figures: Mapping[str, bytes]) -> Iterable[str]:
    if figures:
        yield "<h2>Pictures</h2>"
    for name, png in figures.items():
        data, caption = base64.b64encode(png).decode(), _CAPTIONS[name]
        picture = f'<img alt="{_text(f"{name.capitalize()}: {caption}")}" src="data:image/png;base64,{data}">'
        yield _folded(name.capitalize(), f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>")


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{inside}</details>"


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, str]], footer: Mapping[str, str] | None = None) -> str:
    """In a box of its own, which scrolls where the page is narrow."""
    name, *others = columns
    lines = ["<tr>" + "".join(f'<th scope="col">{_text(column)}</th>' for column in columns) + "</tr>"]
    for row in (*rows, *([footer] if footer else [])):
        cells = "".join(f"<td>{_text(row.get(column, ''))}</td>" for column in others)
        kind = ' class="total"' if row is footer else ""
        lines.append(f'<tr{kind}><th scope="row">{_name(row.get(name, ""))}</th>{cells}</tr>')
    return f'<div class="box" tabindex="0"><table>{"".join(lines)}</table></div>'


def _text(text: str) -> str:
    return escape(visible(text))


def _name(name: str) -> str:
    """A name that may be broken after its dots."""
    return _text(name).replace(".", ".<wbr>")
