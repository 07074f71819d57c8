"""One budget for all layers, spent where a small measured cut says that it is worth most."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_prehab.errors import StatisticsError
from lightning_prehab.rank_policies.base import BudgetPolicy, LayerChoices, check_probe_keep
from lightning_prehab.rank_policies.trading import Offer, best_ranks, retained_at

#: A tail below this share of all energy is rounding: nothing can be measured by cutting it.
ROUNDING = 1e-12


@dataclass(frozen=True)
class ProbeBudget(BudgetPolicy):
    """Global: the ranks of least predicted loss, by a curve for each layer that one measured cut has given its scale.

    The curve is ``loss(r) = probe.loss_increase * tail(r) / tail(probe.rank)``, ``tail(r)`` the sum of ``s_i^2`` over
    ``i > r``; ranks are chosen by an exact search. So spectra of any metric become comparable between layers, for one
    forward pass over the probe batches for each layer. A layer whose probe says nothing (the cut dropped no more than
    rounding, or changed nothing) is taken to be as sensitive, per share of its energy, as the median of the others.

    After LEMS (Thoma et al., ICML 2026, https://lems-svd.github.io), without its term for how errors propagate.

    Args:
        keep: Share of the parameters that is kept in total, in ``(0, 1]``.
        min_rank: Smallest rank of any layer, at least 1.
        scope: Whether ``keep`` is a share of the ``"targets"`` or of the whole ``"model"``.
        probe_keep: Share of its parameters that a layer is cut to for its probe, in ``(0, 1)``; a cut too small
            drowns in rounding, one too large leaves the range in which the curve holds.

    Raises:
        ArgumentError: If a value is out of range.
    """

    probe_keep: float = 0.9

    needs_probes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probe_keep(self.probe_keep)

    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """Ranks within the budget.

        Raises:
            PlanError: If the smallest ranks exceed it.
            StatisticsError: If a layer comes without a probe, or with one that is not a sensible number.
        """
        self.check(layers)
        measured = [_sensitivity(layer) for layer in layers]
        known = [value for value in measured if value is not None]
        typical = statistics.median(known) if known else 1.0
        offers = [
            self._offer(layer, typical if value is None else value)
            for layer, value in zip(layers, measured, strict=True)
        ]
        return best_ranks(layers, offers, self.budget(layers))

    def _offer(self, layer: LayerChoices, sensitivity: float) -> Offer:
        options = layer.options(self.min_rank)
        costs = torch.tensor([layer.parameters(rank) for rank in options], device="cpu")
        energy = float(layer.retained()[-1])
        return options, costs, retained_at(layer, options) * (sensitivity / energy if energy > 0.0 else 0.0)


def _sensitivity(layer: LayerChoices) -> float | None:
    """Predicted loss increase of dropping all the energy of a layer; None if the probe does not tell."""
    if layer.probe is None:
        raise StatisticsError(f"{layer} has no probe; ProbeBudget needs a measured cut of each layer (pass batches).")
    rank, increase = layer.probe
    if not 0 <= rank <= len(layer.singular_values):
        raise StatisticsError(f"{layer}: the probe has rank {rank}, which the layer cannot have.")
    if not 0.0 <= increase < math.inf:
        raise StatisticsError(
            f"{layer}: the loss increase of the probe is {increase}; it must be a number of at least 0. Are the "
            "model's outputs finite on the probe batches?"
        )
    retained = layer.retained()
    energy = float(retained[-1])
    tail = energy - float(retained[rank])
    if increase == 0.0 or tail <= ROUNDING * energy:
        return None
    return increase * energy / tail
