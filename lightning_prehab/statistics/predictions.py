"""What the dense model makes of a batch, kept to compare others with it."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prehab.statistics.divergence import divergence_of_logs, fitting_mask, in_parts, log_chances, wide
from lightning_prehab.statistics.outputs import require_finite_output


class Distance(NamedTuple):
    """How far a model is from the dense one: a sum, and what it is a share of."""

    total: float
    of: float


class Predictions:
    """Probabilities of the classes: all of them, or the largest ones of each prediction and the sum of the others.

    Args:
        logits: Shape ``(..., classes)``, finite.
        batch: Its ``attention_mask`` leaves positions out, where it fits.
        room: Bytes that may be kept.

    Raises:
        NumericalError: If the logits are not finite.
    """

    def __init__(self, logits: Tensor, batch: Any, room: int) -> None:
        require_finite_output(logits, "The output of the dense model")
        self._mask = fitting_mask(logits, batch)
        rows = self._rows(logits)
        classes = rows.shape[-1]
        self._most = classes if rows.numel() * 4 <= room else min(max(room // (12 * max(len(rows), 1)), 1), classes)
        kept, places = [], []
        for part in in_parts(rows):
            logs = log_chances(part, wide(part))
            if self._most < classes:
                logs, indices = logs.topk(self._most)
                places.append(indices)
            kept.append(logs.float())
        self._logs, self._places = kept, places

    def distance(self, logits: Tensor) -> Distance:
        """``KL(dense || other)`` in nats, summed over all predictions, and their number; infinite if it is not finite.

        Where only the largest probabilities are kept, all others count as one class.
        """
        total, count = 0.0, 0
        for index, part in enumerate(in_parts(self._rows(logits))):
            p, q = self._logs[index].to(wide(part)), log_chances(part, wide(part))
            if self._places:
                p, q = (_with_rest(logs) for logs in (p, q.gather(-1, self._places[index])))
            total += float(divergence_of_logs(p, q))
            count += len(part)
        return Distance(total if math.isfinite(total) else math.inf, count)

    def _rows(self, logits: Tensor) -> Tensor:
        return (logits if self._mask is None else logits[self._mask]).reshape(-1, logits.shape[-1])


class Outputs:
    """A tensor that is no logits.

    Args:
        output: Of any shape.
        batch: Its ``attention_mask`` leaves positions out, where it fits.

    Raises:
        NumericalError: If it is not finite.
    """

    def __init__(self, output: Tensor, batch: Any) -> None:
        require_finite_output(output, "The output of the dense model")
        self._mask = fitting_mask(output, batch)
        self._expected = output.clone() if self._mask is None else output[self._mask]  # it may be written over

    def distance(self, output: Tensor) -> Distance:
        """The squared difference, and the square of the dense output."""
        found = output if self._mask is None else output[self._mask]
        expected = self._expected.to(wide(found))
        total = float((expected - found.to(expected)).square().sum())
        return Distance(total if math.isfinite(total) else math.inf, float(expected.square().sum()))


def _with_rest(logs: Tensor) -> Tensor:
    """Log-probabilities, and that of all classes that are not among them."""
    rest = (1.0 - logs.exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()
    return torch.cat([logs, rest], -1)
