"""The only file that changes an optimizer: factors take the place of a weight, with what is known of it."""

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.linalg.sharding import is_distributed, local_part
from lightning_prehab.surgery.meanings import ITERATES, counts_in_group, flags, readable_state
from lightning_prehab.surgery.rehearsal import fresh_states
from lightning_prehab.surgery.replacement import Exchange, Inheriting, renamed
from lightning_prehab.surgery.rows_and_columns import parted
from lightning_prehab.surgery.wrapped import caches, family, second_holder

X = TypeVar("X", bound=Exchange)


def check_optimizer(
    optimizer: torch.optim.Optimizer, split: Iterable[Tensor] = (), weights: Iterable[Tensor] = ()
) -> None:
    """Raises :class:`UnsupportedError` for an optimizer whose state cannot follow a change of parameters.

    Args:
        optimizer: The optimizer; those that it wraps are looked at, too.
        split: Weights that leave a vector beside their factors: the values of a sparse part, a new bias.
        weights: All weights that may be replaced.
    """
    weights, split = list(weights), list(split)
    for one in family(optimizer):
        _check_one(one, split, weights)


def _check_one(optimizer: torch.optim.Optimizer, split: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "LBFGS keeps one flat history over all parameters and cannot follow the surgery; use another optimizer, or "
            "compress after training with compress_()."
        )
    name = type(optimizer).__name__
    if name == "ZeroRedundancyOptimizer":  # not imported: it exists only where torch.distributed does
        raise UnsupportedError(
            "ZeroRedundancyOptimizer has assigned the parameters to ranks once and for all and would never step the "
            "factors; use the plain optimizer until the compression is done."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if name == "Muon" and not _steps_vectors(optimizer) and any(id(weight) in held for weight in split):
        raise UnsupportedError(
            "Muon steps matrices alone, and the values of a sparse part or a new bias are vectors; use another "
            "optimizer for the targets, or a factorization that makes two factors and nothing else."
        )
    attribute = second_holder(optimizer, weights)
    if attribute is not None:
        raise UnsupportedError(
            f"{name} holds weights that are to be cut, or tensors for them, in its attribute {attribute!r} besides its "
            "groups, and would go on with these instead of the factors; use another optimizer for the targets, or "
            "compress after training with compress_()."
        )


def _steps_vectors(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a Muon has another rule for vectors: that of timm has, that of torch (newer than our oldest) has not."""
    return type(optimizer).__module__.startswith("timm.")


@dataclass
class StateEdit:
    """What changes in a dictionary that has parameters as keys."""

    state: MutableMapping[Any, Any]
    removed: list[Tensor] = field(default_factory=list)
    added: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    shifts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def commit(self) -> None:
        """Changes the dictionary."""
        for parameter in self.removed:
            self.state.pop(parameter, None)
        self.state.update(self.added)
        for kept, shift in self.shifts:
            kept.add_(shift)


@dataclass
class GroupEdit:
    """The new content of one parameter group; :meth:`commit` puts it there and cannot fail."""

    group: dict[str, Any]
    states: list[StateEdit]
    params: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

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
        for edit in self.states:
            edit.commit()


#: What an optimizer shall know of what takes the place of a weight: its group, the weight, the exchange.
StatesOf = Callable[[torch.optim.Optimizer, Mapping[str, Any], Tensor, X], dict[Tensor, dict[str, Any]]]


def listed_optimizers(optimizers: object) -> list[torch.optim.Optimizer]:
    """The optimizers one by one.

    Raises:
        ArgumentError: If they are none.
    """
    if isinstance(optimizers, torch.optim.Optimizer):
        raise ArgumentError("optimizers is one optimizer; give a list, for example optimizers=[optimizer].")
    found: list[Any] = list(optimizers) if isinstance(optimizers, Iterable) else [None]
    if not all(hasattr(one, "param_groups") for one in found):
        raise ArgumentError(f"optimizers must be a list of optimizers, got {show(optimizers)}.")
    return found


def plan_edits(optimizer: torch.optim.Optimizer, replacements: Sequence[X], states: StatesOf[X]) -> list[GroupEdit]:
    """What has to change in an optimizer when layers are replaced; nothing is changed yet.

    Args:
        optimizer: The optimizer; those that it wraps are edited, too.
        replacements: The layers.
        states: What it shall know of the new parameters; :func:`inherited_states`, or what is known already.

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
    check_optimizer(optimizer, split, [weight for one in replacements for weight in one.replaced()])
    names = {id(parameter): both for one in replacements for parameter, both in renamed(one)}
    edits = []
    for one in family(optimizer):
        for group in one.param_groups:
            edit = _plan_group(one, group, replacements, by_weight, names, states)
            for replacement in replacements:
                edit.order(list(replacement.new.parameters()))
            edits.append(edit)
    return edits


def _plan_group(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    replacements: Sequence[X],
    by_weight: Mapping[int, X],
    both_names: Mapping[int, tuple[str, str]],
    states: StatesOf[X],
) -> GroupEdit:
    """The edit of one group, with the parameters in the order in which they replace each other."""
    removed = [parameter for parameter in group["params"] if id(parameter) in by_weight]
    own = StateEdit(optimizer.state, removed)
    edit = GroupEdit(group, [own, *(StateEdit(other, removed) for other in caches(optimizer, removed))])
    names = group.get("param_names", [""] * len(group["params"]))
    for parameter, name in zip(group["params"], names, strict=True):
        found = by_weight.get(id(parameter))
        if found is None:
            before, after = both_names.get(id(parameter), ("", ""))
            edit.params.append(parameter)
            edit.names.append(name.removesuffix(before) + after)
            own.shifts.extend(_shifts(parameter, optimizer.state.get(parameter), replacements))
            continue
        within = next(key for key, weight in found.old.named_parameters() if weight is parameter)
        parts = found.parameters(parameter)
        edit.params.extend(parts.values())
        edit.names.extend(name.removesuffix(within) + part for part in parts)
        own.added.update(states(optimizer, group, parameter, found))
    return edit


def inherited_states(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], weight: Tensor, found: Inheriting
) -> dict[Tensor, dict[str, Any]]:
    """What follows from what the optimizer itself knows of the layer."""
    return moved_states(optimizer, group, weight, found, lambda other: optimizer.state.get(other, {}))


def moved_states(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    weight: Tensor,
    found: Inheriting,
    state_of: Callable[[Tensor], Mapping[str, Any]],
) -> dict[Tensor, dict[str, Any]]:
    """What takes the place of the state of a weight; parameters that start with nothing are left out.

    Args:
        optimizer: The one that keeps it.
        group: The group of the weight.
        weight: The weight.
        found: The layer that holds it, and what takes its place.
        state_of: The state of a weight of that layer.
    """
    state = state_of(weight)
    if not state:
        return {}
    known = readable_state(optimizer, weight, state)

    def of(other: Tensor) -> Mapping[str, Any] | None:
        return readable_state(optimizer, other, state_of(other))

    moved = {} if known is None else found.states(weight, known, of)
    least = group.get("min_dim_size_to_factor", 0)  # of timm
    moved = {parameter: parted(parameter, one, state, least) for parameter, one in moved.items()}
    rest = [parameter for parameter in found.parameters(weight).values() if parameter not in moved]
    if known is None and counts_in_group(group, state):
        warnings.warn(
            f"{type(optimizer).__name__} counts its steps for all parameters together, and the factors of a layer "
            f"start without {', '.join(map(str, state))}, which cannot be carried: their first steps may be larger "
            "than usual. RehabSchedule warms the learning rate up after the cut.",
            stacklevel=2,
        )
    if known is None or flags(state):
        moved |= fresh_states(optimizer, group, weight, state, rest)
    return moved


def _shifts(
    parameter: Tensor, state: Mapping[str, Any] | None, replacements: Sequence[Exchange]
) -> list[tuple[Tensor, Tensor]]:
    """Where the state of a bias that is kept holds other values of it, which move with it: parts, and by how much."""
    known = [value for key, value in (state or {}).items() if key in ITERATES and isinstance(value, Tensor)]
    known = [value for value in known if value.shape == parameter.shape]
    iterates = [local_part(value) if is_distributed(value) else value for value in known]
    return [
        (value[part], shift.to(value.dtype))
        for value in iterates
        if type(value) is Tensor
        for one in replacements
        for part, shift in one.shifts(parameter)
    ]
