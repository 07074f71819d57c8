"""The rows of ``rehab_sst2.py`` and ``rehab_gpt.py``: which callbacks each of them gives to the Trainer.

Rivals are written out here; what is ours is public. Each row is a function of a :class:`Trial`; ``RECOVERY``,
``RECIPE`` and ``SPIKE`` name them.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from prehab_trial import Record, Task
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lightning_prehab as lp

LORA_RANK, LORA_SCALE = 8, 2.0  # as in LoRA and in the update of SVD-LLM
REFINED = 4  # a refinement takes one of so many steps of a recovery
SHARES = (1.0, 0.05)  # of the training data
TUNED_AT = {"recovery": 0.15, "recipe": 0.1}  # keeps
WARM_EPOCHS = 4  # of ordinary training, before the cut whose first steps are looked at


class RehabTask(Task):
    """A task of ``prehab_trial.py`` on any device, with some of its data; an epoch has ``steps`` steps."""

    parts: ClassVar[dict[str, Sequence[float]]]  # the keeps of each
    recovery: ClassVar[int]  # steps after the cut
    equal: ClassVar[int]  # steps that all runs of a recovery make, also those that are back before
    recipe: ClassVar[int]  # steps in all
    rates: ClassVar[Sequence[float]]
    sparse: ClassVar[int] = 1  # with little data only every so many of the points of a recovery is measured
    device: torch.device
    cache: Path

    @abstractmethod
    def batches(self, seed: int, epoch: int, share: float = 1.0) -> list[Any]:
        """``steps`` training batches, on the device."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """What the model says of a batch."""

    @abstractmethod
    def inputs(self, batch: Any) -> Any:
        """A batch without its labels, as the model takes it."""

    @abstractmethod
    def reached(self, now: Record, dense: Record) -> bool:
        """Whether a cut model has recovered."""


@dataclass(frozen=True)
class Job:
    """One run. A "tuning" is measured on the validation split, a "run" on the test split."""

    kind: str  # "dense", "tuning" or "run"
    seed: int
    part: str = ""
    row: str = ""
    keep: float = 1.0
    share: float = 1.0
    rate: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it another one; the rate of a reported run follows from the tuning."""
        return tuple(asdict(self if self.kind == "tuning" else replace(self, rate=None)).values())


@dataclass
class Trial:
    """What a row needs to know to make its callbacks."""

    task: RehabTask
    job: Job
    total: int  # steps
    dense: nn.Module  # on the device, in eval mode

    def __deepcopy__(self, memory: dict[int, Any]) -> "Trial":
        return self  # copies of a module share it

    @property
    def epochs(self) -> int:
        return self.total // self.task.steps

    def cut(self, epoch: Any = 0, keep: Any = None, **settings: Any) -> lp.CompressionCallback:
        """The default cut, but for the settings."""
        return lp.CompressionCallback(
            epoch,
            self.job.keep if keep is None else keep,
            calibration_batches=self.task.calibration_batches,
            target_modules=self.task.targets,
            **settings,
        )


def loss_over(record: Record, part: str) -> float:
    """The mean loss over the course, by the trapezoidal rule; or the loss in the end."""
    if part == "recipe":
        return record["end"]["loss"]
    course = [(step, found["loss"]) for step, found in record["course"]]
    return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(course)) / (course[-1][0] - course[0][0])


Callbacks = list[L.Callback]
Row = Callable[[Trial], Callbacks]


class Update(nn.Module):
    """A weight and a low-rank update that starts as zero."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(LORA_RANK, *weight.shape)
        down = torch.randn(rank, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1])
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + LORA_SCALE * self.up @ self.down


class LoRA(L.Callback):
    """Low-rank updates of both factors of every layer; nothing else is trained."""

    def on_surgery(self, trainer: L.Trainer, pl_module: L.LightningModule, report: lp.CompressionReport) -> None:
        generator = torch.Generator().manual_seed(0)
        pl_module.requires_grad_(False)
        updates = [Update(part.weight, generator) for one in low_rank_layers(pl_module) for part in (one.A, one.B)]
        parts = [part for one in low_rank_layers(pl_module) for part in (one.A, one.B)]
        for part, update in zip(parts, updates, strict=True):
            parametrize.register_parametrization(part, "weight", update)
        trainer.optimizers[0].add_param_group({"params": [p for update in updates for p in update.parameters()]})


class RefinedFirst(L.Callback):
    """``refine_`` with the calibration batches, right after the cut; its steps count."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.steps = trial, trial.total // REFINED

    def on_surgery(self, trainer: L.Trainer, pl_module: L.LightningModule, report: lp.CompressionReport) -> None:
        task, job = self.trial.task, self.trial.job
        batches = [task.inputs(batch) for batch in task.batches(job.seed, 0, job.share)]
        training = pl_module.training
        wish = lp.Refinement(self.steps, scope="model", lr=job.rate, precision="full")
        lp.refine_(pl_module.model, self.trial.dense, batches, wish, progress=False)
        pl_module.train(training)


class FreshOptimizer(L.Callback):
    """Forgets what the optimizer knew before the cut."""

    def on_surgery(self, trainer: L.Trainer, pl_module: L.LightningModule, report: lp.CompressionReport) -> None:
        trainer.optimizers[0].state.clear()


def low_rank_layers(module: nn.Module) -> list[lp.LowRankLinear]:
    return [one for one in module.modules() if isinstance(one, lp.LowRankLinear)]


def rehab(trial: Trial, *others: L.Callback) -> Callbacks:
    """The cut and RehabSchedule, both as they are."""
    return [trial.cut(), lp.RehabSchedule(), *others]


