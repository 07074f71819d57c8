"""Which layers of a model can be cut, by dotted name, and why the others are left alone."""

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_prehab.errors import TargetError
from lightning_prehab.kinds import Kind, MatrixView, kind_of, view_of
from lightning_prehab.kinds.fused import fused_blocks
from lightning_prehab.layers import LowRankLayer
from lightning_prehab.linalg import break_even_rank, is_quantized

#: Parameters that torch.nn.utils.prune, spectral_norm and weight_norm leave in place of the weight.
_REPARAMETRIZED = {"weight_orig", "weight_v"}

_TIED = "its weight is tied to another layer"

#: Above so many inputs or outputs a matrix is a target only if it is asked for: a projection to a vocabulary.
WIDE = 30_000

Patterns = str | Sequence[str] | None
#: A layer that is one matrix, or one matrix of a layer; :func:`~lightning_prehab.kinds.view_of` shows both alike.
Target = nn.Module | MatrixView


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


def find_targets(
    model: nn.Module, target_modules: Patterns = None, exclude_modules: Patterns = None, *, split_fused: bool = False
) -> Targets:
    """Finds the weight matrices that can be cut.

    A pattern is a dotted name or an fnmatch pattern (``"blocks.*.mlp.*"``). One that fits no full name is tried against
    the ends of the names, at a dot, so the same pattern serves a bare model and a LightningModule that holds it as
    ``self.model``. The name of a layer of several matrices stands for all of them.

    Args:
        model: Any module. The root itself cannot be replaced and is never a target.
        target_modules: Patterns of the layers to take; None takes every layer that can be cut, but for those of more
            than 30,000 inputs or outputs (projections to a vocabulary, whose Gram matrices take gigabytes).
        exclude_modules: Patterns of the layers to leave out.
        split_fused: Take fused projections (queries, keys and values; gate and up) apart into one target for each;
            else they are one matrix.

    Returns:
        The targets in model order. Layers under several names (shared modules) appear once, under the first.

    Raises:
        TargetError: If nothing matches, a pattern matches nothing, or a layer addressed by its full name cannot be cut.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> targets = find_targets(model)
    >>> list(targets), targets.skipped
    (['0'], {'2': 'no rank saves parameters (1x8)'})
    """
    candidates = _candidates(model, split_fused)
    names, layers_of = list(candidates), {name: found.layer for name, found in candidates.items()}
    wanted = set(names if target_modules is None else match_names(target_modules, names, "target_modules", layers_of))
    for pattern in _as_list(target_modules):
        if pattern in candidates and candidates[pattern].reason is not None:
            kind = type(candidates[pattern].module).__name__
            raise TargetError(f"Layer {pattern!r} ({kind}) cannot be cut: {candidates[pattern].reason}.")
    excluded: set[str] = set()
    if exclude_modules is not None:
        excluded.update(match_names(exclude_modules, names, "exclude_modules", layers_of))

    layers: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    for name, (_, _, target, reason) in candidates.items():
        if name in excluded:
            skipped[name] = "excluded by exclude_modules"
        elif name not in wanted:
            skipped[name] = "not in target_modules"
        elif target is None or reason is not None:
            skipped[name] = str(reason)
        elif target_modules is None and max(view_of(target).shape) > WIDE:
            skipped[name] = _too_wide(view_of(target))
        else:
            layers[name] = target
    if not layers:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:8])
        if _has_matrix(model):
            listed = "a layer that is the model itself cannot be replaced; wrap it, for example in nn.Sequential"
        listed = listed or "it has no weight matrices"
        raise TargetError(f"{type(model).__name__} has no layer to cut ({listed}).")
    return Targets(layers, skipped, count_parameters(model))


class _Candidate(NamedTuple):
    """A layer that may be a target, or one of its matrices: its target and why it cannot be cut, if it cannot."""

    layer: str
    module: nn.Module
    target: Target | None
    reason: str | None


def _candidates(model: nn.Module, split_fused: bool) -> dict[str, _Candidate]:
    owners = _parameter_owners(model)
    found: dict[str, _Candidate] = {}
    for layer in _layers(model):
        reason = _why_not(layer.module, layer.kind)
        if reason is not None:
            found[layer.name] = _Candidate(layer.name, layer.module, None, reason)
            continue
        views = layer.views(split_fused)
        shown = Counter(id(view.parameter) for view in views.values())
        split = any(count > 1 and len(owners[key]) > 1 for key, count in shown.items())
        for part, view in views.items():
            target = view if part else layer.module
            reason = _TIED if split else _why_not_view(view, owners)
            found[join(layer.name, part)] = _Candidate(layer.name, layer.module, target, reason)
    return found


