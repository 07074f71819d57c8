"""Plain text tables for plans and reports."""

from collections.abc import Sequence


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
