"""Running sums in little memory, where torch has to be deterministic on a GPU too."""

import torch
from torch import Tensor


def running_sum(values: Tensor) -> Tensor:
    """Sums of the first 1, 2, 3, ... values along the last dimension.

    Under ``torch.use_deterministic_algorithms`` (``Trainer(deterministic=True)``) ``cumsum`` takes a square matrix for
    each row on a GPU: gigabytes for the tokens of a batch. Sums over ever longer pieces take a copy, and are as exact.

    Args:
        values: Shape ``(..., n)``.

    Returns:
        The same shape, dtype and device.
    """
    if values.device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(-1)
    return sum_by_doubling(values)


def sum_by_doubling(values: Tensor) -> Tensor:
    """The same, in ``log2(n)`` additions of all values to themselves.

    >>> sum_by_doubling(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    tensor([ 1.,  3.,  6., 10., 15.])
    """
    step = 1
    while step < values.shape[-1]:
        values = torch.cat([values[..., :step], values[..., step:] + values[..., :-step]], -1)
        step *= 2
    return values
