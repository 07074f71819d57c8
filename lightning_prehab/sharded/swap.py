"""The swap of a sharded model: layer by layer made ready on all processes, then put in place without sending anything.

``surgery`` makes every new layer, from a plain copy of the old one (:class:`~lightning_prehab.sharded.exchange.Shell`).
Of a linear layer whose rows are divided, and which becomes two factors, nothing is gathered: its error and the states
of its factors are sums over rows. Of any other layer the weight is gathered, then one state after the other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.kinds.linear import LinearView
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.plan.compression_plan import CompressionPlan, LayerPlan
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.origin import Origin
from lightning_prehab.sharded.agreement import Agree, alone
from lightning_prehab.sharded.engine import Managed, managed_by, reshard_, settle_
from lightning_prehab.sharded.exchange import ShardedExchange, Shell
from lightning_prehab.sharded.served import why_not_served
from lightning_prehab.sharded.shares import full, row_dimension, share_of
from lightning_prehab.sharded.states import (
    LayerInRows,
    Moved,
    holders_of,
    in_rows,
    placed,
    states_of_whole,
    whole_states,
    with_sums,
)
from lightning_prehab.surgery.factors import planned_targets, stays_as_it_is
from lightning_prehab.surgery.moments import AddUp
from lightning_prehab.surgery.optimizers import GroupEdit, check_optimizer, plan_edits
from lightning_prehab.surgery.pretrained import check_pretrained, note_structure_
from lightning_prehab.surgery.replacement import Replacement
from lightning_prehab.surgery.swap import check_hooks, kind_of_exchange, put_, slots_of
from lightning_prehab.targets.find import count_dense_parameters, count_parameters
from lightning_prehab.targets.locate import Layer, locate
from lightning_prehab.targets.names import join


@dataclass
class ChangeOfShards:
    """Layers that are ready to be replaced; :meth:`commit` consists of assignments alone and sends nothing."""

    model: nn.Module
    exchanges: list[ShardedExchange]
    edits: list[GroupEdit] = field(default_factory=list)

    @torch.no_grad()
    def commit(self) -> None:
        """Changes the model, what FSDP2 knows of it, and the optimizers."""
        for one in self.exchanges:
            for bias in one.new.parameters():
                for _, shift in one.shifts(bias):
                    (bias.to_local() if isinstance(bias, DTensor) else bias).add_(shift)
        plain = [one for one in self.exchanges if not one.is_unit]
        slots = slots_of(self.model, {id(one.old): one.new for one in plain})
        put_(slots, [(one.old, one.new) for one in plain])
        groups = {id(old.group): old.group for one in self.exchanges for old, _ in one.managed}
        for one in self.exchanges:
            one.commit()
        for group in groups.values():
            settle_(group)
        for edit in self.edits:
            edit.commit()
        note_structure_(self.model)


@dataclass
class PreparedShardedSwap:
    """A swap that every process is ready to make."""

    plan: CompressionPlan
    change: ChangeOfShards
    errors: Mapping[str, float]

    def commit(self) -> CompressionReport:
        """Changes the model and the optimizers."""
        model = self.change.model
        before = count_dense_parameters(model)
        self.change.commit()
        origin = Origin.of(model)
        return CompressionReport(self.plan, self.errors, before, count_parameters(model), origin=origin)


@in_full_precision
def prepare_sharded_swap(
    model: nn.Module,
    plan: CompressionPlan,
    factors: Mapping[str, Factors],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    agree: Agree = alone,
) -> PreparedShardedSwap:
    """All that a swap of a sharded model computes, sends and checks; nothing is changed yet.

    Every process has to call it. Layers are made ready one after the other, in the order of the model.

    Args:
        model: The module that the plan was made for.
        plan: What is cut to which rank.
        factors: Asked once for those of each layer that changes, by all processes in the same order; it may send them.
        optimizers: Those that hold the weights.
        agree: ``agree(work)`` returns ``work()``, and raises on every process if it fails on one.

    Raises:
        PlanError: If the plan does not fit the model.
        UnsupportedError: If a layer or an optimizer cannot be served. Model and optimizers are as they were.
    """
    optimizers = list(optimizers)
    agree(lambda: reshard_(model))
    found: _Layers = agree(lambda: _layers(model, plan, optimizers))
    errors: dict[str, float] = {}
    exchanges = []
    for layer, views in found.layers:
        made = _OneLayer(layer, views, found, optimizers, agree)
        exchanges.append(made.prepare(factors))
        errors |= made.errors
    change = agree(lambda: change_of(model, exchanges, optimizers))
    cut = [layer.name for layer in plan.layers if layer.rank is not None]
    return PreparedShardedSwap(plan, change, {name: errors.get(name, 0.0) for name in cut})


def change_of(
    model: nn.Module, exchanges: list[ShardedExchange], optimizers: Sequence[torch.optim.Optimizer]
) -> ChangeOfShards:
    """What replaces layers in a model and in its optimizers."""

    def moved(
        optimizer: torch.optim.Optimizer, _: Any, weight: Tensor, exchange: ShardedExchange
    ) -> dict[Tensor, dict[str, Any]]:
        return exchange.moved.get((id(optimizer), id(weight)), {})

    edits = [edit for optimizer in optimizers for edit in plan_edits(optimizer, exchanges, moved)]
    return ChangeOfShards(model, exchanges, edits)


@dataclass
class _Layers:
    """The layers that change, checked."""

    layers: list[tuple[Layer, dict[str, MatrixView]]]
    cuts: dict[str, LayerPlan]
    index: dict[int, Managed]


def _layers(model: nn.Module, plan: CompressionPlan, optimizers: Sequence[torch.optim.Optimizer]) -> _Layers:
    targets = planned_targets(model, plan)
    wanted = [layer for layer in plan.layers if layer.rank is not None]
    cuts = {layer.name: layer for layer in wanted if not stays_as_it_is(layer, view_of(targets[layer.name]))}
    located = list(locate(model, {name: (cut.out_features, cut.in_features) for name, cut in cuts.items()}).values())
    check_pretrained(model, (layer.module for layer, _ in located))
    index = managed_by(model)
    for layer, views in located:
        mine = [cuts[join(layer.name, part)] for part in views if join(layer.name, part) in cuts]
        reason = why_not_served(views.values(), index, two_factors=all(_two_factors(cut) for cut in mine))
        if reason is not None:
            raise UnsupportedError(f"Layer {layer.name!r} cannot be cut now: {reason}.")
    weights = [parameter for _, views in located for view in views.values() for parameter in view.parameters]
    for optimizer in optimizers:
        check_optimizer(optimizer, (), weights)
    return _Layers(located, cuts, index)


def _two_factors(cut: LayerPlan) -> bool:
    return cut.layout == "factors" and cut.nonzeros == 0


class _OneLayer:
    """Makes one layer ready.

    Args:
        layer: The layer.
        views: Its matrices, by part.
        among: What is known of the model.
        optimizers: Those that may hold its weights.
        agree: As of :func:`prepare_sharded_swap`.

    Attributes:
        errors: Of its matrices that are cut, by name.
    """

    def __init__(
        self,
        layer: Layer,
        views: dict[str, MatrixView],
        among: _Layers,
        optimizers: Sequence[torch.optim.Optimizer],
        agree: Agree,
    ) -> None:
        self._layer, self._views, self._index = layer, views, among.index
        self._cuts = {name: among.cuts[name] for part in views if (name := join(layer.name, part)) in among.cuts}
        self._optimizers, self._agree = optimizers, agree
        self._weights = list({id(one): one for view in views.values() for one in view.parameters}.values())
        self.errors: dict[str, float] = {}

    def prepare(self, factors: Mapping[str, Factors]) -> ShardedExchange:
        """The new layer, sharded, with all that optimizers know of it."""
        rows = self._agree(self._in_rows)
        shell, made = self._built({} if rows else self._gather(), {name: factors[name] for name in self._cuts})
        if rows:
            child = made.child("")  # it has copies of the factors: they are kept once
            made.factors[""] = made.factors[""]._replace(A=child.A.weight.detach(), B=child.B.weight.detach())
            moved = self._from_rows(made)
        else:
            self.errors = self._agree(made.errors)
            known = {id(weight): whole_states(weight, self._optimizers) for weight in self._weights}
            moved = self._agree(lambda: states_of_whole(made, shell.originals, known, self._optimizers))
            del known
        exchange: ShardedExchange = self._agree(lambda: self._divided(shell, made, moved))
        return exchange

    def _in_rows(self) -> bool:
        """Whether it is a linear layer of which nothing has to be gathered."""
        view, weight = self._views.get(""), self._weights[0]
        return (
            type(view) is LinearView
            and all(_two_factors(cut) for cut in self._cuts.values())
            and isinstance(weight, DTensor)
            and row_dimension(weight) is not None
            and in_rows(weight, self._optimizers)
        )

    def _gather(self) -> dict[int, Tensor]:
        sharded = [one for one in self._weights if isinstance(one, DTensor)]
        self._agree(lambda: _room_for(sharded))
        return {id(one): full(one) for one in sharded}

    def _built(self, values: Mapping[int, Tensor], found: Mapping[str, Factors]) -> tuple[Shell, Replacement]:
        def work() -> tuple[Shell, Replacement]:
            shell = Shell.of(self._layer, self._views, values)
            made = kind_of_exchange(self._views).prepare(shell.layer, shell.views, found)
            check_hooks([kind_of_exchange(self._views)(self._layer, self._views, made.factors, made.new)])
            return shell, made

        shell, made = self._agree(work)
        return shell, made

    def _from_rows(self, made: Replacement) -> Moved:
        weight = self._weights[0]
        assert isinstance(weight, DTensor)
        dimension = row_dimension(weight)
        assert dimension is not None
        mesh = weight.device_mesh
        here: LayerInRows = self._agree(lambda: LayerInRows(made, weight))

        def work(add_up: AddUp) -> tuple[Tensor, Moved]:
            return here.squares(add_up), here.moved(self._optimizers, add_up)

        squares, moved = with_sums(work, mesh.get_group(dimension), mesh.device_type, self._agree)
        error, whole = squares.sqrt().tolist()
        self.errors = {name: error / max(whole, torch.finfo(torch.float32).tiny) for name in self._cuts}
        return moved

    def _divided(self, shell: Shell, made: Replacement, moved: Moved) -> ShardedExchange:
        names = {id(one): name for name, one in made.new.named_parameters()}
        heirs = {id(shell.originals[id(weight)]): list(made.parameters(weight)) for weight in made.replaced()}
        added = {}
        for plain, original in _pairs(shell):
            shift = _added(made, plain)
            if shift is not None:
                added[id(original)] = share_of(shift, original) if isinstance(original, DTensor) else shift
        exchange = ShardedExchange(self._layer.module, made.new, heirs, added=added)
        by_name = {key: {names[id(one)]: state for one, state in found.items()} for key, found in moved.items()}
        exchange.divide_(shell, self._index)
        before = {id(weight): weight for weight in self._weights}
        for (optimizer, weight), states in by_name.items():
            state = next(
                one.state[before[weight]]
                for one, _ in holders_of(before[weight], self._optimizers)
                if id(one) == optimizer
            )
            exchange.moved[optimizer, weight] = {
                parameter: placed(known, state, parameter)
                for name, known in states.items()
                for parameter in [made.new.get_parameter(name)]
            }
        return exchange


def _pairs(shell: Shell) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of a shell, each with the one that it stands for."""
    return [(one, shell.originals[id(one)]) for one in shell.layer.module.parameters()]


def _added(made: Replacement, bias: Tensor) -> Tensor | None:
    """What is added to a bias, all of it; None for nothing."""
    parts = made.shifts(bias)
    if not parts:
        return None
    total = torch.zeros_like(bias)
    for part, shift in parts:
        total[part] += shift
    return total


def _room_for(weights: Iterable[Tensor]) -> None:
    """Takes the memory that a gathered layer needs, and gives it back: who lacks it says so before the others wait."""
    for weight in weights:
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
