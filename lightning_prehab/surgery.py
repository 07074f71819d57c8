"""The only file that changes a model or an optimizer.

Everything is computed and checked before the first change; the changes themselves are assignments that cannot fail
halfway.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.choices import added_parameters
from lightning_prehab.errors import NumericalError, PlanError, UnsupportedError
from lightning_prehab.factorizations import Decomposition, Factors
from lightning_prehab.forms import form_name
from lightning_prehab.kinds import MatrixView, kind_of, view_of
from lightning_prehab.layers import LowRankLayer, LowRankPlusSparseLinear
from lightning_prehab.moments import block_state, entry_state, factor_states
from lightning_prehab.plan import CompressionPlan, LayerPlan
from lightning_prehab.pretrained import check_pretrained, note_structure_
from lightning_prehab.report import CompressionReport
from lightning_prehab.sparse import Sparse
from lightning_prehab.spectra import decompose_targets, naming
from lightning_prehab.statistics import LayerStatistics
from lightning_prehab.stored import follower, shapes_of, stored_factors
from lightning_prehab.targets import Layer, Patterns, Target, clean_name, count_parameters, join, locate, match_names


def apply_plan_(
    model: nn.Module,
    plan: CompressionPlan,
    statistics: Mapping[str, LayerStatistics] | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> CompressionReport:
    """Replaces the planned layers by :class:`~lightning_prehab.LowRankLinear`, in place.

    Layers with a sparse part become :class:`~lightning_prehab.LowRankPlusSparseLinear`.

    Args:
        model: The module that the plan was made for.
        plan: From :func:`~lightning_prehab.make_plan`.
        statistics: The same statistics as for the plan, for factorizations that read them.
        optimizers: Optimizers that hold the weights. Each weight is replaced by its factors at the same place of its
            group, first moments are carried over exactly, learning-rate schedulers go on undisturbed. Both moments of
            the values of a sparse part are carried over exactly.

    Returns:
        The report. Biases stay the same parameter objects.

    Raises:
        PlanError: If the plan does not fit the model.
        NumericalError: If factors are not finite (the layer is named).
        UnsupportedError: If an optimizer cannot be edited.
        PrehabError: Whatever a factorization raises. The model and the optimizers are then as they were.
    """
    made: dict[str, Decomposition] = {}
    factors = compute_factors(model, plan, statistics, decompositions=made)
    spectra = {name: decomposition.singular_values for name, decomposition in made.items()}
    made.clear()  # they can be large
    return swap_(model, plan, factors, optimizers).with_spectra(spectra)


def compute_factors(
    model: nn.Module,
    plan: CompressionPlan,
    statistics: Mapping[str, LayerStatistics] | None = None,
    names: Iterable[str] | None = None,
    decompositions: dict[str, Decomposition] | None = None,
) -> dict[str, Factors]:
    """Factors for the layers that the plan cuts (or for those of ``names``), in the dtype of their weights.

    Decompositions that planning has made already may be given; the others are made here and added to them.
    """
    targets = _planned_targets(model, plan)
    cuts = {cut.name: cut for cut in plan.layers if cut.rank is not None}
    for cut in cuts.values():
        counted, added = cut.new_bias + cut.nonzeros, added_parameters(targets[cut.name], plan.factorization)
        if counted != added:
            raise PlanError(
                f"Layer {cut.name!r}: the plan counts {counted} parameters beside the two factors, "
                f"{plan.factorization} adds {added}. A plan belongs to its factorization; make it anew with make_plan."
            )
    wanted = list(cuts) if names is None else [name for name in cuts if name in set(names)]
    found = {} if decompositions is None else decompositions
    missing = {form_name(name, targets[name]): name for name in wanted if name not in found}
    made = decompose_targets({form: targets[name] for form, name in missing.items()}, plan.factorization, statistics)
    found |= {missing[form]: decomposition for form, decomposition in made.items()}
    return {name: _checked_factors(cuts[name], targets[name], plan, found[name]) for name in wanted}


def swap_(
    model: nn.Module,
    plan: CompressionPlan,
    factors: Mapping[str, Factors],
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> CompressionReport:
    """Puts factors in the place of the planned layers; see :func:`apply_plan_`."""
    check_pretrained(model)
    _planned_targets(model, plan)
    before = count_parameters(model)
    cut = {layer.name: factors[layer.name] for layer in plan.layers if layer.rank is not None}
    swaps = [_Swap.prepare(layer, views, cut) for layer, views in locate(model, shapes_of(cut)).values()]
    edits = [edit for optimizer in optimizers for edit in _optimizer_edits(optimizer, swaps)]
    slots = _slots(model, {id(swap.old): swap.new for swap in swaps})
    errors = {name: error for swap in swaps for name, error in swap.errors().items()}

    with torch.no_grad():
        for swap in swaps:
            swap.shift_biases_()
    for parent, key, new in slots:
        parent._modules[key] = new
    for edit in edits:
        edit.commit()
    note_structure_(model)
    after = count_parameters(model)
    return CompressionReport(plan, {name: errors[name] for name in cut}, before, after)


def follow_state_dict_(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Gives a model the structure of a state dict, in both directions, without an optimizer.

    Where the state dict holds factors, an ``nn.Linear`` (or a :class:`~lightning_prehab.LowRankLinear` of another rank)
    is replaced by one that fits; where it holds a dense weight, a ``LowRankLinear`` is replaced by an ``nn.Linear``.

    Args:
        model: The module that the state dict is going to be loaded into.
        state_dict: Keys without ``prefix`` are names in ``model``.
        prefix: What the keys start with.

    Returns:
        The names of the replaced layers.

    Raises:
        CheckpointError: If the shapes do not fit (the layer is named); the model is then as it was.
    """
    stored = stored_factors(state_dict, prefix)
    modules = dict(model.named_modules())
    replacement: dict[int, nn.Module] = {}
    names = []
    inside: set[int] = set()
    for name, module in modules.items():
        if not name or id(module) in inside or (kind_of(module) is None and not isinstance(module, LowRankLayer)):
            continue
        inside.update(id(inner) for inner in module.modules())
        new = follower(modules, name, stored, state_dict, prefix)
        if new is not None:
            replacement[id(module)] = new
            names.append(name)
    for parent, key, new in _slots(model, replacement):
        parent._modules[key] = new
    if names:
        note_structure_(model)
    return names


