"""A model and the dense one that it learns from, asked the same."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.refinement.distance import Distance, answer_in, distance, measure_for
from lightning_prehab.refinement.stand_ins import StandIns
from lightning_prehab.statistics.batches import call_model, to_device


class Pair:
    """A model and its teacher.

    Args:
        model: What is trained; its outputs have to be those of the teacher in form.
        teacher: What counts as right.
        half: Compute in bfloat16 where autocast does so.
        measure: See :class:`~lightning_prehab.Refinement`.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, half: bool, measure: str | None = None) -> None:
        self.model, self.teacher, self.half, self.measure = model, teacher, half, measure
        self.device = next(model.parameters()).device
        self.stand_ins = StandIns(model)

    def distance(self, batch: Any) -> Distance:
        """How far the model's answer is from the teacher's, with its graph if gradients are on."""
        with torch.no_grad():
            right = self._ask(self.teacher, batch)
        return self._compare(self._ask(self.model, batch), right, batch)

    @torch.no_grad()
    def mean_distance(self, batches: Sequence[Any]) -> float:
        """Over all predictions of some batches."""
        found = [self.distance(batch) for batch in batches]
        total = sum(float(one.total) for one in found)
        return max(total, 0.0) / max(sum(one.weight for one in found), 1e-30)  # of equal answers rounding is left

    def _ask(self, module: nn.Module, batch: Any) -> Any:
        device = next(module.parameters()).device
        return self.under_autocast(lambda: call_model(module, to_device(copy.deepcopy(batch), device)), device)

    def under_autocast(self, work: Any, device: torch.device) -> Any:
        """What work gives in the precision of this pair, whatever autocast is on around it."""
        if not self.half:
            return in_full_precision(work)()
        with torch.autocast(device.type, torch.bfloat16):
            return work()

    def _compare(self, output: Any, right: Any, batch: Any) -> Distance:
        if self.measure is None:
            self.measure = measure_for(self.teacher, right, batch)
        expected: Tensor = answer_in(right).to(self.device)
        return in_full_precision(distance)(self.measure, answer_in(output), expected, batch)
