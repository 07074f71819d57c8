"""Which layers of a model can be cut, by dotted name, and why the others are left alone."""

import difflib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_prehab.errors import TargetError
from lightning_prehab.layers import LowRankLinear
from lightning_prehab.linalg import break_even_rank

#: Parameters that torch.nn.utils.prune, spectral_norm and weight_norm leave in place of the weight.
_REPARAMETRIZED = {"weight_orig", "weight_v"}

Patterns = str | Sequence[str] | None


class Targets(dict[str, nn.Linear]):
    """Layers to be compressed, ``{name: module}`` in model order, and what was left out.

    Attributes:
        skipped: ``{name: reason}`` for the layers with a weight matrix that are not targets.
        model_parameters: Number of parameters of the whole model, shared ones counted once; None if it is not known.
    """

    def __init__(self, layers: dict[str, nn.Linear], skipped: dict[str, str], model_parameters: int | None) -> None:
        super().__init__(layers)
        self.skipped = skipped
        self.model_parameters = model_parameters


def find_targets(model: nn.Module, target_modules: Patterns = None, exclude_modules: Patterns = None) -> Targets:
    """Finds the linear layers that can be cut.

    A pattern is a dotted name or an fnmatch pattern (``"blocks.*.mlp.*"``). One that fits no full name is tried against
    the ends of the names, at a dot, so the same pattern serves a bare model and a LightningModule that holds it as
    ``self.model``.

    Args:
        model: Any module. The root itself cannot be replaced and is never a target.
        target_modules: Patterns of the layers to take; None takes every layer that can be cut.
        exclude_modules: Patterns of the layers to leave out.

    Returns:
        The targets in model order. Layers under several names (shared modules) appear once, under the first.

    Raises:
        TargetError: If nothing matches, a pattern matches nothing, or a layer addressed by its full name cannot be cut.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> targets = find_targets(model)
    >>> list(targets), targets.skipped
    (['0'], {'2': 'no rank saves parameters (1x8)'})
    """
    modules = {clean_name(name): module for name, module in model.named_modules() if name}
    owners = _parameter_owners(model)
    candidates: dict[str, str | None] = {}
    for name, module in modules.items():
        if not _inside_low_rank(name, modules) and _has_matrix(module):
            candidates[name] = _why_not(module, owners)
    wanted = list(candidates) if target_modules is None else _match(target_modules, candidates, "target_modules")
    for pattern in _as_list(target_modules):
        if candidates.get(pattern) is not None:
            raise TargetError(
                f"Layer {pattern!r} ({type(modules[pattern]).__name__}) cannot be cut: {candidates[pattern]}."
            )
    excluded = set() if exclude_modules is None else set(_match(exclude_modules, candidates, "exclude_modules"))

    layers: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    for name, reason in candidates.items():
        module = modules[name]
        if name in excluded:
            skipped[name] = "excluded by exclude_modules"
        elif name not in wanted:
            skipped[name] = "not in target_modules"
        elif reason is not None:
            skipped[name] = reason
        elif isinstance(module, nn.Linear):
            layers[name] = module
    if not layers:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:8])
        if _has_matrix(model):
            listed = "a layer that is the model itself cannot be replaced; wrap it, for example in nn.Sequential"
        listed = listed or "it has no weight matrices"
        raise TargetError(f"{type(model).__name__} has no layer to cut ({listed}).")
    return Targets(layers, skipped, count_parameters(model))


def match_names(patterns: Patterns, names: Sequence[str], what: str) -> list[str]:
    """Names that fit at least one pattern, in the order of ``names``; see :func:`find_targets` for the rules.

    Raises:
        TargetError: If a pattern fits no name; near names are listed. ``what`` says which argument it came from.
    """
    found: set[str] = set()
    for pattern in _as_list(patterns):
        fits = [name for name in names if fnmatchcase(name, pattern)]
        fits = fits or [name for name in names if fnmatchcase(name, f"*.{pattern}")]
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


def _match(patterns: Patterns, candidates: dict[str, str | None], what: str) -> list[str]:
    return match_names(patterns, list(candidates), what)


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
    return any(is_lazy(weight) or weight.dim() >= 2 for weight in weights)


def _why_not(module: nn.Module, owners: dict[int, set[int]]) -> str | None:
    """Why a module with a weight matrix cannot be cut, or None if it can."""
    kind = type(module).__name__
    if is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if _REPARAMETRIZED & module._parameters.keys():
        return "its weight is pruned or normalized by a hook; make that permanent or remove it first"
    if isinstance(module, nn.MultiheadAttention):
        return "the fused input projection of nn.MultiheadAttention is a bare parameter"
    if isinstance(module, nn.Embedding):
        return "embeddings are looked up, not multiplied"
    if type(module) is not nn.Linear:
        return f"{kind} is not a layer kind that can be cut"
    if is_lazy(module.weight):
        return "its weight is not initialized"
    if len(owners[id(module.weight)]) > 1:
        return "its weight is tied to another layer"
    if break_even_rank(module.out_features, module.in_features) < 1:
        return f"no rank saves parameters ({module.out_features}x{module.in_features})"
    return None


def _parameter_owners(model: nn.Module) -> dict[int, set[int]]:
    """For the id of each parameter the ids of the modules that hold it."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].add(id(module))
    return owners


def _inside_low_rank(name: str, modules: dict[str, nn.Module]) -> bool:
    return any(isinstance(modules.get(parent), LowRankLinear) for parent in _parents(name))


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
