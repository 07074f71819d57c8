"""Shows the package's docstrings as Markdown: roles become links, doctests and literal blocks become code blocks."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|mod):`(~?)([\w.]+)`")
_DOCTEST = re.compile(r"(?:^[ ]*>>> .*(?:\n[ ]*\S.*)*\n?)+", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj.path)


def to_markdown(text: str, inside: str) -> str:
    r"""The docstring of the object ``inside`` as Markdown.

    >>> to_markdown("See :func:`~package.linalg.shrink`.", "package.layers")
    'See <autoref identifier="package.linalg.shrink" optional><code>shrink</code></autoref>.'
    >>> print(to_markdown("Counts. Example::\n\n    f()", "package"))
    Counts. Example:
    <BLANKLINE>
        f()
    """
    return re.sub(
        r"::$",
        ":",
        _DOCTEST.sub(
            _fence, _ROLE.sub(lambda match: _link(match, inside), text)
        ),
        flags=re.M,
    )


def _link(match: re.Match[str], inside: str) -> str:
    """A link where the name is documented, code where not. A bare name is one of the same class or module."""
    short, path = match.groups()
    target = path if "." in path else f"{inside.rpartition('.')[0]}.{path}"
    text = path.rpartition(".")[2] if short else path
    return (
        f'<autoref identifier="{target}" optional><code>{text}</code></autoref>'
    )


def _fence(match: re.Match[str]) -> str:
    indent = re.match(" *", match[0])[0]  # type: ignore[index]
    return f"{indent}```pycon\n{match[0].rstrip()}\n{indent}```\n"
