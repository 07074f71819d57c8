"""What optimizers know of sharded weights, for what takes their place: from rows where they are, or gathered."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_prehab.linalg.blocks import squares_of_error
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.sharding import local_part
from lightning_prehab.sharded.agreement import Agree
from lightning_prehab.sharded.shares import dtensor_like, full, share_in, share_of
from lightning_prehab.surgery.moments import AddUp, bias_state, factor_states
from lightning_prehab.surgery.optimizers import moved_states
from lightning_prehab.surgery.replacement import Replacement, StateOf
from lightning_prehab.surgery.wrapped import family

T = TypeVar("T")
#: What an optimizer knows of new parameters, by its id and that of the one whose place they take.
Moved = dict[tuple[int, int], dict[Tensor, dict[str, Any]]]


def holders_of(
    weight: Tensor, optimizers: Iterable[torch.optim.Optimizer]
) -> list[tuple[torch.optim.Optimizer, Mapping[str, Any]]]:
    """The optimizers that know something of a weight, each with the group that it is in."""
    return [
        (one, group)
        for optimizer in optimizers
        for one in family(optimizer)
        for group in one.param_groups
        if any(parameter is weight for parameter in group["params"]) and one.state.get(weight)
    ]


def whole_states(weight: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, dict[str, Any]]:
    """The states of a weight with all of their tensors whole, by the id of the optimizer; collective."""
    return {
        id(optimizer): {key: _whole(value) for key, value in optimizer.state[weight].items()}
        for optimizer, _ in holders_of(weight, optimizers)
    }


def _whole(value: Any) -> Any:
    """A tensor whole; what is stored in a way of its own (eight bits) stays as it is, and is not understood."""
    if not isinstance(value, DTensor) or type(local_part(value)) is not Tensor:
        return value
    return full(value)


def states_of_whole(
    replacement: Replacement,
    originals: Mapping[int, nn.Parameter],
    known: Mapping[int, Mapping[int, Mapping[str, Any]]],
    optimizers: Sequence[torch.optim.Optimizer],
) -> Moved:
    """What optimizers know of the plain parameters of a new layer.

    Args:
        replacement: A plain layer and what takes its place.
        originals: The sharded parameters, by the id of the plain ones.
        known: Their states, by their id and that of the optimizer; see :func:`whole_states`.
        optimizers: The optimizers.
    """
    moved: Moved = {}
    for weight in {id(one): one for one in replacement.replaced()}.values():
        original = originals[id(weight)]
        for optimizer, group in holders_of(original, optimizers):

            def state_of(other: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> Mapping[str, Any]:
                return known.get(id(originals[id(other)]), {}).get(id(optimizer), {})

            found = moved_states(optimizer, group, weight, replacement, state_of)
            moved[id(optimizer), id(original)] = found
    return moved


def with_sums(work: Callable[[AddUp], T], group: distributed.ProcessGroup, device: str, agree: Agree) -> T:
    """What ``work(add_up)`` returns, where ``add_up`` gives the sum of what all processes have.

    The work is done twice: once without sending anything, so that one that fails does so before the others wait for it.

    Args:
        work: It asks for the same sums in the same order on all processes, and takes as much memory both times.
        group: The processes.
        device: On which sums are sent.
        agree: Asked before anything is sent.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would come twice
        agree(lambda: work(lambda tensor: tensor) and None)
    wide = torch.float32 if device == "mps" else torch.float64

    def add_up(tensor: Tensor) -> Tensor:
        sent = tensor.detach().to(device, wide).contiguous()
        distributed.all_reduce(sent, group=group)
        return sent.to(tensor)

    return work(add_up)


def in_rows(weight: DTensor, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether all that optimizers know of a weight lies as it does, or is no matrix."""
    for optimizer, _ in holders_of(weight, optimizers):
        for value in optimizer.state[weight].values():
            alike = isinstance(value, DTensor) and value.placements == weight.placements and value.shape == weight.shape
            if isinstance(value, Tensor) and value.dim() > 0 and not (alike and type(local_part(value)) is Tensor):
                return False
            if isinstance(value, DTensor) and value.dim() == 0:
                return False
    return True


@dataclass
class LayerInRows:
    """The part of a linear layer and of its two factors that lies on this process; nothing is gathered.

    Args:
        replacement: The layer, without values, and what takes its place.
        weight: The weight of the layer itself.
    """

    replacement: Replacement
    weight: DTensor
    add_up: AddUp | None = None
    _local: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        self.child = self.replacement.child("")
        self.device = self.child.A.weight.device
        self._local = nn.Parameter(local_part(self.weight).to(self.device), requires_grad=False)
        self.old, self.new = self.replacement.old, self.replacement.new
        where = self.weight.device_mesh, self.weight.placements
        self.b = share_in(self.child.B.weight, *where)
        bias = None if self.replacement.views[""].bias is not None else self.child.bias
        self.bias = None if bias is None else share_in(bias, *where)

    def squares(self, add_up: AddUp) -> Tensor:
        """``|W - B A|_F^2`` and ``|W|_F^2``."""
        return add_up(squares_of_error(self._local, Factors(self.child.A.weight, self.b)))

    def moved(self, optimizers: Sequence[torch.optim.Optimizer], add_up: AddUp) -> Moved:
        """What optimizers know of the plain new parameters: of ``A`` whole, of ``B`` the rows that are here."""
        self.add_up = add_up
        found: Moved = {}
        for optimizer, group in holders_of(self.weight, optimizers):
            state = {key: self._here(value) for key, value in optimizer.state[self.weight].items()}
            found[id(optimizer), id(self.weight)] = moved_states(
                optimizer,
                group,
                self._local,
                self,
                lambda other, state=state: state,  # type: ignore[misc]
            )
        return found

    def _here(self, value: Any) -> Any:
        return local_part(value).to(self.device) if isinstance(value, DTensor) else value

    def replaced(self) -> list[nn.Parameter]:
        """The weight."""
        return [self._local]

    def parameters(self, weight: Tensor) -> dict[str, Tensor]:
        """What takes its place."""
        return self.replacement.parameters(self.replacement.views[""].parameter)

    def shifts(self, parameter: Tensor) -> list[tuple[slice, Tensor]]:
        """None; see the whole layer."""
        return []

    def states(self, weight: Tensor, state: Mapping[str, Any], of: StateOf) -> dict[Tensor, dict[str, Any]]:
        """As of the whole layer, from the rows that are here."""
        assert self.add_up is not None
        for_a, for_b = factor_states(state, self.child.A.weight, self.b, self.add_up)
        found = {self.child.A.weight: for_a, self.child.B.weight: for_b}
        if self.bias is not None:
            found[self.child.bias] = bias_state(state, self.bias)
        return {parameter: moved for parameter, moved in found.items() if moved}


def placed(moved: Mapping[str, Any], before: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A state with its tensors where the parameter is.

    Args:
        moved: Tensors of the shape of the parameter, or of what this process has of it.
        before: What the optimizer knew of the parameter that was replaced.
        parameter: Sharded, or plain.
    """
    if not isinstance(parameter, DTensor):
        return dict(moved)
    return {key: _placed(value, before.get(key), parameter) for key, value in moved.items()}


def _placed(value: Any, before: Any, parameter: DTensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    local = local_part(parameter)
    if value.dim() > 0 and value.shape == parameter.shape:
        return dtensor_like(share_of(value, parameter), parameter)
    if value.dim() > 0 and value.shape == local.shape:
        return dtensor_like(value.to(local.device), parameter)
    if not isinstance(before, DTensor):
        return value
    mesh = parameter.device_mesh
    return DTensor.from_local(value.to(local.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
