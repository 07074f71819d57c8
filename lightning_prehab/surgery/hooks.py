"""What others have put on a layer goes over to what takes its place: hooks with their handles, and attributes.

A :class:`~torch.utils.hooks.RemovableHandle` finds its hook through the dictionary that it was put into, so it is the
dictionary itself that moves.
"""

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.targets.attached import has_hooks

#: Where ``nn.Module`` keeps hooks, and what it notes of each.
HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
#: What every module has.
_OF_ALL = frozenset(vars(nn.Module()))


def hand_over_(old: nn.Module, new: nn.Module, itself: bool = True) -> None:
    """Moves the hooks of a layer, and of the modules in it that have a namesake in the new one; cannot fail.

    A dense layer hands over the attributes that somebody has put on it as well, where the new one lacks them.

    Args:
        old: The layer.
        new: What takes its place.
        itself: Whether the layer itself has to do with it, or only what is inside.
    """
    inside = dict(new.named_modules())
    for name, module in old.named_modules():
        if name in inside and inside[name] is not module and (itself or name):
            _move_hooks_(module, inside[name])
    if itself and not isinstance(old, LowRankLayer):
        theirs = {key: value for key, value in vars(old).items() if key not in _OF_ALL and not hasattr(new, key)}
        vars(new).update(theirs)


def without_hooks(model: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy``: the copy has none of the hooks that somebody has put on the modules.

    What torch computes a weight with in a hook (``weight_norm``, ``spectral_norm``, pruning), and by which it divides
    the work of a layer (tensor parallelism), is part of the module, and stays on it.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        hooks = hooks_of(module)
        kept = {key for found in hooks.values() for key, hook in found.items() if makes_weight(hook) or _divides(hook)}
        for found in hooks.values():
            memo[id(found)] = OrderedDict((key, copy.deepcopy(hook)) for key, hook in found.items() if key in kept)
    return memo


def lost_hooks(name: str, old: nn.Module, new: nn.Module) -> list[str]:
    """Names of what has hooks in a layer and will have no place in the new one: modules inside, and parameters."""
    inside = dict(new.named_modules())
    kept = {id(parameter) for parameter in new.parameters()}
    modules = [key for key, module in old.named_modules() if key not in inside and hooks_of(module)]
    parameters = [key for key, p in old.named_parameters() if id(p) not in kept and has_hooks(p)]
    return [f"{name}.{key}" for key in (*modules, *parameters)]


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """The hooks of a module itself, by where it keeps them; what is empty is left out."""
    return {kind: found for kind in HOOKS if (found := vars(module).get(kind))}


def makes_weight(hook: Any) -> bool:
    """Whether it is one of torch's, that computes a weight of parameters before each call."""
    return any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__)


def _divides(hook: Any) -> bool:
    """Whether it is a function of torch's that tells the layer which part of a tensor is whose."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor.")


def own_content(module: nn.Module) -> dict[str, Any]:
    """What makes a module what it is, besides its class: parts and settings, without hooks and without its mode."""
    return {key: value for key, value in vars(module).items() if key not in (*HOOKS, "_is_full_backward_hook")}


def _move_hooks_(old: nn.Module, new: nn.Module) -> None:
    hooks = hooks_of(old)
    for kind, found in hooks.items():
        found.update(vars(new)[kind])  # a new layer of another package may have some of its own
        vars(new)[kind], vars(old)[kind] = found, OrderedDict()
    if "_backward_hooks" in hooks:
        vars(new)["_is_full_backward_hook"] = old._is_full_backward_hook
        vars(old)["_is_full_backward_hook"] = None
