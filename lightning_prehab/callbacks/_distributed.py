"""Several processes: sum the statistics, let one rank decide, share the factors, wrap the model anew."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_prehab.errors import PrehabError
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.statistics.sums import LayerStatistics

T = TypeVar("T")


def sum_statistics_(trainer: "pl.Trainer", statistics: Mapping[str, LayerStatistics]) -> None:
    """Replaces the sums of every rank by the sum over all ranks."""
    if trainer.world_size == 1:
        return
    owners = _owners(statistics)
    if any(other != owners for other in gather(trainer, owners)):  # ranks that disagree would wait for each other
        for layer in statistics.values():
            layer.unshare_inputs_()
    done: set[int] = set()
    for layer in statistics.values():
        for _, tensor in layer.tensors():
            if id(tensor) not in done:
                done.add(id(tensor))
                tensor.copy_(trainer.strategy.reduce(tensor, reduce_op="sum"))


def _owners(statistics: Mapping[str, LayerStatistics]) -> dict[str, str]:
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


def share_factors(
    trainer: "pl.Trainer", own: Mapping[str, Factors], devices: Mapping[str, torch.device]
) -> dict[str, Factors]:
    """The factors of all layers on every rank, bit-identical, each from the rank that has computed it.

    Args:
        trainer: The running Trainer.
        own: What this rank has computed, by the name of the layer.
        devices: Of all layers, in the order of the plan: where their factors belong.
    """
    if trainer.world_size == 1:
        return dict(own)
    described = merge(
        trainer,
        {
            name: [None if part is None else (part.shape, part.dtype) for part in found.parts()]
            for name, found in own.items()
        },
    )
    owner = merge(trainer, dict.fromkeys(own, trainer.global_rank))
    factors: dict[str, Factors] = {}
    for name, device in devices.items():
        descriptions, found = described[name], own.get(name)
        shared: list[torch.Tensor | None] = []
        for part, description in zip(found.parts() if found else [None] * len(descriptions), descriptions, strict=True):
            tensor = None
            if description is not None:
                shape, dtype = description
                tensor = torch.empty(shape, dtype=dtype, device=device) if part is None else part.contiguous()
                distributed.broadcast(tensor, src=owner[name])
            shared.append(tensor)
        factors[name] = Factors.from_parts(shared)
    return factors


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
