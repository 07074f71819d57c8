"""Numbers for people: few digits, and zero for what is no more than rounding."""

#: Relative errors up to this are rounding: matrices are decomposed in float32 (a step of 2^-23), and
#: sums of many entries lose more.
ROUNDING = 64 * 2.0**-23


def format_number(value: float | None, spec: str) -> str:
    """The number in the given format, ``"?"`` for one that is not known.

    >>> format_number(0.12345, ".3f"), format_number(None, ".3f")
    ('0.123', '?')
    """
    return "?" if value is None else format(value, spec)


def format_error(error: float | None, rounding: float = ROUNDING, digits: int = 3) -> str:
    """A relative error in [0, 1], ``"?"`` for one that is not known.

    Args:
        error: The error.
        rounding: Up to this it is zero.
        digits: Of a larger one, after the point.

    >>> [format_error(error) for error in (0.12345, 2e-4, 3e-8, 0.0, None)]
    ['0.123', '<0.001', '0', '0', '?']
    """
    if error is not None and abs(error) <= rounding:
        return "0"
    if error is not None and 0.0 < error < 0.5 * 0.1**digits:
        return f"<{0.1**digits:.{digits}f}"
    return format_number(error, f".{digits}f")


def format_increase(increase: float | None, error: float | None = None) -> str:
    """A predicted increase of the loss, whose unit is not known here.

    Args:
        increase: In the unit of the loss, or None if it is not known.
        error: The relative error that it comes from, if that is known: what follows from rounding is rounding.

    >>> format_increase(0.0123, 0.1), format_increase(1.53e-17, 1e-8), format_increase(-0.5), format_increase(None)
    ('+0.0123', '0', '-0.5', '?')
    """
    if increase == 0.0 or (increase is not None and error is not None and abs(error) <= ROUNDING):
        return "0"
    return format_number(increase, "+.3g")


def format_loss(increase: float | None, error: float | None = None) -> str:
    """The end of a summary; empty for an increase that is not known. See :func:`format_increase`."""
    return "" if increase is None else f"; predicted loss increase {format_increase(increase, error).lstrip('+')}"


def format_count(count: int) -> str:
    """A count in at most five characters, up to a thousand billions.

    >>> [format_count(count) for count in (999, 1000, 26_543_000, 106_168_320, 1_500_000_000)]
    ['999', '1.0K', '26.5M', '106M', '1.5B']
    """
    if count < 1000:
        return str(count)
    value, units = count / 1000.0, "KMB"
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000.0, units[1:]
    unit = units[0]
    return f"{value:.0f}{unit}" if value >= 99.95 else f"{value:.1f}{unit}"


def format_times(before: float, after: float) -> str:
    """How many times smaller.

    >>> format_times(8.13, 1), format_times(3, 2), format_times(2, 2)
    ('8.1 times smaller', '1.50 times smaller', 'as large as before')
    """
    times = before / after
    return "as large as before" if times == 1.0 else f"{times:.{2 if times < 2 else 1}f} times smaller"


def format_range(low: str, high: str) -> str:
    """From one number to another, both as they are shown.

    >>> format_range("41", "310"), format_range("0", "0")
    ('41 to 310', '0')
    """
    return low if low == high else f"{low} to {high}"
