"""Training of the factors as what they are: two parts of one matrix."""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer

from lightning_prehab.callbacks._checkpoint import check_version
from lightning_prehab.callbacks._factor_steps import DecayForm, FactorSettings, FactorSteps, settings_are_idle
from lightning_prehab.callbacks._freezing import Freezing, Train
from lightning_prehab.callbacks._only_one import OnlyOne
from lightning_prehab.callbacks._steps import are_of_now, check_seen
from lightning_prehab.callbacks._trainer import check_strategy, find_callback, gradient_scale, shards
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.sharded.pairs import pairs_of_now
from lightning_prehab.surgery.optimizers import check_optimizer
from lightning_prehab.surgery.wrapped import family

#: Of the state in checkpoints.
STATE_VERSION = 1


class FactorTraining(OnlyOne):
    """Trains the factors of low-rank layers as two parts of one matrix, from the surgery on.

    In a run that starts from a compressed model it acts at once. The user's optimizer, its groups and its schedulers
    stay as they are: factors are in groups of their own only while ``optimizer.step`` computes, so one group may hold
    both factors and everything else. A step that loss scaling skips changes nothing. All settings can be combined.

    ``A`` is what the input meets first, ``B`` what makes the output of it; ``D`` and ``C`` in the pivot layout.

    Args:
        product_decay: Decay of the matrix in the place of weight decay on the factors: ``d`` pulls them along
            ``d * grad(0.5 |B A|_F^2)``, which is ``d (B A) A^T`` for ``B`` and ``d B^T (B A)`` for ``A`` (Frobenius
            decay: Pufferfish, https://arxiv.org/abs/2103.03936; Cuttlefish, https://arxiv.org/abs/2305.02538). The
            product is not formed. The optimizer's own weight decay then leaves the factors alone, be it coupled or
            decoupled, and acts on all other parameters as before; 0 does only that. The sparse part of
            :class:`~lightning_prehab.LowRankPlusSparse` keeps its weight decay.
        decay_form: ``"decoupled"``: as in AdamW, factors lose the learning rate times that before they are updated, and
            nothing of it enters moments or clipping. ``"gradient"``: it is added to the gradients, before they are
            clipped, as in the papers; with Adam it is then divided by the second moment like everything else. Plain SGD
            makes no difference between them.
        rebalance_every: After each so many steps a row of ``A`` and its column of ``B`` are made equally long again,
            within a factor of 2: both are multiplied by powers of two, with the gradients and moments that belong to
            them. The product does not change in any bit. Pivot layers, whose ``D`` is rows of the matrix itself, have
            nothing to share out and are left as they are; so are layers whose optimizer has something else than moments
            of the shape of the factors (Adafactor).
        rate_A: Factor on the learning rate of ``A``, and of a decoupled decay with it.
        rate_B: Factor on the learning rate of ``B``. LoRA+ (https://arxiv.org/abs/2402.12354) wants it larger where
            ``B`` starts from zero.
        alternate: ``B`` alone is trained for so many steps, then ``A`` alone, and so on, as in the sequential update of
            SVD-LLM (https://arxiv.org/abs/2403.07378). The other one has no gradient then: it is not stepped, not
            decayed, and its moments stand still.
        train: ``"all"``; ``"factors"``: the low-rank matrices alone; ``"factors_norms_biases"``: these, all vectors,
            and the layers of normalization. The rest is frozen until the end of the fit; what the user has frozen stays
            so.

    Raises:
        ArgumentError: If a value is out of range, or no setting does anything.
        UnsupportedError: When fit starts, without low-rank layers and a CompressionCallback to make them, beside
            another FactorTraining, or a BaseFinetuning if something is frozen here; for other strategies than one
            device, DDP and FSDP2, and for optimizers without usual steps. At a step, for an optimizer whose groups
            count what depends on the learning rate, or that makes its gradients within a step that Lightning does not
            announce.

    Example::

        trainer = L.Trainer(callbacks=[CompressionCallback(epoch=6), FactorTraining(product_decay=1e-2)])
    """

    def __init__(
        self,
        product_decay: float | None = None,
        *,
        decay_form: DecayForm = "decoupled",
        rebalance_every: int | None = None,
        rate_A: float = 1.0,
        rate_B: float = 1.0,
        alternate: int | None = None,
        train: Train = "all",
    ) -> None:
        super().__init__()
        check_real("product_decay", product_decay, "[0, inf)", optional=True)
        check_whole("rebalance_every", rebalance_every, 1, optional=True)
        check_whole("alternate", alternate, 1, optional=True)
        check_real("rate_A", rate_A, "(0, inf)")
        check_real("rate_B", rate_B, "(0, inf)")
        if decay_form not in ("decoupled", "gradient"):
            raise ArgumentError(f"decay_form must be 'decoupled' or 'gradient', got {decay_form!r}.")
        if train not in ("all", "factors", "factors_norms_biases"):
            raise ArgumentError(f"train must be 'all', 'factors' or 'factors_norms_biases', got {train!r}.")
        self.settings = FactorSettings(product_decay, decay_form, rebalance_every, rate_A, rate_B, alternate)
        self.train: Train = train
        if settings_are_idle(self.settings) and train == "all":
            raise ArgumentError(
                "FactorTraining with these settings does nothing; give product_decay, rebalance_every, rate_A, rate_B, "
                "alternate or train, or leave the callback out."
            )
        self._freezing = Freezing(train)
        self._optimizers: list[FactorSteps] = []
        self._steps: list[int] = []  # of each optimizer since the surgery, while nobody counts

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), **asdict(self.settings)}

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuses what cannot work."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.refuse_others(trainer, FactorTraining, "both would step the same factors. Keep one of them.")
        check_strategy(trainer, self, sharded=True)
        self._check_parallelism(trainer)
        if self.train != "all" and find_callback(trainer, BaseFinetuning) is not None:
            raise UnsupportedError(
                f"FactorTraining(train={self.train!r}) and a BaseFinetuning both decide what is frozen. Keep one of "
                "them; the other settings of FactorTraining need train='all'."
            )
        self._stop()
        self._steps = []

    def _check_parallelism(self, trainer: "pl.Trainer") -> None:
        whole = self.settings.product_decay or self.settings.rebalance_every
        if whole and shards(trainer) and trainer.strategy.device_mesh["tensor_parallel"].size() > 1:  # type: ignore[attr-defined]
            raise UnsupportedError(
                "FactorTraining(product_decay=, rebalance_every=) is not there for tensor parallelism, where gradients "
                "may still have to be summed. Leave both out (product_decay=0 takes the weight decay off the factors), "
                "or set tensor_parallel_size=1."
            )

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Freezes, if the model is compressed: after the surgery that a loaded checkpoint has had is repeated."""
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer)
        if not shards(trainer):
            self._start(trainer, pl_module)

    def _start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Once the checkpoint is loaded, which for a sharded model is after fit has started."""
        if find_callback(trainer, CompressionCallback) is None and not pairs_of_now(pl_module):
            raise UnsupportedError(
                "FactorTraining found no low-rank layer to train. Add a CompressionCallback to the Trainer, or start "
                "from a compressed model."
            )
        if self._acts(trainer):
            self._freezing.begin(trainer, pl_module)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Watches the steps, if the model is compressed."""
        if shards(trainer):
            self._start(trainer, pl_module)
        if self._acts(trainer) and not self._optimizers:
            self._follow(trainer, pl_module)

    def on_before_surgery(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Lets go of what is about to be cut (again)."""
        self._stop()

    def on_surgery(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", report: Any) -> None:
        """Begins."""
        self._stop()
        self._steps = []
        self._freezing.begin(trainer, pl_module)
        self._follow(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Watches the optimizers of now, if somebody has made them anew."""
        watches = [one.watch for one in self._optimizers]
        if watches and not are_of_now(watches, trainer.optimizers):
            self._follow(trainer, pl_module)
        self._forget()

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Changes the gradients, and divides the groups if the step has begun."""
        # Lightning leaves the gradients of a fused optimizer scaled; the optimizer unscales them itself.
        scale = gradient_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
        for one in self._optimizers:
            if one.watch.optimizer is optimizer:
                one.announce(scale)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Leaves nothing of a step that was skipped or has failed."""
        self._forget()

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """No step of an optimizer may have gone unseen."""
        watches = [one.watch for one in self._optimizers]
        if are_of_now(watches, trainer.optimizers):
            check_seen(watches, self)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Takes the hooks off; what was frozen here is trainable again."""
        self._stop()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """The same."""
        self._stop()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """The same."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """The steps since the surgery; plain data only. The optimizers are asked next: they have the user's groups."""
        self._forget()
        return {"version": STATE_VERSION, "steps": self._counted()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint was written."""
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        self._steps = list(state_dict["steps"])

    def _acts(self, trainer: "pl.Trainer") -> bool:
        """Whether there is nothing to wait for."""
        compression = find_callback(trainer, CompressionCallback)
        return compression is None or compression.report is not None

    def _counted(self) -> list[int]:
        return [one.steps for one in self._optimizers] if self._optimizers else list(self._steps)

    def _follow(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        steps = self._counted()
        if len(steps) != len(trainer.optimizers):
            steps = [0] * len(trainer.optimizers)
        self._let_go()
        pairs = pairs_of_now(pl_module)
        every = list(dict.fromkeys(one for optimizer in trainer.optimizers for one in family(optimizer)))
        self._optimizers = [
            FactorSteps(self.settings, optimizer, every, pairs, count)
            for optimizer, count in zip(trainer.optimizers, steps, strict=True)
        ]

    def _forget(self) -> None:
        for one in self._optimizers:
            one.forget()

    def _let_go(self) -> None:
        self._steps = self._counted()
        for one in self._optimizers:
            one.remove()
        self._optimizers = []

    def _stop(self) -> None:
        self._let_go()
        self._freezing.end()
