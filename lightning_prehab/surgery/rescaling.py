"""Two factors whose sizes are shared out evenly again, and what their optimizers know of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.layers.pairs import FactorPair
from lightning_prehab.linalg.sharding import is_distributed, local_part
from lightning_prehab.surgery.meanings import FIRST_MOMENTS, ITERATES, LARGEST, SECOND_MOMENTS, readable_state


@torch.no_grad()
def rebalance_(pair: FactorPair, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Makes each row of ``A`` as long as its column of ``B``, within a factor of 2.

    They are multiplied by powers of two, so that no digit is lost: the product is the same bit by bit, and gradients
    and moments are those of the new factors, exactly: a first moment is divided by what its entry was multiplied by, a
    second one by its square.

    Args:
        pair: The factors.
        optimizers: All that may hold a state of them.

    Returns:
        False if a state has something of unknown meaning; then nothing is changed.
    """
    scales = pair.even_scales()
    if scales is None:
        return True
    changes: list[tuple[Tensor, Tensor]] = []
    for parameter, scale in zip(pair.both, scales, strict=True):
        if parameter.grad is not None:
            changes.append((parameter.grad, 1 / scale))
        for optimizer in optimizers:
            found = _changes(optimizer, parameter, scale)
            if found is None:
                return False
            changes += found
        changes.append((parameter, scale))
    for value, scale in changes:
        local_part(value).mul_(scale.to(value.dtype))
    return True


def _changes(optimizer: torch.optim.Optimizer, parameter: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """What in the state of a parameter is multiplied by what; None if it is not known."""
    state = {key: _here(value) for key, value in optimizer.state.get(parameter, {}).items()}
    known = readable_state(optimizer, local_part(parameter), state)
    if known is None or "s" in known:  # MADGRAD has an iterate that moves by no power of two
        return None
    changes = []
    for key, value in known.items():
        if key not in state:
            return None  # it is kept in parts, such as rows and columns
        if not isinstance(value, Tensor) or value.dim() == 0 or value is not state[key]:
            continue  # a counter, or an average of steps, which have no unit where they are divided by a second moment
        if key in ITERATES or key == "step_size":
            changes.append((value, scale))
        elif key in FIRST_MOMENTS or key in LARGEST:
            changes.append((value, 1 / scale))
        elif key in SECOND_MOMENTS:
            changes.append((value, 1 / scale.square()))
        else:  # Adadelta: the squares of steps
            changes.append((value, scale.square()))
    return changes


def _here(value: Any) -> Any:
    return local_part(value) if isinstance(value, Tensor) and is_distributed(value) else value
