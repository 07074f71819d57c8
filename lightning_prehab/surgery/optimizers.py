"""The only file that changes an optimizer: factors take the place of a weight, with what is known of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.surgery.replacement import Replacement


def check_optimizer(optimizer: torch.optim.Optimizer, split: Iterable[Tensor] = ()) -> None:
    """Raises :class:`UnsupportedError` for an optimizer whose state cannot follow a change of parameters.

    Args:
        optimizer: The optimizer.
        split: Weights that leave a vector beside their factors: the values of a sparse part, a new bias.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "LBFGS keeps one flat history over all parameters and cannot follow the surgery; use another optimizer, or "
            "compress after training with compress_()."
        )
    if (
        type(optimizer).__name__ == "ZeroRedundancyOptimizer"
    ):  # not imported: it exists only where torch.distributed does
        raise UnsupportedError(
            "ZeroRedundancyOptimizer has assigned the parameters to ranks once and for all and would never step the "
            "factors; use the plain optimizer until the compression is done."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if type(optimizer).__name__ == "Muon" and any(id(weight) in held for weight in split):  # newer than our torch
        raise UnsupportedError(
            "Muon steps matrices alone, and the values of a sparse part or a new bias are vectors; use another "
            "optimizer for the targets, or a factorization that makes two factors and nothing else."
        )


@dataclass
class GroupEdit:
    """The new content of one parameter group; :meth:`commit` puts it there and cannot fail."""

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    params: list[Tensor]
    names: list[str]
    removed: list[Tensor]
    states: dict[Tensor, dict[str, Any]]

    def order(self, parameters: Sequence[Tensor]) -> None:
        """Brings the parameters of one layer, if they stand side by side, into the order of a fresh optimizer."""
        rank = {id(parameter): index for index, parameter in enumerate(parameters)}
        places = [place for place, parameter in enumerate(self.params) if id(parameter) in rank]
        if not places or places[-1] - places[0] >= len(places):
            return  # it is not held, or the groups were not made in the order of the model
        ordered = sorted(places, key=lambda place: rank[id(self.params[place])])
        self.params[places[0] : places[-1] + 1] = [self.params[place] for place in ordered]
        self.names[places[0] : places[-1] + 1] = [self.names[place] for place in ordered]

    def commit(self) -> None:
        """Changes the optimizer."""
        self.group["params"][:] = self.params
        if "param_names" in self.group:
            self.group["param_names"][:] = self.names
        for parameter in self.removed:
            self.optimizer.state.pop(parameter, None)
        self.optimizer.state.update(self.states)


def plan_edits(optimizer: torch.optim.Optimizer, replacements: Sequence[Replacement]) -> list[GroupEdit]:
    """What has to change in an optimizer when layers are replaced; nothing is changed yet.

    Raises:
        UnsupportedError: As :func:`check_optimizer`.
    """
    by_weight = {id(weight): one for one in replacements for weight in one.replaced()}
    split = [
        weight
        for one in replacements
        for weight in one.replaced()
        if any(part.dim() < 2 for part in by_weight[id(weight)].parameters(weight).values())
    ]
    check_optimizer(optimizer, split)
    renamed = {id(parameter): names for one in replacements for parameter, names in one.renamed()}
    edits = []
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        edit = GroupEdit(optimizer, group, [], [], [], {})
        for parameter, name in zip(group["params"], names, strict=True):
            found = by_weight.get(id(parameter))
            if found is None:
                before, after = renamed.get(id(parameter), ("", ""))
                edit.params.append(parameter)
                edit.names.append(name.removesuffix(before) + after)
                continue
            own = next(key for key, weight in found.old.named_parameters() if weight is parameter)
            parts = found.parameters(parameter)
            edit.params.extend(parts.values())
            edit.names.extend(name.removesuffix(own) + part for part in parts)
            edit.removed.append(parameter)
            state = optimizer.state.get(parameter)
            if state:
                edit.states.update(found.states(parameter, state))
        for one in replacements:
            edit.order(list(one.new.parameters()))
        edits.append(edit)
    return edits
