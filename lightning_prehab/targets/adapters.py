"""Layers under an adapter of peft: one that is merged later is added to a dense weight, which a cut would take away."""

import sys

from torch import nn

#: Why such a layer is no target unless it is named.
ADAPTED = (
    "an adapter of peft is on it, or it belongs to one, and could not be merged any more; merge it first "
    "(merge_and_unload), or name the layer to cut it beside the adapter"
)


def adapted_modules(model: nn.Module) -> set[int]:
    """The ids of the modules that an adapter is made of or stands on; peft itself is not imported."""
    source = sys.modules.get("peft.tuners.tuners_utils")  # nobody can have made an adapter before
    if source is None:
        return set()
    adapters = [module for module in model.modules() if isinstance(module, source.BaseTunerLayer)]
    return {id(inner) for adapter in adapters for inner in adapter.modules()}
