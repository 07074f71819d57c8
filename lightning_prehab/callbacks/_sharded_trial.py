"""What a change of sharded weights would do to the loss of the running training: tried on a copy in shards."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lightning_prehab.callbacks._distributed import together
from lightning_prehab.callbacks._trial import Trial
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.sharded.engine import reshard_
from lightning_prehab.sharded.moved import changes_by_cut, moved_shards
from lightning_prehab.surgery.factors import planned_targets


class ShardedTrial(Trial):
    """A copy that is sharded as the module is; the processes run it together.

    Without autograd: between a forward pass and its backward pass FSDP2 keeps account of what it has gathered.
    """

    grad_mode = torch.no_grad

    def changes(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> Sequence[Any]:
        """Each process has its part of them; one whole layer at a time is put together for that."""
        reshard_(self.module)
        targets = together(self._trainer, lambda: planned_targets(self.module, plan))
        views = {name: view_of(target) for name, target in targets.items()}
        return changes_by_cut(views, factors, lambda work: together(self._trainer, work))

    def moved(self, changes: Sequence[Any], step: float) -> AbstractContextManager[None]:
        """Inside, the shards of the copy are moved by ``step`` times the changes."""
        return moved_shards(self.module, changes, step)
