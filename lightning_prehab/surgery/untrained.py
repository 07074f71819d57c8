"""Which targets no optimizer trains: a sign of networks that are not the model."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lightning_prehab.kinds import view_of
from lightning_prehab.targets.locate import Target


def held_by_none(targets: Mapping[str, Target], optimizers: Iterable[torch.optim.Optimizer]) -> str | None:
    """A warning that names trainable targets which no optimizer holds; None if there is nothing to say.

    Frozen ones are held by nobody on purpose. If no target is held, nothing is being trained, and nothing can be told
    from that.
    """
    held = _held(targets, optimizers)
    loose = [name for name in targets if name not in held and name not in frozen(targets)]
    if not loose or not held:
        return None
    return (
        f"{len(loose)} of {len(targets)} targets are held by no optimizer (first: {loose[0]!r}). If they are a loss "
        "network or a teacher, name them in exclude_modules, or the cut changes what the model is trained toward; if "
        "they shall stay as they are, say so with requires_grad_(False)."
    )


def frozen(targets: Mapping[str, Target]) -> list[str]:
    """Names of those whose weights are not trained at all."""
    return [name for name, target in targets.items() if not any(one.requires_grad for one in _matrices(target))]


def _held(targets: Mapping[str, Target], optimizers: Iterable[torch.optim.Optimizer]) -> set[str]:
    held = {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
    return {name for name, target in targets.items() if any(id(one) in held for one in _matrices(target))}


def _matrices(target: Target) -> tuple[nn.Parameter, ...]:
    """The weight, or both factors of a layer that has been cut before."""
    return view_of(target).parameters
