"""What a change of the weights does to the loss, measured: by running the model with them and without."""

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prehab.errors import StatisticsError
from lightning_prehab.kinds import MatrixView
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.progress import tell
from lightning_prehab.statistics.batches import as_predicted, ask_model, has_decoder, to_device
from lightning_prehab.statistics.calibration import Forward, as_found
from lightning_prehab.statistics.divergence import divergence
from lightning_prehab.statistics.outputs import logits_in, loss_in, next_token_loss, require_finite_output

#: Batches that are gone through before it is asked whether they were enough.
BATCHES_AT_ONCE = 4
#: Standard errors by which a change must differ from zero to count as it is.
SURE = 4.0

#: ``losses_at(number, step)``: the loss of a batch with the weights moved by ``step`` times the change, NaN if it has
#: none. On several processes those of the batches of all that have this number, the same ones everywhere.
LossesAt = Callable[[int, float], Sequence[float]]


class Change(NamedTuple):
    """What is added to a matrix of the model, and to the bias beside it.

    Attributes:
        view: The matrix.
        weight: Shape ``(m, n)``.
        bias: Shape of ``view.bias``, or None.
    """

    view: MatrixView
    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    @torch.no_grad()
    @in_full_precision
    def by_cut(cls, view: MatrixView, factors: Factors) -> "Change":
        """What turns a matrix into the product of its factors.

        A shift for a layer that has no bias is left out.
        """
        shift = None if view.bias is None else factors.bias_shift
        return cls(view, factors.product(view.group_count) - view.weight, shift)


@contextmanager
def moved(changes: Sequence[Change], step: float) -> Iterator[None]:
    """Inside, the weights are moved by ``step`` times the changes; outside they are what they were, bit by bit.

    The parameters show other memory meanwhile, so that a graph that somebody has made of them stays valid. Biases are
    changed in place, where there is a change for them.
    """
    if step == 0.0:
        yield
        return
    weights = {id(view.parameter): view.parameter for view, _, _ in changes}
    theirs = [(parameter, parameter.data) for parameter in weights.values()]
    ours = {key: parameter.detach().clone() for key, parameter in weights.items()}
    shifted = [(bias, shift) for view, _, shift in changes if (bias := view.bias) is not None and shift is not None]
    biases = [(bias, bias.detach().clone()) for bias, _ in shifted]
    for view, weight, _ in changes:
        view.write_(view.weight.detach() + step * weight, into=ours[id(view.parameter)])
    try:
        for parameter in weights.values():
            parameter.data = ours[id(parameter)]
        for bias, shift in shifted:
            _put_(bias, bias.detach() + step * shift)
        torch.clear_autocast_cache()  # inside the user's autocast casts of the old weights would be taken
        yield
    finally:
        for parameter, data in theirs:
            parameter.data = data
        for bias, old in biases:
            _put_(bias, old)
        torch.clear_autocast_cache()


