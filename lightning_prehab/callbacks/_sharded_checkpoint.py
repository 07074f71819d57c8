"""Checkpoints of sharded runs: the module takes their structure right before Lightning fills it.

A ``ModelParallelStrategy`` loads weights and optimizer states in one go, in ``load_checkpoint``, when the optimizers
are there and ``on_fit_start`` is over. Until then nobody is told which checkpoint it is going to be. So the method is
replaced, on this one strategy and for this one run.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.hooks import RemovableHandle

from lightning_prehab.callbacks._checkpoint import DenseShell, follow_on_load, plan_of_factors
from lightning_prehab.callbacks._distributed import decide_on_rank_zero, together
from lightning_prehab.callbacks._neighbours import refuse_finders
from lightning_prehab.callbacks._said import say_followed
from lightning_prehab.callbacks._trainer import shards
from lightning_prehab.errors import CheckpointError
from lightning_prehab.factorizations import Factorization, Factors
from lightning_prehab.files.distributed import check_complete, first_failure, stored_tensors
from lightning_prehab.kinds import kind_of
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.origin import Origin
from lightning_prehab.sharded.structure import drop_structure_, put_structure_
from lightning_prehab.surgery.holders import holders_named_later
from lightning_prehab.surgery.stored import factors_of_layer, stored_factors
from lightning_prehab.targets.find import count_dense_parameters, count_parameters
from lightning_prehab.targets.locate import Layer, low_rank_layers
from lightning_prehab.targets.names import clean_name, join

#: What Lightning looks for in a file to go on from.
_OPTIMIZERS = "optimizer_states"


def followed_load(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> "RemovableHandle | ShardedFollowing":
    """For validate, test and predict: the module takes the structure of whatever is loaded, until ``remove()``."""
    return ShardedFollowing(trainer, pl_module) if shards(trainer) else follow_on_load(pl_module)


def shell_for(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", own: Iterable[str], factorization: Factorization
) -> "DenseShell | ShardedShell":
    """For fit: what makes the module, and later the optimizers, follow a checkpoint of before or after a cut.

    Args:
        trainer: The Trainer.
        pl_module: The module that is about to be loaded.
        own: Names of the low-rank layers that an earlier surgery of the same callback has made.
        factorization: How the factors have come about, for the report.
    """
    if shards(trainer):
        return ShardedShell(trainer, pl_module, factorization)
    return DenseShell(pl_module, own)


class ShardedFollowing:
    """Makes a sharded module follow what ``trainer.strategy.load_checkpoint`` loads, until :meth:`remove`.

    The processes tell each other whether all could read what there is to load, and nothing else.

    Args:
        trainer: The Trainer, in ``setup``.
        pl_module: Its module; ``configure_model`` may still be to come.

    Attributes:
        loaded: Whether something has been loaded.
        parameters: How many the module had before.
        name_holders: To call later: warns of who still holds what has been replaced.
    """

    def __init__(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.loaded, self.parameters = False, 0
        self.name_holders: Callable[[], None] | None = None
        self._trainer, self._pl_module = trainer, pl_module
        self._original = trainer.strategy.load_checkpoint
        trainer.strategy.load_checkpoint = self._load  # type: ignore[method-assign,assignment]

    def remove(self) -> None:
        """Takes it off again."""
        if vars(self._trainer.strategy).get("load_checkpoint") == self._load:
            del self._trainer.strategy.load_checkpoint

    def _load(self, checkpoint_path: Any, **options: Any) -> dict[str, Any]:
        trainer, module = self._trainer, self._pl_module
        path = trainer.strategy.broadcast(str(checkpoint_path))
        decide_on_rank_zero(trainer, lambda: check_complete(path))
        tensors = together(trainer, lambda: stored_tensors(path))
        self.loaded, self.parameters = True, count_parameters(module)
        with holders_named_later() as self.name_holders:
            together(trainer, lambda: self._follow(tensors))
        if trainer.state.fn != TrainerFn.FITTING:
            say_followed(module, self.parameters)
        try:
            return self._original(path, **options)
        except CheckpointException as error:
            failure = first_failure(error)
            raise CheckpointError(f"{path!r} could not be loaded: {type(failure).__name__}: {failure}") from failure
        except KeyError as error:
            if error.args[:1] != (_OPTIMIZERS,):
                raise
            raise CheckpointError(
                f"{path!r} holds no {_OPTIMIZERS}, so fit cannot go on from it: it has been consolidated, or was "
                "written with save_weights_only=True. Give the folder, or the full file, that the run has written."
            ) from error

    def _follow(self, tensors: Mapping[str, Tensor]) -> None:
        trainer, module = self._trainer, self._pl_module
        others = of_another_structure(module, tensors)
        if trainer.state.fn != TrainerFn.FITTING and (others or stored_factors(tensors)):
            trainer.strategy.optimizers = []  # of an earlier fit: they would be filled too, and nobody steps them
        if others:
            drop_structure_(module, others, trainer.optimizers)
        factors = factors_for(module, tensors)
        if factors:
            refuse_finders(trainer)
            self._put_(factors)

    def _put_(self, factors: Mapping[str, Factors]) -> None:
        put_structure_(self._pl_module, factors, self._trainer.optimizers)


class ShardedShell(ShardedFollowing):
    """The same for fit, where somebody wants to know what has been put in place; named as in a DenseShell.

    Attributes:
        report: Of what has been put in the place of dense layers, or None; its errors are not known.
    """

    def __init__(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", factorization: Factorization) -> None:
        super().__init__(trainer, pl_module)
        self.report: CompressionReport | None = None
        self._factorization = factorization

    def close(self) -> dict[str, Factors]:
        """Takes it off again; there is nothing left to be repeated."""
        self.remove()
        return {}

    def _put_(self, factors: Mapping[str, Factors]) -> None:
        module = self._pl_module
        plan, before = plan_of_factors(module, factors, self._factorization), count_dense_parameters(module)
        super()._put_(factors)
        after, origin = count_parameters(module), Origin.of(module)
        self.report = CompressionReport(plan, dict.fromkeys(factors, math.nan), before, after, origin=origin)


def of_another_structure(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the low-rank layers that a state dict holds dense, or in other shapes."""
    found = []
    for path, layer in low_rank_layers(module):
        start = f"{clean_name(path)}."
        stored = {key: one.shape for key, one in tensors.items() if key.startswith(start)}
        own = {
            f"{start}{clean_name(key)}": one.shape for key, one in (*layer.named_parameters(), *layer.named_buffers())
        }
        if stored and stored != own:
            found.append(clean_name(path))
    return found


def factors_for(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """What a state dict holds in the place of dense layers, by the names of their matrices.

    Raises:
        CheckpointError: If the shapes do not fit (the layer is named).
    """
    stored = stored_factors(tensors)
    modules = {clean_name(name): one for name, one in module.named_modules(remove_duplicate=False)}
    wanted: dict[str, Factors] = {}
    seen: set[int] = set()  # a shared module has its factors under each of its names
    for name, dense in modules.items():
        if not name or id(dense) in seen or kind_of(dense) is None:
            continue
        found = factors_of_layer(name, Layer.at(name, dense, modules), stored)
        if found is None:
            continue
        seen.add(id(dense))
        views, factors = found
        for part, one in factors.items():
            has_bias = views[part].bias is not None
            wanted[join(name, part)] = one._replace(bias_shift=None) if has_bias else one
    return wanted
