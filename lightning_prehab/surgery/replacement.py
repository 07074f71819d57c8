"""One layer and what takes its place: its parameters, what optimizers know of them, its error. Changes nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_prehab.kinds import MatrixView
from lightning_prehab.layers.linear import LowRankLayer, LowRankPlusSparseLinear
from lightning_prehab.layers.pivot import PivotLayer, bias_holder
from lightning_prehab.linalg.blocks import squares_of_error
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.surgery.moments import (
    bias_state,
    block_state,
    entry_state,
    factor_states,
    pivot_states,
    seen_state,
)
from lightning_prehab.targets.locate import Layer
from lightning_prehab.targets.names import join

#: What an optimizer knows of a parameter, as :func:`~lightning_prehab.surgery.meanings.readable_state` gives it.
StateOf = Callable[[Tensor], Mapping[str, Any] | None]


class Exchange(Protocol):
    """A layer and what takes its place, as the groups of an optimizer have to know of it."""

    @property
    def old(self) -> nn.Module:
        """The one."""

    @property
    def new(self) -> nn.Module:
        """The other."""

    def replaced(self) -> list[nn.Parameter]:
        """The parameters that the new layer does not hold any more."""

    def parameters(self, weight: Tensor) -> dict[str, Tensor]:
        """What takes the place of one of them, by name in the new layer."""

    def shifts(self, parameter: Tensor) -> list[tuple[slice, Tensor]]:
        """What is added to a parameter that both hold."""


class Inheriting(Exchange, Protocol):
    """One that can tell, too, what becomes of what an optimizer knows."""

    def states(self, weight: Tensor, state: Mapping[str, Any], of: StateOf) -> dict[Tensor, dict[str, Any]]:
        """What is known of those parameters; see :meth:`Replacement.states`."""


def renamed(exchange: Exchange) -> list[tuple[Tensor, tuple[str, str]]]:
    """Parameters that both layers hold, each with its old and its new name within the layer."""
    old = {id(parameter): name for name, parameter in exchange.old.named_parameters()}
    return [(p, (old[id(p)], name)) for name, p in exchange.new.named_parameters() if id(p) in old]


@dataclass
class Replacement:
    """One layer, and what takes its place; nothing is changed yet."""

    layer: Layer
    views: dict[str, MatrixView]
    factors: dict[str, Factors]  # by part, those that are cut
    new: LowRankLayer

    @classmethod
    def prepare(cls, layer: Layer, views: dict[str, MatrixView], factors: Mapping[str, Factors]) -> "Replacement":
        """The low-rank layer for a dense one.

        Args:
            layer: The dense one.
            views: All of its matrices, by part.
            factors: By the name of the matrix; of all layers, on any device (those of a checkpoint are on the CPU).
        """
        known = {part: factors.get(join(layer.name, part)) for part in views}
        mine = {part: one.to(views[part].parameter.device) for part, one in known.items() if one is not None}
        assert layer.kind is not None
        new = layer.kind.low_rank(layer.module, views, mine)
        made = cls(layer, views, mine, new)
        for part, found in mine.items():
            if found.bias_shift is not None and views[part].bias is None:
                shift = found.bias_shift.clone()
                holder: Any = bias_holder(made.child(part))
                holder.bias = nn.Parameter(shift, requires_grad=views[part].parameter.requires_grad)
        return made

    @property
    def old(self) -> nn.Module:
        """The dense layer."""
        return self.layer.module

    def child(self, part: str) -> Any:
        """What holds the factors of a part, or its dense weight."""
        return self.new.get_submodule(part)

    def replaced(self) -> list[nn.Parameter]:
        """The weights that the new layer does not hold any more; one of a matrix that is not cut may stay."""
        kept = {id(parameter) for parameter in self.new.parameters()}
        return [view.parameter for view in self.views.values() if id(view.parameter) not in kept]

    def parameters(self, weight: Tensor) -> dict[str, Tensor]:
        """What takes the place of a weight in an optimizer, by name in the new layer; old biases stay."""
        kept = {id(parameter) for parameter in self.old.parameters()}
        return {
            join(part, name): parameter
            for part, view in self.views.items()
            if view.parameter is weight
            for name, parameter in self.child(part).named_parameters()
            if id(parameter) not in kept
        }

    def states(self, weight: Tensor, state: Mapping[str, Any], of: StateOf) -> dict[Tensor, dict[str, Any]]:
        """What an optimizer knows of these parameters, from what it knows of the weight; unknown ones are left out.

        Args:
            weight: The weight.
            state: As :func:`~lightning_prehab.surgery.meanings.readable_state` gives it.
            of: The same for other weights.
        """
        found: dict[Tensor, dict[str, Any]] = {}
        for part, view in self.views.items():
            if view.parameter is not weight:
                continue
            child = self.child(part)
            if part not in self.factors:
                found[child.weight] = block_state(state, weight.shape, view.matrix)
                continue
            seen = seen_state(state, weight.shape, view.matrix)
            found |= _factor_states(view, child, seen)
            if isinstance(child, LowRankPlusSparseLinear):
                found[child.values] = entry_state(seen, child.indices, view.shape, child.values)
            if child.bias is not None and view.bias is None:
                found[child.bias] = bias_state(seen, child.bias)
        return {parameter: moved for parameter, moved in found.items() if moved}

    def shifts(self, parameter: Tensor) -> list[tuple[slice, Tensor]]:
        """What is added to a bias that both layers hold, and where; other parameters stay as they are."""
        found = []
        for part, factors in self.factors.items():
            bias = self.views[part].bias  # the parameter, or a part of it
            if factors.bias_shift is None or bias is None:
                continue
            start = bias.storage_offset() - parameter.storage_offset()
            if bias.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
                found.append((slice(start, start + len(bias)), factors.bias_shift))
        return found

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """``|W - B A - S|_F / |W|_F`` of each matrix that is cut, by name; 0 for a zero weight."""
        errors = {}
        for part, found in self.factors.items():
            view = self.views[part]
            error, norm = squares_of_error(view.weight.detach(), found, view.group_count).sqrt().float()
            errors[join(self.layer.name, part)] = float(error / norm.clamp_min(torch.finfo(torch.float32).tiny))
        return errors


def _factor_states(view: MatrixView, child: Any, state: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """States of the two factors of a matrix, from the state of the matrix."""
    if isinstance(child, PivotLayer):
        return pivot_states(state, child)
    a, b = view.unfold(child.A.weight, child.B.weight)
    if view.group_count == 1:
        for_a, for_b = factor_states(state, a, b)
    else:
        parts = []
        for index, (a_part, b_part) in enumerate(
            zip(a.chunk(view.group_count), b.chunk(view.group_count), strict=True)
        ):
            own = seen_state(state, view.shape, partial(_chunk, count=view.group_count, index=index))
            parts.append(factor_states(own, a_part, b_part))
        for_a, for_b = (_joined_states([part[side] for part in parts]) for side in (0, 1))
    folded = {key: view.fold(for_a[key], for_b[key]) for key in for_a if _is_matrix(for_a[key])}
    for_a |= {key: pair[0] for key, pair in folded.items()}
    for_b |= {key: pair[1] for key, pair in folded.items()}
    return {child.A.weight: for_a, child.B.weight: for_b}


def _chunk(tensor: Tensor, count: int, index: int) -> Tensor:
    return tensor.chunk(count)[index]


def _joined_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of factors that stand one below the other."""
    first = states[0]
    return {
        key: torch.cat([state[key] for state in states]) if _is_matrix(value) else value for key, value in first.items()
    }


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
