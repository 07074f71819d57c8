"""How far the student's answers are from the teacher's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.distillation.values import all_tensors
from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.refinement.distance import answer_in, are_classes_second, distance, measure_for
from lightning_prehab.statistics.batches import IGNORED, as_predicted, has_decoder, padding_mask
from lightning_prehab.statistics.outputs import labels_in


class Comparison:
    """A number for each pair of answers, and its gradient.

    Logits are compared by the Kullback-Leibler divergence of the predictions, ``T^2 KL(right || answer)`` at
    temperature ``T`` (Hinton et al., 2015, https://arxiv.org/abs/1503.02531), a mean over all predictions; other
    answers by their mean squared error; features by their squared error relative to the square of the right ones.
    Positions that an ``attention_mask`` leaves out do not count, nor those whose label is -100.

    Args:
        temperature: Of the predictions, above 0.
        relative: Compare features.

    Attributes:
        measure: ``"divergence"`` or ``"squared"``, once it is known; then it stays.
        shifted: Whether labels stand one position after the logits that predict them, once it is known.
        second: Whether the classes are the second dimension, as of logits for each pixel.
        decoded: Whether what is predicted has another mask than what is read.
    """

    def __init__(self, temperature: float = 1.0, relative: bool = False) -> None:
        self.temperature, self.relative = temperature, relative
        self.measure: str | None = "squared" if relative else None
        self.shifted: bool | None = None
        self.second = False
        self.decoded = False

    def decide(self, model: Any, output: Any, asked: Sequence[Any]) -> None:
        """Tells logits from other answers.

        Args:
            model: The teacher.
            output: All that it has returned.
            asked: What may hold labels.
        """
        self.decoded = has_decoder(model)
        if self.measure is None:
            answer, labels = answer_in(output) if isinstance(output, tuple | list) else output, _without_ignored(asked)
            self.second = are_classes_second(answer_in(answer), labels)
            self.measure = "divergence" if self.second else measure_for(model, answer, labels)

    def value(self, answer: Tensor, right: Tensor, asked: Sequence[Any]) -> Tensor:
        """The distance, differentiable in the answer.

        Args:
            answer: Of the student.
            right: Of the teacher, same shape.
            asked: What may hold a mask or labels: arguments of the call, the batch.

        Returns:
            Scalar in float32, or in the dtype of a wider answer.
        """
        assert self.measure is not None
        answer = answer.float() if answer.dtype is torch.float16 else answer  # small gradients would be rounded away
        if self.second:
            answer, right = answer.movedim(1, -1), right.movedim(1, -1)
        if answer.shape == right.shape:  # else distance says so
            counted = None if self.relative else self._counted(answer, asked)
            mask = _first(padding_mask(as_predicted(one, self.decoded)) for one in asked)
            if mask is not None and answer.dim() > 2 and mask.shape == answer.shape[:2]:
                mask = mask.to(answer.device)
                mask = mask.reshape(mask.shape + (1,) * (answer.dim() - 3)).expand(answer.shape[:-1])
                counted = mask if counted is None else counted & mask
            if counted is not None:
                answer, right = answer[counted], right[counted]
        if self.measure == "divergence":
            if self.temperature != 1.0:
                answer, right = answer / self.temperature, right / self.temperature
            return distance("divergence", answer, right, None).mean * self.temperature**2
        found = distance("squared", answer, right, None)
        return found.mean if self.relative else found.total / max(answer.numel(), 1)

    @in_full_precision
    def gradient(
        self, answer: Tensor, right: Tensor, asked: Sequence[Any], scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The distance, and ``scale`` times its gradient by the answer.

        Returns:
            Scalar, and a tensor of the shape of the answer.
        """
        with torch.enable_grad():
            leaf = answer.detach()
            leaf = (leaf.float() if leaf.dtype is torch.float16 else leaf).requires_grad_()
            value = self.value(leaf, right, asked)
            (found,) = torch.autograd.grad(value * scale, leaf)
        return value.detach(), found

    def _counted(self, answer: Tensor, asked: Sequence[Any]) -> Tensor | None:
        """Which predictions have a label that counts; None if there are no labels for them."""
        labels = _first(labels_in(one) for one in asked)
        if labels is None or labels.shape != answer.shape[:-1]:
            return None
        counted: Tensor = labels.to(answer.device) != IGNORED
        if self.shifted is None and bool(counted.any()):
            self.shifted = labels.dim() == 2 and _are_the_tokens(labels, asked)
        if self.shifted:
            counted = torch.cat([counted[:, 1:], torch.ones_like(counted[:, :1])], dim=1)
        return counted


def _are_the_tokens(labels: Tensor, asked: Sequence[Any]) -> bool:
    """Whether each label that counts is the token at its own place: the model is then going to shift them."""
    tokens = _first(_tokens_in(one) for one in asked)
    if tokens is None or tokens.shape != labels.shape:
        return False
    counts = labels != IGNORED
    return bool((tokens[counts] == labels[counts]).all())


def _tokens_in(given: Any) -> Tensor | None:
    """The inputs that labels stand beside."""
    if isinstance(given, Mapping):
        found: Any = given.get("input_ids")
    else:
        found = given[0] if isinstance(given, tuple | list) and len(given) == 2 else None
    return found if isinstance(found, Tensor) else None


def _without_ignored(batch: Any) -> list[Tensor]:
    """Tensors in which labels that do not count are 0: not to be taken for numbers."""
    return [
        one.masked_fill(one == IGNORED, 0) if one.dtype in (torch.int32, torch.int64) else one
        for one in all_tensors(batch)
    ]


def _first(found: Any) -> Any:
    return next((one for one in found if one is not None), None)
