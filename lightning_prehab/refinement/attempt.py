"""Training that is undone, bit by bit, unless what is left of it is better than what was there before."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.refinement.course import Outcome
from lightning_prehab.refinement.pair import Pair
from lightning_prehab.refinement.trained import is_short, undisturbed
from lightning_prehab.statistics.effect import same_randomness


def attempt(
    pair: Pair, parameters: Sequence[nn.Parameter], train: Callable[[], Outcome], measure: Callable[[], float]
) -> Outcome:
    """Trains the model of a pair; what is not measured to be better, or fails, leaves it as it was.

    Args:
        pair: The model, and what it learns from.
        parameters: What may be changed.
        train: Does it, with the model ready for it.
        measure: What is left when weights are packed and rounded; lower is better.
    """
    values = [*parameters, *(one.order for one in pair.model.modules() if isinstance(one, PivotLayer))]
    first = [value.detach().clone() for value in values]
    try:
        with at_work(pair), pair.training(parameters):
            found = train()
        if found.kept:
            pair.stand_ins.pack_()
            if pair.stand_ins or any(map(is_short, parameters)):
                with at_work(pair):
                    after = measure()
                found = found._replace(after=after, kept=after < found.before)
    except Exception:
        _restore_(values, first)
        raise
    if not found.kept:
        _restore_(values, first)
        found = found._replace(after=found.before)
    return found


@contextmanager
def at_work(pair: Pair) -> Iterator[None]:
    """Inside, both models answer the same at each call; outside they are as they were."""
    with same_randomness(pair.device), undisturbed(pair.model), undisturbed(pair.teacher):
        yield


@torch.no_grad()
def _restore_(values: Sequence[Tensor], first: Sequence[Tensor]) -> None:
    for value, old in zip(values, first, strict=True):
        value.copy_(old)
