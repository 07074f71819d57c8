"""The strength of a penalty as a share of the task gradient: penalties have no common scale, shares have."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.documents.checks import check_real
from lightning_prehab.errors import CheckpointError
from lightning_prehab.linalg.matrices import widened


def strength_for_share(share: float, task_norm: Tensor, penalty_norm: Tensor) -> Tensor:
    """Strength at which the penalty's gradient has the given share of the norm of the task's gradient.

    Args:
        share: Wanted ``strength * penalty_norm / task_norm``.
        task_norm: Norm of the gradient of the task loss, over the weights that the penalty acts on.
        penalty_norm: Norm of the gradient of the penalty at strength 1, over the same weights.

    Returns:
        Scalar; not finite, or 0, where a norm is.

    >>> strength_for_share(0.1, torch.tensor(2.0), torch.tensor(0.5))
    tensor(0.4000)
    """
    return share * task_norm / penalty_norm


class GradientRatio:
    """A strength that follows a share of the task gradient's norm, smoothed over steps.

    The strength is ``share`` times a moving average of ``task_norm / penalty_norm``. The average is taken of
    logarithms, since ratios spread over decades, and without a bias toward its start. Steps where a norm is 0 or not
    finite (a loss that overflowed) are passed over. Nothing is read back from the device: the strength is a tensor.

    Args:
        share: Wanted ratio of the two gradients, positive.
        smoothing: Weight of the past per step, in [0, 1).

    Raises:
        ArgumentError: If a value is out of range.

    >>> ratio = GradientRatio(share=0.1, smoothing=0.5)
    >>> ratio.update(torch.tensor(2.0), torch.tensor(0.5))
    tensor(0.4000)
    >>> ratio.update(torch.tensor(float("inf")), torch.tensor(0.5))
    tensor(0.4000)
    """

    def __init__(self, share: float = 0.1, smoothing: float = 0.95) -> None:
        check_real("share", share, "(0, inf)")
        check_real("smoothing", smoothing, "[0, 1)")
        self.share = share
        self.smoothing = smoothing
        self._total = torch.zeros(())
        self._count = torch.zeros(())

    def update(self, task_norm: Tensor, penalty_norm: Tensor) -> Tensor:
        """Takes in the two norms of a step and returns the strength to use, on the device of the norms.

        Args:
            task_norm: Scalar norm of the task gradient.
            penalty_norm: Scalar norm of the gradient of the penalty at strength 1.

        Returns:
            Scalar, in float32 at least; 0 until the first usable step.
        """
        ratio = (widened(task_norm.detach()) / widened(penalty_norm.detach())).log()
        usable = torch.isfinite(ratio)
        past = torch.where(usable, torch.full_like(ratio, self.smoothing), torch.ones_like(ratio))
        fresh = torch.where(usable, torch.full_like(ratio, 1.0 - self.smoothing), torch.zeros_like(ratio))
        self._total = self._total.to(ratio.device) * past + torch.where(usable, ratio, torch.zeros_like(ratio)) * fresh
        self._count = self._count.to(ratio.device) * past + fresh
        return self.strength

    @property
    def strength(self) -> Tensor:
        """The present strength; 0 until the first usable step."""
        mean = (self._total / self._count.clamp_min(torch.finfo(torch.float32).tiny)).exp()
        return torch.where(self._count > 0, self.share * mean, torch.zeros_like(mean))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data."""
        return {"total": self._total.clone(), "count": self._count.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave.

        Raises:
            CheckpointError: If something is missing.
        """
        missing = {"total", "count"} - set(state)
        if missing:
            raise CheckpointError(f"The state of GradientRatio lacks {', '.join(sorted(missing))}.")
        self._total, self._count = state["total"].clone(), state["count"].clone()
