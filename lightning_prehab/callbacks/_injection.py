"""The penalty of some layers, its gradient, and how strong it has to be."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.regularizers import GradientRatio, Penalty


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


def _measured_strength(
    ratio: GradientRatio, weights: Sequence[Tensor], gradients: Sequence[Tensor], scale: float | Tensor
) -> Tensor:
    """The factor that gives the penalty its share of the task gradient, which is in ``grad``, times ``scale``."""
    task = [weight.grad for weight in weights if weight.grad is not None]
    norms = (torch.stack([part.float().norm() for part in parts]).norm() for parts in (task, gradients))
    return ratio.update(next(norms) / scale, next(norms))


def add_to_gradients_(
    optimizer: torch.optim.Optimizer,
    layers: Sequence[RegularizedLayer],
    penalty: Callable[[Sequence[RegularizedLayer]], Tensor | None],
    strength: float | Tensor | GradientRatio,
    ramp: float,
    scale: float | Tensor,
) -> float | Tensor | None:
    """Adds the gradient of a penalty to those of an optimizer's weights.

    Args:
        optimizer: It is about to step.
        layers: All layers.
        penalty: The penalty of some of them, differentiable.
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
    weights = list({id(one): one for layer in mine for one in layer.parameters if one.requires_grad}.values())
    with torch.enable_grad(), torch.autocast(weights[0].device.type, enabled=False):
        value = penalty(mine)
        if value is None:
            return None
        gradients = torch.autograd.grad(value, weights)
    if isinstance(strength, GradientRatio):
        strength = _measured_strength(strength, weights, gradients, scale)
    used = strength * ramp
    for weight, gradient in zip(weights, gradients, strict=True):
        addend = (gradient * (used * scale)).to(weight.dtype)
        weight.grad = addend if weight.grad is None else weight.grad.add_(addend)
    return used
