"""Regularized layers of a sharded model: seen by the rows of each process, or whole on one process at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_prehab.callbacks._owners import owners_of
from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.callbacks._rounds import whole_in_rounds
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.linalg.sharding import is_distributed, local_part
from lightning_prehab.regularizers.metric import Metric
from lightning_prehab.sharded.gathered import copies_of, pinned, rebound
from lightning_prehab.sharded.rows import ShardedRows, rows_of, spreads_of
from lightning_prehab.targets.locate import Target

T = TypeVar("T")


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


class Gathering:
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


def gatherings_of(layers: Sequence[ShardedLayer]) -> dict[str, Gathering]:
    """What shares its parameters, by the name of the first layer."""
    sharing: dict[int, list[ShardedLayer]] = {}
    for layer in layers:
        sharing.setdefault(id(layer.parameter), []).append(layer)
    return {found[0].name: Gathering(found) for found in sharing.values()}


def share_out_(layers: Sequence[ShardedLayer]) -> None:
    """Gives each layer its owner, who does what one process does for all, and remembers it, as long as the layers live.

    Args:
        layers: All that there are; what is asked of some of them goes to the same owners.
    """
    gatherings = gatherings_of(layers)
    views = {name: one.layers[0].view for name, one in gatherings.items()}
    owners = owners_of(views, max((one.spreads[0].parts for one in gatherings.values()), default=1))
    for name, one in gatherings.items():
        for layer in one.layers:
            layer.owner = owners[name] % one.spreads[0].parts


def on_owners(
    trainer: "pl.Trainer",
    layers: Sequence[ShardedLayer],
    work: Callable[[list[RegularizedLayer], Mapping[int, nn.Parameter]], T],
    then: Callable[[Gathering, T | None], object],
) -> None:
    """Has each layer whole on one process, which works on it; a process has no more than one of them at a time.

    Args:
        trainer: The running Trainer.
        layers: Of all processes the same, in the same order.
        work: ``(the gathered layers that share parameters, the parameters by the id of the sharded ones)``.
        then: ``(what shares its parameters, the answer of the owner; None on the others)``: called on all processes;
            what it does not keep is gone before the next layer is whole.
    """
    gatherings = gatherings_of(layers)
    views = {name: one.layers[0].view for name, one in gatherings.items()}
    owners = {name: one.owner for name, one in gatherings.items()}

    def answers_of(wholes: Mapping[str, Mapping[int, nn.Parameter]]) -> dict[str, T]:
        return {
            name: work([layer.whole(parameters) for layer in gatherings[name].layers], parameters)
            for name, parameters in wholes.items()
        }

    for names, answers in whole_in_rounds(trainer, views, owners, lambda name: gatherings[name].gather(), answers_of):
        for name in names:
            then(gatherings[name], answers.pop(name, None))
