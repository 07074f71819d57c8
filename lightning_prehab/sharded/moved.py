"""Changes of sharded weights that are tried and taken back, each process on its own part."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.kinds import MatrixView
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.linalg.sharding import local_part
from lightning_prehab.sharded.agreement import Agree
from lightning_prehab.sharded.engine import reshard_
from lightning_prehab.sharded.gathered import gathered
from lightning_prehab.sharded.shares import share_of


class ShardedChange(NamedTuple):
    """What is added to a parameter of the model, on this process.

    Attributes:
        parameter: A sharded one, or one that every process has as a whole.
        local: The shape of what this process holds of it.
    """

    parameter: Tensor
    local: Tensor


def changes_by_cut(
    views: Mapping[str, MatrixView], factors: Mapping[str, Factors], agree: Agree
) -> list[ShardedChange]:
    """What turns matrices into the products of their factors; collective, one whole layer at a time.

    Args:
        views: The matrices by name; the model has to be resharded.
        factors: Of those that are cut. They may be sent from process to process as they are asked for.
        agree: Asked before anything is sent.

    Raises:
        UnsupportedError: Where the cut shifts a bias.
    """
    return [_of_one(views[name], factors[name], agree) for name in factors]


@torch.no_grad()
def _of_one(view: MatrixView, found: Factors, agree: Agree) -> ShardedChange:
    parameter = view.parameter

    def check() -> None:
        if found.bias_shift is not None:
            raise UnsupportedError(
                "What a cut does to the loss is not measured on sharded weights where it shifts biases. So it is not "
                "known beforehand."
            )

    agree(check)
    whole = gathered(view)
    change: ShardedChange = agree(lambda: ShardedChange(parameter, _local_change(parameter, whole, found)))
    return change


@in_full_precision
def _local_change(parameter: Any, whole: MatrixView, found: Factors) -> Tensor:
    """This process's part of it; the stand-in holds the whole weight, or both factors of a layer cut before."""
    before = whole.parameter.detach()
    goal = before.clone()
    whole.write_(found.to(goal.device).product(whole.group_count).to(goal), into=goal)
    change = goal.sub_(before)
    return share_of(change, parameter) if isinstance(parameter, DTensor) else change


@contextmanager
@torch.no_grad()
def moved_shards(model: nn.Module, changes: Sequence[ShardedChange], step: float) -> Iterator[None]:
    """Inside, the weights are moved by ``step`` times the changes; outside they are what they were, bit by bit.

    Every process has to do it, and run the model inside as often as the others.
    """
    reshard_(model)  # what was gathered before would be used as it is
    locals_ = {id(parameter): local_part(parameter) for parameter, _ in changes}
    before = {key: local.clone() for key, local in locals_.items()} if step else {}
    try:
        for parameter, change in changes if step else ():
            locals_[id(parameter)].add_(change, alpha=step)
        yield
    finally:
        reshard_(model)
        for key, local in before.items():
            locals_[key].copy_(local)
