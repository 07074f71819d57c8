"""The only file that changes a model or an optimizer.

Everything is computed and checked before the first change; the changes themselves are assignments that cannot fail
halfway.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import CheckpointError, NumericalError, PlanError, UnsupportedError
from lightning_prehab.factorizations import Decomposition, Factors
from lightning_prehab.layers import LowRankLinear, LowRankPlusSparseLinear
from lightning_prehab.moments import entry_state, factor_states
from lightning_prehab.plan import CompressionPlan, LayerPlan
from lightning_prehab.planning import added_parameters
from lightning_prehab.pretrained import check_pretrained, note_structure_
from lightning_prehab.report import CompressionReport
from lightning_prehab.sparse import Sparse
from lightning_prehab.spectra import decompose_targets, naming
from lightning_prehab.statistics import LayerStatistics
from lightning_prehab.targets import Patterns, clean_name, count_parameters, match_names


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
    return swap_(model, plan, compute_factors(model, plan, statistics), optimizers)


def compute_factors(
    model: nn.Module,
    plan: CompressionPlan,
    statistics: Mapping[str, LayerStatistics] | None = None,
    names: Iterable[str] | None = None,
    decompositions: Mapping[str, Decomposition] | None = None,
) -> dict[str, Factors]:
    """Factors for the layers that the plan cuts (or for those of ``names``), in the dtype of their weights.

    Decompositions that planning has made already may be given; the others are made here.
    """
    layers = _planned_layers(model, plan)
    for cut, layer in layers.values():
        counted, added = cut.new_bias + cut.nonzeros, added_parameters(layer, plan.factorization)
        if counted != added:
            raise PlanError(
                f"Layer {cut.name!r}: the plan counts {counted} parameters beside the two factors, "
                f"{plan.factorization} adds {added}. A plan belongs to its factorization; make it anew with make_plan."
            )
    wanted = list(layers) if names is None else [name for name in layers if name in set(names)]
    found = dict(decompositions or {})
    missing = {name: layers[name][1] for name in wanted if name not in found}
    found |= decompose_targets(missing, plan.factorization, statistics)
    return {name: _checked_factors(*layers[name], plan, found[name]) for name in wanted}


def swap_(
    model: nn.Module,
    plan: CompressionPlan,
    factors: Mapping[str, Factors],
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> CompressionReport:
    """Puts factors in the place of the planned layers; see :func:`apply_plan_`."""
    check_pretrained(model)
    layers = _planned_layers(model, plan)
    before = count_parameters(model)
    cuts = [_prepare(cut.name, layer, factors[cut.name]) for cut, layer in layers.values()]
    edits = [edit for optimizer in optimizers for edit in _optimizer_edits(optimizer, cuts)]
    slots = _slots(model, {id(cut.old): cut.new for cut in cuts})
    errors = {cut.name: cut.weight_error() for cut in cuts}

    with torch.no_grad():
        for cut in cuts:
            if cut.bias is not None:
                cut.old.bias.copy_(cut.bias)
    for parent, key, new in slots:
        parent._modules[key] = new
    for edit in edits:
        edit.commit()
    note_structure_(model)
    after = count_parameters(model)
    return CompressionReport(plan, errors, before, after)


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
    factored = stored_factors(state_dict, prefix)
    replacement: dict[int, nn.Module] = {}
    names = []
    for name, module in model.named_modules():
        new: nn.Module | None = None
        if name in factored and (type(module) is nn.Linear or isinstance(module, LowRankLinear)):
            new = _low_rank_like(name, module, factored[name])
        elif isinstance(module, LowRankLinear) and f"{prefix}{name}.weight" in state_dict:
            new = _dense_like(module, bias=f"{prefix}{name}.bias" in state_dict)
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

    >>> model = nn.Sequential(LowRankLinear(8, 8, rank=2))
    >>> to_dense_(model), type(model[0]).__name__
    (['0'], 'Linear')
    """
    found = [clean_name(name) for name, module in model.named_modules() if name and isinstance(module, LowRankLinear)]
    wanted = found if names is None else match_names(names, found, "names")
    densify_(model, wanted)
    return wanted


def densify_(model: nn.Module, names: Iterable[str]) -> None:
    """Replaces the named low-rank layers by dense ones with the same function."""
    wanted = set(names)
    replacement: dict[int, nn.Module] = {
        id(module): _dense_like(module, bias=module.bias is not None)
        for name, module in model.named_modules()
        if clean_name(name) in wanted and isinstance(module, LowRankLinear)
    }
    for parent, key, new in _slots(model, replacement):
        parent._modules[key] = new
    note_structure_(model)


