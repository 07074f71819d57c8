"""Arguments that cannot be used: one sentence with the name and the value."""

import math
import numbers
import os

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError

_WORDS = {"[0, inf)": "be finite and not negative", "(0, inf)": "be positive and finite"}


def check_kind(name: str, value: object, kind: type, words: str, *, optional: bool = False) -> None:
    """Raises :class:`ArgumentError` unless ``value`` is of some type, or None where it may be.

    >>> check_kind("statistics", 5, dict, "a mapping of statistics", optional=True)
    Traceback (most recent call last):
    lightning_prehab.errors.ArgumentError: statistics must be a mapping of statistics, or None, got 5.
    """
    if not (isinstance(value, kind) or (optional and value is None)):
        raise ArgumentError(f"{name} must be {words}{', or None' if optional else ''}, got {show(value)}.")


def check_path(name: str, value: object) -> None:
    """Raises :class:`ArgumentError` unless ``value`` can be a path.

    >>> check_path("folder", None)
    Traceback (most recent call last):
    lightning_prehab.errors.ArgumentError: folder must be a path, got None.
    """
    if not isinstance(value, str | os.PathLike):
        raise ArgumentError(f"{name} must be a path, got {show(value)}.")


def check_whole(name: str, value: object, least: int, *, optional: bool = False) -> None:
    """Raises :class:`ArgumentError` unless ``value`` is a whole number of at least ``least``, or None where it may be.

    >>> check_whole("rank", 3, 1)
    >>> check_whole("rank", "3", 1)
    Traceback (most recent call last):
    lightning_prehab.errors.ArgumentError: rank must be at least 1, got '3' (a whole number is needed).
    """
    if optional and value is None:
        return
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least:  # type: ignore[call-overload]
        bound = "not be negative" if least == 0 else f"be at least {least}"
        raise ArgumentError(f"{name} must {bound}, got {show(value)}{_needed('a whole number', whole, optional)}.")


def check_seed(name: str, value: object) -> None:
    """Raises :class:`ArgumentError` unless ``value`` is a seed for a generator of torch: a whole number below 2**64.

    >>> check_seed("seed", 2**64)
    Traceback (most recent call last):
    lightning_prehab.errors.ArgumentError: seed must be below 2**64, got 18446744073709551616.
    """
    check_whole(name, value, 0)
    if int(value) >= 2**64:  # type: ignore[call-overload]
        raise ArgumentError(f"{name} must be below 2**64, got {show(value)}.")


def check_real(name: str, value: object, where: str, *, optional: bool = False) -> None:
    """Raises :class:`ArgumentError` unless ``value`` is a finite number in a range, or None where it may be.

    Args:
        name: Of the setting.
        value: What was given.
        where: The range as people write it: ``"(0, 1]"``, ``"[0, inf)"``.
        optional: None is allowed.

    >>> check_real("share", 60, "(0, 1]")
    Traceback (most recent call last):
    lightning_prehab.errors.ArgumentError: share must lie in (0, 1], got 60.
    """
    if optional and value is None:
        return
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    low, high = (float(end) for end in where[1:-1].split(","))
    number = float(value) if real else math.nan  # type: ignore[arg-type]
    above = number > low or (where[0] == "[" and number == low)
    below = number < high or (where[-1] == "]" and number == high)
    if not (math.isfinite(number) and above and below):
        bounds = _WORDS.get(where, f"lie in {where}")
        raise ArgumentError(f"{name} must {bounds}, got {show(value)}{_needed('a number', real, optional)}.")


def _needed(kind: str, has_it: bool, optional: bool) -> str:
    return "" if has_it else f" ({kind}{' or None' if optional else ''} is needed)"
