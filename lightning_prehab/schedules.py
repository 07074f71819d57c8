"""Warm-up and ramp factors: pure functions of a step count."""

import math
from typing import Literal

Shape = Literal["linear", "cosine"]


def ramp(step: int, steps: int) -> float:
    """Linear ramp from ``1 / steps`` at step 0 to 1 at step ``steps - 1`` and after; 1 at once for ``steps = 0``.

    >>> [ramp(step, 4) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return 1.0 if step >= steps else (step + 1) / steps


def warmup_factor(step: int, steps: int, start: float, peak: float = 1.0, shape: Shape = "linear") -> float:
    """Factor on the learning rate: ``start`` at step 0, ``peak`` from step ``steps`` on.

    Args:
        step: Optimizer steps done since the surgery.
        steps: Length of the warm-up in optimizer steps; 0 means no warm-up.
        start: Factor at step 0.
        peak: Factor at the end, kept from then on.
        shape: ``"linear"`` or ``"cosine"`` (half a cosine wave from ``start`` to ``peak``).

    >>> [warmup_factor(step, 4, 0.0) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    if step >= steps:
        return peak
    share = step / steps
    if shape == "cosine":
        share = (1.0 - math.cos(math.pi * share)) / 2.0
    return start + (peak - start) * share
