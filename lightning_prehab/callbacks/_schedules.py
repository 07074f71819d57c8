"""Warm-up and ramp factors: pure functions of a step count."""

import math
from typing import Literal

from lightning_prehab.errors import ArgumentError

Shape = Literal["linear", "cosine"]


def ramp(step: int, steps: int) -> float:
    """Linear ramp from ``1 / steps`` at step 0 to 1 at step ``steps - 1`` and after; 1 at once for ``steps = 0``.

    >>> [ramp(step, 4) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return 1.0 if step >= steps else (step + 1) / steps


def exponential_ramp(step: int, steps: int, start: float, end: float = 1.0) -> float:
    """Geometric ramp from ``start`` at step 0 to ``end`` at step ``steps`` and after.

    The strength of "Low-Rank Prehab" (Qin et al., 2025, https://arxiv.org/abs/2512.01980, and their code) rises from
    1e-4 to 10 in 10 steps, a factor ``10 ** 0.5`` per step.

    Args:
        step: Optimizer steps done.
        steps: Length of the ramp in optimizer steps; 0 means ``end`` at once.
        start: Value at step 0, above 0.
        end: Value from step ``steps`` on, above 0.

    Raises:
        ArgumentError: If ``start`` or ``end`` is not positive and finite: no geometric path leads there.

    >>> [round(exponential_ramp(step, 10, 1e-4, 10.0), 4) for step in (0, 2, 4, 6, 8, 10, 600)]
    [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 10.0]
    """
    if not (0.0 < start < math.inf and 0.0 < end < math.inf):
        raise ArgumentError(f"An exponential ramp needs a positive start and end, got {start} and {end}.")
    return end if step >= steps else start * (end / start) ** (max(step, 0) / steps)


def between(start: float, end: float, share: float, shape: Shape = "linear") -> float:
    """A way from one factor on the learning rate to another.

    Args:
        start: Factor at share 0.
        end: Factor at share 1.
        share: Of the way, in ``[0, 1]``.
        shape: ``"linear"`` or ``"cosine"`` (half a cosine wave).

    >>> [between(0.0, 1.0, share / 4) for share in range(5)]
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> [round(between(1.0, 0.0, share / 4, "cosine"), 2) for share in range(5)]
    [1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if share >= 1.0:
        return end
    if shape == "cosine":
        share = (1.0 - math.cos(math.pi * share)) / 2.0
    return start + (end - start) * share