@contextmanager
def same_randomness(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Inside, the random numbers of torch, Python and numpy go on from where they are, and outside too.

    With a seed those inside are always the same ones.
    """
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
                if device.type == "cuda":
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
                random.seed(seed)
                if numpy is not None:
                    numpy.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


@torch.no_grad()
def _put_(bias: Tensor, value: Tensor) -> None:
    bias.copy_(value)


def measure_increase(losses_at: LossesAt, batches: int) -> float:
    """What a change of the weights adds to the loss, in its unit; not negative.

    The mean difference over the batches, if it is clear of its own noise. A small change is not: on few samples the
    part that is odd in the change, which is about zero on all data once a model is trained, hides the curvature that is
    looked for. The change is then tried with the opposite sign too. That parts the odd from the even, and of the odd
    part no more is taken than is sure (:func:`odd_and_even`); nothing of it if the loss would seem to fall.

    Args:
        losses_at: Measures.
        batches: How many there are, at least 1.

    Raises:
        StatisticsError: If none of them has a loss.
    """
    told = 0
    tell("try", told, 3 * batches)

    def losses(some: range, step: float) -> list[float]:
        nonlocal told
        found: list[float] = []
        for number in some:
            found += losses_at(number, step)
            told += 1
            tell("try", told, 3 * batches)
        return found

    before: list[float] = []
    after: list[float] = []
    for start in range(0, batches, BATCHES_AT_ONCE):
        some = range(start, min(start + BATCHES_AT_ONCE, batches))
        before += losses(some, 0.0)
        after += losses(some, 1.0)
        changes = [new - old for old, new in _with_losses(before, after)]
        if len(changes) >= min(BATCHES_AT_ONCE, batches):
            change, error = mean_and_error(changes)
            if change > 0.0 and change > SURE * error:
                tell("try", told, told)
                return change
    triples = _with_losses(before, after, losses(range(batches), -1.0))
    if not triples:
        raise StatisticsError("No batch has a loss.")
    odd, even = odd_and_even(*zip(*triples, strict=True))
    return max(odd + even if odd + even > 0.0 else even, 0.0)


def _with_losses(*passes: Sequence[float]) -> list[tuple[float, ...]]:
    """The losses of each batch that has them."""
    return [losses for losses in zip(*passes, strict=True) if not any(map(math.isnan, losses))]


def odd_and_even(before: Sequence[float], after: Sequence[float], opposite: Sequence[float]) -> tuple[float, float]:
    """What is odd in a change of the weights, as far as it is sure, and what is even: means over the batches.

    As far as it is sure: ``a^2 / (a^2 + e^2)`` of the odd part ``a`` with standard error ``e``; all of it where there
    is one batch alone, whose error is not known.

    >>> odd_and_even([1.0, 1.0], [1.75, 1.75], [1.25, 1.25])
    (0.25, 0.5)
    """
    triples = list(zip(before, after, opposite, strict=True))
    odd, error = mean_and_error([(plus - minus) / 2 for _, plus, minus in triples])
    even, _ = mean_and_error([(plus + minus) / 2 - zero for zero, plus, minus in triples])
    sure = odd**2 / (odd**2 + error**2) if odd and len(triples) > 1 else 1.0
    return sure * odd, even


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; that of a single value is 0.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def effect_of_cuts(
    model: nn.Module,
    views: Mapping[str, MatrixView],
    factors: Mapping[str, Factors],
    batches: Sequence[Any],
    forward: Forward | None = None,
) -> float:
    """What cuts do to the loss of some batches, all of them together; nothing is left changed.

    The loss is that which the model or ``forward`` returns. Where they return logits alone, it is that of the next
    tokens for a model that predicts them, else the mean of the Kullback-Leibler divergence from the dense model's
    predictions: what the cross-entropy of labels would rise by that are drawn from the dense model. The model runs in
    eval mode, without autograd unless a ``forward`` may need it; each pass over a batch starts from the same random
    state, with a copy of the batch.

    Args:
        model: The module, on one device.
        views: The matrices by name.
        factors: Of those that are cut.
        batches: At least one.
        forward: ``(model, batch) -> output or loss``; as for :func:`~lightning_prehab.collect_statistics`.

    Raises:
        NumericalError: If an output is not finite.
        StatisticsError: If there is no loss and there are no logits.
    """
    changes = [Change.by_cut(views[name], found) for name, found in factors.items()]
    device = next(model.parameters()).device

    def output_of(number: int, step: float) -> Any:
        given = to_device(copy.deepcopy(batches[number]), device)
        with moved(changes, step), same_randomness(device), torch.set_grad_enabled(forward is not None):
            return ask_model(model, given) if forward is None else forward(model, given)

    def loss_at(number: int, step: float) -> float:
        output = output_of(number, step)
        found, logits = loss_in(output), logits_in(output)
        if found is not None:
            require_finite_output(found.detach(), "The loss")
            return float(found.detach())
        if logits is None:
            raise StatisticsError(f"The output ({type(output).__name__}) has neither a loss nor logits.")
        logits, batch = logits.detach(), to_device(batches[number], device)
        require_finite_output(logits, "The output of the model")
        text = next_token_loss(logits, batch)
        if number not in speaks:
            speaks[number] = text is not None and text[1]
        if text is not None and speaks[number]:
            return text[0]
        if step == 0.0:
            return 0.0
        dense = logits_in(output_of(number, 0.0))
        assert dense is not None
        total, count = divergence(dense.detach(), logits, as_predicted(batch, has_decoder(model)))
        return total / max(count, 1)

    speaks: dict[int, bool] = {}  # whether the dense model predicts the next tokens of a batch
    with as_found(model):
        return measure_increase(lambda number, step: [loss_at(number, step)], len(batches))
