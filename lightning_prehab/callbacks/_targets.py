"""What a recipe cuts of the module of a Trainer."""

import lightning.pytorch as pl

from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.sharded.engine import is_sharded
from lightning_prehab.sharded.served import leave_unserved
from lightning_prehab.targets.find import Targets


def targets_of(recipe: Recipe, pl_module: "pl.LightningModule") -> Targets:
    """The layers to cut, also once more; of a sharded module those that can be cut there.

    Raises:
        TargetError: If there are none.
    """
    found = recipe.find_targets(pl_module, cut_again=True)
    return leave_unserved(pl_module, found) if is_sharded(pl_module) else found
