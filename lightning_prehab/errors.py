"""The errors that this package raises on purpose; every one of them is a :class:`PrehabError`."""

import textwrap


class PrehabError(Exception):
    """Base of every error of this package."""


class ArgumentError(PrehabError, ValueError):
    """A setting has a value that cannot be used."""


class TargetError(PrehabError, ValueError):
    """No layer, or the wrong layer, was addressed."""


class PlanError(PrehabError, ValueError):
    """A plan cannot be made, or does not fit the model that it is applied to."""


class StatisticsError(PrehabError, ValueError):
    """Calibration statistics are missing or do not fit the layer."""


class CheckpointError(PrehabError, RuntimeError):
    """A file or a state dict is damaged, or does not fit the model that it is loaded into."""


class NumericalError(PrehabError, ArithmeticError):
    """A weight or a statistic holds NaN or Inf, or a decomposition did not converge."""


class UnsupportedError(PrehabError, RuntimeError):
    """The surroundings (strategy, optimizer, another callback) cannot be combined with this package."""


class ReadOnlyError(UnsupportedError, AttributeError):
    """What a layer computes was assigned or deleted."""


def reason(error: BaseException) -> str:
    r"""What somebody else's code says, in one line.

    >>> reason(ValueError("too long\nand more"))
    'ValueError: too long'
    """
    words = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(words, 200)}"