def svd_llm_cut(trial: Trial) -> lp.CompressionCallback:
    """Whitening and the same ratio in every layer."""
    return trial.cut(policy=lp.RankRatio(trial.job.keep), factorization=lp.WhitenedSVD())


def update_in_sequence(trial: Trial) -> L.Callback:
    """All B, then all A, half of the steps each, and nothing else: the sequential update of SVD-LLM.

    Source: Wang et al., 2024, https://arxiv.org/abs/2403.07378, section 3.3; there through low-rank updates of the
    factors, here the factors themselves.
    """
    return lp.FactorTraining(alternate=trial.total // 2, train="factors")


def teacher(trial: Trial, **settings: Any) -> L.Callback:
    """The dense model of the beginning, also where prehab has changed it before the cut."""
    return lp.RehabDistillation(teacher=trial.dense, **settings)


def prehab(trial: Trial, share: float, *others: L.Callback, before: float = 0.0) -> Callbacks:
    """Prehab for a share of the steps, the cut, rehab for the rest."""
    prepared = lp.PrehabCallback(self_distillation=before)
    return [prepared, trial.cut(round(share * trial.epochs)), lp.RehabSchedule(), *others]


def cuts(trial: Trial, *times: float, **settings: Any) -> Callbacks:
    """Cuts at these shares of the steps, each to half of what the one before has left; distillation."""
    epochs = [round(time * trial.epochs) for time in times]
    keeps = [trial.job.keep * 2 ** (len(times) - 1 - index) for index in range(len(times))]
    return [trial.cut(epochs, keeps), lp.RehabSchedule(), teacher(trial, **settings)]


#: Rows of the recovery; all but one have the default cut.
RECOVERY: dict[str, Row] = {
    "plain training": lambda trial: [trial.cut()],
    "SVD-LLM's update, B then A": lambda trial: [trial.cut(), update_in_sequence(trial)],
    f"LoRA of rank {LORA_RANK} on the factors": lambda trial: [trial.cut(), LoRA()],
    "SVD-LLM's cut, plain training": lambda trial: [svd_llm_cut(trial)],
    "RehabSchedule": rehab,
    "RehabSchedule, product decay": lambda trial: rehab(trial, lp.FactorTraining(product_decay=0.1)),
    "RehabSchedule, rebalanced": lambda trial: rehab(trial, lp.FactorTraining(rebalance_every=10)),
    "RehabSchedule, nothing else than factors": lambda trial: rehab(trial, lp.FactorTraining(train="factors")),
    "refined first": lambda trial: rehab(trial, RefinedFirst(trial)),
    "distillation (logits)": lambda trial: rehab(trial, lp.RehabDistillation()),
    "distillation (logits) alone": lambda trial: rehab(trial, lp.RehabDistillation(task_strength=0.0)),
    "distillation (features)": lambda trial: rehab(trial, lp.RehabDistillation(form="features")),
}
#: Rows with the same number of steps in all.
RECIPE: dict[str, Row] = {
    "cut first": rehab,
    "cut first, distillation": lambda trial: rehab(trial, lp.RehabDistillation()),
    "cut first, distillation alone": lambda trial: rehab(trial, lp.RehabDistillation(task_strength=0.0)),
    "prehab 1/2": lambda trial: prehab(trial, 1 / 2),
    "prehab 1/2, distillation after": lambda trial: prehab(trial, 1 / 2, teacher(trial)),
    "prehab 1/4, distillation before and after": lambda trial: prehab(trial, 1 / 4, teacher(trial), before=1.0),
    "prehab 1/2, distillation before and after": lambda trial: prehab(trial, 1 / 2, teacher(trial), before=1.0),
    "prehab 3/4, distillation before and after": lambda trial: prehab(trial, 3 / 4, teacher(trial), before=1.0),
    "two cuts, distillation": lambda trial: cuts(trial, 0, 1 / 4),
    "three cuts, distillation": lambda trial: cuts(trial, 0, 1 / 4, 1 / 2),
    "three cuts, distillation alone": lambda trial: cuts(trial, 0, 1 / 4, 1 / 2, task_strength=0.0),
    "prehab, three cuts, distillation throughout": lambda trial: [
        lp.PrehabCallback(self_distillation=1.0),
        *cuts(trial, 1 / 6, 1 / 3, 1 / 2),
    ],
}
#: Rows that are trained as usual before the cut.
SPIKE: dict[str, Row] = {
    "carried": lambda trial: [trial.cut(WARM_EPOCHS)],
    "fresh": lambda trial: [trial.cut(WARM_EPOCHS), FreshOptimizer()],
    "carried, RehabSchedule": lambda trial: [trial.cut(WARM_EPOCHS), lp.RehabSchedule()],
    "fresh, RehabSchedule": lambda trial: [trial.cut(WARM_EPOCHS), lp.RehabSchedule(), FreshOptimizer()],
}
ROWS: dict[str, dict[str, Row]] = {"recovery": RECOVERY, "recipe": RECIPE, "spike": SPIKE}
#: The row that the others of a part are compared with.
CONTROLS = {"recovery": "plain training", "recipe": "cut first, distillation"}


def cut_first_beside(row: str) -> str:
    """Cutting first with the distillation of a recipe."""
    return "cut first, distillation alone" if row.endswith("alone") else CONTROLS["recipe"]


#: Few numbers are trained: the rates of a task times this.
HIGHER = {f"LoRA of rank {LORA_RANK} on the factors": 5.0}