def to_dense_(model: nn.Module, names: Patterns = None) -> list[str]:
    """Replaces low-rank layers by dense ones with the same function, in place: the way back from the surgery.

    Args:
        model: Any module. A layer that is the model itself cannot be replaced: use its ``to_linear()``. Make optimizers
            anew afterwards; they still hold the factors.
        names: Names or patterns of the layers, as for :func:`~lightning_prehab.find_targets`; None takes all.

    Returns:
        The names of the replaced layers, in model order; empty if ``names`` is None and there are none.

    Raises:
        TargetError: If a pattern matches no low-rank layer; the model is then as it was.

    >>> from lightning_prehab import LowRankLinear
    >>> model = nn.Sequential(LowRankLinear(8, 8, rank=2))
    >>> to_dense_(model), type(model[0]).__name__
    (['0'], 'Linear')
    """
    found = [clean_name(name) for name, _ in _low_rank_layers(model) if name]
    wanted = found if names is None else match_names(names, found, "names")
    densify_(model, wanted)
    return wanted


def densify_(model: nn.Module, names: Iterable[str]) -> None:
    """Replaces the named low-rank layers, or those that the names are parts of, by dense ones of the same function."""
    wanted = set(names)
    replacement: dict[int, nn.Module] = {}
    for name, module in _low_rank_layers(model):
        if any(join(clean_name(name), part) in wanted for part, _ in module.named_modules()):
            replacement[id(module)] = module.to_dense()
    for parent, key, new in _slots(model, replacement):
        parent._modules[key] = new
    note_structure_(model)


def _low_rank_layers(model: nn.Module) -> list[tuple[str, LowRankLayer]]:
    """The outermost low-rank layers."""
    inside: set[int] = set()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer) and id(module) not in inside:
            inside.update(id(inner) for inner in module.modules())
            found.append((name, module))
    return found


