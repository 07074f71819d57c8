"""The recipe of "Low-Rank Prehab" as its authors published it, to compare with."""

from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.callbacks._schedules import exponential_ramp
from lightning_prehab.callbacks._sharded_layers import check_rows
from lightning_prehab.callbacks.prehab import PrehabCallback
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.kinds import view_of
from lightning_prehab.regularizers import NuclearNorm, StableRank
from lightning_prehab.targets.names import Patterns

Objective = Literal["stable_rank", "nuclear_norm"]

#: Published strengths: for language models reached in 10 steps from 1e-4, for vision transformers there at once.
STRENGTHS: dict[str, float] = {"stable_rank": 10.0, "nuclear_norm": 5.0}
RAMP_STEPS, RAMP_START = 10, 1e-4


class PaperPrehab(PrehabCallback):
    """The published recipe: a penalty on ``M = W S``, and ``M`` is what the optimizer steps.

    Like ``PrehabCallback(space="activation")`` with three differences. ``S`` (``S S^T = E[x x^T]``) is computed once
    and kept. The strength is that of the paper, for the stable rank in an exponential ramp from 1e-4 to 10 in 10 steps.
    And while the optimizer steps, the weight is replaced by ``M`` and its gradient by ``dL/dM = dL/dW S^-T``, so Adam's
    moments, clipping by the Trainer and weight decay act on ``M``; the change of ``M`` is then mapped back,
    ``W <- W + dM S^-1``. The optimizer's state of these weights starts anew when that begins and when it ends, as in
    the paper, where prehab and recovery are runs of their own. The authors step with Adam at a learning rate of 2e-5
    for about 600 batches (language models) or 2,500 (vision); optimizer and length are yours here.

    It is here to be compared with, not recommended: in activation space the stable rank of a trained layer is mostly
    one dominant direction, and its gradient shrinks all others in proportion. ``benchmarks/prehab_gpt.py`` has it
    beside the default of :class:`PrehabCallback`.

    Args:
        objective: ``"stable_rank"`` (language models) or ``"nuclear_norm"`` (vision transformers, not normalized).
        start_epoch: First epoch with the penalty, counted from 0.
        stop_epoch: First epoch without it; None means the surgery (of several the first one), or the end.
        target_modules: Names or fnmatch patterns; None means the targets of the CompressionCallback.
        exclude_modules: Names or fnmatch patterns of layers to leave out.

    Raises:
        ArgumentError: If ``objective`` is another word.

    Reference:
        Qin et al., "Low-Rank Prehab: Preparing Neural Networks for SVD Compression", 2025, https://arxiv.org/abs/2512.01980

    Example::

        trainer = L.Trainer(max_epochs=12, callbacks=[PaperPrehab(), CompressionCallback(epoch=6, keep=0.4)])
    """

    goes_on: ClassVar[bool] = False  # the paper has one cut

    def __init__(
        self,
        objective: Objective = "stable_rank",
        *,
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        target_modules: Patterns = None,
        exclude_modules: Patterns = None,
    ) -> None:
        if not isinstance(objective, str) or objective not in STRENGTHS:
            raise ArgumentError(f"objective must be 'stable_rank' or 'nuclear_norm', got {objective!r}.")
        self._inside: list[tuple[RegularizedLayer, Tensor, Tensor]] = []  # the layer, its W and its M, during a step
        super().__init__(
            StableRank() if objective == "stable_rank" else NuclearNorm(normalized=False, refresh=1),
            STRENGTHS[objective],
            space="activation",
            start_epoch=start_epoch,
            stop_epoch=stop_epoch,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            update_steps=0,
        )
        self.objective: Objective = objective

    def _look(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super()._look(trainer, pl_module)
        cut = [name for name, target in (self._targets or {}).items() if view_of(target).rank is not None]
        if cut:
            raise UnsupportedError(
                f"PaperPrehab steps dense weights, and {cut[0]!r} has been cut already. Use PrehabCallback, or leave "
                "such layers out with exclude_modules."
            )
        check_rows(self._targets or {})

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Maps back where loss scaling has skipped a step; lets the optimizer start anew at both ends."""
        self._map_back()
        was_ready = self._way.ready
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        ends = self._in_season(trainer) and self._remaining(trainer, batch_idx) == 0
        if self._weight_steps is not None and self._way.ready and (ends or not was_ready):
            for layer in self._layers:
                for optimizer in self._weight_steps.optimizers():
                    optimizer.state.pop(layer.parameter, None)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Maps back, and takes the hooks off."""
        self._map_back()
        super().on_exception(trainer, pl_module, exception)

    def _before_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Puts ``M`` and its gradient in the place of the weight and its gradient."""
        super()._before_step(trainer, pl_module, optimizer)
        if not self._way.ready or not self._in_season(trainer):
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        with torch.no_grad():
            for layer in self._layers:
                parameter, root = layer.parameter, layer.metric.right
                if id(parameter) in held and parameter.grad is not None and root is not None:
                    seen, gradient = layer.metric.view(layer.here()), layer.here(parameter.grad)
                    self._inside.append((layer, layer.here().clone(), seen))
                    layer.put_(seen)
                    layer.put_(gradient @ layer.metric.right_inverse.mT.to(gradient), into=parameter.grad)

    def _after_step(self) -> None:
        """Maps the weights back right after a step."""
        self._map_back()

    def _ramp(self) -> float:
        if self.objective == "nuclear_norm":
            return 1.0
        return exponential_ramp(self._way.steps, RAMP_STEPS, RAMP_START / self.strength)

    @torch.no_grad()
    def _map_back(self) -> None:
        """The weights, changed by what the step has done to ``M``."""
        for layer, weight, seen in self._inside:
            change = layer.metric.back(layer.here() - seen)
            layer.put_(weight + change)
        self._inside = []
