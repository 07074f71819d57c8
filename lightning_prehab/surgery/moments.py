"""Optimizer state of what replaces a dense weight from the optimizer state of that weight: pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: States that are linear in the past gradients: Adam and its family; SGD and Muon.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
#: States that average or sum squared gradients, each entry for itself: Adam and its family; RMSprop; Adagrad.
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def factor_states(state: Mapping[str, Any], a: Tensor, b: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """States of ``A`` and ``B`` from the state of ``W``, for ``W ~ B A``.

    The gradients are ``dA = B^T dW`` and ``dB = dW A^T``, so a first moment, being linear in them, moves exactly:
    ``exp_avg_A = B^T exp_avg_W`` and ``exp_avg_B = exp_avg_W A^T``. A second moment moves as if the entries of ``dW``
    were uncorrelated, ``(B * B)^T v``, and is then raised to the square of the first moment where that is larger:
    without that, correlated gradients would make the first steps larger than the learning rate.

    Args:
        state: ``optimizer.state[W]``.
        a: Shape ``(rank, in_features)``.
        b: Shape ``(out_features, rank)``.

    Returns:
        ``(state of A, state of B)``. Both are empty, a fresh start, if the state holds a matrix of unknown meaning.

    >>> state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.ones(2, 2)}
    >>> for_a, for_b = factor_states(state, a=torch.ones(1, 2), b=torch.ones(2, 1))
    >>> for_a["exp_avg"], for_b["exp_avg"].mT
    (tensor([[2., 2.]]), tensor([[2., 2.]]))
    """
    shape = (b.shape[0], a.shape[1])
    for_a: dict[str, Any] = {}
    for_b: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            for_a[key] = value.clone() if isinstance(value, Tensor) else value
            for_b[key] = value.clone() if isinstance(value, Tensor) else value
        elif key in FIRST_MOMENTS and value.shape == shape:
            for_a[key] = _product(b.mT, value, value.dtype)
            for_b[key] = _product(value, a.mT, value.dtype)
        elif key in SECOND_MOMENTS and value.shape == shape:
            for_a[key] = _product(b.square().mT, value, value.dtype)
            for_b[key] = _product(value, a.square().mT, value.dtype)
        else:
            return {}, {}
    for moved in (for_a, for_b):
        for key in SECOND_MOMENTS:
            if key in moved and "exp_avg" in moved:
                moved[key] = torch.maximum(moved[key], moved["exp_avg"].square())
    return for_a, for_b


def block_state(state: Mapping[str, Any], shape: Sequence[int], part: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """State of a part of ``W``, kept as a parameter of its own, from the state of ``W``: that part of each moment.

    Args:
        state: ``optimizer.state[W]``.
        shape: Of ``W``.
        part: Takes the part out of a tensor of this shape.

    Returns:
        The state; empty, a fresh start, if the state holds a tensor of another shape.

    >>> block_state({"exp_avg": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, (2, 2), lambda moment: moment[1:])
    {'exp_avg': tensor([[3., 4.]])}
    """
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            moved[key] = value.clone() if isinstance(value, Tensor) else value
        elif value.shape == tuple(shape):
            moved[key] = part(value).clone(memory_format=torch.contiguous_format)
        else:
            return {}
    return moved


def entry_state(state: Mapping[str, Any], indices: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """State of single entries of ``W``, kept as a parameter of their own, from the state of ``W``.

    Their gradients are those entries of ``dW``, so first and second moments are those entries of the moments, exactly.

    Args:
        state: ``optimizer.state[W]``.
        indices: Places in ``W`` read row by row: shape ``(k,)``.
        shape: Of ``W``.

    Returns:
        The state; empty, a fresh start, if the state holds a matrix of unknown meaning.

    >>> entry_state({"exp_avg": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, torch.tensor([1, 2]), (2, 2))
    {'exp_avg': tensor([2., 3.])}
    """
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            moved[key] = value.clone() if isinstance(value, Tensor) else value
        elif key in (*FIRST_MOMENTS, *SECOND_MOMENTS) and value.shape == shape:
            moved[key] = value.flatten()[indices]
        else:
            return {}
    return moved


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A product in float64 (float32 where the device has no float64), rounded to ``dtype``."""
    wide = torch.float32 if left.device.type == "mps" else torch.float64
    return (left.detach().to(wide) @ right.detach().to(wide)).to(dtype)
