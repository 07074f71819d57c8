"""Several processes: sum the statistics, let one rank decide, share the factors, wrap the model anew."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_prehab.errors import PrehabError
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.statistics.sums import LayerStatistics

T = TypeVar("T")
#: Sums are sent in pieces of this size, in one flat tensor beside them.
BUCKET_BYTES = 64 * 2**20


def data_group(trainer: "pl.Trainer") -> distributed.ProcessGroup | None:
    """The processes that see different data; None stands for all of them.

    With tensor parallelism, processes that hold parts of the same layers are fed with the same batches.
    """
    mesh = getattr(trainer.strategy, "_device_mesh", None)  # of a ModelParallelStrategy, once its processes are there
    if mesh is None or mesh["data_parallel"].size() == trainer.world_size:
        return None
    group: distributed.ProcessGroup = mesh["data_parallel"].get_group()
    return group


def data_ranks(trainer: "pl.Trainer") -> tuple[int, int]:
    """The number of this process among those that see different data, and how many these are."""
    group = data_group(trainer)
    if group is None:
        return trainer.global_rank, trainer.world_size
    return distributed.get_rank(group), distributed.get_world_size(group)


def sum_statistics_(trainer: "pl.Trainer", statistics: Mapping[str, LayerStatistics]) -> None:
    """Replaces the sums of every rank by the sum over the ranks that see different data."""
    if data_ranks(trainer)[1] == 1:
        return
    leaders = _leaders(statistics)
    if any(other != leaders for other in gather(trainer, leaders)):  # ranks that disagree would wait for each other
        for layer in statistics.values():
            layer.unshare_inputs_()
    sums = {id(tensor): tensor for layer in statistics.values() for _, tensor in layer.tensors()}
    sum_in_buckets_(trainer, list(sums.values()))


def sum_in_buckets_(trainer: "pl.Trainer", tensors: Sequence[Tensor]) -> None:
    """Adds up tensors over the ranks that see different data, in place: many small ones are sent as a few large ones.

    Args:
        trainer: The running Trainer.
        tensors: The same shapes on every rank.
    """
    group = data_group(trainer)
    buckets = _buckets(tensors)
    rooms = together(trainer, lambda: _rooms_for(buckets))
    for bucket in buckets:
        if len(bucket) == 1 and bucket[0].is_contiguous():
            distributed.all_reduce(bucket[0], group=group)
            continue
        room = rooms[_sort_of(bucket[0])][: sum(tensor.numel() for tensor in bucket)]
        parts = torch.split(room, [tensor.numel() for tensor in bucket])
        for part, tensor in zip(parts, bucket, strict=True):
            part.copy_(tensor.reshape(-1))
        distributed.all_reduce(room, group=group)
        for part, tensor in zip(parts, bucket, strict=True):
            tensor.copy_(part.view(tensor.shape))


def _sort_of(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    """What tensors have in common that can be sent as one."""
    return tensor.dtype, tensor.device


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one sort side by side, ``BUCKET_BYTES`` of them at most; one that is as large as that is alone."""
    open_ones: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    buckets: list[list[Tensor]] = []
    for tensor in tensors:
        bucket = open_ones.get(_sort_of(tensor))
        if bucket is None or sum(one.nbytes for one in bucket) + tensor.nbytes > BUCKET_BYTES:
            bucket = open_ones[_sort_of(tensor)] = []
            buckets.append(bucket)
        bucket.append(tensor)
    return buckets


def _rooms_for(buckets: Sequence[Sequence[Tensor]]) -> dict[tuple[torch.dtype, torch.device], Tensor]:
    """One flat tensor for each sort, in which any bucket of it has room."""
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for bucket in buckets:
        sort = _sort_of(bucket[0])
        sizes[sort] = max(sizes.get(sort, 0), sum(tensor.numel() for tensor in bucket) if len(bucket) > 1 else 0)
    return {sort: torch.empty(size, dtype=sort[0], device=sort[1]) for sort, size in sizes.items()}


