"""Activations that are computed twice rather than kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_prehab.errors import TargetError
from lightning_prehab.refinement.blocks import find_blocks
from lightning_prehab.refinement.memory import SavedBytes, bytes_to_train, free_memory
from lightning_prehab.refinement.pair import Pair
from lightning_prehab.refinement.sequences import first_row
from lightning_prehab.statistics.batches import batch_size

#: Share of the free memory that activations may take.
ROOM = 0.5


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside, the blocks of a model keep their inputs alone for the backward pass.

    Raises:
        TargetError: If the model has no blocks.
    """
    blocks = [block for _, block in find_blocks(model)]
    theirs = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, forward in zip(blocks, theirs, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def is_due(pair: Pair, batch: Any, parameters: list[nn.Parameter]) -> bool:
    """Whether the activations of a step would take too much: told by the first row of a batch."""
    free = free_memory(pair.device)
    try:
        find_blocks(pair.model)
    except TargetError:
        return False
    if free is None:
        return False
    alone = first_row(batch)
    saved = SavedBytes()
    try:
        with saved:
            pair.distance(alone)
    except Exception:
        if alone is batch:
            raise
        alone, saved = batch, SavedBytes()  # a model may take whole batches alone
        with saved:
            pair.distance(alone)
    return saved.bytes * (1 if alone is batch else batch_size(batch)) > ROOM * max(free - bytes_to_train(parameters), 0)
