"""The surgery, at an epoch boundary of an ordinary training run."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_prehab.callbacks._announcement import announce
from lightning_prehab.callbacks._auto_epoch import check_reachable, counts_as_free, is_due, last_possible_epoch
from lightning_prehab.callbacks._checkpoint import DenseShell, check_version
from lightning_prehab.callbacks._course import CourseNotes
from lightning_prehab.callbacks._cuts import Cut, Epochs, Keeps, cuts_made, planned_cuts, settings_of_cuts
from lightning_prehab.callbacks._finetuning import FROZEN, note_frozen, rename_groups_, unfreeze_
from lightning_prehab.callbacks._neighbours import (
    refuse_averaging,
    refuse_communication_state,
)
from lightning_prehab.callbacks._of_recipe import OfRecipe
from lightning_prehab.callbacks._only_one import OnlyOne
from lightning_prehab.callbacks._ready import check_ready, check_settings
from lightning_prehab.callbacks._replay import replay_
from lightning_prehab.callbacks._ride import Ride
from lightning_prehab.callbacks._said import (
    say_followed,
    say_it_never_came,
    say_other_cuts,
    say_passed_over,
    saying_what_to_do,
)
from lightning_prehab.callbacks._sharded_checkpoint import ShardedShell, followed_load, shell_for
from lightning_prehab.callbacks._sharded_site import site_of
from lightning_prehab.callbacks._showing import showing
from lightning_prehab.callbacks._trainer import (
    check_launcher,
    check_strategy,
    move_to_front,
    reset_scores_,
    shards,
)
from lightning_prehab.compress import make_plan
from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.factorizations import Factorization
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import RankOverride, Recipe
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.road import operate
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.surgery.holders import names_holders
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.names import Patterns, clean_name

#: Of the state in checkpoints.
STATE_VERSION = 1
_ONE_CUT = (
    "one callback makes all cuts of a run. For several, each deeper than the one before, give it lists: "
    "CompressionCallback(epoch=[3, 6], keep=[0.6, 0.4]). rank_overrides gives some layers other ranks than the rest."
)


class CompressionCallback(OnlyOne):
    """Replaces layers by their low-rank factors at the start of an epoch, in the middle of training.

    In the epoch before, hooks ride on the last ``calibration_batches`` ordinary training steps and collect what the
    factorization needs; no extra data pass is made. (A surgery at epoch 0 makes a short pass of its own, on a copy of
    the module.) Then the ranks are planned, all factors computed, the modules swapped, the optimizers edited in place
    with their first moments carried over, and a DDP wrapper rebuilt. Learning-rate schedulers go on as if nothing had
    happened. If anything fails before the swap, the model is as it was. A table of what was done is printed once;
    ``compression/keep`` and ``compression/model_keep`` are logged; TensorBoard, W&B and MLflow get the table and the
    figures too.

    Any callback or the LightningModule may define ``on_surgery(trainer, pl_module, report)``, which is called right
    after, and ``on_before_surgery(trainer, pl_module)``, called once the plan is made, before anything is changed.

    Several cuts: ``epoch=[3, 6, 9], keep=[0.6, 0.4, 0.2]``. Layers that are cut already are factorized again, in the
    metric of then, out of the factors alone; ranks are planned anew each time, and no layer grows.

    Args:
        epoch: The surgery happens before the first batch of this epoch (counted from 0). ``"auto"``: at the first epoch
            boundary at which the forecast of a :class:`~lightning_prehab.PrehabCallback` in the loss space is below
            ``forecast_below``, before the last epoch in any case. A list: several surgeries; epochs ascend.
        keep: Share of the targets' weight parameters to keep, in ``(0, 1]``: 0.4 keeps 40 %. Without effect if a policy
            is given. Or a whole :class:`~lightning_prehab.Recipe`; those of the other arguments that are its fields are
            then left out. A list, of one of them for each epoch: shares descend, each of the dense weights; a policy
            gets each of them as its ``keep``.
        policy: Rank policy; None means one global :class:`~lightning_prehab.ParameterBudget` for factorizations whose
            spectra compare between layers (the default one), :class:`~lightning_prehab.RankRatio` for the others.
        factorization: How factors are computed; None means :class:`~lightning_prehab.KroneckerSVD`.
        calibration_batches: Training batches whose statistics are used, at least 1; at most the length of one epoch
            (twice this number of the last batches where the length of an epoch is not known).
        target_modules: Names or fnmatch patterns of the layers to cut; None takes all that can be cut, but for
            projections to a vocabulary, see :func:`~lightning_prehab.find_targets`.
        exclude_modules: Names or fnmatch patterns of the layers to leave.
        rank_overrides: ``{pattern: rank}``: an int is a rank, a float a share of the layer's parameters, ``"dense"``
            keeps it.
        rank_multiple_of: Ranks are multiples of this; multiples of 8 to 32 may run faster, on GPUs above all: measure.
        reset_scores: Make ModelCheckpoint and EarlyStopping forget the scores of the dense model at the surgery; files
            that are written already stay. Otherwise "best" can remain a dense checkpoint, and patience counts on.
        forecast_below: With ``epoch="auto"``: predicted increase of the loss, in its units, at which the cut counts as
            free; positive.
        split_fused: Cut the parts of fused projections (queries, keys and values; gate and up) each for itself; else
            they are one matrix.
        layout: How a matrix of rank ``r`` is stored: ``"factors"``, two factors, or ``"pivot"``, in ``r`` times ``r``
            fewer numbers, which are then trained on as they are; see :class:`~lightning_prehab.Recipe`.

    Attributes:
        epoch: When the next surgery comes; when the last one has come, if there is no next.
        recipe: What is wished for in it, as one object.
        reports: The :class:`~lightning_prehab.CompressionReport` of each surgery that is done.
        report: The last of them, or None.

    Raises:
        ArgumentError: If a value is out of range, or ``epoch`` is never reached.
        TargetError: When fit starts, if no layer matches.
        UnsupportedError: When fit starts, for strategies, optimizers or callbacks that cannot follow a change of
            parameters, and for a second CompressionCallback.
        NumericalError: At the surgery, if training has diverged (the layer is named).

    Example::

        trainer = L.Trainer(max_epochs=12, callbacks=[CompressionCallback(epoch=6, keep=0.4)])
    """

    factorization = OfRecipe("factorization_or_default")
    policy = OfRecipe("policy_or_default")
    target_modules, exclude_modules, rank_overrides = OfRecipe(), OfRecipe(), OfRecipe()
    rank_multiple_of, split_fused, layout = OfRecipe(), OfRecipe(), OfRecipe()

    def __init__(
        self,
        epoch: Epochs,
        keep: Keeps = 0.5,
        *,
        policy: RankPolicy | None = None,
        factorization: Factorization | None = None,
        calibration_batches: int = 64,
        target_modules: Patterns = None,
        exclude_modules: Patterns = None,
        rank_overrides: Mapping[str, RankOverride] | None = None,
        rank_multiple_of: int = 1,
        reset_scores: bool = False,
        forecast_below: float = 0.01,
        split_fused: bool = False,
        layout: Layout = "factors",
    ) -> None:
        super().__init__()
        check_real("forecast_below", forecast_below, "(0, inf)")
        check_whole("calibration_batches", calibration_batches, 1)
        self._auto = epoch == "auto"  # the epoch is then the last possible one, until it is decided
        self.forecast_below = forecast_below
        self._cuts = planned_cuts(
            epoch,
            keep,
            policy,
            factorization=factorization,
            layout=layout,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            rank_overrides=rank_overrides,
            rank_multiple_of=rank_multiple_of,
            split_fused=split_fused,
        )
        self.calibration_batches = calibration_batches
        self.reset_scores = reset_scores
        self.reports: list[CompressionReport] = []
        self._ride = Ride(calibration_batches)
        self._course = CourseNotes()
        self._restored: dict[str, Any] = {}
        self._frozen: list[str] | None = None  # names, from a checkpoint
        self._name_holders: Callable[[], None] | None = None  # of what a resumed run has replaced
        self._shell: DenseShell | ShardedShell | None = None
        self._following: Any = None
        self._world_size = 1

    @property
    def done(self) -> bool:
        """Whether the surgery has happened; of several the last one."""
        return self._cuts.done

    @property
    def report(self) -> CompressionReport | None:
        """That of the last surgery that is done."""
        return self.reports[-1] if self.reports else None

    @property
    def epoch(self) -> int:
        """Of the next surgery, or of the last one."""
        return self._cuts.next.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._cuts.next = Cut(epoch, self.recipe)

    @property
    def began(self) -> int:
        """The epoch that the time before the next surgery has begun with: 0, or that of the surgery before."""
        return self._cuts.began

    @property
    def last_epoch(self) -> int:
        """Of the last surgery."""
        return self._cuts[-1].epoch

    @property
    def recipe(self) -> Recipe:
        """Of the next surgery, or of the last one."""
        return self._cuts.next.recipe

    @recipe.setter
    def recipe(self, recipe: Recipe) -> None:
        self._cuts.next = Cut(self.epoch, recipe)

    def change_recipes(self, **changes: object) -> None:
        """Gives the recipes of all surgeries other values in some fields."""
        self._cuts.change_recipes(**changes)

    def make_plan(self, targets: Targets, statistics: Mapping[str, LayerStatistics] | None) -> CompressionPlan:
        """What the surgery would do, given these statistics.

        A policy that probes or tries does so at the surgery only; until then one budget for all layers stands in.
        """
        return make_plan(targets, self.recipe.without_probes(), statistics=statistics)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), **settings_of_cuts(self._cuts), **({"epoch": "auto"} if self._auto else {})}

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuses what cannot work, before anything has been trained, and prepares for what may be loaded."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            self._following = followed_load(trainer, pl_module)
            return
        self.refuse_others(trainer, CompressionCallback, _ONE_CUT)
        check_strategy(trainer, self, sharded=True)
        check_launcher(trainer, self)
        refuse_averaging(trainer)
        refuse_communication_state(trainer)
        cuts = [name for report in self.reports for name, rank in report.ranks.items() if rank is not None]
        modules = {clean_name(name): module for name, module in pl_module.named_modules()}
        if not all(isinstance(modules.get(name), LowRankLayer) for name in cuts):
            cuts = []  # another module, or one that follows a dense checkpoint since
            self.reports, self._cuts.made = [], 0
        if self._auto:
            self.epoch = last_possible_epoch(trainer, self)
        check_settings(trainer, pl_module, self._cuts)
        check_reachable(trainer, self.last_epoch)
        self._ride.forget()
        self._restored, self._world_size, self._frozen = {}, trainer.world_size, None
        self._name_holders, self._course = None, CourseNotes()
        self._shell = shell_for(trainer, pl_module, cuts, self.recipe.factorization_or_default)
        move_to_front(trainer, self)  # others then see the compressed model from its first epoch on

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Repeats the surgery that a loaded checkpoint has had; else checks targets and optimizers."""
        if not shards(trainer):
            self._follow(trainer, pl_module)
        check_ready(trainer, pl_module, self._cuts.to_come)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Operates at epoch 0, and on a resume that enters an epoch without its start hook."""
        if self._shell is not None:  # a sharded run has been loaded only now
            self._follow(trainer, pl_module)
            check_ready(trainer, pl_module, self._cuts.to_come)
        if not self.done and self._fits(self._restored):
            self._ride.load_state_dict(trainer, pl_module, self.recipe, self._restored)
        self._restored = {}
        self._operate_if_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Operates when the epoch has come: the last checkpoint of the epoch before is a whole dense model."""
        self._operate_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Starts counting what this step sends through the targets, shortly before the surgery."""
        if self._name_holders is not None:
            self._name_holders()
            self._name_holders = None
        undecided = self._auto and not self.done and is_due(trainer, batch_idx, self.calibration_batches)
        if undecided and counts_as_free(trainer, pl_module, self.forecast_below, batch, batch_idx):
            self.epoch = min(self.epoch, trainer.current_epoch + 1)
        if not self.done and trainer.current_epoch == self.epoch - 1 and any(self.recipe.wanted):
            self._ride.begin_batch(trainer, pl_module, self.recipe, batch, batch_idx)

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: torch.Tensor) -> None:
        """Notes the scale of this loss, to take it out of the gradients again."""
        self._ride.note_loss_scale(trainer)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops counting, so that validation batches are not counted."""
        self._course.note_loss(trainer, outputs)
        self._ride.end_batch()

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Notes what was logged, for the report."""
        self._course.note_validation(trainer)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Completes the report; takes the hooks off if training ended before the surgery."""
        self._ride.stop()
        self._end_course(trainer)
        if not self.done:
            say_it_never_came(trainer, self.epoch, self._cuts.name_of_next if self._cuts.made else "")

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Takes the hooks off; what was collected stays for a checkpoint that is written now."""
        self._ride.detach()
        self._close()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Takes the loading hooks off."""
        if self._shell is not None and self._shell.loaded:  # there was nothing left to train
            self._follow(trainer, pl_module)
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the report, and the sums that were being collected; plain data only."""
        return {
            "version": STATE_VERSION,
            "report": None if self.report is None else self.report.to_dict(),
            "reports": [report.to_dict() for report in self.reports],
            **self._cuts.to_dict(),
            "wanted": list(self.recipe.wanted),
            **self._ride.state_dict(self._world_size),
            "course": self._course.state_dict(),
        }

    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Notes beside a BaseFinetuning what is frozen."""
        note_frozen(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Keeps that for the start of fit."""
        self._frozen = checkpoint.get(FROZEN)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the start of fit; the structure itself is read from the weights."""
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        self._restored = state_dict
        if "course" in state_dict:
            self._course.load_state_dict(state_dict["course"])
        if self._auto:
            self.epoch = min(self.epoch, state_dict["epoch"])

    def _fits(self, state: Mapping[str, Any]) -> bool:
        """Whether stored sums are those that the surgery wants: of the epoch before it, and of the same kind."""
        return (
            bool(state.get("statistics"))
            and state["epoch"] == self.epoch
            and Wanted(*state["wanted"]) == self.recipe.wanted
        )

    def _follow(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Takes over what has been loaded; a dense shell is cut as it was in the run that wrote the checkpoint."""
        assert self._shell is not None
        shell, self._shell = self._shell, None
        factors = shell.close()
        if shell.loaded:
            self.reports, self._cuts.made = [], 0
            report, self._name_holders = shell.report, shell.name_holders
            if factors:
                method = self.recipe.factorization_or_default
                report, self._name_holders = replay_(trainer, pl_module, factors, method)
            self._remember(report)
            keep = self.report.keep if self.report and self._restored.get("report") else None
            say_followed(pl_module, shell.parameters, keep)
        if self._restored:
            say_other_cuts(self._restored, self._cuts, with_epochs=not self._auto)
        unfreeze_(trainer, pl_module, self._frozen)
        self._frozen = None

    def _remember(self, replayed: CompressionReport | None) -> None:
        """Takes over what the checkpoint says of the surgeries that are done; of weights alone, what they show."""
        stored, method = self._restored.get("report"), self.recipe.factorization_or_default
        known = self._restored.get("reports") or ([] if stored is None else [stored])  # older files hold the last alone
        self.reports = [CompressionReport.from_dict(one, method) for one in known]
        if replayed is not None and not known:
            self.reports, self._cuts.made = [replayed], cuts_made(self._cuts, replayed)
        else:
            self._cuts.made = min(self._restored.get("made", len(known)), len(self._cuts))

    def _close(self) -> None:
        self._ride.let_go()
        if self._shell is not None:
            self._shell.close()
        if self._following is not None:
            self._following.remove()
        self._shell = self._following = None

    def _operate_if_due(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        due = self._cuts.due(trainer.current_epoch)
        if len(due) > 1:
            say_passed_over([cut.epoch for cut in due])
            self._cuts.made += len(due) - 1
        if due:
            self._operate(trainer, pl_module)

    @names_holders
    def _operate(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        site = site_of(trainer, pl_module, self.calibration_batches, *self._ride.take(), announced=True)
        with showing(trainer), saying_what_to_do():
            report = operate(self.recipe, site)
        self._end_course(trainer)
        report = self._course.at_the_cut(trainer, report.with_note(self._cuts.name_of_next))
        self.reports.append(report)
        self._cuts.made += 1
        rename_groups_(trainer, pl_module)
        if self.reset_scores:
            reset_scores_(trainer)
        announce(trainer, pl_module, report, self._cuts.made)

    def _end_course(self, trainer: "pl.Trainer") -> None:
        """Completes the last report: the time after its surgery is over."""
        if self.reports:
            self.reports[-1] = self._course.at_the_end(trainer, self.reports[-1])
