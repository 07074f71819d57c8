"""Texts in narrow places: names folded at their dots, lines at their words."""

import textwrap

#: Columns of a text that is not printed on a terminal: wished for, and at most.
WIDTH, WIDEST = 100, 120


def visible(text: str) -> str:
    r"""The text on one line, with what cannot be seen written out.

    >>> visible("fc\n1")
    'fc\\n1'
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def fold_name(name: str, width: int) -> list[str]:
    """A name in lines of at most ``width`` characters, each broken after a dot where that is possible.

    >>> fold_name("layers.*.mlp.up_proj", 12)
    ['layers.*.', 'mlp.up_proj']
    """
    lines = [""]
    for part in name.replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return lines


def wrap(text: str, width: int = WIDTH, indent: str = "") -> list[str]:
    """A text in lines of at most ``width`` characters; those after the first are indented."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
