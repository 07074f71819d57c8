"""Networks that measure the model and are no part of it: those inside of a torchmetrics.Metric."""

from torch import nn
from torchmetrics import Metric

from lightning_prehab.targets.names import clean_name


def measured_by(model: nn.Module) -> dict[int, str]:
    """For the id of each module that is reached through a metric alone the name of the outermost such metric.

    What the model holds too is a part of it. A model that is a metric itself is asked for by whoever passes it.
    """
    found: dict[int, str] = {}
    outside: set[int] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if isinstance(module, Metric) and module is not model:
            found |= {id(inner): clean_name(name) for inner in module.modules()}
        elif id(module) not in outside:
            outside.add(id(module))
            pending += [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
    return {key: name for key, name in found.items() if key not in outside}