@dataclass(frozen=True)
class Layer:
    """A layer of a model that may hold weight matrices.

    Attributes:
        name: Dotted name, without what ``torch.compile`` puts around.
        module: The layer.
        kind: What it is, or None for a kind that cannot be cut.
        blocks: ``{part: rows}`` if it is a fused projection, else None.
    """

    name: str
    module: nn.Module
    kind: Kind | None
    blocks: dict[str, int] | None

    @classmethod
    def at(cls, name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> "Layer":
        """The layer that stands, or stood, at a place of a model, ``{name: module}``."""
        kind = kind_of(module)
        blocks = None
        if kind is not None and kind.linear and "weight" in module._parameters:
            path, _, key = name.rpartition(".")
            blocks = fused_blocks(key, kind.views(module)[""].out_features, modules.get(path))
        return cls(clean_name(name), module, kind, blocks)

    def views(self, split_fused: bool) -> dict[str, MatrixView]:
        """Its matrices by part; the part of a layer that is one matrix is ``""``."""
        return self.candidates(split_fused)[0]

    def candidates(self, split_fused: bool) -> list[dict[str, MatrixView]]:
        """All ways to see it, the one that is used when there is a choice first."""
        blocks = self.blocks if split_fused else None
        found = [{}] if self.kind is None else list(self.kind.candidates(self.module, blocks))
        for views in found:
            for part, view in views.items():
                view.part = part
        return found


def locate(
    model: nn.Module, shapes: Mapping[str, tuple[int, int] | None]
) -> dict[str, tuple[Layer, dict[str, MatrixView]]]:
    """The layers that hold some targets, by the name of the layer, with all of their matrices by part.

    A layer is seen whole if its own name is among the names, else as its parts; where there are several ways to see it,
    in the one whose matrices have the given shapes (None: any). Names that are not found are left out.
    """
    found: dict[str, tuple[Layer, dict[str, MatrixView]]] = {}
    for layer in _layers(model):
        if layer.kind is None:
            continue
        views = _of_shapes(layer.name, layer.candidates(split_fused=layer.name not in shapes), shapes)
        if any(join(layer.name, part) in shapes for part in views):
            found[layer.name] = layer, views
    return found


def same_targets(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The same targets in another copy of the model that they were found in; see :func:`locate`."""
    located = locate(model, {name: view_of(target).shape for name, target in targets.items()})
    found = {join(name, part): view for name, (_, views) in located.items() for part, view in views.items()}
    views = {name: found[name] for name in targets if name in found}
    return {name: view if isinstance(targets[name], MatrixView) else view.module for name, view in views.items()}


def _of_shapes(
    name: str, candidates: Sequence[dict[str, MatrixView]], shapes: Mapping[str, tuple[int, int] | None]
) -> dict[str, MatrixView]:
    for views in candidates:
        if all(shapes.get(join(name, part)) in (None, view.shape) for part, view in views.items()):
            return views
    return candidates[0]


def join(layer: str, part: str) -> str:
    """Name of a matrix of a layer, or of a module in another one.

    >>> join("attn.qkv", "q"), join("fc", ""), join("", "B")
    ('attn.qkv.q', 'fc', 'B')
    """
    return ".".join(name for name in (layer, part) if name)


def group_names(name: str, target: Target) -> list[str]:
    """Names under which the statistics of a target stand: its own, or one for each group of a grouped convolution."""
    count = view_of(target).group_count
    return [name] if count == 1 else [f"{name}:{index}" for index in range(count)]


def layer_names(targets: Mapping[str, Target]) -> dict[str, str]:
    """Name of the layer of each target."""
    parts = {name: target.part if isinstance(target, MatrixView) else "" for name, target in targets.items()}
    return {name: name.removesuffix(f".{part}") if part else name for name, part in parts.items()}


def match_names(
    patterns: Patterns, names: Sequence[str], what: str, layers: Mapping[str, str] | None = None
) -> list[str]:
    """Names that fit at least one pattern, in the order of ``names``; see :func:`find_targets` for the rules.

    Args:
        patterns: The patterns.
        names: The names to choose from.
        what: Which argument the patterns came from.
        layers: Name of the layer for each name that may be matched in its place.

    Raises:
        TargetError: If a pattern fits no name; near names are listed.
    """
    found: set[str] = set()
    for pattern in _as_list(patterns):
        fits: list[str] = []
        for tried in (pattern, f"*.{pattern}"):
            fits = fits or [name for name in names if fnmatchcase(name, tried)]
            fits = fits or [name for name in names if layers is not None and fnmatchcase(layers.get(name, ""), tried)]
        if not fits:
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or list(names[:5])
            raise TargetError(f"{what}: {pattern!r} matches no layer. Near names: {', '.join(near) or 'none'}.")
        found.update(fits)
    return [name for name in names if name in found]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once, uninitialized ones not at all."""
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


def clean_name(name: str) -> str:
    """The name without the part that ``torch.compile`` puts around an inner module.

    >>> clean_name("net._orig_mod.0")
    'net.0'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _as_list(patterns: Patterns) -> list[str]:
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _has_matrix(module: nn.Module) -> bool:
    """A leaf-like module with a weight of two or more dimensions of its own (norms and activations have none)."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if is_parametrized(module) or _REPARAMETRIZED & module._parameters.keys():
        return True
    weights = [p for name, p in module._parameters.items() if name.startswith("weight") and p is not None]
    return any(is_lazy(weight) or weight.dim() >= 2 for weight in weights) or _stacked_weight(module) is not None


def _stacked_weight(module: nn.Module) -> str | None:
    """Names and shapes of parameters that are stacks of matrices, such as the experts of a mixture; None if none is."""
    found = [
        f"{name}: {'x'.join(map(str, parameter.shape))}"
        for name, parameter in module._parameters.items()
        if parameter is not None and not is_lazy(parameter) and parameter.dim() == 3 and parameter.shape[0] > 1
        if break_even_rank(*parameter.shape[1:]) > 0  # a scale of shape (channels, 1, 1) is no stack
    ]
    return ", ".join(found) or None


def _why_not(module: nn.Module, kind: Kind | None) -> str | None:
    """Why a module with a weight matrix cannot be cut, whatever its matrices look like, or None if it can."""
    if is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if _REPARAMETRIZED & module._parameters.keys():
        return "its weight is pruned or normalized by a hook; make that permanent or remove it first"
    if isinstance(module, nn.Embedding):
        return "embeddings are looked up, not multiplied"
    if kind is None and not any(name.startswith("weight") for name in module._parameters) and _stacked_weight(module):
        return f"it holds stacked matrices ({_stacked_weight(module)}), which are not cut"
    if kind is None:
        return f"{type(module).__name__} is not a layer kind that can be cut"
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return "its weight is not initialized"
    if any(is_quantized(parameter) for parameter in module.parameters()):
        return "its weight is quantized; compress the model first, then quantize the factors"
    return kind.refusal(module)


def _why_not_view(view: MatrixView, owners: dict[int, set[int]]) -> str | None:
    """Why one matrix cannot be cut, or None if it can."""
    if len(owners[id(view.parameter)]) > 1:
        return _TIED
    if break_even_rank(view.out_features, view.in_features, view.group_count) < 1:
        return f"no rank saves parameters ({view.out_features}x{view.in_features})"
    return None


def _too_wide(view: MatrixView) -> str:
    gigabytes = 4e-9 * max(view.shape) ** 2
    return (
        f"the Gram matrix of its {max(view.shape):,} features takes {gigabytes:.1f} GB; name it to cut it all the same"
    )


def _layers(model: nn.Module) -> Iterator[Layer]:
    """What may be a target: modules with a weight matrix of their own, but for those inside of another such layer."""
    modules = dict(model.named_modules())
    inside: set[int] = set()
    for name, module in modules.items():
        if id(module) in inside:
            continue
        kind = kind_of(module)
        if isinstance(module, LowRankLayer) or kind is not None:
            inside.update(id(inner) for inner in module.modules())
        if not name or isinstance(module, LowRankLayer) or not (kind is not None or _has_matrix(module)):
            continue
        yield Layer.at(name, module, modules)


def _parameter_owners(model: nn.Module) -> dict[int, set[int]]:
    """For the id of each parameter the ids of the modules that hold it."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].add(id(module))
    return owners
