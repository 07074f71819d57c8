"""What a recipe cuts of the module of a Trainer."""

import lightning.pytorch as pl

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.kinds import view_of
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.sharded.engine import is_sharded
from lightning_prehab.sharded.served import leave_unserved, tensor_parallel
from lightning_prehab.targets.find import Targets


def targets_of(recipe: Recipe, pl_module: "pl.LightningModule") -> Targets:
    """The layers to cut, also once more; of a sharded module those that can be cut there.

    Raises:
        TargetError: If there are none.
    """
    found = recipe.find_targets(pl_module, cut_again=True)
    return leave_unserved(pl_module, found) if is_sharded(pl_module) else found


def check_parallel(pl_module: "pl.LightningModule", targets: Targets, recipe: Recipe) -> None:
    """Raises :class:`UnsupportedError` for what tensor-parallel layers do not allow.

    Args:
        pl_module: The module, with all parameters in shards.
        targets: What is cut.
        recipe: How.
    """
    names = tensor_parallel(pl_module, targets) if is_sharded(pl_module) else []
    if not names:
        return
    method = recipe.factorization_or_default
    if recipe.layout != "factors" or any(method.nonzeros(*view_of(targets[name]).shape) for name in names):
        raise UnsupportedError(
            f"Layer {names[0]!r} and {len(names) - 1} more are tensor parallel, and become two factors there and "
            "nothing else: use layout='factors' and a factorization without a sparse part, or leave them out "
            "(exclude_modules)."
        )
