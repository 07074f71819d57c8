"""One sharded layer and what takes its place, sharded alike; nothing is changed before its ``commit``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lightning_prehab.kinds import MatrixView
from lightning_prehab.sharded.engine import (
    Managed,
    become_unit_,
    move_,
    parallel_plan,
    place_of,
    replace_in_group_,
    sharded_by,
)
from lightning_prehab.sharded.gathered import copies_of, rebound
from lightning_prehab.sharded.shares import divided
from lightning_prehab.surgery.swap import become_
from lightning_prehab.targets.locate import Layer


@dataclass
class Shell:
    """A copy of a layer with plain parameters in the place of sharded ones, for code that knows no others.

    Attributes:
        layer: The layer, with the copy as its module.
        views: Its matrices, by part.
        originals: The parameters of the layer itself, by the id of those in the copy.
    """

    layer: Layer
    views: dict[str, MatrixView]
    originals: dict[int, nn.Parameter]

    @classmethod
    def of(cls, layer: Layer, views: Mapping[str, MatrixView], values: Mapping[int, Tensor]) -> "Shell":
        """A shell of a layer.

        Args:
            layer: The layer.
            views: Its matrices, by part.
            values: Whole tensors, by the id of the sharded parameter; the others have the right shapes and no values.
        """
        instead = {
            id(one): nn.Parameter(values[id(one)] if id(one) in values else _blank(one), one.requires_grad)
            for one in layer.module.parameters()
            if isinstance(one, DTensor)
        }
        copies = copies_of(layer.module, instead)
        originals = {id(instead.get(id(one), one)): one for one in layer.module.parameters()}
        shown = {part: rebound(view, copies) for part, view in views.items()}
        return cls(replace(layer, module=copies[id(layer.module)]), shown, originals)


@dataclass
class ShardedExchange:
    """A sharded layer and what takes its place, as optimizers and FSDP2 have to know of it.

    Attributes:
        old: The layer.
        new: What takes its place; it holds the biases of the layer.
        heirs: Names of the new parameters, by the id of the one whose place they take.
        moved: What an optimizer knows of new parameters, by its id and that of the one whose place they take.
        added: What is added to the biases that stay, by their id: to what this process has of them.
        managed: What FSDP2 has managed and does no more, and what it manages instead.
        stays: What it goes on managing, by the name in the new layer.
    """

    old: nn.Module
    new: nn.Module
    heirs: dict[int, list[str]]
    moved: dict[tuple[int, int], dict[Tensor, dict[str, Any]]] = field(default_factory=dict)
    added: dict[int, Tensor] = field(default_factory=dict)
    managed: list[tuple[Managed, list[Any]]] = field(default_factory=list)
    stays: list[tuple[Managed, nn.Module, str]] = field(default_factory=list)

    @property
    def is_unit(self) -> bool:
        """Whether others know the layer by its identity."""
        return isinstance(self.old, FSDPModule)

    def replaced(self) -> list[nn.Parameter]:
        """The parameters that the new layer does not hold any more."""
        kept = {id(one) for one in self.new.parameters()}
        return [one for one in self.old.parameters() if id(one) not in kept]

    def parameters(self, weight: Tensor) -> dict[str, Tensor]:
        """What takes the place of one of them, by name in the new layer."""
        return {name: self.new.get_parameter(name) for name in self.heirs.get(id(weight), ())}

    def shifts(self, parameter: Tensor) -> list[tuple[slice, Tensor]]:
        """What is added to what this process has of a bias that both hold."""
        found = self.added.get(id(parameter))
        return [] if found is None else [(slice(None), found)]

    def divide_(self, shell: Shell, index: Mapping[int, Managed]) -> None:
        """Shards what is new like what it replaces, and hangs the parameters that stay into the new layer.

        Nothing is sent, and the model stays as it is.

        Args:
            shell: What the new layer was made from.
            index: What FSDP2 manages, by the id of the parameter.
        """
        plan = self._plan(index)
        for original in self.old.parameters():
            names = self.heirs.get(id(original))
            managed = index.get(id(original))
            if names is None or not isinstance(original, DTensor):
                continue
            if plan is not None:
                self._divide_by_plan_(names, *plan)
            if managed is not None:
                self.managed.append((managed, self._shard_(managed, names) if names else []))
        for module in self.new.modules():
            for name, one in module._parameters.items():
                if one is not None and id(one) in shell.originals:
                    module._parameters[name] = shell.originals[id(one)]
                    if id(shell.originals[id(one)]) in index:
                        self.stays.append((index[id(shell.originals[id(one)])], module, name))

    def commit(self) -> None:
        """Tells FSDP2 of the change, and makes a unit what has taken its place; assignments alone."""
        if self.is_unit:
            become_(self.old, self.new)
            become_unit_(self.old, type(self.new))
        for old, made in self.managed:
            replace_in_group_(old, made)
            for one in made:
                self._settle_(one, *place_of(one))
        for managed, module, name in self.stays:
            self._settle_(managed.parameter, module, name)

    def _settle_(self, parameter: Any, module: nn.Module, name: str) -> None:
        move_(parameter, self.old if self.is_unit and module is self.new else module, name)

    def _shard_(self, managed: Managed, names: Sequence[str]) -> list[Any]:
        wanted = {id(self.new.get_parameter(name)) for name in names}
        with _alone(self.new, wanted):
            made = sharded_by(managed, nn.Sequential(self.new))
        for one in made:
            one._post_load_hook_handle.remove()  # it may hang in a dictionary that is going to be exchanged
        return made

    def _plan(self, index: Mapping[int, Managed]) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
        """How tensor parallelism divides the layer: its weight, or its factors, of which it divides one."""
        matrices = [one for one in self.old.parameters() if one.dim() > 1]
        plans = [plan for one in matrices if (plan := parallel_plan(one, index.get(id(one)))) is not None]
        if not plans:
            return None
        sides = zip(*(placements for _, placements in plans), strict=True)
        return plans[0][0], tuple(next((one for one in side if isinstance(one, Shard)), Replicate()) for side in sides)

    def _divide_by_plan_(self, names: Sequence[str], mesh: Any, placements: Sequence[Placement]) -> None:
        """Rows of ``B`` where rows of the weight are on several processes, columns of ``A`` where columns are."""
        for name in names:
            module = self.new.get_submodule(name.rpartition(".")[0])
            one = self.new.get_parameter(name)
            side = [_side(placement, name) for placement in placements]
            made = divided(one, mesh, side)
            module._parameters["weight" if one.dim() > 1 else "bias"] = nn.Parameter(made, one.requires_grad)


def _side(placement: Placement, name: str) -> Placement:
    """How a parameter of a layer lies, by its name: rows of the weight are those of ``B`` and of biases."""
    if not isinstance(placement, Shard) or name == "weight":
        return placement
    return placement if (placement.dim == 1) == name.startswith("A.") else Replicate()


def _blank(parameter: DTensor) -> Tensor:
    """The shape of a parameter on the device where one works: without memory, but for vectors, which are zero."""
    device = parameter.device_mesh.device_type
    if parameter.dim() < 2:
        return torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
    return torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)


@contextmanager
def _alone(module: nn.Module, wanted: set[int]) -> Iterator[None]:
    """Hides all parameters but some (told by their ids)."""
    hidden = [
        (inner, name, one)
        for inner in module.modules()
        for name, one in inner._parameters.items()
        if one is not None and id(one) not in wanted
    ]
    for inner, name, _ in hidden:
        inner._parameters[name] = None
    try:
        yield
    finally:
        for inner, name, one in hidden:
            inner._parameters[name] = one
