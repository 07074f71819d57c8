"""Which targets no optimizer trains: a sign of networks that are not the model."""

from collections.abc import Iterable, Mapping

import torch

from lightning_prehab.kinds import view_of
from lightning_prehab.targets.locate import Target


def held_by_none(targets: Mapping[str, Target], optimizers: Iterable[torch.optim.Optimizer]) -> str | None:
    """A warning that names targets which no optimizer holds while others are held; None if there is nothing to say.

    If no target is held, nothing is being trained, and nothing can be told from that.
    """
    held = {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
    loose = [name for name, target in targets.items() if id(view_of(target).parameter) not in held]
    if not loose or len(loose) == len(targets):
        return None
    return (
        f"{len(loose)} of {len(targets)} targets are held by no optimizer (first: {loose[0]!r}). If they are a frozen "
        "loss network or a teacher, name them in exclude_modules, or the cut changes what the model is trained toward."
    )
