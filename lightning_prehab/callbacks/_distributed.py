"""Several processes: sum the statistics, let one rank decide, share the factors, wrap the model anew."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_prehab.errors import PrehabError
from lightning_prehab.factorizations import Factors
from lightning_prehab.plan import CompressionPlan
from lightning_prehab.statistics import LayerStatistics
from lightning_prehab.surgery import compute_factors
from lightning_prehab.targets import clean_name

T = TypeVar("T")


def sum_statistics_(trainer: "pl.Trainer", statistics: Mapping[str, LayerStatistics]) -> None:
    """Replaces the sums of every rank by the sum over all ranks."""
    if trainer.world_size == 1:
        return
    for layer in statistics.values():
        for _, tensor in layer.tensors():
            tensor.copy_(trainer.strategy.reduce(tensor, reduce_op="sum"))


def decide_on_rank_zero(trainer: "pl.Trainer", decide: Callable[[], T]) -> T:
    """Calls ``decide`` on rank 0 alone and hands the answer to every rank; an error is raised on every rank."""
    answer: T | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            answer = decide()
        except Exception as caught:
            error = caught
    raise_together(trainer, error)
    return trainer.strategy.broadcast(answer, src=0)  # type: ignore[return-value]


def share_factors(
    trainer: "pl.Trainer",
    model: torch.nn.Module,
    plan: CompressionPlan,
    statistics: Mapping[str, LayerStatistics] | None,
) -> dict[str, Factors]:
    """Factors of all layers on every rank, bit-identical; each rank computes one in ``world_size`` layers."""
    if trainer.world_size == 1:
        return compute_factors(model, plan, statistics)
    cut = [layer for layer in plan.layers if layer.rank is not None]
    mine: dict[str, Factors] = {}
    error: Exception | None = None
    try:
        own = [layer.name for layer in cut[trainer.global_rank :: trainer.world_size]]
        mine = compute_factors(model, plan, statistics, names=own)
    except Exception as caught:
        error = caught
    raise_together(trainer, error)

    shifted: set[str] = set()
    for names in _gather(trainer, [name for name, factors in mine.items() if factors.bias_shift is not None]):
        shifted.update(names)
    weights = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    factors: dict[str, Factors] = {}
    for index, layer in enumerate(cut):
        weight = weights[f"{layer.name}.weight"]
        assert layer.rank is not None
        shapes: list[tuple[int, ...]] = [(layer.rank, layer.in_features), (layer.out_features, layer.rank)]
        if layer.name in shifted:
            shapes.append((layer.out_features,))
        parts = mine.get(layer.name)
        tensors = (
            [weight.new_empty(shape) for shape in shapes] if parts is None else [p for p in parts if p is not None]
        )
        for tensor in tensors:
            distributed.broadcast(tensor.contiguous() if parts is not None else tensor, src=index % trainer.world_size)
        factors[layer.name] = Factors(*tensors)
    return factors


def raise_together(trainer: "pl.Trainer", error: Exception | None) -> None:
    """Raises on every rank if one rank has an error, so that no rank waits for one that has given up."""
    if trainer.world_size == 1:
        if error is not None:
            raise error
        return
    for rank, message in enumerate(_gather(trainer, None if error is None else str(error))):
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


def _gather(trainer: "pl.Trainer", value: T) -> list[T]:
    gathered: list[T] = [value] * trainer.world_size
    distributed.all_gather_object(gathered, value)
    return gathered
