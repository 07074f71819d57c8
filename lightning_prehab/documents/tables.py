"""Tables for plans and reports: plain text, and a coloured one for terminals that have rich."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prehab.documents.folding import WIDEST, WIDTH, fold_name, visible, wrap

if TYPE_CHECKING:
    import rich.console
    from rich.text import Text

#: Names get at least so many columns, and so many where nothing else is left to give.
_NAME, _SHORTEST = 20, 8
_GAP = 2

_Line = list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """One table in two forms: ``str()`` is plain text, ``rich.print`` shows it in colour, as wide as the terminal.

    What it says as a whole stands first. The first column holds names, which are folded where they are too long;
    numbers are never broken.

    Attributes:
        title: Above the coloured form.
        columns: The first holds names, the others numbers.
        rows: ``{column: cell}``; missing cells are empty. A row with a text under ``"why"`` stands back; the text is
            not in the columns, but for those who want to write all into a table of their own.
        footer: ``{column: total}``.
        summary: Lines above both forms.
        notes: Lines below both forms.
        spare: Columns that are left out where the place is too narrow, the first one first.
        texts: Columns of words, aligned to the left.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    footer: Mapping[str, str]
    summary: Sequence[str] = ()
    notes: Sequence[str] = ()
    spare: Sequence[str] = ()
    texts: Sequence[str] = ()

    def __str__(self) -> str:
        return "\n".join("".join(piece for piece, _ in line).rstrip() for line in self._lines(WIDTH, WIDEST))

    def __rich_console__(
        self, console: "rich.console.Console", options: "rich.console.ConsoleOptions"
    ) -> "Iterator[Text]":
        """What rich calls: the same lines as wide as the terminal, under the title, in colour."""
        from rich.text import Text

        width = options.max_width
        for line in [[(self.title, "bold")], *self._lines(width, width)]:
            yield Text.assemble(*line, no_wrap=True, overflow="fold")

    def _lines(self, width: int, widest: int) -> list[_Line]:
        """All lines, each in pieces with a style.

        Args:
            width: Columns that are wished for.
            widest: Columns that it may have before some are left out.
        """
        above = [[(line, "")] for text in self.summary for line in wrap(visible(text), width, "  ")]
        below = [[(line, "dim")] for text in self.notes for line in wrap(visible(text), width, "  ")]
        if not self.rows:
            return [*above, *below]
        return [*above, *([[]] if above else []), *self._grid(width, widest), *([[]] if below else []), *below]

    def _grid(self, width: int, widest: int) -> list[_Line]:
        """Header, rule and rows, names folded, without columns for which there is no place."""
        name, *others = self.columns
        headers = {column: column.split() for column in self.columns}  # a line for each word
        cells = [{column: visible(row.get(column, "")) for column in self.columns} for row in self.rows]
        widths = {
            column: max(*map(len, headers[column]), *(len(row[column]) for row in cells)) for column in self.columns
        }
        longest = widths[name]

        def room(limit: int) -> int:
            return limit - sum(_GAP + widths[column] for column in others)

        spare = [column for column in self.spare if column in others]
        while room(widest) < min(longest, _NAME) and spare:
            others.remove(spare.pop(0))
        wished = max(room(width), min(room(widest), _NAME), _SHORTEST)
        widths[name] = min(longest, wished)

        def line(texts: Mapping[str, str], style: str = "") -> _Line:
            pieces = [(texts.get(name, "").ljust(widths[name]), style)]
            for column in others:
                text = texts.get(column, "")
                text = text.ljust(widths[column]) if column in self.texts else text.rjust(widths[column])
                pieces.append((" " * _GAP + text, "cyan" if column == "rank" and not style else style))
            return pieces

        headers = {column: headers[column] for column in (name, *others)}
        height = max(map(len, headers.values()))
        heads = {column: [""] * (height - len(words)) + words for column, words in headers.items()}
        grid = [line({column: words[place] for column, words in heads.items()}, "bold") for place in range(height)]
        grid.append(line({column: "-" * widths[column] for column in headers}))
        for row, given in zip(cells, self.rows, strict=True):
            style = "dim" if given.get("why") else ""
            first, *more = fold_name(row[name], widths[name])
            grid += [line({**row, name: first}, style), *(line({name: part}, style) for part in more)]
        return grid
