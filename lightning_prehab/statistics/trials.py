"""Tries whole cuts of a model: how far its predictions move, and what its loss does."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prehab.errors import NumericalError, StatisticsError
from lightning_prehab.statistics.batches import as_predicted, has_decoder, to_device
from lightning_prehab.statistics.calibration import Forward, as_found
from lightning_prehab.statistics.effect import Change, measure_increase, moved, same_randomness
from lightning_prehab.statistics.kept import KEPT_BYTES
from lightning_prehab.statistics.outputs import fit_to_labels, fit_to_next_tokens, logits_in, loss_in, main_tensor
from lightning_prehab.statistics.predictions import Distance, Outputs, Predictions
from lightning_prehab.statistics.running import copied, outputs_of


class Tried(NamedTuple):
    """What a cut does.

    Attributes:
        divergence: How far the model is from the dense one: the smaller, the better; infinite for NaN.
        losses: Of each batch, as the model or the ``forward`` returns it; NaN where there is none, infinite for NaN.
    """

    divergence: float
    losses: tuple[float, ...]


class _Output(NamedTuple):
    """What comes out for a batch: a tensor to compare, whether it is logits, and the loss, NaN where there is none."""

    tensor: Tensor | None
    are_logits: bool
    loss: float


class _Dense(NamedTuple):
    """What the dense model makes of a batch: what is kept to compare with, and the loss, NaN where there is none."""

    kept: Predictions | Outputs | None
    loss: float


class Trials:
    """Cuts of one model, each tried by one pass over the same batches.

    What is compared is the first of these that the outputs have: logits, by the mean Kullback-Leibler divergence of a
    prediction from that of the dense model, in nats; a floating tensor of two dimensions or more, by the squared
    difference as a share of its square; a loss, by its mean increase. Under a ``forward`` a plain tensor counts as
    logits where the batch has labels for it. The dense outputs are computed once and kept, in 256 MB: of logits that
    need more the largest of each prediction, with the rest as one class; of other tensors those of the first batches.

    The model runs in eval mode, without autograd unless a ``forward`` may need it, each pass over a batch starts from
    the same random state, with a copy of the batch, and nothing is left changed.

    Args:
        model: On one device.
        batches: At least one.
        forward: ``(model, batch) -> output or loss``; as for :func:`~lightning_prehab.collect_statistics`.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], forward: Forward | None = None) -> None:
        self._model, self._batches, self._forward = model, batches, forward
        self._dense: list[_Dense] = []

    def of(self, changes: Sequence[Change]) -> Tried:
        """What these changes of the weights do.

        Raises:
            NumericalError: If an output of the dense model is not finite.
            StatisticsError: If there is nothing to compare.
        """
        with as_found(self._model):
            if not self._dense:
                self._dense = self._look_at_dense()
            with moved(changes, 1.0):
                found = [self._compare(*one) for one in zip(self._batches, self._dense, strict=True)]
        losses = tuple(loss for _, loss in found)
        distances = [distance for distance, _ in found if distance is not None]
        if distances:
            total, of = (math.fsum(parts) for parts in zip(*distances, strict=True))
            return Tried(total / of if of > 0.0 else total, losses)
        rises = [new - old.loss for new, old in zip(losses, self._dense, strict=True) if not math.isnan(old.loss)]
        return Tried(math.fsum(rises) / len(rises), losses)

    def increase(self, changes: Sequence[Change], tried: Tried) -> float | None:
        """What the changes add to the loss, in its unit, out of what was seen when they were tried.

        Where there are logits alone, the divergence: what the cross-entropy of labels would rise by that are drawn from
        the dense model. None where it is not known.
        """
        known = [dense.loss for dense in self._dense]
        if not math.isfinite(tried.divergence) or math.inf in tried.losses:
            return None
        if all(map(math.isnan, known)):
            return tried.divergence if isinstance(self._dense[0].kept, Predictions) else None

        def losses_at(number: int, step: float) -> list[float]:
            if step in (0.0, 1.0):
                return [tried.losses[number] if step else known[number]]
            with as_found(self._model), moved(changes, step):
                return [self._run(self._batches[number]).loss]

        return measure_increase(losses_at, len(self._batches))

    def _look_at_dense(self) -> list[_Dense]:
        found: list[_Dense] = []
        left = KEPT_BYTES
        for batch in self._batches:
            output, are_logits, loss = self._run(batch)
            kept: Predictions | Outputs | None = None
            if math.isinf(loss):
                raise NumericalError("The loss of the dense model is not finite; check the batches and the precision.")
            if output is not None and are_logits:
                kept = Predictions(output, self._asked(batch), KEPT_BYTES // len(self._batches))
            elif output is not None and (left == KEPT_BYTES or output.numel() * output.element_size() <= left):
                left -= output.numel() * output.element_size()
                kept = Outputs(output, self._asked(batch))
            found.append(_Dense(kept, loss))
        if all(one.kept is None and math.isnan(one.loss) for one in found):
            raise StatisticsError(
                "The model returns no logits, no floating tensor of two or more dimensions, and no loss to try cuts "
                "by; pass loss=, a function (model, batch) -> scalar."
            )
        return found

    def _compare(self, batch: Any, dense: _Dense) -> tuple[Distance | None, float]:
        output, _, loss = self._run(batch)
        if dense.kept is None:
            return None, loss
        return Distance(math.inf, 1.0) if output is None else dense.kept.distance(output), loss

    def _run(self, batch: Any) -> _Output:
        device = next(self._model.parameters()).device
        given = to_device(copied(batch), device)
        with same_randomness(device), torch.set_grad_enabled(self._forward is not None):
            outputs = outputs_of(self._model, given, self._forward)
        found = loss_in(outputs[0])
        loss = math.nan if found is None else float(found.detach())
        if found is not None and not math.isfinite(loss):
            loss = math.inf
        for one in outputs:
            logits = logits_in(one)
            if logits is not None and (one is not logits or self._has_labels(logits, batch)):
                return _Output(logits.detach(), True, loss)
        return _Output(next((seen for one in outputs if (seen := main_tensor(one)) is not None), None), False, loss)

    def _has_labels(self, logits: Tensor, batch: Any) -> bool:
        """Whether a plain tensor is logits; under a ``forward`` it may be anything, such as a regression."""
        if self._forward is None:
            return True
        fits = (fit(logits.detach(), self._here(batch)) for fit in (fit_to_labels, fit_to_next_tokens))
        return any(found is not None for found in fits)

    def _asked(self, batch: Any) -> Any:
        return as_predicted(self._here(batch), has_decoder(self._model))

    def _here(self, batch: Any) -> Any:
        return to_device(batch, next(self._model.parameters()).device)
