"""The penalty of some layers, its gradient, and how strong it has to be."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.regularizers import GradientRatio, Penalty


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


def measured_strength(
    ratio: GradientRatio, weights: Sequence[Tensor], gradients: Sequence[Tensor], scale: float
) -> float | Tensor:
    """The factor that gives the penalty its share of the task gradient, which is in ``grad``, times ``scale``."""
    task = [weight.grad for weight in weights if weight.grad is not None]
    norms = (torch.stack([part.float().norm() for part in parts]).norm() for parts in (task, gradients))
    return ratio.update(next(norms) / scale, next(norms))


def add_gradients_(weights: Sequence[Tensor], gradients: Sequence[Tensor], factor: float | Tensor) -> None:
    """Adds ``factor`` times the gradients to those that are there."""
    for weight, gradient in zip(weights, gradients, strict=True):
        addend = (gradient * factor).to(weight.dtype)
        weight.grad = addend if weight.grad is None else weight.grad.add_(addend)
