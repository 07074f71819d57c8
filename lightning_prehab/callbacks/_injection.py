"""The penalty of some layers, its gradient, and how strong it has to be."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.callbacks._sharded_acts import pull_of_shards
from lightning_prehab.callbacks._sharded_layers import ShardedLayer
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.linalg.matrices import widened
from lightning_prehab.linalg.sharding import is_distributed, local_part
from lightning_prehab.regularizers import GradientRatio, Penalty
from lightning_prehab.sharded.rows import norm_of_shards
from lightning_prehab.sharded.shares import dtensor_like

#: Some parameters, each with the gradient of a penalty; of a sharded one in what this process has of it.
Pull = Sequence[tuple[nn.Parameter, Tensor]]


def add_to_loss_(loss: Tensor, penalty: Tensor, factor: float | Tensor) -> None:
    """Adds ``factor`` times a penalty to a loss in place.

    Raises:
        UnsupportedError: If the loss cannot be changed.
    """
    try:
        loss.add_((penalty * factor).to(loss.dtype))
    except RuntimeError as error:
        raise UnsupportedError(
            f"This loss cannot be changed in place ({error}); use PrehabCallback(injection='gradient')."
        ) from error


def penalty_of(
    regularizer: Penalty, layers: Sequence[RegularizedLayer], mine: Sequence[RegularizedLayer], processes: int | None
) -> tuple[Tensor, Tensor] | None:
    """Sum over the trainable ones of some layers, divided by the number of all.

    With ``processes`` the layers are those of this process, and the sum is multiplied by the number of processes: DDP
    takes the mean of the gradients, which is then that of the whole penalty, at no communication of its own.

    Args:
        regularizer: The penalty.
        layers: All layers.
        mine: Those that count here.
        processes: How many share the work, or None if every process does all of it.

    Returns:
        The sum, differentiable, and the mean over the trainable layers (over ``mine`` if the work is not shared); None
        if there is none.
    """
    trainable = [layer for layer in layers if layer.parameter.requires_grad]
    values = [layer.penalty(regularizer) for layer in mine if layer.parameter.requires_grad]
    if not trainable or not (values or processes is not None):
        return None
    total = torch.stack(values).sum() if values else torch.zeros((), device=trainable[0].parameter.device)
    factor = 1 if processes is None else processes
    count = len(values) if processes is None else len(trainable)
    return total * (factor / len(layers)), factor * total.detach() / count


def pull_of(
    trainer: "pl.Trainer", regularizer: Penalty, layers: Sequence[RegularizedLayer], mine: Sequence[RegularizedLayer]
) -> tuple[Pull, Tensor] | None:
    """The gradient of what :func:`penalty_of` says where every process does all of it.

    Args:
        trainer: The running Trainer.
        regularizer: The penalty.
        layers: All layers.
        mine: Those that count here, with trainable weights.

    Returns:
        The gradient, and the mean over ``mine``; None if there is none.
    """
    shards = [layer for layer in mine if isinstance(layer, ShardedLayer)]
    if shards:
        values, pull = pull_of_shards(trainer, regularizer, shards)
        return [(one, gradient / len(layers)) for one, gradient in pull], torch.stack(values).mean()
    found = penalty_of(regularizer, layers, mine, None)
    if found is None:
        return None
    weights = list({id(one): one for layer in mine for one in layer.parameters if one.requires_grad}.values())
    return list(zip(weights, torch.autograd.grad(found[0], weights), strict=True)), found[1]


def add_to_gradients_(
    optimizer: torch.optim.Optimizer,
    layers: Sequence[RegularizedLayer],
    pull: Callable[[Sequence[RegularizedLayer]], Pull | None],
    strength: float | Tensor | GradientRatio,
    ramp: float,
    scale: float | Tensor,
) -> float | Tensor | None:
    """Adds the gradient of a penalty to those of an optimizer's weights.

    Args:
        optimizer: It is about to step.
        layers: All layers.
        pull: The gradient of the penalty of some of them.
        strength: Its factor, or what measures it.
        ramp: A factor on the strength.
        scale: That of the gradients that are there.

    Returns:
        The strength; None if there was nothing to do, as before any backward pass.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    mine = [layer for layer in layers if id(layer.parameter) in held and layer.parameter.requires_grad]
    if all(layer.parameter.grad is None for layer in mine):
        return None
    with torch.enable_grad(), torch.autocast(mine[0].device.type, enabled=False):
        found = pull(mine)
    if found is None:
        return None
    for weight, _ in found:
        _settle_(weight)
    if isinstance(strength, GradientRatio):
        task = [(weight, weight.grad) for weight, _ in found if weight.grad is not None]
        norms = [_norm(parts, mine) for parts in (task, found)]
        strength = strength.update(norms[0] / scale, norms[1])
    used = strength * ramp
    for weight, gradient in found:
        _add_(weight, gradient * (used * scale))
    return used


def _norm(parts: Pull, layers: Sequence[RegularizedLayer]) -> Tensor:
    """Of gradients taken together; sharded ones are those of all processes."""
    spreads = {id(one.parameter): one for layer in layers if isinstance(layer, ShardedLayer) for one in layer.spreads}
    if spreads:
        return norm_of_shards([(spreads[id(one)], local_part(part)) for one, part in parts])
    norm: Tensor = torch.stack([widened(part).norm() for _, part in parts]).norm()
    return norm


@torch.no_grad()
def _settle_(weight: nn.Parameter) -> None:
    """Makes a gradient lie as its weight does; that of a factor which all have may be a sum still to be made."""
    grad: Any = weight.grad
    if grad is not None and is_distributed(weight) and grad.placements != weight.placements:  # type: ignore[attr-defined]
        weight.grad = grad.redistribute(placements=weight.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def _add_(weight: nn.Parameter, addend: Tensor) -> None:
    """Adds to the gradient of a weight, or of what this process has of it."""
    addend = addend.to(weight.device, weight.dtype)
    if not is_distributed(weight):
        weight.grad = addend if weight.grad is None else weight.grad.add_(addend)
    elif weight.grad is None:
        weight.grad = dtensor_like(addend, weight)  # type: ignore[arg-type]
    else:
        local_part(weight.grad).add_(addend)
