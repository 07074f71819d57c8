"""What the planned cut would do to the user's loss if it came now."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_prehab.callbacks._distributed import gather, together
from lightning_prehab.callbacks._figures import tails_of
from lightning_prehab.callbacks._regularized import RegularizedLayer, matrices
from lightning_prehab.callbacks._sharded_acts import cuts_of_shards
from lightning_prehab.callbacks._sharded_layers import ShardedLayer
from lightning_prehab.callbacks._sharded_trial import ShardedTrial
from lightning_prehab.callbacks._trainer import log_number
from lightning_prehab.callbacks._trial import Trial, where_possible
from lightning_prehab.sharded.engine import reshard_
from lightning_prehab.sharded.moved import ShardedChange
from lightning_prehab.statistics.effect import Change, mean_and_error, odd_and_even
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import in_all_forms
from lightning_prehab.targets.locate import same_targets

#: Batches, one at a step, on which the cut is tried in a new metric; later on it is one.
BATCHES = 2
#: Share of the energy at the first trial below which the cut counts as free: it is not tried any more.
FREE = 1e-6
#: Steps, each smaller than the one before, by which the change is tried at most.
HALVINGS = 5
#: Share of the loss by which a trial may raise it at most: beyond, the effect of a small cut could not be told from it.
SMALL = 0.03
_STORED = ("tried", "old", "step", "left", "first", "last", "impossible")


class Forecast:
    """Follows what a cut would do to the loss by the energy of the tails that it would drop.

    Gradients alone do not know the unit of the loss. So the cut is tried, on a copy of the module, on two batches when
    its metric has become known, and on one more whenever the energy has halved: with the tails taken off and added once
    more, in part if the whole is too much. What is odd in that goes with the root of the energy, what is even with the
    energy itself. The odd part is what a network that is being shrunk holds against it, and grows as it is.
    """

    def __init__(self) -> None:
        self._tried: list[tuple[float, float]] = []  # per batch: the odd part per root of energy, the even per energy
        self._old = False  # what was tried is of another time
        self._step = 1.0
        self._left = 0
        self._first = self._last = 0.0  # energies, when the cut was tried for the first time in this metric, and last
        self._impossible = False

    def begin(self) -> None:
        """The metric is a new one."""
        self._tried, self._step, self._first, self._last = [], 1.0, 0.0, 0.0
        self._left = 0 if self._impossible else BATCHES

    def renew(self) -> None:
        """What was tried is of another time: the next batch counts alone."""
        self._left, self._old = (0, self._old) if self._impossible else (1, True)

    def try_now(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        targets: Targets,
        layers: Sequence[RegularizedLayer],
        batch: Any,
        batch_idx: int,
    ) -> float | None:
        """What :meth:`predict` says after the cut has been tried on this batch, whatever the time."""
        self.renew()
        self.follow(trainer, pl_module, targets, layers, batch, batch_idx, look=False)
        return self.predict(tails_of(trainer, layers)[1])

    def predict(self, energy: float) -> float | None:
        """The increase of the loss by a cut that drops so much energy; None if nothing could be tried."""
        if not self._tried:
            return None
        odd, _ = odd_and_even(*zip(*((0.0, odd, -odd) for odd, _ in self._tried), strict=True))
        even, _ = mean_and_error([even for _, even in self._tried])
        return max(odd * math.sqrt(energy) + even * energy, 0.0)

    def log(
        self, pl_module: "pl.LightningModule", layers: Sequence[RegularizedLayer], last: float | None
    ) -> float | None:
        """Logs the share of the energy in the tails, and what :meth:`predict` says, which is returned.

        Args:
            pl_module: Whose logs these are.
            layers: Without a target rank among them nothing is logged.
            last: What is returned then.
        """
        share, energy = tails_of(pl_module.trainer, layers)
        if share is None:
            return last
        log_number(pl_module, "prehab/tail_energy", share)
        found = self.predict(energy)
        if found is not None:
            log_number(pl_module, "prehab/forecast", found, prog_bar=True)
        return found

    def follow(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        targets: Targets,
        layers: Sequence[RegularizedLayer],
        batch: Any,
        batch_idx: int,
        *,
        look: bool,
    ) -> None:
        """Tries the cut on a batch of each process, if it is time to; the module is not touched.

        Args:
            trainer: The running Trainer.
            pl_module: Its module.
            targets: What the layers were made of.
            layers: Those with a target rank are cut.
            batch: The batch of the next step.
            batch_idx: Its number.
            look: Whether to see if the energy has halved.
        """
        if self._left == 0 and not (look and self._last > 0.0):
            return
        _, energy = tails_of(trainer, layers)
        if self._left == 0 and FREE * self._first < energy < 0.5 * self._last:
            self._last = energy
            self.renew()
        if self._left == 0 or not 0.0 < energy < math.inf:
            return
        if self._first == 0.0:
            self._first = self._last = energy
        self._left -= 1

        def even_part() -> float:
            trial, changes = _prepared(trainer, pl_module, targets, [one for one in layers if one.rank is not None])

            def loss_at(step: float) -> float:
                own = together(trainer, lambda: trial.loss(batch, batch_idx, changes, step))
                return mean_and_error(gather(trainer, own))[0]

            before = loss_at(0.0)
            for _ in range(HALVINGS) if not math.isnan(before) else ():  # else it is a batch that is skipped
                odd, even = odd_and_even([before], [loss_at(self._step)], [loss_at(-self._step)])
                if not even > SMALL * abs(before) > 0.0:
                    break
                self._step *= math.sqrt(0.5 * SMALL * abs(before) / even)
            else:
                self._left += math.isnan(before)  # another batch, then
                return math.nan
            tried = odd / (self._step * math.sqrt(energy)), even / (self._step**2 * energy)
            self._tried = [tried] if self._old else [*self._tried, tried]
            self._old = False
            return even

        if where_possible(even_part) is None:
            self._left, self._impossible = 0, True

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, f"_{name}") for name in _STORED} | {"tried": [list(trial) for trial in self._tried]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was called."""
        for name in _STORED:
            setattr(self, f"_{name}", state[name])
        self._tried = [(odd, even) for odd, even in self._tried]  # another list, whatever the file has made of them


def _prepared(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", targets: Targets, layers: Sequence[RegularizedLayer]
) -> tuple[Trial, Sequence[Any]]:
    """A copy of the module, and what the cut of some layers would change in it."""
    shards = [layer for layer in layers if isinstance(layer, ShardedLayer)]
    if shards:
        reshard_(pl_module)
    trial = together(trainer, lambda: (ShardedTrial if shards else Trial)(trainer, pl_module))
    if not shards:
        views = matrices(in_all_forms(same_targets(trial.module, targets)))
        return trial, [Change(views[layer.name], layer.cut()) for layer in layers]
    reshard_(trial.module)
    views = matrices(in_all_forms(same_targets(trial.module, targets)))
    changes = cuts_of_shards(trainer, shards)
    return trial, [ShardedChange(views[name].parameter, local) for name, local in changes.items()]
