"""What a regularizer does to layers in shards: its penalties and their gradients, its shrinking, its cuts on trial.

Where rows suffice each process works on its own; what needs a matrix as a whole is done by the owner of the layer.
"""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.callbacks._said import named
from lightning_prehab.callbacks._sharded_layers import Gathering, ShardedLayer, on_owners
from lightning_prehab.callbacks._sharded_memories import hand_out_, learns_of_owners
from lightning_prehab.errors import PrehabError
from lightning_prehab.linalg.matrices import working_dtype
from lightning_prehab.regularizers import Penalty, Shrinkage
from lightning_prehab.sharded.rows import ShardedRows, Spread

#: Of parameters, by their id: how they lie, and what this process has of a gradient.
_Gradients = dict[int, tuple[Spread, Tensor]]


def pull_of_shards(
    trainer: "pl.Trainer", regularizer: Penalty, layers: Sequence[ShardedLayer]
) -> tuple[list[Tensor], list[tuple[nn.Parameter, Tensor]]]:
    """The penalties of some layers, and the gradient of their sum in what this process has of each parameter."""
    values: dict[str, Tensor] = {}
    gradients = {id(one.parameter): (one, torch.zeros_like(one.local)) for layer in layers for one in layer.spreads}
    whole = []
    for layer in layers:
        rows = layer.rows()
        if rows is None or regularizer.needs_whole(layer.memory, layer.rank):
            whole.append(layer)
        else:
            values[layer.name] = _pull_rows_(regularizer, layer, rows, gradients)
    _pull_whole_(trainer, regularizer, whole, values, gradients)
    pulled = [(one.parameter, part) for one, part in gradients.values() if one.parameter.requires_grad]
    return [values[layer.name] for layer in layers], pulled


def _pull_rows_(regularizer: Penalty, layer: ShardedLayer, rows: ShardedRows, gradients: _Gradients) -> Tensor:
    """The penalty of a layer; its gradient in the rows of this process is added up."""
    own = rows.own.requires_grad_()
    try:
        value = regularizer.in_metric(rows, layer.metric, layer.rank, layer.memory)
    except PrehabError as error:
        raise named(error, layer.name) from error
    (gradient,) = torch.autograd.grad(value, own)
    into = rows.within(gradients[id(layer.parameter)][1])
    into.add_(gradient.reshape(into.shape))
    return value.detach()


