"""One HTML page without scripts or anything to load; its links stay on it."""

import base64
import html
from collections.abc import Mapping

from lightning_prehab.documents.tables import Table

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2328}
div{overflow-x:auto}table{border-collapse:collapse;font-size:13px}th{vertical-align:bottom}
td,th{padding:.25rem .6rem;text-align:right;font-variant-numeric:tabular-nums}td{white-space:nowrap}
td:first-child,th:first-child,td:last-child,th:last-child{text-align:left}
td:last-child{white-space:normal;min-width:12rem}
tr{border-bottom:1px solid #d8dee4}tr:last-child{font-weight:bold}
img{max-width:100%}a{margin-right:1rem;color:#0b5cad}"""


def build_page(facts, metrics):
    return ""


def old(table: Table, sections: Mapping[str, bytes | str]) -> str:
    """The page: title, caption, under each heading a PNG or the reason why there is none, the table."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = [
        "<tr>" + "".join(f"<td>{html.escape(row.get(column, ''))}</td>" for column in table.columns) + "</tr>"
        for row in (*table.rows, table.footer)
    ]
    names = {heading: f"part-{place}" for place, heading in enumerate((*sections, "Layers"))}
    links = "".join(f'<a href="#{name}">{html.escape(heading)}</a>' for heading, name in names.items())
    images = [
        f'<h2 id="{names[heading]}">{html.escape(heading)}</h2>\n{_picture(heading, found)}'
        for heading, found in sections.items()
    ]
    title = html.escape(table.title)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{html.escape(table.caption)}</p>\n<p>{links}</p>",
        *images,
        f'<h2 id="{names["Layers"]}">Layers</h2>\n<div><table><tr>{head}</tr>',
        *rows,
        "</table></div></body></html>\n",
    ]
    return "\n".join(parts)


def _picture(heading: str, found: bytes | str) -> str:
    if isinstance(found, str):
        return f"<p>{html.escape(found)}</p>"
    return f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{base64.b64encode(found).decode()}">'
