"""Regularized layers of a sharded model: multiplied where their rows are, or whole on one process at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn

from lightning_prehab.callbacks._distributed import merge, together
from lightning_prehab.callbacks._owners import in_rounds, owners_of
from lightning_prehab.callbacks._regularized import RegularizedLayer, restore_layers
from lightning_prehab.callbacks._said import named
from lightning_prehab.errors import PrehabError, UnsupportedError
from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.linalg.sharding import is_distributed, local_part
from lightning_prehab.regularizers import Penalty, Shrinkage
from lightning_prehab.regularizers.metric import Metric
from lightning_prehab.sharded.gathered import copies_of, pinned, rebound
from lightning_prehab.sharded.rows import ShardedRows, rows_of, spreads_of
from lightning_prehab.targets.locate import Target

T = TypeVar("T")
#: What :meth:`RegularizedLayer.tail` remembers, which only owners are asked for.
_FORECAST = "forecast"


class ShardedLayer(RegularizedLayer):
    """A layer that holds the sharded parameters for good; when it is made, they have to hang in the model.

    What asks it for its weight asks for one that is gathered, see :meth:`whole`, but for :meth:`here` and :meth:`put_`.

    Attributes:
        owner: The number of the process, among those with shards of it, that has it whole where one has to; see
            :func:`share_out_`.
    """

    owner = 0

    def __init__(self, name: str, view: MatrixView, rank: int | None, metric: Metric) -> None:
        super().__init__(name, pinned(view), rank, metric)
        self.spreads = spreads_of(self.parameters)

    @property
    def device(self) -> torch.device:
        """That of the mesh, also where the shards are kept on the CPU."""
        return self.spreads[0].device

    def rows(self) -> ShardedRows | None:
        """The rows of this process; None if they are not what it has of the parameter."""
        return rows_of(self.view, self.spreads)

    def here(self, tensor: Tensor | None = None) -> Tensor:
        """The rows of this process, of the weight or of its gradient."""
        return self._rows().within(local_part(self.parameter if tensor is None else tensor)).flatten(1)

    def put_(self, matrix: Tensor, into: Tensor | None = None) -> None:
        """Writes them."""
        self._rows().write_(matrix, local_part(self.parameter if into is None else into))

    def whole(self, parameters: Mapping[int, nn.Parameter]) -> RegularizedLayer:
        """The same layer, with the same memory, around gathered parameters, by the id of the sharded ones."""
        found = RegularizedLayer(
            self.name, rebound(self.view, copies_of(self.view.module, parameters)), self.rank, self.metric
        )
        found.memory = self.memory
        return found

    def _rows(self) -> ShardedRows:
        rows = self.rows()
        assert rows is not None  # see check_rows
        return rows


def check_rows(targets: Mapping[str, Target]) -> None:
    """Raises :class:`UnsupportedError` for a layer in shards whose rows cannot be changed where they are."""
    for name, target in targets.items():
        view = view_of(target)
        if is_distributed(view.parameter) and rows_of(view, spreads_of(view.parameters)) is None:
            raise UnsupportedError(
                f"Layer {name!r} ({type(view.module).__name__}) is not sharded row by row, so its matrix cannot be "
                "exchanged for another one in each step. Use PrehabCallback, or leave it out with exclude_modules."
            )


class _Gathering:
    """Some layers that share their parameters, and who has these for the moment."""

    def __init__(self, layers: list[ShardedLayer]) -> None:
        self.layers = layers
        self.spreads = list({id(one.parameter): one for layer in layers for one in layer.spreads}.values())
        self.owner = layers[0].owner

    def gather(self) -> dict[int, nn.Parameter] | None:
        """The whole parameters where the owner is, by the id of the sharded ones, else None."""
        wholes = {id(one.parameter): one.gather(self.owner) for one in self.spreads}
        own = {key: nn.Parameter(whole) for key, whole in wholes.items() if whole is not None}
        return own if len(own) == len(wholes) else None

    @property
    def is_here(self) -> bool:
        """Whether the owner is this process, or one of several."""
        return all(not one.by_slices or one.place == self.owner for one in self.spreads)


def on_owners(
    trainer: "pl.Trainer",
    layers: Sequence[ShardedLayer],
    work: Callable[[list[RegularizedLayer], Mapping[int, nn.Parameter]], T],
) -> Iterator[tuple[_Gathering, T | None]]:
    """Has each layer whole on one process, which works on it; a process has no more than one of them at a time.

    Args:
        trainer: The running Trainer.
        layers: Of all processes the same, in the same order.
        work: ``(the gathered layers that share parameters, the parameters by the id of the sharded ones)``.

    Yields:
        What shares its parameters, and the answer of the owner; None on the others.
    """
    gatherings = _gatherings(layers)
    views = {name: one.layers[0].view for name, one in gatherings.items()}
    for names in in_rounds(views, {name: one.owner for name, one in gatherings.items()}):
        answers = _one_round(trainer, {name: gatherings[name] for name in names}, work)
        for name in names:
            yield gatherings[name], answers.pop(name, None)


def _one_round(
    trainer: "pl.Trainer",
    gatherings: Mapping[str, _Gathering],
    work: Callable[[list[RegularizedLayer], Mapping[int, nn.Parameter]], T],
) -> dict[str, T]:
    """The answers of this process; what it has gathered is gone with them."""
    here = {name: found for name, one in gatherings.items() if (found := one.gather()) is not None}

    def answers() -> dict[str, T]:
        return {
            name: work([layer.whole(parameters) for layer in gatherings[name].layers], parameters)
            for name, parameters in here.items()
        }

    return together(trainer, answers)


def share_out_(layers: Sequence[ShardedLayer]) -> None:
    """Gives each layer its owner, who does what one process does for all, and remembers it, as long as the layers live.

    Args:
        layers: All that there are; what is asked of some of them goes to the same owners.
    """
    gatherings = _gatherings(layers)
    views = {name: one.layers[0].view for name, one in gatherings.items()}
    owners = owners_of(views, max((one.spreads[0].parts for one in gatherings.values()), default=1))
    for name, one in gatherings.items():
        for layer in one.layers:
            layer.owner = owners[name] % one.spreads[0].parts


def _gatherings(layers: Sequence[ShardedLayer]) -> dict[str, _Gathering]:
    """What shares its parameters, by the name of the first layer."""
    sharing: dict[int, list[ShardedLayer]] = {}
    for layer in layers:
        sharing.setdefault(id(layer.parameter), []).append(layer)
    return {found[0].name: _Gathering(found) for found in sharing.values()}


def figures(
    trainer: "pl.Trainer",
    layers: Sequence[RegularizedLayer],
    of_layer: Callable[[RegularizedLayer], tuple[Tensor, ...]],
) -> list[tuple[Tensor, ...]]:
    """Some numbers of each layer, as scalars: computed here, or of sharded layers where they are whole for a moment."""
    sharded = [layer for layer in layers if isinstance(layer, ShardedLayer)]
    if not sharded:
        return [of_layer(layer) for layer in layers]
    own: dict[str, list[float]] = {}
    for _, found in on_owners(trainer, sharded, lambda wholes, _: {one.name: of_layer(one) for one in wholes}):
        own.update({name: [float(number) for number in numbers] for name, numbers in (found or {}).items()})
    known = merge(trainer, own)
    return [tuple(torch.tensor(known[layer.name], dtype=torch.float64, device=layer.device)) for layer in layers]


def tails_of(trainer: "pl.Trainer", layers: Sequence[RegularizedLayer]) -> tuple[float | None, float]:
    """The share of energy that the cut would drop now, mean over layers, and the energy itself, summed.

    The share is None if no layer has a target rank. Reads values back from the device, all at once.
    """
    found = figures(trainer, [layer for layer in layers if layer.rank is not None], RegularizedLayer.tail)
    if not found:
        return None, 0.0
    tails, energies = (torch.stack(parts) for parts in zip(*found, strict=True))
    shares, absolute = torch.stack([tails / energies.clamp_min(torch.finfo(energies.dtype).tiny), tails]).tolist()
    return sum(shares) / len(shares), sum(absolute)


@torch.no_grad()
def cuts_of_shards(trainer: "pl.Trainer", layers: Sequence[ShardedLayer]) -> Iterator[tuple[str, Tensor]]:
    """What :meth:`RegularizedLayer.cut` would change in what this process has of each parameter.

    Yields:
        The name of a layer that is held by the parameter, and the change; once for each parameter.
    """

    def change(wholes: list[RegularizedLayer], _: Mapping[int, nn.Parameter]) -> Tensor:
        held = wholes[0].parameter.detach()
        new = held.clone()
        for one in wholes:
            one.view.write_(one.here() + one.cut().to(held), into=new)
        return new - held

    for gathering, found in on_owners(trainer, layers, change):
        yield gathering.layers[0].name, gathering.layers[0].spreads[0].scatter(found, gathering.owner)


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
            continue
        own = rows.own.requires_grad_()
        try:
            value = regularizer.in_metric(rows, layer.metric, layer.rank, layer.memory)
        except PrehabError as error:
            raise named(error, layer.name) from error
        (gradient,) = torch.autograd.grad(value, own)
        values[layer.name] = value.detach()
        into = rows.within(gradients[id(layer.parameter)][1])
        into.add_(gradient.reshape(into.shape))

    def pull(
        wholes: list[RegularizedLayer], parameters: Mapping[int, nn.Parameter]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        own = torch.stack([one.penalty(regularizer) for one in wholes])
        found = torch.autograd.grad(own.sum(), list(parameters.values()))
        return own.detach(), dict(zip(parameters, found, strict=True))

    for gathering, answer in on_owners(trainer, whole, pull):
        found = torch.zeros(len(gathering.layers), device=gathering.layers[0].device) if answer is None else answer[0]
        found = gathering.spreads[0].send(found, gathering.owner)
        values.update({layer.name: value for layer, value in zip(gathering.layers, found, strict=True)})
        for spread in gathering.spreads:
            part = spread.scatter(None if answer is None else answer[1][id(spread.parameter)], gathering.owner)
            gradients[id(spread.parameter)][1].add_(part)
        if _learns_of_owners(regularizer):
            hand_out_(trainer, [gathering])
    pulled = [(one.parameter, part) for one, part in gradients.values() if one.parameter.requires_grad]
    return [values[layer.name] for layer in layers], pulled


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

    def needs_whole(layer: ShardedLayer) -> bool:
        return shrinkage.needs_whole(layer.memory, progress, layer.rank)

    def prepare(wholes: list[RegularizedLayer], _: Mapping[int, nn.Parameter]) -> None:
        for one in wholes:
            one.prepare_(shrinkage, progress)

    rows = {layer.name: layer.view.slices is not None and layer.spreads[0].by_slices for layer in layers}
    due = [one for one in layers if rows[one.name] and one.has_work(shrinkage, progress) and needs_whole(one)]
    hand_out_(trainer, [gathering for gathering, _ in on_owners(trainer, due, prepare)])
    whole = []
    for layer in layers:
        if layer.name not in rates:
            continue
        if rows[layer.name] and not needs_whole(layer):
            _shrink_rows_(layer, shrinkage, progress, rates[layer.name])
        elif not shrinkage.passes_(layer.memory, progress, layer.rank, rates[layer.name]):
            whole.append(layer)

    def shrink(wholes: list[RegularizedLayer], parameters: Mapping[int, nn.Parameter]) -> Mapping[int, nn.Parameter]:
        for one in wholes:
            one.shrink_(shrinkage, progress, rates[one.name])
        return parameters

    done = []
    for gathering, shrunk in on_owners(trainer, whole, shrink):
        for spread in gathering.spreads:
            new = None if shrunk is None else shrunk[id(spread.parameter)].detach()
            spread.local.copy_(spread.scatter(new, gathering.owner))
        done.append(gathering)
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


def hand_out_(trainer: "pl.Trainer", gatherings: Sequence[_Gathering]) -> None:
    """Gives all processes what those remember who have worked on some layers, but for what nobody else needs."""
    if not gatherings:
        return
    described = merge(trainer, _described(gatherings))
    for one in described.values():
        one.pop(_FORECAST, None)
    for layer, memory in _memories_of_owners(gatherings, described):
        kept = {key: tensor for key, tensor in layer.memory.items() if key == _FORECAST}
        layer.memory.clear()
        layer.memory.update(kept | memory)


def states_of_shards(layers: Sequence[ShardedLayer]) -> dict[str, dict[str, Any]]:
    """The states of all layers, with what their owners alone remember, on the CPU; every process has to call this."""
    states = {layer.name: layer.state_dict() for layer in layers}
    gatherings = list(_gatherings(layers).values())
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, _described(gatherings))
    described = {name: one for part in parts for name, one in part.items()}
    for layer, memory in _memories_of_owners(gatherings, described):
        states[layer.name]["memory"] = {key: tensor.cpu().clone() for key, tensor in memory.items()}
    return states


def restore_shards(
    views: Mapping[str, MatrixView], states: Mapping[str, Mapping[str, Any]], regularizer: Penalty | Shrinkage
) -> list[RegularizedLayer]:
    """The layers that :func:`states_of_shards` has described; what owners alone remember stays with them.

    Raises:
        CheckpointError: If one of them is not a target now.
    """
    bare = {name: {**state, "memory": {}} for name, state in states.items()}
    layers = restore_layers(views, bare, ShardedLayer)
    shards = [layer for layer in layers if isinstance(layer, ShardedLayer)]
    share_out_(shards)
    for one in _gatherings(shards).values():
        for layer in one.layers:
            memory = dict(states[layer.name]["memory"])
            if not one.is_here:
                memory.pop(_FORECAST, None)
                if isinstance(regularizer, Penalty) and not _learns_of_owners(regularizer):
                    memory = {}
            layer.load_memory(memory)
    return layers


def _learns_of_owners(penalty: Penalty) -> bool:
    """Whether all processes have to know what an owner remembers, since the next call may do with rows."""
    return type(penalty).needs_whole is not Penalty.needs_whole


#: Of each tensor of a memory the shape, the strides of a copy (products are rounded as memory is laid out), the dtype,
#: and whether it lives on the CPU whatever the device.
_Description = dict[str, tuple[torch.Size, tuple[int, ...], torch.dtype, bool]]


def _described(gatherings: Sequence[_Gathering]) -> dict[str, _Description]:
    """What this process remembers of its own layers."""
    return {
        layer.name: {
            key: (tensor.shape, torch.empty_like(tensor, device="meta").stride(), tensor.dtype, tensor.is_cpu)
            for key, tensor in layer.memory.items()
        }
        for one in gatherings
        for layer in one.layers
        if one.is_here
    }


def _memories_of_owners(
    gatherings: Sequence[_Gathering], described: Mapping[str, _Description]
) -> Iterator[tuple[ShardedLayer, dict[str, Tensor]]]:
    """Each layer with what its owner remembers of it, sent to all, one layer after the other."""
    for one in gatherings:
        for layer in one.layers:
            memory = {}
            for key, (shape, strides, dtype, on_cpu) in described[layer.name].items():
                tensor = layer.memory[key] if one.is_here else torch.empty(shape, dtype=dtype)
                tensor = one.spreads[0].send(tensor.to(layer.device), one.owner)
                memory[key] = torch.empty_strided(shape, strides, dtype=dtype, device="cpu" if on_cpu else layer.device)
                memory[key].copy_(tensor)
            yield layer, memory
