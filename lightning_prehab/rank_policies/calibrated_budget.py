"""One budget for all layers, with a multiplier over the depth that is chosen by trying whole cuts."""

from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError
from lightning_prehab.rank_policies.base import BudgetPolicy, LayerChoices, RankPolicy
from lightning_prehab.rank_policies.compass import LARGEST_ALPHA, LARGEST_GAMMA, Lean, search
from lightning_prehab.rank_policies.depth import weighed
from lightning_prehab.rank_policies.parameter_budget import ParameterBudget
from lightning_prehab.rank_policies.rank_ratio import RankRatio

#: What a policy promises to read, and how it measures.
_NEEDS = ("needs_weight_gradients", "needs_probes", "probe_keep", "latency_tokens")


@dataclass(frozen=True)
class CalibratedBudget(BudgetPolicy):
    """A budget whose predicted losses are multiplied over the depth of the model, as the measured effect says.

    Predictions of the loss look at each layer alone. A cut of all layers adds up otherwise: what an early layer gets
    wrong goes through all that follow. So the loss of a layer in block ``b`` of ``B`` is multiplied by
    ``1 + gamma * norm01(sum of (k + 1)^-alpha over k = b ... B - 1)``, and ``alpha`` and ``gamma`` are looked for by
    trying: a trial plans the whole cut, runs the model with it on calibration batches that are held back, and compares
    its predictions with those of the dense model. The first trial is the base itself, and the best one is taken, so the
    answer is never worse than the base on what is measured. The search is always the same one.

    What is measured is the mean Kullback-Leibler divergence of the predictions; without logits the squared error of the
    outputs as a share of their squares; in a Trainer, where outputs are not seen, the increase of the loss that
    ``training_step`` returns. Where it is in the unit of the loss, it is also the plan's predicted loss increase.

    One row in 16 of the calibration data is held back for the trials (at least one row, or one batch of a few that
    cannot be parted), and is not in the statistics; ``batches`` are kept in memory for that. What ``evaluate`` measures
    on is not looked at. In a Trainer they are training batches outside of those that the statistics are from, where an
    epoch has more. Blocks are told by the numbers in the names of the layers.

    After LEMS (Thoma et al., ICML 2026, https://lems-svd.github.io), which multiplies toward the early layers only, and
    measures each layer first (``base=ProbeBudget(keep)`` does that).

    Args:
        keep: Share that is kept in total, in ``(0, 1]``.
        min_rank: Smallest rank of any layer, at least 1.
        scope: Whether ``keep`` is a share of the ``"targets"`` or of the whole ``"model"``.
        trials: How many whole cuts are tried, at most; with 0 none is, and ``alpha`` and ``gamma`` are those given.
        base: How the budget is spent: a policy that reads spectra. Its ``keep``, ``min_rank`` and ``scope`` are those
            given here. None means :class:`~lightning_prehab.ParameterBudget`.
        alpha: In [0, 3]: how fast the multiplier falls; only with ``trials=0``.
        gamma: In [-7, 7]: how much more the first block counts; negative for the last one. Only with ``trials=0``.

    Raises:
        ArgumentError: If a value is out of range, or the base does not look at spectra.

    >>> import torch
    >>> layers = [LayerChoices(f"{block}.fc", 20, 20, torch.ones(20), tuple(range(1, 10))) for block in range(3)]
    >>> CalibratedBudget(0.5, trials=0, alpha=1, gamma=2)(layers)
    {'0.fc': None, '1.fc': 4, '2.fc': 1}
    """

    trials: int = 10
    base: BudgetPolicy | None = None
    alpha: float = 0.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("trials", self.trials, 0)
        check_real("alpha", self.alpha, f"[0, {LARGEST_ALPHA:g}]")
        check_real("gamma", self.gamma, f"[-{LARGEST_GAMMA:g}, {LARGEST_GAMMA:g}]")
        if self.trials and (self.alpha, self.gamma) != (0.0, 0.0):
            raise ArgumentError(
                f"alpha={self.alpha} and gamma={self.gamma} are what trials look for; give them with trials=0."
            )
        if self.base is not None:
            if not isinstance(self.base, BudgetPolicy) or isinstance(self.base, RankRatio | CalibratedBudget):
                raise ArgumentError(
                    "base must be a budget that is spent by the spectra, such as ParameterBudget(keep) or "
                    f"ProbeBudget(keep), got {show(self.base)}."
                )
            object.__setattr__(
                self, "base", replace(self.base, keep=self.keep, min_rank=self.min_rank, scope=self.scope)
            )
        for name in _NEEDS:
            object.__setattr__(self, name, getattr(self._spender, name))

    @property
    def _spender(self) -> BudgetPolicy:
        return ParameterBudget(self.keep, self.min_rank, self.scope) if self.base is None else self.base

    @property
    def needs_positions(self) -> bool:
        """Whether the base reads them."""
        return self._spender.needs_positions

    @property
    def needs_latencies(self) -> bool:
        """Whether the base reads them."""
        return self._spender.needs_latencies

    def search(self) -> Generator[RankPolicy, float, str]:
        """The base, then the same budget with one multiplier after the other."""
        points, costs = search(self.trials), dict[Lean, float]()
        point = next(points)
        with suppress(StopIteration):
            while True:
                costs[point] = yield self._at(point)
                point = points.send(costs[point])
        best = min(costs, key=costs.__getitem__)  # the first of equals
        least, base = f"{costs[best]:.3g}", f"{costs[Lean()]:.3g}"
        if not best.gamma:
            return f"no depth multiplier: effect {base}, best of {len(costs)} trials"
        multiplier = f"depth multiplier alpha={best.alpha:g}, gamma={best.gamma:g}"
        return f"{multiplier}: effect {least} instead of {base}, best of {len(costs)} trials"

    def _at(self, point: Lean) -> "CalibratedBudget":
        return replace(self, trials=0, alpha=point.alpha if point.gamma else 0.0, gamma=point.gamma)

    def parameter_limit(self, layers: Sequence[LayerChoices]) -> int | None:
        """That of the base."""
        return self._spender.parameter_limit(layers)

    def check(self, layers: Sequence[LayerChoices]) -> None:
        """What the base checks."""
        self._spender.check(layers)

    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """Ranks within the budget, with the multiplier that is given; before any trial that of the base, which is none.

        Raises:
            PlanError: If the smallest ranks exceed it.
        """
        return self._spender(weighed(layers, self.alpha, self.gamma))
