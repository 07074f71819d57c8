"""How the command line shows warnings."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parent.parent)


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, what this package warns of is a line on standard error, without the place in the code.

    Which warnings are shown, and whether they are errors, is left to Python's filters.
    """
    theirs = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if file is None and filename.startswith(_PACKAGE):
            print(f"warning: {message}", file=sys.stderr)
        else:
            theirs(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = theirs
