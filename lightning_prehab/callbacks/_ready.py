"""Whether a module and its optimizers are ready for the cuts that are to come: asked before anything is trained."""

from collections.abc import Sequence

import lightning.pytorch as pl

from lightning_prehab.callbacks._cuts import Cut
from lightning_prehab.callbacks._neighbours import refuse_pruning
from lightning_prehab.callbacks._own_pass import check_runs_apart
from lightning_prehab.callbacks._targets import check_parallel, targets_of
from lightning_prehab.callbacks._trainer import shards
from lightning_prehab.callbacks._untrained import warn_of_unheld
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.kinds import view_of
from lightning_prehab.plan.choices import added_parameters
from lightning_prehab.plan.ranks import check_recipe
from lightning_prehab.sharded.engine import check_engine, reshard_
from lightning_prehab.surgery.optimizers import check_optimizer
from lightning_prehab.surgery.pretrained import check_pretrained


def check_settings(trainer: "pl.Trainer", pl_module: "pl.LightningModule", cuts: Sequence[Cut]) -> None:
    """Raises what would stop one of these cuts whatever the module looks like: asked in ``setup``.

    Raises:
        UnsupportedError: If a policy cannot measure what it asks for.
    """
    for cut in cuts:
        policy = cut.recipe.policy_or_default
        check_runs_apart(policy, pl_module)
        if not shards(trainer):
            continue
        if policy.needs_probes:
            raise UnsupportedError(
                f"{policy} cuts one layer after the other to see what it does, and each process would have to run the "
                "whole of a sharded model for it. Use another rank policy: CalibratedBudget tries whole cuts, "
                "ParameterBudget measures none."
            )
        if cut.epoch == 0 and any(cut.recipe.wanted):
            raise UnsupportedError(
                f"A surgery at epoch 0 would calibrate {cut.recipe.factorization_or_default} in a pass of its own, "
                "which sharded weights do not allow. Use CompressionCallback(epoch=1, ...) or later, or "
                "factorization=SVD(), which needs no data, and no PrehabCallback, which would have no time."
            )


def check_ready(trainer: "pl.Trainer", pl_module: "pl.LightningModule", cuts: Sequence[Cut]) -> None:
    """Raises what would stop one of these cuts, as far as it can be known.

    Args:
        trainer: The Trainer; its optimizers are there.
        pl_module: Its module.
        cuts: Those that are to come; none of them if all are made.

    Raises:
        PrehabError: If something is wrong.
    """
    check_engine(pl_module)
    reshard_(pl_module)
    found = [(cut.recipe, targets_of(cut.recipe, pl_module)) for cut in cuts]
    weights = {id(p): p for _, targets in found for target in targets.values() for p in view_of(target).parameters}
    refuse_pruning(trainer, pl_module, weights.values())
    for recipe, targets in found:
        check_parallel(pl_module, targets, recipe)
        check_recipe(recipe, targets)
        check_pretrained(pl_module, (view_of(target).module for target in targets.values()))
        if len(cuts) > 1 and any(recipe.factorization_or_default.nonzeros(*view_of(t).shape) for t in targets.values()):
            raise UnsupportedError(
                f"{recipe.factorization_or_default} keeps a sparse part beside the factors, and a layer with one is "
                "not cut a second time. Make one cut, or choose a factorization without a sparse part."
            )
    if not found:
        return
    warn_of_unheld(trainer, found[0][1])
    split = [
        view_of(target).parameter
        for recipe, targets in found
        for target in targets.values()
        if added_parameters(target, recipe.factorization_or_default)
    ]
    for optimizer in trainer.optimizers:
        check_optimizer(optimizer, split, weights.values())
