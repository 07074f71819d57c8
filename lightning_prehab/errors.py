"""The errors that this package raises on purpose; every one of them is a :class:`PrehabError`."""

#: Letters of what somebody else says.
_LONGEST = 200


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing, on any device: torch has a class of its own for that only where it is a GPU's.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), is_out_of_memory(ValueError())
    (True, False)
    """
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(one in str(error) for one in words)
    )


def reason(error: BaseException) -> str:
    r"""What somebody else's code says, in one line.

    >>> reason(ValueError("too long\nand more"))
    'ValueError: too long'
    """
    words = next(iter(str(error).strip().splitlines()), "")
    said = words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
