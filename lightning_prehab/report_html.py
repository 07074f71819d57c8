"""One HTML page without scripts, links or anything else to load."""

import base64
import html
from collections.abc import Mapping

from lightning_prehab.tables import Table

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2328}
div{overflow-x:auto}table{border-collapse:collapse;font-size:13px}td,th{padding:.25rem .6rem;text-align:right}
td:first-child,th:first-child,td:last-child{text-align:left}tr{border-bottom:1px solid #d8dee4}img{max-width:100%}"""


def build_page(table: Table, sections: Mapping[str, bytes | str]) -> str:
    """The page: title, caption, under each heading a PNG or the reason why there is none, the table."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = [
        "<tr>" + "".join(f"<td>{html.escape(row.get(column, ''))}</td>" for column in table.columns) + "</tr>"
        for row in (*table.rows, table.footer)
    ]
    images = [f"<h2>{html.escape(heading)}</h2>\n{_picture(heading, found)}" for heading, found in sections.items()]
    title = html.escape(table.title)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{html.escape(table.caption)}</p>",
        *images,
        f"<h2>Layers</h2>\n<div><table><tr>{head}</tr>",
        *rows,
        "</table></div></body></html>\n",
    ]
    return "\n".join(parts)


def _picture(heading: str, found: bytes | str) -> str:
    if isinstance(found, str):
        return f"<p>{html.escape(found)}</p>"
    return f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{base64.b64encode(found).decode()}">'
