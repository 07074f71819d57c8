"""Runs a model on a batch, and looks at all that comes out of it."""

import copy
from typing import Any

from torch import nn

from lightning_prehab.statistics.batches import ask_model
from lightning_prehab.statistics.calibration import Forward


def outputs_of(model: nn.Module, batch: Any, forward: Forward | None) -> list[Any]:
    """What the model returns for a batch; with a ``forward`` what that returns, then what the model has returned in it.

    So there are logits to be found where a ``forward`` makes a loss of them.
    """
    if forward is None:
        return [ask_model(model, batch)]
    seen: list[Any] = []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        return [forward(model, batch), *seen]
    finally:
        hook.remove()


def copied(batch: Any) -> Any:
    """A copy, if it can be copied: a ``forward`` may take the batch apart."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # a batch may be anything: a non-leaf tensor, a generator
        return batch
