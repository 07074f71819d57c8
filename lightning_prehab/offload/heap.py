"""Memory that is free, but not yet the system's."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """``malloc_trim`` of the C library, where it has it: glibc's."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Gives freed memory back to the system, where the C library can.

    glibc keeps pieces of less than 32 MB for later. Where one matrix after the other is decomposed, what it keeps grows
    with each: 1 GB and more for a block of a 1B model, beside less than 1 GB that is in use.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
