"""Tables for plans and reports: plain text, and a coloured one for terminals that have rich."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Table:
    """One table in two forms: ``str()`` is plain text, ``rich.print`` shows it in colour.

    Attributes:
        title: Above the coloured form.
        columns: The first holds names, the last remarks, those between numbers.
        rows: ``{column: cell}``; missing cells are empty. A row with a remark stands back.
        footer: ``{column: total}``; only in the coloured form.
        caption: Below both forms.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    footer: Mapping[str, str]
    caption: str

    def __str__(self) -> str:
        return f"{format_table(self.columns, [self._cells(row) for row in self.rows])}\n{self.caption}"

    def __rich__(self) -> "rich.table.Table":
        import rich.box
        import rich.table
        from rich.text import Text

        table = rich.table.Table(
            title=Text(self.title, style="bold"),
            caption=Text(self.caption, style="dim"),
            box=rich.box.SIMPLE,
            show_footer=True,
            footer_style="bold",
        )
        for column in self.columns:
            number = column not in (self.columns[0], self.columns[-1])
            table.add_column(
                Text(column.replace(" ", "\n") if number else column),
                Text(self.footer.get(column, "")),
                justify="right" if number else "left",
                style="cyan" if column == "rank" else None,
                overflow="fold",
                no_wrap=number,
            )
        for row in self.rows:
            table.add_row(*map(Text, self._cells(row)), style="dim" if row.get(self.columns[-1]) else None)
        return table

    def _cells(self, row: Mapping[str, str]) -> list[str]:
        return [row.get(column, "") for column in self.columns]


def format_number(value: float | None, spec: str) -> str:
    """The number in the given format, ``"?"`` for one that is not known.

    >>> format_number(0.12345, ".3f"), format_number(None, ".3f")
    ('0.123', '?')
    """
    return "?" if value is None else format(value, spec)


def format_loss(increase: float | None) -> str:
    """The end of a summary; empty for an increase that is not known."""
    return "" if increase is None else f"; predicted loss increase {increase:.3g}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns by width: the first to the left, the last to the left, those between to the right.

    >>> print(format_table(["layer", "rank", "note"], [["fc1", "12", ""], ["head", "-", "tied"]]))
    layer  rank  note
    -----  ----  ----
    fc1      12
    head      -  tied
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    last = len(header) - 1

    def line(cells: Sequence[str]) -> str:
        aligned = (
            c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
