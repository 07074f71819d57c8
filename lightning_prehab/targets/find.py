"""Which layers of a model can be cut, by dotted name, and why the others are left alone."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, TargetError
from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.linalg.matrices import break_even_rank
from lightning_prehab.targets.adapters import ADAPTED, adapted_modules
from lightning_prehab.targets.attached import why_not_attached
from lightning_prehab.targets.locate import Target, cut_layers_of, layers_of, low_rank_layers
from lightning_prehab.targets.metrics import measured_by
from lightning_prehab.targets.names import Patterns, as_list, begins_with, clean_name, join, match_names
from lightning_prehab.targets.weights import has_matrix, parameter_owners

_TIED = "its weight is tied to another layer"
_CUT = "it is low-rank already; to_dense_ gives the dense layer back, cut_again=True takes it for a deeper cut"
_UNKNOWN = "it is low-rank already, and not a layer of this package; to_dense_ gives the dense layer back"

#: Above so many inputs or outputs a matrix is a target only if it is asked for: a projection to a vocabulary.
WIDE = 30_000


class Targets(dict[str, Target]):
    """Matrices to be compressed, ``{name: module}`` in model order, and what was left out.

    The value is the layer itself if it is one matrix, else a :class:`~lightning_prehab.kinds.MatrixView` of a part. The
    name is that of the layer, with the name of the part for a layer of several matrices (``"attn.qkv.q"``).

    Attributes:
        skipped: ``{name: reason}`` for the layers with a weight matrix that are not targets.
        model_parameters: Number of parameters of the whole model, shared ones counted once; None if it is not known.
    """

    def __init__(self, layers: Mapping[str, Target], skipped: dict[str, str], model_parameters: int | None) -> None:
        super().__init__(layers)
        self.skipped = skipped
        self.model_parameters = model_parameters

    def add(self, others: "Targets") -> None:
        """Takes in other targets of the same model, and what was left out beside them."""
        self.update(others)
        self.skipped |= others.skipped


def find_targets(
    model: nn.Module,
    target_modules: Patterns = None,
    exclude_modules: Patterns = None,
    *,
    split_fused: bool = False,
    cut_again: bool = False,
) -> Targets:
    """Finds the weight matrices that can be cut.

    A pattern is a dotted name or an fnmatch pattern (``"blocks.*.mlp.*"``). One that fits no full name is tried against
    the ends of the names, at a dot, so the same pattern serves a bare model and a LightningModule that holds it as
    ``self.model``. The name of a layer of several matrices stands for all of them.

    Args:
        model: Any module. The root itself cannot be replaced and is never a target.
        target_modules: Patterns of the layers to take; None takes every layer that can be cut, but for those of more
            than 30,000 inputs or outputs (projections to a vocabulary, whose Gram matrices take gigabytes) and those
            under an adapter of peft. Networks inside of a torchmetrics.Metric are taken only by a pattern that begins
            with the name of the metric.
        exclude_modules: Patterns of the layers to leave out.
        split_fused: Take fused projections (queries, keys and values; gate and up) apart into one target for each;
            else they are one matrix.
        cut_again: Take low-rank layers too, for a deeper cut: each is the product of its factors. Else they are left
            out.

    Returns:
        The targets in model order. Layers under several names (shared modules) appear once, under the first.

    Raises:
        ArgumentError: If ``model`` is no module, or there are patterns that are none.
        TargetError: If nothing matches, a pattern matches nothing, or a layer addressed by its full name cannot be cut.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> targets = find_targets(model)
    >>> list(targets), targets.skipped
    (['0'], {'2': 'no rank saves parameters (1x8)'})
    """
    check_model(model)
    candidates = _candidates(model, split_fused, cut_again)
    names, owner = list(candidates), {name: found.layer for name, found in candidates.items()}
    metrics = measured_by(model)
    measuring = {name: metrics[id(found.module)] for name, found in candidates.items() if id(found.module) in metrics}
    wanted = {name for name in names if name not in measuring} if target_modules is None else set()
    for pattern in as_list(target_modules, "target_modules"):
        fits = match_names(pattern, names, "target_modules", owner)
        wanted.update(name for name in fits if name not in measuring or begins_with(pattern, measuring[name]))
        if pattern in candidates and candidates[pattern].reason is not None:
            kind = type(candidates[pattern].module).__name__
            raise TargetError(f"Layer {pattern!r} ({kind}) cannot be cut: {candidates[pattern].reason}.")
    excluded: set[str] = set()
    if exclude_modules is not None:
        excluded.update(match_names(exclude_modules, names, "exclude_modules", owner))

    layers: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    adapted = adapted_modules(model)
    for name, (_, module, target, reason) in candidates.items():
        if name in excluded:
            skipped[name] = "excluded by exclude_modules"
        elif name not in wanted:
            metric = measuring.get(name)
            skipped[name] = "not in target_modules" if metric is None else _measures(metric)
        elif target is None or reason is not None:
            skipped[name] = str(reason)
        elif target_modules is None and id(module) in adapted:
            skipped[name] = ADAPTED
        elif target_modules is None and max(view_of(target).shape) > WIDE:
            skipped[name] = _too_wide(view_of(target))
        else:
            layers[name] = target
    if not layers:
        if target_modules is None:
            check_uncut(model, layers)
        raise TargetError(f"{type(model).__name__} has no layer to cut ({_why_none(model, skipped)}).")
    return Targets(layers, skipped, count_dense_parameters(model))


def _why_none(model: nn.Module, skipped: Mapping[str, str]) -> str:
    if has_matrix(model):
        return "a layer that is the model itself cannot be replaced; wrap it, for example in nn.Sequential"
    listed = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:8])
    more = f"; and {len(skipped) - 8} more" if len(skipped) > 8 else ""
    return f"{listed}{more}" or "it has no weight matrices"


def check_model(model: object) -> None:
    """Raises :class:`ArgumentError` for what is no module: a path, a state dict, a class."""
    if not isinstance(model, nn.Module):
        hint = f"make one first: {model.__name__}(...)" if isinstance(model, type) else "build or load the model first"
        raise ArgumentError(f"The model must be an nn.Module, got {show(model)}; {hint}.")


def check_uncut(model: nn.Module, others: Mapping[str, Target]) -> None:
    """Raises :class:`TargetError` for a model that is compressed already: a second cut is rarely what is meant."""
    cut = low_rank_layers(model)
    if not cut:
        return
    names = ", ".join(repr(name) for name in list(others)[:3]) + (", ..." if len(others) > 3 else "")
    rest = f", or name the layers that are left to be cut (target_modules=[{names}])" if others else ""
    raise TargetError(
        f"{type(model).__name__} is compressed already (low-rank layers: {len(cut)}, the first {cut[0][0]!r}). Start "
        f"from the dense model, or call to_dense_(model) first for another cut of the same layers{rest}; "
        "cut_again=True takes low-rank layers too, for a deeper cut."
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once, uninitialized ones not at all."""
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