def stored_factors(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Factors]:
    """The factors that a state dict holds, by layer name; ``bias_shift`` is the stored bias."""
    found: dict[str, Factors] = {}
    for key, a in state_dict.items():
        name = key.removeprefix(prefix).removesuffix(".A.weight")
        b = state_dict.get(f"{prefix}{name}.B.weight")
        if key == f"{prefix}{name}.A.weight" and isinstance(a, Tensor) and isinstance(b, Tensor):
            places, values = (state_dict.get(f"{prefix}{name}.{part}") for part in ("indices", "values"))
            sparse = Sparse(places, values) if isinstance(places, Tensor) and isinstance(values, Tensor) else None
            found[name] = Factors(a, b, state_dict.get(f"{prefix}{name}.B.bias"), sparse)
    return found


def _low_rank_like(name: str, layer: nn.Linear | LowRankLinear, stored: Factors) -> LowRankLinear | None:
    """A layer for the stored factors, or None if ``layer`` fits them already."""
    a, b, bias, sparse = stored
    m, n = layer.out_features, layer.in_features
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != n or b.shape[0] != m or a.shape[0] != b.shape[1] or 0 in a.shape:
        raise CheckpointError(
            f"Layer {name!r}: the checkpoint holds factors of shapes {tuple(b.shape)} and {tuple(a.shape)}, the model "
            f"has a {m}x{n} layer. Build the model with the same sizes as the one that was saved."
        )
    if sparse is not None and not sparse.fits(m, n):
        raise CheckpointError(
            f"Layer {name!r}: the checkpoint holds a sparse part of {sparse.values.numel()} values that has no place "
            f"in a {m}x{n} weight; the file is damaged, or the model has other sizes than the one that was saved."
        )
    has_bias = layer.bias is not None
    nonzeros = None if sparse is None else len(sparse.values)
    same = isinstance(layer, LowRankLinear) and layer.rank == a.shape[0] and _nonzeros(layer) == nonzeros
    if isinstance(layer, LowRankLinear) and same and has_bias == (bias is not None):
        return None
    dense = layer if isinstance(layer, nn.Linear) else _dense_like(layer, bias=has_bias)
    new = _low_rank(stored, like=dense)
    if not has_bias and bias is not None:
        value = bias.detach().to(dense.weight, copy=True)
        new.B.bias = nn.Parameter(value, requires_grad=dense.weight.requires_grad)
    elif bias is None:
        new.B.register_parameter("bias", None)
    return new


def _low_rank(factors: Factors, like: nn.Linear) -> LowRankLinear:
    """A layer of the kind that the factors need."""
    if factors.sparse is None:
        return LowRankLinear.from_factors(factors.A, factors.B, like)
    return LowRankPlusSparseLinear.from_factors(factors.A, factors.B, like, factors.sparse)


def _nonzeros(layer: nn.Module) -> int | None:
    """Entries of the sparse part, or None if the layer has no such part."""
    return layer.nonzeros if isinstance(layer, LowRankPlusSparseLinear) else None


def _dense_like(layer: LowRankLinear, bias: bool) -> nn.Linear:
    """The dense product, with or without a bias."""
    dense = layer.to_linear()
    if not bias:
        dense.register_parameter("bias", None)
    elif layer.bias is None:
        zeros = dense.weight.new_zeros(layer.out_features)
        dense.bias = nn.Parameter(zeros, requires_grad=dense.weight.requires_grad)
    return dense


@dataclass
class _Cut:
    """One layer, its replacement, and the new value of its bias if that changes."""

    name: str
    old: nn.Linear
    new: LowRankLinear
    bias: Tensor | None

    def parameters(self) -> dict[str, Tensor]:
        """What takes the place of the weight in an optimizer, by suffix. An old bias object stays where it is."""
        found: dict[str, Tensor] = dict(self.new.named_parameters())
        if _bias(self.old) is not None:
            del found["B.bias"]
        return found

    def states(self, state: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """What an optimizer knows of these parameters, from what it knows of the weight; unknown ones are left out."""
        a, b = self.new.A.weight, self.new.B.weight
        for_a, for_b = factor_states(state, a, b)
        states = {a: for_a, b: for_b}
        if isinstance(self.new, LowRankPlusSparseLinear):
            states[self.new.values] = entry_state(state, self.new.indices, self.old.weight.shape)
        return {parameter: moved for parameter, moved in states.items() if moved}

    @torch.no_grad()
    def weight_error(self) -> float:
        """``|W - B A - S|_F / |W|_F``; 0 for a zero weight."""
        weight = self.old.weight.float()
        error = weight - self.new.B.weight.float() @ self.new.A.weight.float()
        if isinstance(self.new, LowRankPlusSparseLinear):
            error -= Sparse(self.new.indices, self.new.values.float()).matrix(*error.shape)
        return float(error.norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))


