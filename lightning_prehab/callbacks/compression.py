"""The surgery, at an epoch boundary of an ordinary training run."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.hooks import RemovableHandle

from lightning_prehab.callbacks._auto_epoch import check_reachable, counts_as_free, is_due, last_possible_epoch
from lightning_prehab.callbacks._checkpoint import (
    DenseShell,
    check_version,
    dump_statistics,
    follow_on_load,
    plan_of_factors,
    restore_statistics_,
)
from lightning_prehab.callbacks._course import CourseNotes
from lightning_prehab.callbacks._finetuning import FROZEN, StoredGroups, note_frozen, rename_groups_, unfreeze_
from lightning_prehab.callbacks._listeners import tell_listeners
from lightning_prehab.callbacks._neighbours import (
    refuse_averaging,
    refuse_communication_state,
    refuse_finders,
    refuse_pruning,
)
from lightning_prehab.callbacks._of_recipe import OfRecipe
from lightning_prehab.callbacks._only_one import OnlyOne
from lightning_prehab.callbacks._own_pass import check_runs_apart
from lightning_prehab.callbacks._printing import show
from lightning_prehab.callbacks._report_logging import log_report
from lightning_prehab.callbacks._said import (
    plain_recipe,
    say_followed,
    say_it_never_came,
    say_other_settings,
    saying_what_to_do,
)
from lightning_prehab.callbacks._showing import showing
from lightning_prehab.callbacks._site import TrainerSite
from lightning_prehab.callbacks._trainer import (
    EQUAL,
    batches_per_epoch,
    check_launcher,
    check_strategy,
    loss_scale,
    move_to_front,
    reset_scores_,
    uses_loss_scaling,
)
from lightning_prehab.callbacks._untrained import warn_of_unheld
from lightning_prehab.compress import make_plan
from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.kinds import view_of
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.plan.choices import added_parameters
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.ranks import check_recipe
from lightning_prehab.plan.recipe import RankOverride, Recipe
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.road import operate
from lightning_prehab.statistics.collector import MANY_BATCHES, Collector
from lightning_prehab.statistics.kept import KeptBatches
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.surgery.holders import holders_named_later, names_holders
from lightning_prehab.surgery.optimizers import check_optimizer
from lightning_prehab.surgery.pretrained import check_pretrained
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.names import Patterns, clean_name

#: Of the state in checkpoints.
STATE_VERSION = 1
_ONE_CUT = (
    "a model is cut once in a run. Keep one of them: rank_overrides gives some layers other ranks than the rest. For a "
    "second, deeper cut call to_dense_(model) after this run, and train on with a new CompressionCallback."
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

    Args:
        epoch: The surgery happens before the first batch of this epoch (counted from 0). ``"auto"``: at the first epoch
            boundary at which the forecast of a :class:`~lightning_prehab.PrehabCallback` in the loss space is below
            ``forecast_below``, before the last epoch in any case.
        keep: Share of the targets' weight parameters to keep, in ``(0, 1]``: 0.4 keeps 40 %. Without effect if a policy
            is given. Or a whole :class:`~lightning_prehab.Recipe`; those of the other arguments that are its fields are
            then left out.
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
        rank_multiple_of: Ranks are multiples of this; multiples of 8 to 32 run faster on most hardware.
        reset_scores: Make ModelCheckpoint and EarlyStopping forget the scores of the dense model at the surgery; files
            that are written already stay. Otherwise "best" can remain a dense checkpoint, and patience counts on.
        forecast_below: With ``epoch="auto"``: predicted increase of the loss, in its units, at which the cut counts as
            free; positive.
        split_fused: Cut the parts of fused projections (queries, keys and values; gate and up) each for itself; else
            they are one matrix.
        layout: How a matrix of rank ``r`` is stored: ``"factors"``, two factors, or ``"pivot"``, in ``r`` times ``r``
            fewer numbers, which are then trained on as they are; see :class:`~lightning_prehab.Recipe`.

    Attributes:
        recipe: What is wished for, as one object.
        report: The :class:`~lightning_prehab.CompressionReport` once the surgery is done, else None.

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
        epoch: int | Literal["auto"],
        keep: float | Recipe = 0.5,
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
        if epoch != "auto" and (not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0):
            raise ArgumentError(f"epoch is a whole number that counts from 0, or 'auto', got {epoch!r}.")
        check_real("forecast_below", forecast_below, "(0, inf)")
        check_whole("calibration_batches", calibration_batches, 1)
        self._auto = epoch == "auto"
        self.epoch = 0 if isinstance(epoch, str) else epoch  # with "auto" the last possible one, until it is decided
        self.forecast_below = forecast_below
        self.recipe = Recipe.of(
            keep,
            policy=policy,
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
        self.report: CompressionReport | None = None
        self._collector: Collector | None = None
        self._older: dict[str, LayerStatistics] | None = None
        self._kept = KeptBatches()
        self._course = CourseNotes()
        self._restored: dict[str, Any] = {}
        self._frozen: list[str] | None = None  # names, from a checkpoint
        self._name_holders: Callable[[], None] | None = None  # of what a resumed run has replaced
        self._shell: DenseShell | None = None
        self._following: RemovableHandle | None = None
        self._world_size = 1

    @property
    def done(self) -> bool:
        """Whether the surgery has happened."""
        return self.report is not None

    def make_plan(self, targets: Targets, statistics: Mapping[str, LayerStatistics] | None) -> CompressionPlan:
        """What the surgery would do, given these statistics.

        A policy that probes or tries does so at the surgery only; until then one budget for all layers stands in.
        """
        return make_plan(targets, self.recipe.without_probes(), statistics=statistics)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuses what cannot work, before anything has been trained, and prepares for what may be loaded."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            self._following = follow_on_load(pl_module)
            return
        self.refuse_others(trainer, CompressionCallback, _ONE_CUT)
        check_strategy(trainer, self)
        check_launcher(trainer, self)
        check_runs_apart(self.policy, pl_module)
        if self._auto:
            self.epoch = last_possible_epoch(trainer, self)
        check_reachable(trainer, self.epoch)
        refuse_averaging(trainer)
        refuse_communication_state(trainer)
        cuts = [] if self.report is None else [name for name, rank in self.report.ranks.items() if rank is not None]
        modules = {clean_name(name): module for name, module in pl_module.named_modules()}
        if not all(isinstance(modules.get(name), LowRankLayer) for name in cuts):
            self.report, cuts = None, []  # another module, or one that has followed a dense checkpoint since
        self._stop_collecting()
        self._restored, self._world_size, self._older, self._frozen = {}, trainer.world_size, None, None
        self._kept, self._name_holders, self._course = KeptBatches(), None, CourseNotes()
        self._shell = DenseShell(pl_module, cuts)
        move_to_front(trainer, self)  # others then see the compressed model from its first epoch on

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Repeats the surgery that a loaded checkpoint has had; else checks targets and optimizers."""
        assert self._shell is not None
        loaded, before, factors = self._shell.loaded, self._shell.parameters, self._shell.close()
        self._shell = None
        if loaded:
            self.report = None
        if factors:
            refuse_finders(trainer)
            with holders_named_later() as self._name_holders:
                self._replay(trainer, pl_module, factors)
        if loaded:
            say_followed(pl_module, before, self.report.keep if self.report and self._restored.get("report") else None)
        if self._restored:
            say_other_settings(self._restored, self.recipe, None if self._auto else self.epoch)
        unfreeze_(trainer, pl_module, self._frozen)
        self._frozen = None
        targets = None if self.done else self.recipe.find_targets(pl_module)
        refuse_pruning(trainer, pl_module, [view_of(target).parameter for target in (targets or {}).values()])
        if targets is not None:
            check_recipe(self.recipe, targets)
            check_pretrained(pl_module, (view_of(target).module for target in targets.values()))
            warn_of_unheld(trainer, targets)
            split = [
                view_of(t).parameter
                for t in targets.values()
                if added_parameters(t, self.recipe.factorization_or_default)
            ]
            weights = [view_of(t).parameter for t in targets.values()]
            for optimizer in trainer.optimizers:
                check_optimizer(optimizer, split, weights)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Operates at epoch 0, and on a resume that enters an epoch without its start hook."""
        if not self.done and self._fits(self._restored):
            self._collector = self._new_collector(trainer, pl_module)
            restore_statistics_(self._collector.statistics, self._restored["statistics"], trainer.global_rank)
            if self._restored["older"]:
                self._older = self._new_collector(trainer, pl_module, attach=False).statistics
                restore_statistics_(self._older, self._restored["older"], trainer.global_rank)
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
        if self.done or trainer.current_epoch != self.epoch - 1 or not any(self.recipe.wanted):
            return
        length = batches_per_epoch(trainer)
        if length is not None and batch_idx < length - self.calibration_batches:
            return
        if self._collector is not None and length is None and batch_idx % self.calibration_batches == 0:
            self._older = self._stop_collecting()  # unknown length: the last full window and the running one
        if self._collector is None:
            self._collector = self._new_collector(trainer, pl_module)
        first = 0 if length is None else max(length - self.calibration_batches, 0)
        self._collector.begin_batch(batch, batch_idx - first)
        if self.recipe.factorization_or_default.comparable:
            self._kept.keep(batch, batch_idx)

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: torch.Tensor) -> None:
        """Notes the scale of this loss, to take it out of the gradients again."""
        if self._collector is not None:
            self._collector.loss_scale = loss_scale(trainer)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops counting, so that validation batches are not counted."""
        self._course.note_loss(trainer, outputs)
        if self._collector is not None:
            self._collector.end_batch()

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Notes what was logged, for the report."""
        self._course.note_validation(trainer)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Completes the report; takes the hooks off if training ended before the surgery."""
        self._stop_collecting()
        if self.report is not None:
            self.report = self._course.at_the_end(trainer, self.report)
        if not self.done:
            say_it_never_came(trainer, self.epoch)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Takes the hooks off; what was collected stays for a checkpoint that is written now."""
        if self._collector is not None:
            self._collector.detach()
        self._close()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Takes the loading hooks off."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the report, and the sums that were being collected; plain data only."""
        collecting = None if self._collector is None else self._collector.statistics
        return {
            "version": STATE_VERSION,
            "report": None if self.report is None else self.report.to_dict(),
            "epoch": self.epoch,
            "recipe": plain_recipe(self.recipe),
            "wanted": list(self.recipe.wanted),
            "statistics": dump_statistics(collecting, self._world_size),
            "older": dump_statistics(self._older, self._world_size),
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

    def _replay(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", factors: Mapping[str, Factors]) -> None:
        """The same edits of modules and optimizers, with stored factors; nobody is told, since it is no new surgery."""
        method = self.recipe.factorization_or_default
        site = TrainerSite(trainer, pl_module, self.calibration_batches)
        groups = StoredGroups(trainer, pl_module)
        report = site.swap(plan_of_factors(pl_module, factors, method), factors)
        groups.complete_()
        stored = self._restored.get("report")
        self.report = report if stored is None else CompressionReport.from_dict(stored, method)

    def _close(self) -> None:
        self._kept = KeptBatches()
        if self._shell is not None:
            self._shell.close()
        if self._following is not None:
            self._following.remove()
        self._shell = self._following = None

    def _new_collector(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", attach: bool = True) -> Collector:
        targets = self.recipe.find_targets(pl_module)
        collector = Collector(
            targets,
            self.recipe.wanted,
            drop_overflow=uses_loss_scaling(trainer),
            batches=min(self.calibration_batches, batches_per_epoch(trainer) or MANY_BATCHES - 1),  # none is left out
        )
        if attach:
            collector.attach()
            megabytes = collector.memory() / 1e6
            rank_zero_info(f"Calibration of {len(targets)} layers: at most {megabytes:.1f} MB of sums.")
        return collector

    def _operate_if_due(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self.done and trainer.current_epoch >= self.epoch:
            self._operate(trainer, pl_module)

    @names_holders
    def _operate(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        kept, self._kept = self._kept, KeptBatches()
        site = TrainerSite(trainer, pl_module, self.calibration_batches, self._take_statistics(), kept, announced=True)
        with showing(trainer), saying_what_to_do():
            report = self.report = self._course.at_the_cut(trainer, operate(self.recipe, site))
        rename_groups_(trainer, pl_module)
        if self.reset_scores:
            reset_scores_(trainer)
        show(pl_module, report)
        shares = {"compression/keep": report.keep, "compression/model_keep": report.model_keep}
        pl_module.log_dict(shares, batch_size=1, **EQUAL)
        log_report(trainer, report)
        tell_listeners(trainer, pl_module, "on_surgery", report)

    def _take_statistics(self) -> dict[str, LayerStatistics] | None:
        """What the ride on training steps has collected, of this process alone; None without a ride."""
        statistics, older = self._stop_collecting(), self._older
        self._older = None
        if statistics is not None and older is not None:
            statistics = {name: layer.merge_(older[name]) for name, layer in statistics.items()}
        return statistics

    def _stop_collecting(self) -> dict[str, LayerStatistics] | None:
        collector, self._collector = self._collector, None
        if collector is None:
            return None
        collector.detach()
        return collector.statistics
