"""Stand-ins: a shallow copy of a layer that holds another tensor as its weight, for code that reads ``view.weight``.

A sharded layer is served by the same code as any other, one at a time. A *gathered* stand-in holds the whole weight. A
*pinned* one holds the sharded parameter for good: what hangs in the layer itself is the sharded one at one time and a
whole, plain one at another, between its forward and its backward pass and after an evaluation.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn

from lightning_prehab.kinds import MatrixView
from lightning_prehab.kinds.base import plain_type
from lightning_prehab.sharded.agreement import Agree
from lightning_prehab.sharded.shares import full, whole_on
from lightning_prehab.surgery.hooks import HOOKS


def stand_in(view: MatrixView, weight: nn.Parameter | Tensor) -> MatrixView:
    """The same matrix of a shallow copy of its layer that holds this weight: the parameter, or a tensor for one.

    Biases, settings and everything else are those of the layer; hooks are not.
    """
    return rebound(view, copies_of(view.module, {id(view.parameter): _as_parameter(weight, view.parameter)}))


def gathered(view: MatrixView) -> MatrixView:
    """A stand-in that holds the whole weight; collective. Keep one of them at a time."""
    whole = {id(one): _as_parameter(full(one), one) for one in view.parameters}
    return rebound(view, copies_of(view.module, whole))


def gathered_on(view: MatrixView, owner: int, agree: Agree) -> MatrixView | None:
    """The same on the one process that is going to work on it, so that others can work on others; None on these.

    Collective; see :func:`~lightning_prehab.sharded.shares.whole_on`.

    Args:
        view: Of a sharded layer; the model has to be resharded.
        owner: Global rank.
        agree: Asked before anything is sent.
    """
    here = distributed.get_rank() == owner
    instead: dict[int, nn.Parameter] = {}
    for parameter in view.parameters:
        whole = whole_on(parameter, owner, agree)
        if here and whole is not None:
            instead[id(parameter)] = _as_parameter(whole, parameter)
        del whole
    return rebound(view, copies_of(view.module, instead)) if here else None


def pinned(view: MatrixView) -> MatrixView:
    """A stand-in that holds the parameter which hangs in the layer now; the model has to be resharded for that.

    See :func:`~lightning_prehab.sharded.engine.reshard_`.
    """
    return rebound(view, copies_of(view.module, {}))


def copies_of(layer: nn.Module, instead: Mapping[int, nn.Parameter]) -> dict[int, nn.Module]:
    """Shallow copies of a layer and of all modules inside, by the id of the original.

    They are of the plain classes, without hooks, and hold the same objects, but for parameters that others stand for.

    Args:
        layer: The layer.
        instead: Parameters, by the id of those in whose place they stand.
    """
    copies: dict[int, nn.Module] = {}
    for module in layer.modules():
        made: nn.Module = object.__new__(plain_type(module))
        theirs = {key: value for key, value in vars(module).items() if key != "forward"}
        made.__dict__.update(theirs)
        made.__dict__.update({key: OrderedDict() for key in HOOKS})
        own = {name: instead.get(id(one), one) for name, one in module._parameters.items()}
        made.__dict__.update(_parameters=own, _buffers=dict(module._buffers), _modules=dict(module._modules))
        copies[id(module)] = made
    for made in copies.values():
        made._modules.update({key: copies.get(id(child), child) for key, child in made._modules.items()})
    return copies


def rebound(view: MatrixView, modules: Mapping[int, nn.Module]) -> MatrixView:
    """A copy of a view that sees other modules: these, by the id of the original."""
    made = copy.copy(view)
    for name, value in vars(view).items():
        if isinstance(value, nn.Module) and id(value) in modules:
            vars(made)[name] = modules[id(value)]
        elif isinstance(value, MatrixView):
            vars(made)[name] = rebound(value, modules)
    return made


def _as_parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    with torch.no_grad():
        return nn.Parameter(tensor, requires_grad=like.requires_grad)