@dataclass
class _Swap:
    """One layer and its replacement."""

    layer: Layer
    views: dict[str, MatrixView]
    factors: dict[str, Factors]  # by part, those that are cut
    new: LowRankLayer

    @classmethod
    def prepare(cls, layer: Layer, views: dict[str, MatrixView], factors: Mapping[str, Factors]) -> "_Swap":
        mine = {part: factors[join(layer.name, part)] for part in views if join(layer.name, part) in factors}
        assert layer.kind is not None
        new = layer.kind.low_rank(layer.module, views, mine)
        swap = cls(layer, views, mine, new)
        for part, found in mine.items():
            if found.bias_shift is not None and views[part].bias is None:
                shift = found.bias_shift.clone()
                swap.child(part).B.bias = nn.Parameter(shift, requires_grad=views[part].parameter.requires_grad)
        return swap

    @property
    def old(self) -> nn.Module:
        return self.layer.module

    def child(self, part: str) -> Any:
        """What holds the factors of a part, or its dense weight."""
        return self.new.get_submodule(part)

    def shift_biases_(self) -> None:
        """Adds to the biases that are there already, and that both layers share."""
        for part, found in self.factors.items():
            bias = self.views[part].bias
            if found.bias_shift is not None and bias is not None:
                bias += found.bias_shift

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

    def states(self, weight: Tensor, state: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """What an optimizer knows of these parameters, from what it knows of the weight; unknown ones are left out."""
        found: dict[Tensor, dict[str, Any]] = {}
        for part, view in self.views.items():
            if view.parameter is not weight:
                continue
            child = self.child(part)
            if part not in self.factors:
                found[child.weight] = block_state(state, weight.shape, view.matrix)
                continue
            seen = block_state(state, weight.shape, view.matrix)
            found |= _factor_states(view, child, seen)
            if isinstance(child, LowRankPlusSparseLinear):
                found[child.values] = entry_state(seen, child.indices, view.shape)
        return {parameter: moved for parameter, moved in found.items() if moved}

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """``|W - B A - S|_F / |W|_F`` of each matrix that is cut, by name; 0 for a zero weight."""
        errors = {}
        for part, found in self.factors.items():
            view = self.views[part]
            weight, groups = view.weight.float(), view.group_count
            parts = zip(found.A.float().chunk(groups), found.B.float().chunk(groups), strict=True)
            error = weight - torch.cat([b @ a for a, b in parts])
            if found.sparse is not None:
                error -= Sparse(found.sparse.indices, found.sparse.values.float()).matrix(*error.shape)
            norm = weight.norm().clamp_min(torch.finfo(torch.float32).tiny)
            errors[join(self.layer.name, part)] = float(error.norm() / norm)
        return errors


def _factor_states(view: MatrixView, child: Any, state: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """States of the two factors of a matrix, from the state of the matrix."""
    a, b = view.unfold(child.A.weight, child.B.weight)
    if view.group_count == 1:
        for_a, for_b = factor_states(state, a, b)
    else:
        parts = []
        for index, (a_part, b_part) in enumerate(
            zip(a.chunk(view.group_count), b.chunk(view.group_count), strict=True)
        ):
            own = block_state(state, view.shape, partial(_chunk, count=view.group_count, index=index))
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


@dataclass
class _GroupEdit:
    """The new content of one parameter group."""

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
        self.group["params"][:] = self.params
        if "param_names" in self.group:
            self.group["param_names"][:] = self.names
        for parameter in self.removed:
            self.optimizer.state.pop(parameter, None)
        self.optimizer.state.update(self.states)


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


def _planned_targets(model: nn.Module, plan: CompressionPlan) -> dict[str, Target]:
    """The matrices that the plan names, checked against it."""
    located = locate(model, {layer.name: (layer.out_features, layer.in_features) for layer in plan.layers})
    views = {join(name, part): view for name, (_, parts) in located.items() for part, view in parts.items()}
    for cut in plan.layers:
        view = views.get(cut.name)
        if view is None or (*view.shape, view.group_count) != (cut.out_features, cut.in_features, cut.groups):
            modules = {clean_name(name): module for name, module in model.named_modules()}
            have = view.module if view is not None else modules.get(cut.name)
            raise PlanError(
                f"Layer {cut.name!r}: the plan expects a {cut.out_features}x{cut.in_features} weight, the model has "
                f"{'nothing' if have is None else repr(have)}. Make the plan for this very model, before any surgery."
            )
    return {cut.name: views[cut.name] for cut in plan.layers}


def _checked_factors(cut: LayerPlan, target: Target, plan: CompressionPlan, decomposition: Decomposition) -> Factors:
    assert cut.rank is not None
    view = view_of(target)
    weight = view.parameter
    where = f"Layer {cut.name!r} ({cut.out_features}x{cut.in_features}): "
    with torch.no_grad(), naming(cut.name, target):
        a, b, shift, sparse = decomposition.factors(cut.rank)
    expected = (cut.groups * cut.rank, cut.in_features), (cut.out_features, cut.rank)
    if (a.shape, b.shape) != expected:
        raise PlanError(
            f"{where}{plan.factorization} returned factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            f"expected {expected[0]} and {expected[1]}."
        )
    nonzeros = 0 if sparse is None else len(sparse.values)
    if nonzeros != cut.nonzeros or (sparse is not None and not sparse.fits(cut.out_features, cut.in_features)):
        raise PlanError(
            f"{where}{plan.factorization} returned a sparse part of {nonzeros} values; the plan expects "
            f"{cut.nonzeros}, each at a place of its own, in ascending order."
        )
    a, b = a.to(weight), b.to(weight)
    shift = None if shift is None else view.to_bias(shift).to(weight)
    if sparse is not None:
        sparse = Sparse(sparse.indices.to(weight.device), sparse.values.to(weight))
    parts = (a, b, shift, None if sparse is None else sparse.values)
    if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
        raise NumericalError(f"{where}{plan.factorization} returned factors with NaN or Inf at rank {cut.rank}.")
    return Factors(a, b, shift, sparse)


def _slots(model: nn.Module, replacement: Mapping[int, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every place where a module hangs that is to be replaced (by id); shared modules hang in several."""
    return [
        (parent, key, replacement[id(child)])
        for parent in model.modules()
        for key, child in parent._modules.items()
        if id(child) in replacement
    ]


def _optimizer_edits(optimizer: torch.optim.Optimizer, swaps: Sequence[_Swap]) -> list[_GroupEdit]:
    replaced = [(swap, weight) for swap in swaps for weight in swap.replaced()]
    by_weight = {id(weight): swap for swap, weight in replaced}
    weights = {id(weight): weight for _, weight in replaced}
    split = [
        weight
        for key, weight in weights.items()
        if any(part.dim() < 2 for part in by_weight[key].parameters(weight).values())
    ]
    check_optimizer(optimizer, split)
    renamed = {id(parameter): names for swap in swaps for parameter, names in _renamed(swap)}
    edits = []
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        edit = _GroupEdit(optimizer, group, [], [], [], {})
        for parameter, name in zip(group["params"], names, strict=True):
            swap = by_weight.get(id(parameter))
            if swap is None:
                old, new = renamed.get(id(parameter), ("", ""))
                edit.params.append(parameter)
                edit.names.append(name.removesuffix(old) + new)
                continue
            own = next(found for found, weight in swap.old.named_parameters() if weight is parameter)
            parts = swap.parameters(parameter)
            edit.params.extend(parts.values())
            edit.names.extend(name.removesuffix(own) + part for part in parts)
            edit.removed.append(parameter)
            state = optimizer.state.get(parameter)
            if state:
                edit.states.update(swap.states(parameter, state))
        for swap in swaps:
            edit.order(list(swap.new.parameters()))
        edits.append(edit)
    return edits


def _renamed(swap: _Swap) -> list[tuple[Tensor, tuple[str, str]]]:
    """Parameters that both layers hold, each with its old and its new name within the layer."""
    old = {id(parameter): name for name, parameter in swap.old.named_parameters()}
    return [(p, (old[id(p)], name)) for name, p in swap.new.named_parameters() if id(p) in old]
