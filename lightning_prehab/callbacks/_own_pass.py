"""Calibration by a short pass of our own, for a surgery that comes before any training step."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_prehab.callbacks._trainer import gradient_scale, uses_loss_scaling
from lightning_prehab.errors import StatisticsError, UnsupportedError
from lightning_prehab.factorizations import Decomposition
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.plan.probes import measure_probes
from lightning_prehab.progress import counted
from lightning_prehab.rank_policies import Probe, RankPolicy
from lightning_prehab.sharded.copies import copy_of_sharded
from lightning_prehab.sharded.engine import is_sharded
from lightning_prehab.sites.process import factors_in_forms
from lightning_prehab.statistics.backward import cheaply_if_possible, gradients_for
from lightning_prehab.statistics.collector import Collector
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.locate import same_targets


def collect_in_own_pass(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", targets: Targets, wanted: Wanted, batches: int
) -> dict[str, LayerStatistics]:
    """Runs ``training_step`` on the first training batches, on a copy of the module in eval mode.

    The user's module, metrics, logs, data order and random state stay untouched. Sums are of this process alone.

    Raises:
        UnsupportedError: With manual optimization, whose ``training_step`` would step the optimizers.
        StatisticsError: If the training data has no batches.
    """
    return cheaply_if_possible(lambda cheap: _collect(trainer, pl_module, targets, wanted, batches, cheap))


def _collect(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", targets: Targets, wanted: Wanted, batches: int, cheap: bool
) -> dict[str, LayerStatistics]:
    instead = "Use CompressionCallback(epoch=1, ...) or later, or factorization=SVD(), which needs no data."
    clone = quiet_copy(trainer, pl_module, instead)
    copied = same_targets(clone, targets)
    collector = Collector(copied, wanted, drop_overflow=uses_loss_scaling(trainer), own_pass=True)
    seen, batches = 0, int(min(batches, trainer.num_training_batches))
    backward = gradients_for(clone, copied, wanted.backward, cheap)
    with isolate_rng(), torch.set_grad_enabled(wanted.backward), backward:
        collector.attach()
        for index, batch in enumerate(counted(first_batches(trainer, clone, batches), "calibrate", batches)):
            collector.begin_batch(batch, index)
            collector.loss_scale = gradient_scale(trainer)
            loss = loss_of(run_training_step(trainer, clone, batch, index))
            if wanted.backward and loss is not None:
                (loss * collector.loss_scale).backward()  # type: ignore[no-untyped-call]
                clone.zero_grad(set_to_none=True)
            collector.end_batch()
            seen += 1
    if seen == 0:
        raise StatisticsError("The training data has no batches; calibration needs at least one.")
    return collector.statistics


def probe_in_own_pass(
    trainer: "pl.Trainer",
    pl_module: "pl.LightningModule",
    targets: Targets,
    decompositions: Mapping[str, Decomposition],
    probe_keep: float,
    batches: int,
    layout: Layout = "factors",
) -> dict[str, Probe]:
    """Measures what a small cut of each layer alone does to the loss of the first training batches, on a copy.

    The decompositions are known by the name of the form.

    Raises:
        UnsupportedError: With manual optimization.
    """
    clone = quiet_copy(trainer, pl_module, "Use another rank policy.")
    with isolate_rng():
        prepared = list(first_batches(trainer, clone, batches))

        def forward(module: torch.nn.Module, batch: Any) -> Any:
            return loss_of(run_training_step(trainer, clone, batch, 0))

        return measure_probes(
            clone,
            same_targets(clone, targets),
            factors_in_forms(targets, decompositions),
            prepared,
            probe_keep,
            forward=forward,
            layout=layout,
        )


def check_runs_apart(policy: RankPolicy, pl_module: "pl.LightningModule") -> None:
    """Raises :class:`UnsupportedError` if a policy measures by ``training_step``, and that cannot be run for it."""
    if policy.needs_probes or policy.trials:
        _check_automatic(pl_module, "Use another rank policy.")


def _check_automatic(pl_module: "pl.LightningModule", instead: str) -> None:
    """Raises :class:`UnsupportedError` if ``training_step`` does more than to compute the loss of a batch."""
    if not pl_module.automatic_optimization:
        raise UnsupportedError(
            "With manual optimization, training_step cannot be run apart from training: it would step the optimizers. "
            f"{instead}"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise UnsupportedError(f"training_step(dataloader_iter) fetches its own batches. {instead}")


def quiet_copy(trainer: "pl.Trainer", pl_module: "pl.LightningModule", instead: str) -> "pl.LightningModule":
    """A copy in eval mode that logs nothing, to run ``training_step`` on.

    Raises:
        UnsupportedError: If that is not possible; ``instead`` says what to do.
    """
    _check_automatic(pl_module, instead)
    clone = _copy(pl_module, instead).eval()
    clone.trainer = trainer
    clone.log = clone.log_dict = _ignore  # type: ignore[method-assign]
    return clone


def first_batches(trainer: "pl.Trainer", clone: "pl.LightningModule", count: int) -> Iterator[Any]:
    """The first training batches, on the device, the way the fit loop hands them over."""
    count = int(min(count, trainer.num_training_batches))
    with _fresh_batches(trainer) as loader:
        for raw in islice(loader, count):
            batch = clone._on_before_batch_transfer(trainer.precision_plugin.convert_input(raw), dataloader_idx=0)
            yield clone._apply_batch_transfer_handler(batch, device=trainer.strategy.root_device)


def run_training_step(trainer: "pl.Trainer", clone: "pl.LightningModule", batch: Any, index: int) -> Any:
    """What ``training_step`` of the copy returns for a batch, in the precision of the Trainer."""
    arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, index)
    with trainer.precision_plugin.train_step_context():
        return type(clone).training_step(clone, *arguments.values())


def loss_of(output: Any) -> Tensor | None:
    """The loss in what ``training_step`` returns; None if it skips the batch."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _ignore(*_args: Any, **_kwargs: Any) -> None:
    """Stands in for ``log`` on the copy."""


def _copy(pl_module: "pl.LightningModule", instead: str) -> "pl.LightningModule":
    try:
        copied: Any = copy_of_sharded(pl_module) if is_sharded(pl_module) else copy.deepcopy(pl_module)
        return copied  # type: ignore[no-any-return]
    except Exception as error:
        raise UnsupportedError(
            f"training_step is run on a copy of the module, and {type(pl_module).__name__} cannot be copied ({error}). "
            f"{instead}"
        ) from error


def _owners(loader: Any) -> Iterator[Any]:
    """What may hold a random generator of its own in a DataLoader."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    yield from (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))


@contextmanager
def _fresh_batches(trainer: "pl.Trainer") -> Iterator[Iterator[Any]]:
    """An iterator over the training batches beside the one that the fit loop has already made for its first epoch."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    generators = [
        generator
        for loader in combined.flattened
        for owner in _owners(loader)
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    persistent = [(loader, loader._iterator) for loader in combined.flattened if hasattr(loader, "_iterator")]
    try:
        for loader, _ in persistent:
            loader._iterator = None
        fresh = CombinedLoader(combined.iterables, combined._mode)
        yield (batch for batch, _, _ in fresh)
    finally:
        for loader, iterator in persistent:
            loader._iterator = iterator
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
