"""Measures what a model is worth on some batches, before a compression and after it, in the same way."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError, NumericalError
from lightning_prehab.linalg.modes import outside_inference_mode
from lightning_prehab.progress import counted
from lightning_prehab.report.scores import Score
from lightning_prehab.report.tally import FITS, LOSS, OUTPUTS, Tally
from lightning_prehab.statistics.batches import as_predicted, batch_size, has_decoder, padding_mask, tensors, to_device
from lightning_prehab.statistics.calibration import Forward, as_found
from lightning_prehab.statistics.effect import same_randomness
from lightning_prehab.statistics.held_back import hold_back
from lightning_prehab.statistics.kept import KEPT_BYTES, MOST_BATCHES
from lightning_prehab.statistics.outputs import logits_in, loss_in, main_tensor
from lightning_prehab.statistics.running import copied, outputs_of


class Evaluation:
    """Scores models on the same batches; the first one, the dense model, decides how.

    The loss is that of ``forward``, or of the model's output. Where it turns out to be the cross-entropy of labels or
    of the next tokens of a text, its mean is taken over these, and of labels the accuracy is told. Without a loss it is
    the cross-entropy of the labels of the batch, or that of the next tokens for a model that predicts them (padding is
    left out by ``attention_mask``). Where there is neither, it is told how far the outputs are from those of the dense
    model, on so many batches as their outputs can be kept.

    Models run in eval mode, without autograd unless a ``forward`` may need it, on copies of the batches, and are left
    as they were: modes, gradients, buffers, hooks, random numbers.

    Args:
        batches: Gone through once for each score; an iterator is kept in memory.
        forward: ``(model, batch) -> output or loss``; as for :func:`~lightning_prehab.collect_statistics`.
        held_back: Whether the batches were held back from the calibration, for the words about it.
        source: Where the batches are from, for the words about it.

    Raises:
        ArgumentError: If there are no batches.

    >>> evaluation = Evaluation([[torch.zeros(5, 3), torch.tensor([0, 1, 1, 0, 1])]])
    >>> score = evaluation.score(nn.Sequential(nn.Linear(3, 2)))
    >>> score.count, score.unit, score.data, 0.0 <= score.accuracy <= 1.0
    (5, 'labels', '5 rows', True)
    """

    def __init__(
        self, batches: Iterable[Any], forward: Forward | None = None, *, held_back: bool = False, source: str = ""
    ) -> None:
        if isinstance(batches, Tensor | str | bytes) or not isinstance(batches, Iterable):
            raise ArgumentError(
                f"evaluate must be a share in (0, 1) or an iterable of batches, got {type(batches).__name__}; for one "
                "batch give evaluate=[batch]."
            )
        self._batches = list(batches) if isinstance(batches, Iterator) else batches
        self._forward, self._held_back, self._source = forward, held_back, source
        self._way: str | None = None  # how to score; "" if it cannot be done
        self._kept: list[tuple[Any, Tensor]] = []  # batches and what the dense model makes of them

    def some_batches(self) -> list[Any]:
        """At most 16 of the batches, to try a cut on; none if going through them may change something (a loader)."""
        return list(self._batches[:MOST_BATCHES]) if isinstance(self._batches, list | tuple) else []

    @outside_inference_mode
    def score(self, model: nn.Module) -> Score | None:
        """What a model is worth; None if nothing can be told.

        Raises:
            ArgumentError: If there are no batches, or the model cannot be called on them.
            NumericalError: If a score is not finite.
        """
        device = next(model.parameters()).device
        grads = torch.set_grad_enabled(self._forward is not None)
        with as_found(model), same_randomness(device), grads:
            found = self._score(model, device)
        return found if found is None else _checked(found)

    def _score(self, model: nn.Module, device: torch.device) -> Score | None:
        if self._way == OUTPUTS:
            return self._compared(model, device)
        ways = FITS if self._way is None else ["labels" if self._way == LOSS else self._way]
        tally = self._pass(model, device, ways)
        if self._way is None:
            self._way = tally.way(model)
        if self._way != OUTPUTS:
            return tally.score(self._way, self._data(tally.rows))
        self._keep_outputs(model, device)
        return self._compared(model, device)

    def _pass(self, model: nn.Module, device: torch.device, ways: Iterable[str]) -> Tally:
        tally = Tally(ways)
        for batch in counted(self._batches, "evaluate"):
            output, logits = self._call(model, to_device(copied(batch), device))
            tally.add(loss_in(output), logits, to_device(batch, device))
        if not tally.sizes:
            raise ArgumentError("evaluate is empty; give at least one batch.")
        return tally

    def _call(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
        """The output, and the logits of it or, where ``forward`` makes a loss of them, of the model."""
        outputs = outputs_of(model, batch, self._forward)
        logits = next((found for one in outputs if (found := logits_in(one)) is not None), None)
        return outputs[0], None if logits is None else logits.detach()

    def _keep_outputs(self, model: nn.Module, device: torch.device) -> None:
        size = 0
        for batch in self._batches:
            kept = copied(batch)
            output = main_tensor(self._call(model, to_device(copied(batch), device))[0])
            if output is None:
                continue
            size += sum(one.numel() * one.element_size() for one in (output, *tensors(kept)))
            if self._kept and size > KEPT_BYTES:
                return
            self._kept.append((kept, output.cpu()))

    def _compared(self, model: nn.Module, device: torch.device) -> Score | None:
        difference = norm = 0.0
        for batch, dense in counted(self._kept, "evaluate"):
            output = main_tensor(self._call(model, to_device(copied(batch), device))[0])
            if output is None or output.shape != dense.shape:
                return None
            mask = padding_mask(as_predicted(batch, has_decoder(model)))
            shown = slice(None) if mask is None or mask.shape != dense.shape[:-1] else mask.cpu()
            expected, found = dense[shown].double(), output.cpu()[shown].double()
            difference += float((expected - found).square().sum())
            norm += float(expected.square().sum())
        rows = sum(batch_size(batch) for batch, _ in self._kept)
        if norm == 0.0:
            return None
        return Score(None, rows, "rows", output_error=math.sqrt(difference / norm), data=self._data(rows))

    def _data(self, rows: int) -> str:
        held_back, source = "held-back " if self._held_back else "", f" of {self._source}" if self._source else ""
        return f"{rows:,} {held_back}row{'' if rows == 1 else 's'}{source}"


def for_calibration(
    batches: Iterable[Any] | None, evaluate: float | Iterable[Any] | Evaluation | None, forward: Forward | None
) -> tuple[Iterable[Any] | None, Evaluation | None]:
    """The batches to calibrate with, and how to score the model.

    Args:
        batches: Calibration batches, or None.
        evaluate: None, batches to score on, or the share of the calibration batches to hold back, in ``(0, 1)``.
        forward: As for :class:`Evaluation`.

    Raises:
        ArgumentError: If it is something else, or nothing can be held back.
    """
    if evaluate is None or isinstance(evaluate, Evaluation):
        return batches, evaluate
    if not isinstance(evaluate, int | float):
        return batches, Evaluation(evaluate, forward)
    if isinstance(evaluate, bool) or not 0.0 < evaluate < 1.0:
        raise ArgumentError(f"evaluate must be a share in (0, 1) or batches, got {evaluate!r}; None measures nothing.")
    if batches is None:
        raise ArgumentError(f"evaluate={evaluate} holds a part of the calibration batches back; give batches.")
    if isinstance(batches, Tensor):
        raise ArgumentError("batches is one tensor; give an iterable of batches, for example batches=[tensor].")
    rest, held = hold_back(list(batches), evaluate)
    return rest, Evaluation(held, forward, held_back=True)


def _checked(score: Score) -> Score:
    for what, value in (("loss", score.loss), ("difference of the outputs", score.output_error)):
        if value is not None and not math.isfinite(value):
            raise NumericalError(f"The {what} on {score.data} is {value}; check the batches and the precision.")
    return score
