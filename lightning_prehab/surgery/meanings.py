"""What the entries of an optimizer's state mean: which of them can follow a weight that becomes two factors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.surgery.rows_and_columns import whole

#: Linear in the past gradients: Adam and its family; SGD and Muon; SGDP; centered RMSprop; Adan; MARS; Rprop;
#: MADGRAD.
FIRST_MOMENTS = (
    *("exp_avg", "momentum_buffer", "momentum", "grad_avg"),
    *("exp_avg_diff", "neg_pre_grad", "last_grad", "prev", "s"),
)
#: Average or sum of squared gradients, each entry for itself: Adam and its family; AdaBelief; RMSprop; Adagrad;
#: MADGRAD; Adafactor, out of rows and columns.
SECOND_MOMENTS = (
    *("exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "max_exp_avg_var"),
    *("square_avg", "sum", "grad_sum_sq", "variance"),
)
#: The largest gradient of each entry, slowly forgotten: Adamax.
LARGEST = ("exp_inf",)
#: How far each entry goes in a step, or the square of it: Rprop; Adadelta.
STEP_SIZES = ("step_size", "acc_delta")
#: Another value of the weight itself: schedule-free optimizers; ASGD; MADGRAD; Lookahead; those for half
#: precision.
ITERATES = ("z", "x", "y", "ax", "x0", "lookahead_slow_buff", "master_param")
#: Short names mean this only beside another one.
_BESIDE = {"s": "grad_sum_sq", "x": "z", "y": "z", "prev": "step_size", "sum": "step", "variance": "step"}
#: Names of counters in parameter groups: Adan and LAMB of timm; schedule-free optimizers; others.
_COUNTERS = ("step", "k", "t", "steps")
#: All of these: entries of the shape of the weight.
MEANINGS = (*FIRST_MOMENTS, *SECOND_MOMENTS, *LARGEST, *STEP_SIZES, *ITERATES)
#: Optimizers whose first moment averages steps, not gradients: it is in other units than the second one.
_AVERAGE_STEPS = ("Adopt", "ADOPT", "LaProp", "Adafactor", "AdafactorBigVision")


def is_plain(value: object) -> bool:
    """Whether a value says the same of any parameter: numbers, flags, names, and tuples of them."""
    if isinstance(value, tuple):
        return all(is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | complex | str)


def flags(state: Mapping[str, Any]) -> dict[str, Any]:
    """What stays true of a parameter that starts afresh: flags and names, but no counters."""
    return {key: value for key, value in state.items() if isinstance(value, bool | str)}


def counts_in_group(group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether steps seem to be counted in the group, for all parameters together, and not in the state of each."""
    counted = any(isinstance(value, int | float) and not isinstance(value, bool) for value in state.values())
    counted |= any(isinstance(value, Tensor) and value.dim() == 0 for value in state.values())
    return not counted and any(bool(group.get(key)) for key in _COUNTERS)


def readable_state(optimizer: torch.optim.Optimizer, weight: Tensor, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of a weight, in terms that :mod:`~lightning_prehab.surgery.moments` can carry to its factors.

    Averages of steps start again at zero: a step of the weight is no step of its factors. What they are divided by is
    carried, so that they do not start again with large ones.

    Args:
        optimizer: The one that keeps it.
        weight: The weight.
        state: ``optimizer.state[weight]``.

    Returns:
        The state; None if any of it is of unknown meaning: lists of matrices, quantized moments. Rows and columns of
        squares have become the matrix that they stand for.
    """
    read: dict[str, Any] = {}
    known = whole(weight, state)
    for key, value in known.items():
        if is_plain(value):
            read[key] = value
        elif type(value) is not Tensor:  # a list, an object, or a subclass: quantized, distributed
            return None
        elif key in MEANINGS and _BESIDE.get(key, key) in known:
            if value.shape != weight.shape:
                return None
            read[key] = value
        elif value.dim() == 0:
            read[key] = value  # a counter
        else:
            return None
    if read.get("use_muon") is True and "exp_avg_sq" in read:
        return None  # AdaMuon: squares of orthogonal steps, not of gradients
    classes = {kind.__name__ for kind in type(optimizer).__mro__}
    if "exp_avg" in read and classes.intersection(_AVERAGE_STEPS):
        read["exp_avg"] = torch.zeros_like(read["exp_avg"])
    if "momentum_buffer" in read and "square_avg" in read:  # RMSprop
        read["momentum_buffer"] = torch.zeros_like(read["momentum_buffer"])
    if "s" in read:  # MADGRAD: a sum of steps from x0 on, which starts again here
        read["s"] = torch.zeros_like(read["s"])
        if "x0" in read:
            read["x0"] = weight.detach().clone()
    return read