def _pull_whole_(
    trainer: "pl.Trainer",
    regularizer: Penalty,
    layers: Sequence[ShardedLayer],
    values: dict[str, Tensor],
    gradients: _Gradients,
) -> None:
    """The same of layers that their owners have whole for it."""

    def pull(
        wholes: list[RegularizedLayer], parameters: Mapping[int, nn.Parameter]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        own = torch.stack([one.penalty(regularizer) for one in wholes])
        found = torch.autograd.grad(own.sum(), list(parameters.values()))
        return own.detach(), dict(zip(parameters, found, strict=True))

    def add_up(gathering: Gathering, answer: tuple[Tensor, dict[int, Tensor]] | None) -> None:
        dtype = working_dtype(gathering.layers[0].parameter.dtype)
        room = torch.zeros(len(gathering.layers), dtype=dtype, device=gathering.layers[0].device)
        found = room if answer is None else answer[0].to(dtype)
        found = gathering.spreads[0].send(found, gathering.owner)
        values.update({layer.name: value for layer, value in zip(gathering.layers, found, strict=True)})
        for spread in gathering.spreads:
            part = spread.scatter(None if answer is None else answer[1][id(spread.parameter)], gathering.owner)
            gradients[id(spread.parameter)][1].add_(part)
        if learns_of_owners(regularizer):
            hand_out_(trainer, [gathering])

    on_owners(trainer, layers, pull, add_up)


def shrink_sharded_(
    trainer: "pl.Trainer",
    layers: Sequence[ShardedLayer],
    shrinkage: Shrinkage,
    progress: float,
    rates: Mapping[str, float],
) -> None:
    """Does what a shrinkage has to do with layers before and at the next call; those with a rate are shrunk.

    Args:
        trainer: The running Trainer.
        layers: All layers.
        shrinkage: The shrinkage.
        progress: Done share of the time before the surgery.
        rates: Learning rate of the last step of each trainable weight that was stepped, by the name of the layer.
    """

    def by_rows(layer: ShardedLayer) -> bool:
        return layer.view.slices is not None and layer.spreads[0].by_slices

    def needs_whole(layer: ShardedLayer) -> bool:
        return shrinkage.needs_whole(layer.memory, progress, layer.rank)

    due = [one for one in layers if by_rows(one) and one.has_work(shrinkage, progress) and needs_whole(one)]
    _prepare_whole(trainer, due, shrinkage, progress)
    whole = []
    for layer in layers:
        if layer.name not in rates:
            continue
        if by_rows(layer) and not needs_whole(layer):
            _shrink_rows_(layer, shrinkage, progress, rates[layer.name])
        elif not shrinkage.passes_(layer.memory, progress, layer.rank, rates[layer.name]):
            whole.append(layer)
    _shrink_whole_(trainer, whole, shrinkage, progress, rates)


def _prepare_whole(
    trainer: "pl.Trainer", layers: Sequence[ShardedLayer], shrinkage: Shrinkage, progress: float
) -> None:
    """Owners do the spectral work of the next call; all have the results then."""

    def prepare(wholes: list[RegularizedLayer], _: Mapping[int, nn.Parameter]) -> None:
        for one in wholes:
            one.prepare_(shrinkage, progress)

    done: list[Gathering] = []
    on_owners(trainer, layers, prepare, lambda gathering, _: done.append(gathering))
    hand_out_(trainer, done)


@torch.no_grad()
def _shrink_rows_(layer: ShardedLayer, shrinkage: Shrinkage, progress: float, rate: float) -> None:
    rows = layer.rows()
    assert rows is not None
    try:
        shrunk = shrinkage(rows, layer.rank, layer.memory, progress, rate, layer.metric)
    except PrehabError as error:
        raise named(error, layer.name) from error
    if shrunk.data_ptr() != rows.own.data_ptr() or not len(shrunk):
        layer.put_(shrunk)


def _shrink_whole_(
    trainer: "pl.Trainer",
    layers: Sequence[ShardedLayer],
    shrinkage: Shrinkage,
    progress: float,
    rates: Mapping[str, float],
) -> None:
    """Owners shrink layers, and all get their parts back."""

    def shrink(wholes: list[RegularizedLayer], parameters: Mapping[int, nn.Parameter]) -> Mapping[int, nn.Parameter]:
        for one in wholes:
            one.shrink_(shrinkage, progress, rates[one.name])
        return parameters

    done: list[Gathering] = []

    def put_back_(gathering: Gathering, shrunk: Mapping[int, nn.Parameter] | None) -> None:
        for spread in gathering.spreads:
            new = None if shrunk is None else shrunk[id(spread.parameter)].detach()
            spread.local.copy_(spread.scatter(new, gathering.owner))
        done.append(gathering)

    on_owners(trainer, layers, shrink, put_back_)
    hand_out_(trainer, done)


@torch.no_grad()
def cuts_of_shards(trainer: "pl.Trainer", layers: Sequence[ShardedLayer]) -> dict[str, Tensor]:
    """What :meth:`RegularizedLayer.cut` would change in what this process has of each parameter.

    Returns:
        By the name of a layer that is held by the parameter; once for each parameter.
    """

    def change(wholes: list[RegularizedLayer], _: Mapping[int, nn.Parameter]) -> Tensor:
        held = wholes[0].parameter.detach()
        new = held.clone()
        for one in wholes:
            one.view.write_(one.here() + one.cut().to(held), into=new)
        return new.sub_(held)

    changes: dict[str, Tensor] = {}

    def keep(gathering: Gathering, found: Tensor | None) -> None:
        changes[gathering.layers[0].name] = gathering.spreads[0].scatter(found, gathering.owner)

    on_owners(trainer, layers, change, keep)
    return changes
