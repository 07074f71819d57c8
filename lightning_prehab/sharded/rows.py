"""What processes hold of a parameter of a sharded model: products with all of it, and the way to one owner and back.

Slices along the first dimension, as FSDP2 gives them out, are multiplied where they are. Parameters in other placements
(tensor parallelism) are put together on every process instead, each time.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_prehab.kinds import MatrixView
from lightning_prehab.linalg.matrices import widened
from lightning_prehab.linalg.rows import Rows
from lightning_prehab.linalg.sharding import is_distributed, local_part
from lightning_prehab.sharded.shares import full, row_dimension, share_of, whole_on


class Spread:
    """How a parameter lies on the processes.

    Several copies of all shards (HSDP) work side by side, each in its own group; the first copy speaks for all.

    Args:
        parameter: The sharded one, or a plain one that every process has.
        slices: Make use of slices, if that is what each process has.

    Attributes:
        parameter: The same.
        device: Where there is work on it: that of the mesh, also where shards are kept on the CPU.
        by_slices: Each process has some slices along the first dimension, one after the other.
        parts: How many such processes there are; 1 where it lies otherwise.
        place: The number of this one.
    """

    def __init__(self, parameter: nn.Parameter, slices: bool = True) -> None:
        self.parameter = cast(Any, parameter)
        self.device, self.parts, self.place = parameter.device, 1, 0
        self._groups: list[Any] = []  # among which shards differ
        self._copies: list[Any] = []
        self.by_slices = False
        if not is_distributed(parameter):
            return
        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        if mesh.device_type != self.device.type:
            self.device = torch.empty(0, device=mesh.device_type).device
        sharded = [number for number, one in enumerate(placements) if not isinstance(one, Replicate)]
        self._groups = [mesh.get_group(number) for number in sharded]
        self._copies = [mesh.get_group(number) for number in range(mesh.ndim) if number not in sharded]
        dimension = row_dimension(parameter) if slices else None
        if dimension is not None:
            self.by_slices, self.parts, self.place = True, mesh.size(dimension), mesh.get_local_rank(dimension)

    @property
    def among(self) -> tuple[int, ...]:
        """Equal for parameters whose shards lie on the same processes."""
        return tuple(id(group) for group in self._groups)

    @property
    def slices(self) -> range:
        """Those that are here; there may be none."""
        count, most = self.parameter.shape[0], self._most
        return range(min(self.place * most, count), min((self.place + 1) * most, count))

    @property
    def local(self) -> Tensor:
        """What this process holds, without a copy."""
        return local_part(self.parameter)

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of what the processes with different shards have; in place."""
        part = part.contiguous()
        for group in self._groups:
            distributed.all_reduce(part, group=group)
        if self._groups:
            self._speak_for_copies(part)
        return part

    def send(self, tensor: Tensor, owner: int) -> Tensor:
        """What the process of that number has, for all others; they give room for it. What all have stays as it is."""
        if not self.by_slices:
            return tensor
        tensor = tensor.to(self.device).contiguous()
        distributed.broadcast(tensor, src=self._rank_of(owner), group=self._groups[0])
        self._speak_for_copies(tensor)
        return tensor

    def gather(self, owner: int) -> Tensor | None:
        """The whole, plain parameter on the process of that number, else None; on all if it does not lie in slices."""
        if not self.by_slices:
            return full(self.parameter)
        return whole_on(self.parameter, self._rank_of(owner))

    def scatter(self, whole: Tensor | None, owner: int) -> Tensor:
        """The way back from :meth:`gather`: what belongs to this process of a tensor of the parameter's shape.

        Args:
            whole: The tensor, where :meth:`gather` has given one.
            owner: The same number.
        """
        if not self.by_slices:
            assert whole is not None
            return share_of(whole, self.parameter) if isinstance(self.parameter, DTensor) else whole
        own = torch.empty(self._most, *self.parameter.shape[1:], dtype=self.parameter.dtype, device=self.device)
        parts = None if whole is None else self._even_parts(whole.contiguous())
        distributed.scatter(own, parts, src=self._rank_of(owner), group=self._groups[0])
        return own[: len(self.slices)].to(self.parameter.device)

    def _even_parts(self, whole: Tensor) -> list[Tensor]:
        """What each process gets, with as many slices for all: views, but for those that have fewer."""
        parts = []
        for place in range(self.parts):
            part = whole[place * self._most : (place + 1) * self._most]
            missing = self._most - len(part)
            parts.append(torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part)
        return parts

    @property
    def _most(self) -> int:
        """Slices of a process, but for the last ones, which may have less."""
        return -(-int(self.parameter.shape[0]) // self.parts)

    def _rank_of(self, place: int) -> int:
        """The number in the world of the process with the slices of that number."""
        return distributed.get_global_rank(self._groups[0], place)

    def _speak_for_copies(self, tensor: Tensor) -> None:
        """Makes the same of a tensor in all copies: whatever the hardware rounds to, they stay equal."""
        for group in self._copies:
            distributed.broadcast(tensor, src=distributed.get_global_rank(group, 0), group=group)


def spreads_of(parameters: Sequence[nn.Parameter]) -> list[Spread]:
    """How parameters lie that are worked on together: by slices if all of them do, so that they have one owner."""
    found = [Spread(one) for one in parameters]
    return found if all(one.by_slices for one in found) else [Spread(one, slices=False) for one in parameters]


class ShardedRows(Rows):
    """The rows that this process has of a matrix of a sharded layer, in float32 at least.

    Args:
        view: The matrix; it shows the sharded parameter.
        spread: How the parameter lies on the processes, :attr:`Spread.by_slices`.
    """

    def __init__(self, view: MatrixView, spread: Spread) -> None:
        rows, here = view.slices, spread.slices
        assert rows is not None
        start, stop = max(rows.start, here.start), min(rows.stop, here.stop)
        self._spread, self._first, self._length = spread, start - here.start, max(stop - start, 0)
        own = self.within(spread.local).flatten(1).to(spread.device)
        super().__init__(widened(own), min(max(start - rows.start, 0), view.out_features), view.out_features)

    def add_up(self, part: Tensor) -> Tensor:
        """Over the processes with other rows."""
        return self._spread.add_up(part)

    def within(self, local: Tensor) -> Tensor:
        """Of what a process holds of the parameter, or of something like it, what belongs to these rows: a view."""
        return local.narrow(0, self._first if self._length else 0, self._length)

    def write_(self, own: Tensor, into: Tensor) -> None:
        """Puts rows into what this process holds of the parameter, or of something of its shape."""
        place = self.within(into)
        place.copy_(own.reshape(place.shape))


def norm_of_shards(parts: Sequence[tuple[Spread, Tensor]]) -> Tensor:
    """The norm of some tensors taken together, of which each process has what it has of a parameter."""
    squares: dict[tuple[int, ...], tuple[Spread, list[Tensor]]] = {}
    for spread, part in parts:
        square = widened(part.to(spread.device)).square().sum()
        squares.setdefault(spread.among, (spread, []))[1].append(square)
    sums = [spread.add_up(torch.stack(found).sum()) for spread, found in squares.values()]
    return torch.stack(sums).sum().sqrt()


def rows_of(view: MatrixView, spreads: Sequence[Spread]) -> ShardedRows | None:
    """The rows of a matrix that lie here; None if those of the parameter are none of the matrix's."""
    (spread, *others) = spreads
    if others or view.slices is None or not spread.by_slices:
        return None
    return ShardedRows(view, spread)
