"""How far predictions are from those that count as right: the Kullback-Leibler divergence, here and nowhere else."""

from typing import Any

import torch
from torch import Tensor

from lightning_prehab.statistics.batches import padding_mask

#: Logits that are compared at a time: few enough to stay in the caches, which is twice as fast as a thousand rows.
AT_ONCE = 2**19
#: In the place of logits of minus infinity: what never happens in both must not become NaN.
_NEVER = -1e4


def divergence(right: Tensor, other: Tensor, batch: Any) -> tuple[float, int]:
    """Of the predictions of two models for a batch.

    Args:
        right: Logits of shape ``(..., classes)``, of the model that counts as right.
        other: Those of the other one.
        batch: Its ``attention_mask`` leaves positions out, where it fits.

    Returns:
        ``KL(right || other)`` in nats, summed over all predictions, and their number.
    """
    mask = fitting_mask(right, batch)
    if mask is not None:
        right, other = right[mask], other[mask]
    pairs = list(zip(*(in_parts(one.reshape(-1, one.shape[-1])) for one in (right, other)), strict=True))
    logs = ((log_chances(one, wide(one)) for one in pair) for pair in pairs)
    return sum(float(divergence_of_logs(*pair)) for pair in logs), sum(len(one) for one, _ in pairs)


def divergence_of_logs(right: Tensor, other: Tensor) -> Tensor:
    """``KL(right || other)`` in nats of log-probabilities of shape ``(..., classes)``, summed; a scalar."""
    return (right.exp() * (right - other)).sum()


def log_chances(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of all classes."""
    return logits.to(dtype).clamp(min=_NEVER).log_softmax(-1)


def in_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Logits of shape ``(rows, classes)``, some rows at a time."""
    return torch.split(rows, max(AT_ONCE // rows.shape[-1], 1))


def fitting_mask(output: Tensor, batch: Any) -> Tensor | None:
    """Which predictions of shape ``(..., classes)`` count, if the batch says that for this shape."""
    mask = padding_mask(batch)
    return mask if mask is not None and mask.shape == output.shape[:-1] else None


def wide(tensor: Tensor) -> torch.dtype:
    """The most precise dtype of the tensor's device."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
