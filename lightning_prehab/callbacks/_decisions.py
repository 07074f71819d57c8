"""What PrehabCallback decides from its settings and its surroundings: regularizer, space, targets, way of injection."""

from collections.abc import Mapping
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_prehab.callbacks._regularized import Space, space_of
from lightning_prehab.callbacks._targets import targets_of
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.errors import ArgumentError, TargetError, UnsupportedError
from lightning_prehab.kinds import view_of
from lightning_prehab.regularizers import Penalty, Shrinkage, StableRank, TailShrinkage
from lightning_prehab.targets.find import Targets, find_targets
from lightning_prehab.targets.names import Patterns

Injection = Literal["auto", "loss", "gradient"]
#: What two of them in a Trainer are told.
ONE_PREHAB = (
    "both would act on the same weights, and log under the same names. Keep one of them (its target_modules may name "
    "all the layers), or use one after the other in two runs."
)


def default_regularizer(planned: bool) -> Penalty | Shrinkage:
    """Where none is given: toward the planned ranks where there are some, else one that needs none."""
    return TailShrinkage() if planned else StableRank()


def settled(
    regularizer: Penalty | Shrinkage,
    default: bool,
    implying: Mapping[str, object],
    compression: CompressionCallback | None,
) -> Penalty | Shrinkage:
    """The regularizer that acts; says which it is where none was named, and it is not the one toward planned ranks.

    Args:
        regularizer: The one that was named, or that settings imply.
        default: There is none.
        implying: Settings that only penalties have, if they have decided it.
        compression: Who would plan ranks.
    """
    if default:
        regularizer = default_regularizer(planned=compression is not None)
    if implying and compression is not None:
        given = ", ".join(f"{name}={value!r}" for name, value in implying.items())
        rank_zero_warn(
            f"PrehabCallback({given}) acts with {type(regularizer).__name__}(), not with the default beside a "
            "CompressionCallback, TailShrinkage(): only penalties have such a setting. Name the one that you want: "
            f"PrehabCallback(StableRank(), {given}), or PrehabCallback(TailShrinkage())."
        )
    elif default and compression is None:
        rank_zero_info(
            f"PrehabCallback acts with {type(regularizer).__name__}(): without a CompressionCallback there are no "
            "planned ranks to aim at. To choose, name one: PrehabCallback(StableRank())."
        )
    return regularizer


def check_target_rank(regularizer: Penalty | Shrinkage, compression: CompressionCallback | None) -> None:
    """Raises :class:`ArgumentError` if the regularizer aims at a rank that nobody gives."""
    if regularizer.needs_rank and compression is None and getattr(regularizer, "rank", None) is None:
        raise ArgumentError(
            f"{regularizer} aims at a target rank: add a CompressionCallback to take it from, or give it a rank."
        )


def penalty_without_an_end(regularizer: Shrinkage, may_replace: bool) -> StableRank:
    """A shrinkage has to be done in time; where none was asked for, a penalty, which need not, takes its place.

    Raises:
        UnsupportedError: If it was asked for.
    """
    why = "the length of an epoch or the last one is not known"
    remedy = "Give limit_train_batches and a CompressionCallback, stop_epoch or max_epochs"
    if not may_replace:
        raise UnsupportedError(
            f"{regularizer} has to know when it must be done, but {why}. {remedy}, or take a penalty: "
            "PrehabCallback(StableRank())."
        )
    rank_zero_warn(f"PrehabCallback takes StableRank() instead of {regularizer}: {why}. {remedy}.")
    return StableRank()


def choose_space(
    asked: Space | None, regularizer: Penalty | Shrinkage, compression: CompressionCallback | None
) -> Space:
    """The space that was asked for, else that of the planned cut for a regularizer that aims at planned ranks."""
    if asked is not None:
        return asked
    if compression is None or not regularizer.needs_rank:
        return "weight"
    return space_of(compression.recipe.factorization_or_default.wanted)


def choose_targets(
    pl_module: "pl.LightningModule",
    compression: CompressionCallback | None,
    target_modules: Patterns,
    exclude_modules: Patterns,
) -> Targets:
    """The layers that were asked for, else those that are going to be cut; without frozen ones.

    Raises:
        TargetError: If there are none.
    """
    own = target_modules is not None or exclude_modules is not None
    if compression is None or own:
        split = compression is None or compression.recipe.split_fused
        targets = find_targets(pl_module, target_modules, exclude_modules, split_fused=split)
    else:
        targets = targets_of(compression.recipe, pl_module)
    for name in [name for name, layer in targets.items() if not view_of(layer).parameter.requires_grad]:
        targets.skipped[name] = "its weight is frozen"
        del targets[name]
    if not targets:
        raise TargetError("PrehabCallback has nothing to train: the weights of all targets are frozen.")
    return targets


def planned_by(source: CompressionCallback | None, pl_module: "pl.LightningModule") -> Targets | None:
    """What ranks are planned for: all targets of the surgery."""
    return None if source is None else targets_of(source.recipe, pl_module)


def choose_rank_source(
    compression: CompressionCallback | None, regularizer: Penalty | Shrinkage, space: Space, forecasts: bool
) -> CompressionCallback | None:
    """Whose plan gives the target ranks: for regularizers that aim at them, and where a forecast is to be had."""
    if compression is None or regularizer.needs_rank:
        return compression
    return (
        compression
        if space == "loss" and forecasts and compression.recipe.factorization_or_default.comparable
        else None
    )


def injects_into_loss(
    trainer: "pl.Trainer",
    pl_module: "pl.LightningModule",
    regularizer: Penalty | Shrinkage,
    injection: Injection,
    strength_share: float | None,
) -> bool:
    """Whether a penalty is added to the loss; otherwise its gradient is added to the gradients.

    Raises:
        UnsupportedError: If it was asked to be, and the weights are sharded.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        if injection == "loss":
            raise UnsupportedError(
                "PrehabCallback(injection='loss') is not for sharded weights: FSDP2 exchanges the parameters between "
                "forward and backward pass, and the gradient of a penalty in the loss can be lost without an error. "
                "Use injection='gradient', or leave it out."
            )
        return False
    if injection != "auto":
        return injection == "loss"
    why = None
    if strength_share is not None:
        return False
    if not pl_module.automatic_optimization:
        why = "manual optimization"
    elif isinstance(trainer.strategy, DDPStrategy) and trainer.strategy._ddp_kwargs.get("find_unused_parameters"):
        why = "find_unused_parameters"
    if why is not None and isinstance(regularizer, Penalty):
        rank_zero_info(f"PrehabCallback adds the penalty to the gradients, not to the loss, because of {why}.")
    return why is None
