"""Checkpoints from the other side of the surgery: the module follows them while Lightning loads its state dict.

Lightning loads the weights before it calls any hook of a callback with the checkpoint, so the only clean place is a
pre-hook of ``load_state_dict``. The hooks are plain functions: a deep copy of the module would copy a callback behind a
bound method.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from lightning_prehab.callbacks._said import say_followed
from lightning_prehab.errors import CheckpointError
from lightning_prehab.factorizations import Factorization, Factors
from lightning_prehab.kinds import MatrixView, kind_of
from lightning_prehab.plan.compression_plan import CompressionPlan, LayerPlan
from lightning_prehab.statistics.sums import LayerStatistics
from lightning_prehab.surgery.stored import factors_of_layer, follower, shapes_of, stored_factors
from lightning_prehab.surgery.structure import densify_, follow_state_dict_
from lightning_prehab.targets.find import count_parameters
from lightning_prehab.targets.locate import Layer, locate, low_rank_layers
from lightning_prehab.targets.names import clean_name, join, stored_name


def follow_on_load(pl_module: "pl.LightningModule") -> RemovableHandle:
    """For validate, test and predict: the module takes the structure of whatever is loaded."""

    def follow(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        before = count_parameters(module)
        follow_state_dict_(module, state_dict, prefix)
        if not prefix:  # else it is a copy, inside of another module
            say_followed(module, before)

    return _before_load(pl_module, follow)


class DenseShell:
    """For fit: the module stays dense while it is loaded, and the factors are kept for a replay of the surgery.

    ``configure_optimizers`` then sees the dense module, as it did in the run that wrote the checkpoint, and the replay
    edits the parameter groups as the surgery did: the stored optimizer state fits, however the groups were made.

    Args:
        pl_module: The module that is about to be loaded.
        own: Names of the low-rank layers that an earlier surgery of the same callback has made.

    Attributes:
        loaded: Whether something has been loaded.
        parameters: How many the module had before.
        report, name_holders: None; see :class:`~lightning_prehab.callbacks._sharded_checkpoint.ShardedShell`.
    """

    report = None
    name_holders = None

    def __init__(self, pl_module: "pl.LightningModule", own: Iterable[str]) -> None:
        self.factors: dict[str, Factors] = {}
        self.loaded = False
        self.parameters = count_parameters(pl_module)  # before
        self._handle = _before_load(pl_module, _shell_hook(self, frozenset(own)))

    def close(self) -> dict[str, Factors]:
        """Takes the hook off; returns the factors that the checkpoint held."""
        self._handle.remove()
        factors, self.factors = {clean_name(name): stored for name, stored in self.factors.items()}, {}
        return factors


def _before_load(module: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    handle: RemovableHandle = module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _shell_hook(shell: DenseShell, own: frozenset[str]) -> Callable[..., None]:
    def take_factors(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        shell.loaded = True
        stored = stored_factors(state_dict, prefix)
        densify_(module, own | _otherwise(module, stored, state_dict, prefix))
        modules = dict(module.named_modules(remove_duplicate=False))
        seen: set[int] = set()  # a shared module has its factors under each of its names
        for name, dense in modules.items():
            layer = Layer.at(name, dense, modules)
            key = stored_name(name)
            found = factors_of_layer(key, layer, stored) if name and kind_of(dense) is not None else None
            if found is None:
                continue
            views, factors = found
            for part, part_factors in factors.items() if id(dense) not in seen else ():
                has_bias = views[part].bias is not None
                kept = part_factors._replace(bias_shift=None) if has_bias else part_factors
                shell.factors[join(name, part)] = kept
            seen.add(id(dense))
            _put_dense_(state_dict, f"{prefix}{key}.", layer, views, factors)

    return take_factors


def _otherwise(
    module: nn.Module, stored: Mapping[str, Factors], state_dict: Mapping[str, Any], prefix: str
) -> frozenset[str]:
    """Names of low-rank layers that the state dict holds dense, or with other factors: of before or after a cut."""
    modules = dict(module.named_modules())
    layers = [name for name, _ in low_rank_layers(module) if name]
    return frozenset(
        clean_name(name) for name in layers if follower(modules, name, stored, state_dict, prefix) is not None
    )


def _put_dense_(
    state_dict: dict[str, Any],
    prefix: str,
    layer: Layer,
    views: Mapping[str, MatrixView],
    factors: Mapping[str, Factors],
) -> None:
    """Puts the entries of the dense layer in the place of those of its low-rank one.

    Biases and parts that are not cut are those of the state dict; the rest of the weight does not matter, since the
    replay is going to cut it off.
    """
    assert layer.kind is not None
    low_rank = layer.kind.low_rank(layer.module, views, factors)
    old = {id(parameter): key for key, parameter in layer.module.named_parameters()}
    kept = {old[id(p)]: key for key, p in low_rank.named_parameters() if id(p) in old}  # dense name -> low-rank name
    stored = {key: state_dict.pop(prefix + key) for key in low_rank.state_dict() if prefix + key in state_dict}
    for part, found in factors.items():  # biases that the surgery has added
        state_dict.pop(prefix + join(part, "B.bias" if found.order is None else "bias"), None)
    dense = {key: parameter.detach() for key, parameter in layer.module.named_parameters()}
    for key, name in kept.items():
        del dense[key]
        if name in stored:
            dense[key] = stored[name]
    for part, view in views.items():
        if part not in factors:
            key = old[id(view.parameter)]
            if dense[key].data_ptr() == view.parameter.data_ptr():
                dense[key] = dense[key].clone()
            view.write_(stored[f"{part}.weight"], into=dense[key])
    state_dict.update({prefix + key: tensor for key, tensor in dense.items()})


def plan_of_factors(module: nn.Module, factors: Mapping[str, Factors], factorization: Factorization) -> CompressionPlan:
    """The plan that a replay carries out: the stored ranks, whatever policy once chose them."""
    views = {
        join(name, part): view
        for name, (_, parts) in locate(module, shapes_of(factors)).items()
        for part, view in parts.items()
    }
    layers = tuple(
        LayerPlan(
            name,
            *views[name].shape,
            f.B.shape[1],
            nonzeros=0 if f.sparse is None else len(f.sparse.values),
            groups=views[name].group_count,
            form=views[name].form,
            layout="factors" if f.order is None else "pivot",
        )
        for name, f in factors.items()
    )
    return CompressionPlan(layers, factorization, {})


def dump_statistics(
    statistics: Mapping[str, LayerStatistics] | None, world_size: int, group: distributed.ProcessGroup | None = None
) -> dict[str, dict[str, Tensor]]:
    """Sums over all processes that see data of their own, as plain tensors for a checkpoint; all have to call this.

    The processes then go on with what a run that resumes here begins with, all sums on rank 0: both add up the same
    numbers in the same order.

    Args:
        statistics: Of this process.
        world_size: Number of processes.
        group: Those that each see other data, and this process; None: all.
    """
    dumped = {name: layer.snapshot() for name, layer in (statistics or {}).items()}
    if world_size > 1 and statistics:
        for sums in dumped.values():
            for tensor in sums.values():
                distributed.all_reduce(tensor, group=group)
        first = distributed.get_rank(group) == 0
        for name, layer in statistics.items():
            layer.restore_({key: one if first else torch.zeros_like(one) for key, one in dumped[name].items()})
    return dumped


def restore_statistics_(
    statistics: Mapping[str, LayerStatistics], dumped: Mapping[str, Mapping[str, Tensor]], rank: int
) -> None:
    """Puts stored sums back: on rank 0 of those that see other data alone, since they are sums over all of them."""
    for name, layer in statistics.items():
        if name in dumped and rank == 0:
            layer.restore_({key: torch.as_tensor(value) for key, value in dumped[name].items()})


def check_version(state: Mapping[str, Any], version: int, who: str) -> None:
    """Raises :class:`CheckpointError` for the state of a version that is not known here."""
    if state.get("version") != version:
        raise CheckpointError(
            f"The checkpoint holds a {who} state of version {state.get('version')!r}, this is version {version}; "
            "update lightning_prehab."
        )