def count_dense_parameters(model: nn.Module) -> int:
    """Number of parameters with a dense weight in the place of all factors; what a model is compared with after cuts.

    >>> from lightning_prehab import LowRankLinear
    >>> model = nn.Sequential(LowRankLinear(8, 8, rank=2))
    >>> count_parameters(model), count_dense_parameters(model)
    (40, 72)
    """
    layers = [module for module in model.modules() if isinstance(module, LowRankLayer)]
    holders = [one for one in layers if not any(isinstance(part, LowRankLayer) for part in list(one.modules())[1:])]
    own = {id(parameter): parameter.numel() for one in holders for parameter in one.parameters()}
    return count_parameters(model) - sum(own.values()) + sum(one.count_dense() for one in holders)


class _Candidate(NamedTuple):
    """A layer that may be a target, or one of its matrices: its target and why it cannot be cut, if it cannot."""

    layer: str
    module: nn.Module
    target: Target | None
    reason: str | None


def _candidates(model: nn.Module, split_fused: bool, cut_again: bool) -> dict[str, _Candidate]:
    owners = parameter_owners(model)
    found: dict[str, _Candidate] = {}
    for layer in layers_of(model):
        if layer.reason is not None:
            found[layer.name] = _Candidate(layer.name, layer.module, None, layer.reason)
            continue
        views = layer.views(split_fused)
        attached = why_not_attached(layer.module, views.values())
        if attached is not None:
            found[layer.name] = _Candidate(layer.name, layer.module, None, attached)
            continue
        shown = Counter(id(view.parameter) for view in views.values())
        split = any(count > 1 and len(owners[key]) > 1 for key, count in shown.items())
        for part, view in views.items():
            target = view if part else layer.module
            reason = _TIED if split else _why_not_view(view, owners)
            found[join(layer.name, part)] = _Candidate(layer.name, layer.module, target, reason)
    low_rank = {clean_name(name): module for name, module in low_rank_layers(model)}
    if not cut_again:
        return found | {name: _Candidate(name, module, None, _CUT) for name, module in low_rank.items()}
    again = list(_again(model, owners))
    known = {one.layer for _, one in again}
    unknown = {name: _Candidate(name, module, None, _UNKNOWN) for name, module in low_rank.items() if name not in known}
    return _in_model_order(model, found | dict(again) | unknown)


def _again(model: nn.Module, owners: dict[int, set[int]]) -> Iterator[tuple[str, _Candidate]]:
    """What has been cut already, and what is dense inside of it."""
    for outer, layer in cut_layers_of(model):
        views = layer.views(split_fused=False)
        reason = layer.reason or why_not_attached(layer.module, views.values())
        if reason is not None:
            yield layer.name, _Candidate(outer, layer.module, None, reason)
            continue
        view = views[""]
        view.part = layer.name.removeprefix(outer).removeprefix(".")
        yield layer.name, _Candidate(outer, layer.module, view, _why_not_view(view, owners))


def _in_model_order(model: nn.Module, candidates: dict[str, _Candidate]) -> dict[str, _Candidate]:
    """Sorted by where the layers stand; matrices of one layer stay as they are."""
    places = {id(module): place for place, module in enumerate(model.modules())}
    return dict(sorted(candidates.items(), key=lambda item: places[id(item[1].module)]))


def _why_not_view(view: MatrixView, owners: dict[int, set[int]]) -> str | None:
    """Why one matrix cannot be cut, or None if it can."""
    if any(len(owners[id(parameter)]) > 1 for parameter in view.parameters):
        return _TIED
    if break_even_rank(view.out_features, view.in_features, view.group_count) < 1:
        return f"no rank saves parameters ({view.out_features}x{view.in_features})"
    return None


def _measures(metric: str) -> str:
    return (
        f"it belongs to the metric {metric!r}, which measures the model; to cut it all the same give a pattern that "
        f"begins with {metric!r}"
    )


def _too_wide(view: MatrixView) -> str:
    gigabytes = 4e-9 * max(view.shape) ** 2
    return (
        f"the Gram matrix of its {max(view.shape):,} features takes {gigabytes:.1f} GB; name it to cut it all the same"
    )
