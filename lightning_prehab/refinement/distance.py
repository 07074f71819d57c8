"""How far the answers of a model are from those of another one, to be trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prehab.errors import StatisticsError
from lightning_prehab.statistics.batches import padding_mask, tensors
from lightning_prehab.statistics.divergence import divergence_of_logs, in_parts, log_chances

_WHOLE = (torch.int32, torch.int64)


class Distance(NamedTuple):
    """A sum over predictions, and what to divide it by.

    Attributes:
        total: Scalar float32 tensor, differentiable.
        weight: Number of predictions, or for squared errors the square of the right outputs.
    """

    total: Tensor
    weight: float

    @property
    def mean(self) -> Tensor:
        """Scalar float32 tensor."""
        return self.total / max(self.weight, torch.finfo(torch.float32).tiny)


def answer_in(output: Any) -> Tensor:
    """What counts as the answer, or as the first one: the output itself, logits, hidden states, a floating tensor.

    Raises:
        StatisticsError: If there is none.
    """
    return answers_in(output)[0]


def answers_in(output: Any) -> list[Tensor]:
    """All that counts as an answer: the logits, or the last hidden state, or all floating tensors.

    So the begins and the ends of spans are compared, and all heads of a model that has several.

    Raises:
        StatisticsError: If there is none.
    """
    for name in ("logits", "last_hidden_state"):
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(named, Tensor):
            return [named]
    found = [one for one in tensors(output) if one.is_floating_point() and one.dim() > 0]
    if not found:
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise StatisticsError(
            f"The output ({type(output).__name__}{shape}) holds nothing to be compared; return logits or numbers for "
            "each row, not a loss alone."
        )
    return found


def measure_for(model: Any, output: Any, batch: Any) -> str:
    """``"divergence"`` for logits, ``"squared"`` for other answers.

    Logits are what is called so, and a tensor of which each prediction stands at a label or token of the batch, or that
    has as many columns as the model says to have classes (``num_classes``, as timm's models). Of four dimensions and
    more, labels have to tell it: classes may stand second, as for pixels (:func:`are_classes_second`).
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    answer = answer_in(output)
    classes = answer.shape[-1]
    if answer is named and 2 <= answer.dim() < 4 and classes > 1:  # one alone is a number: a score, a value
        return "divergence"
    if not (isinstance(output, Tensor) or answer is named) or answer.dim() < 2 or classes < 2:
        return "squared"
    if getattr(model, "num_classes", None) == classes and answer.dim() == 2:
        return "divergence"
    if are_classes_second(answer, batch):
        return "squared"
    return "divergence" if _labels_fit(answer.shape[:-1], classes, batch) else "squared"


def are_classes_second(answer: Tensor, batch: Any) -> bool:
    """Whether an answer of four dimensions and more holds logits for each pixel: shape ``(batch, classes, ...)``.

    >>> are_classes_second(torch.zeros(2, 3, 4, 4), [torch.ones(2, 4, 4, dtype=torch.int64)])
    True
    """
    pixels = answer.dim() > 3 and answer.shape[1] > 1
    return pixels and _labels_fit(answer.shape[:1] + answer.shape[2:], answer.shape[1], batch)


def _labels_fit(shape: torch.Size, classes: int, batch: Any) -> bool:
    return any(
        one.dtype in _WHOLE and one.shape == shape and 0 <= int(one.min()) <= int(one.max()) < classes
        for one in tensors(batch)
        if one.numel() > 0
    )


def distance_of_all(measure: str, answers: Sequence[Tensor], right: Sequence[Tensor], batch: Any) -> Distance:
    """The distance of all answers of an output: of several, each is taken relative to the square of the right one.

    A divergence is that of the first one alone.

    Raises:
        StatisticsError: If the answers differ in number or shape.
    """
    if len(answers) != len(right):
        raise StatisticsError(
            f"The model answers with {len(answers)} tensors, the teacher with {len(right)}; the teacher must be the "
            "dense form of the model."
        )
    if measure == "divergence" or len(right) == 1:
        return distance(measure, answers[0], right[0], batch)
    found = [distance(measure, *pair, batch) for pair in zip(answers, right, strict=True)]
    shares = [one.total / one.weight for one in found if one.weight > 0.0]
    return Distance(sum(shares, start=torch.zeros(())), float(len(shares)))


def distance(measure: str, answer: Tensor, right: Tensor, batch: Any) -> Distance:
    """How far an answer is from the right one; positions that ``attention_mask`` leaves out do not count.

    Args:
        measure: ``"divergence"``: ``KL(right || answer)`` in nats of logits of shape ``(..., classes)``; or
            ``"squared"``.
        answer: Of the model that is trained.
        right: Of the other one, same shape.
        batch: What both were asked.

    Raises:
        StatisticsError: If the answers differ in shape.
    """
    if answer.shape != right.shape:
        raise StatisticsError(
            f"The model answers with shape {tuple(answer.shape)}, the teacher with {tuple(right.shape)}; the teacher "
            "must be the dense form of the model."
        )
    mask = padding_mask(batch)
    if mask is not None and mask.shape == answer.shape[:2] and answer.dim() > 2:
        mask = mask.to(answer.device)
        answer, right = answer[mask], right[mask]
    if measure == "squared":
        right = right.float()
        return Distance((answer.float() - right).square().sum(), float(right.square().sum()))
    answer, right = answer.reshape(-1, answer.shape[-1]), right.reshape(-1, right.shape[-1])
    return Distance(_Divergence.apply(answer, right), len(answer))


class _Divergence(torch.autograd.Function):
    """``KL(right || answer)``, summed over the rows, some rows at a time.

    Logits of a vocabulary are the largest tensors of a language model. Computed at once, this would keep several copies
    of them in float32; here the gradient alone is kept, in the dtype of the logits.
    """

    @staticmethod
    def forward(ctx: Any, answer: Tensor, right: Tensor) -> Tensor:
        """Both of shape ``(rows, classes)``."""
        dtype = torch.float32 if answer.dtype.itemsize < 8 else answer.dtype
        total = torch.zeros((), device=answer.device, dtype=torch.float32)
        gradient = torch.empty_like(answer) if ctx.needs_input_grad[0] else None
        slopes = None if gradient is None else in_parts(gradient)
        for place, pair in enumerate(zip(in_parts(answer), in_parts(right), strict=True)):
            q, p = (log_chances(logits, dtype) for logits in pair)
            total += divergence_of_logs(p, q)
            if slopes is not None:
                slopes[place].copy_(q.exp_().sub_(p.exp_()))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None]:
        """The difference of the two distributions."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None