def _leaders(statistics: Mapping[str, LayerStatistics]) -> dict[str, str]:
    """For each layer the first one that it shares its input sums with."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(layer.input_gram), name) for name, layer in statistics.items()}


def decide_on_rank_zero(trainer: "pl.Trainer", decide: Callable[[], T]) -> T:
    """Calls ``decide`` on rank 0 alone and hands the answer to every rank; an error is raised on every rank."""
    answer = together(trainer, lambda: decide() if trainer.is_global_zero else None)
    return trainer.strategy.broadcast(answer, src=0)  # type: ignore[return-value]


def merge(trainer: "pl.Trainer", own: Mapping[str, T]) -> dict[str, T]:
    """One dictionary of what each rank has found out about its own layers."""
    if trainer.world_size == 1:
        return dict(own)
    return {name: value for part in gather(trainer, dict(own)) for name, value in part.items()}


class FactorsOfOwners(Mapping[str, Factors]):
    """The factors of all layers, each kept by the process that has computed it and sent to all when it is asked for.

    Every process asks for the same one at the same time, and keeps it no longer than it needs it. All then have those
    of the owner, bit by bit, on the device of this process.

    Args:
        trainer: The running Trainer.
        own: What this process has computed, by the name of the layer.
        names: Of the layers that somebody has computed something for, perhaps with others: the order.
    """

    def __init__(self, trainer: "pl.Trainer", own: Mapping[str, Factors], names: Iterable[str]) -> None:
        self._trainer, self._own = trainer, dict(own)
        mine = {
            name: [None if part is None else (part.shape, part.dtype) for part in found.parts()]
            for name, found in own.items()
        }
        described = merge(trainer, mine)
        self._described = {name: described[name] for name in names if name in described}
        self._owner = merge(trainer, dict.fromkeys(own, trainer.global_rank))

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)

    def __contains__(self, name: object) -> bool:
        return name in self._described

    def __getitem__(self, name: str) -> Factors:
        """Those of one layer; every process has to ask for them."""
        if name not in self._described:
            raise KeyError(name)
        if self._trainer.world_size == 1:
            return self._own[name]
        parts = together(self._trainer, lambda: self._room_for(name, self._trainer.strategy.root_device))
        for part in parts:
            if part is not None:
                distributed.broadcast(part, src=self._owner[name])
        return Factors.from_parts(parts)

    def _room_for(self, name: str, device: torch.device) -> list[Tensor | None]:
        found = self._own.get(name)
        if found is not None:
            return [None if part is None else part.to(device).contiguous() for part in found.parts()]
        return [
            None if description is None else torch.empty(description[0], dtype=description[1], device=device)
            for description in self._described[name]
        ]


def together(trainer: "pl.Trainer", work: Callable[[], T]) -> T:
    """What ``work`` returns on this rank; an error on one rank is raised on every rank."""
    answer: T | None = None
    error: Exception | None = None
    try:
        answer = work()
    except Exception as caught:
        error = caught
    raise_together(trainer, error)
    return answer  # type: ignore[return-value]  # there was no error, so there is an answer


def raise_together(trainer: "pl.Trainer", error: Exception | None) -> None:
    """Raises on every rank if one rank has an error, so that no rank waits for one that has given up."""
    if trainer.world_size == 1:
        if error is not None:
            raise error
        return
    for rank, message in enumerate(gather(trainer, None if error is None else str(error))):
        if message is not None:
            if error is not None:
                raise error
            raise PrehabError(f"Rank {rank} failed: {message}")


def rewrap(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """Wraps the changed model in DistributedDataParallel again; the old wrapper knows the old parameters only."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    pl_module.zero_grad(set_to_none=True)  # old gradients may be views into the buckets of the old wrapper
    old = strategy.model
    if hasattr(old, "_remove_autograd_hooks"):
        old._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    strategy.model = strategy.lightning_module
    del old
    strategy.configure_ddp()
    # With static_graph, manual optimization reduces nothing until this flag has been set by the first backward pass.
    strategy._pl_static_graph_delay_done = False


def gather(trainer: "pl.Trainer", value: T) -> list[T]:
    """What each rank has, on every rank."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[T] = [value] * trainer.world_size
    distributed.all_gather_object(gathered, value)
    return gathered