@dataclass
class _GroupEdit:
    """The new content of one parameter group."""

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    params: list[Tensor]
    names: list[str]
    removed: list[Tensor]
    states: dict[Tensor, dict[str, Any]]

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


def _planned_layers(model: nn.Module, plan: CompressionPlan) -> dict[str, tuple[LayerPlan, nn.Linear]]:
    """The layers that are to be cut, checked against the plan."""
    modules = {clean_name(name): module for name, module in model.named_modules()}
    found = {}
    for cut in plan.layers:
        layer = modules.get(cut.name)
        if type(layer) is not nn.Linear or (layer.out_features, layer.in_features) != (
            cut.out_features,
            cut.in_features,
        ):
            have = "nothing" if layer is None else repr(layer)
            raise PlanError(
                f"Layer {cut.name!r}: the plan expects a {cut.out_features}x{cut.in_features} nn.Linear, the model has "
                f"{have}. Make the plan for this very model, before any surgery."
            )
        if cut.rank is not None:
            found[cut.name] = (cut, layer)
    return found


def _checked_factors(cut: LayerPlan, layer: nn.Linear, plan: CompressionPlan, decomposition: Decomposition) -> Factors:
    assert cut.rank is not None
    where = f"Layer {cut.name!r} ({cut.out_features}x{cut.in_features}): "
    with torch.no_grad(), naming(cut.name, layer):
        a, b, shift, sparse = decomposition.factors(cut.rank)
    if a.shape != (cut.rank, cut.in_features) or b.shape != (cut.out_features, cut.rank):
        raise PlanError(
            f"{where}{plan.factorization} returned factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            f"expected {(cut.rank, cut.in_features)} and {(cut.out_features, cut.rank)}."
        )
    nonzeros = 0 if sparse is None else len(sparse.values)
    if nonzeros != cut.nonzeros or (sparse is not None and not sparse.fits(cut.out_features, cut.in_features)):
        raise PlanError(
            f"{where}{plan.factorization} returned a sparse part of {nonzeros} values; the plan expects "
            f"{cut.nonzeros}, each at a place of its own, in ascending order."
        )
    a, b = a.to(layer.weight), b.to(layer.weight)
    shift = None if shift is None else shift.to(layer.weight)
    if sparse is not None:
        sparse = Sparse(sparse.indices.to(layer.weight.device), sparse.values.to(layer.weight))
    parts = (a, b, shift, None if sparse is None else sparse.values)
    if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
        raise NumericalError(f"{where}{plan.factorization} returned factors with NaN or Inf at rank {cut.rank}.")
    return Factors(a, b, shift, sparse)


def _prepare(name: str, layer: nn.Linear, factors: Factors) -> _Cut:
    new = _low_rank(factors, like=layer)
    bias = None
    if factors.bias_shift is not None:
        old = _bias(layer)
        if old is None:
            new.B.bias = nn.Parameter(factors.bias_shift.clone(), requires_grad=layer.weight.requires_grad)
        else:
            bias = old.detach() + factors.bias_shift
    return _Cut(name, layer, new, bias)


def _bias(layer: nn.Linear) -> nn.Parameter | None:
    return layer._parameters["bias"]


def _slots(model: nn.Module, replacement: Mapping[int, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every place where a module hangs that is to be replaced (by id); shared modules hang in several."""
    return [
        (parent, key, replacement[id(child)])
        for parent in model.modules()
        for key, child in parent._modules.items()
        if id(child) in replacement
    ]


def _optimizer_edits(optimizer: torch.optim.Optimizer, cuts: Sequence[_Cut]) -> list[_GroupEdit]:
    split = [cut.old.weight for cut in cuts if any(part.dim() < 2 for part in cut.parameters().values())]
    check_optimizer(optimizer, split)
    by_weight = {id(cut.old.weight): cut for cut in cuts}
    biases = {id(bias) for cut in cuts if (bias := _bias(cut.old)) is not None}
    edits = []
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        edit = _GroupEdit(optimizer, group, [], [], [], {})
        for parameter, name in zip(group["params"], names, strict=True):
            cut = by_weight.get(id(parameter))
            if cut is None:
                edit.params.append(parameter)
                edit.names.append(f"{name.removesuffix('bias')}B.bias" if id(parameter) in biases else name)
                continue
            new = cut.parameters()
            edit.params.extend(new.values())
            edit.names.extend(name.removesuffix("weight") + suffix for suffix in new)
            edit.removed.append(parameter)
            state = optimizer.state.get(parameter)
            if state:
                edit.states.update(cut.states(state))
        edits.append(edit)
    return edits
