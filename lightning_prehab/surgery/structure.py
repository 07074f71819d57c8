"""Gives a model the structure of a state dict, or its dense layers back."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_prehab.errors import TargetError
from lightning_prehab.kinds import kind_of
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.linalg.modes import in_full_precision, outside_inference_mode
from lightning_prehab.surgery.holders import names_holders
from lightning_prehab.surgery.pretrained import note_structure_
from lightning_prehab.surgery.stored import follower, stored_factors
from lightning_prehab.surgery.swap import replace_modules_
from lightning_prehab.targets.adapters import adapted_modules
from lightning_prehab.targets.find import check_model
from lightning_prehab.targets.locate import low_rank_layers
from lightning_prehab.targets.names import Patterns, clean_name, join, match_names
from lightning_prehab.targets.shards import check_not_in_shards


@outside_inference_mode
@in_full_precision
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
    check_not_in_shards(model, "follow_state_dict_")
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
    replace_modules_(model, replacement)
    if names:
        note_structure_(model)
    return names


@names_holders
def to_dense_(model: nn.Module, names: Patterns = None) -> list[str]:
    """Replaces low-rank layers by dense ones with the same function, in place: the way back from the surgery.

    A dense weight is trained if any part of the layer's factors was.

    Args:
        model: Any module. A layer that is the model itself cannot be replaced: use its ``to_linear()``. Make optimizers
            anew afterwards; they still hold the factors.
        names: Names or patterns of the layers, as for :func:`~lightning_prehab.find_targets`; None takes all.

    Returns:
        The names of the replaced layers, in model order; empty if ``names`` is None and there are none.

    Raises:
        ArgumentError: If ``model`` is no module, or ``names`` are no names.
        TargetError: If a pattern matches no low-rank layer, or an adapter of peft is on the factors of one; the model
            is then as it was.

    >>> from lightning_prehab import LowRankLinear
    >>> model = nn.Sequential(LowRankLinear(8, 8, rank=2))
    >>> to_dense_(model), type(model[0]).__name__
    (['0'], 'Linear')
    """
    check_model(model)
    check_not_in_shards(model, "to_dense_")
    found = [clean_name(name) for name, _ in low_rank_layers(model) if name]
    wanted = found if names is None else match_names(names, found, "names")
    densify_(model, wanted)
    return wanted


@outside_inference_mode
@in_full_precision
def densify_(model: nn.Module, names: Iterable[str]) -> None:
    """Replaces the named low-rank layers, or those that the names are parts of, by dense ones of the same function."""
    wanted = set(names)
    replacement: dict[int, nn.Module] = {}
    for name, module in low_rank_layers(model):
        if any(join(clean_name(name), part) in wanted for part, _ in module.named_modules()):
            if adapted_modules(module):
                raise TargetError(
                    f"Layer {clean_name(name)!r} has an adapter of peft on its factors, which would be lost; merge it "
                    "first (merge_and_unload)."
                )
            replacement[id(module)] = module.to_dense()
    replace_modules_(model, replacement)
    note_structure_(model)
