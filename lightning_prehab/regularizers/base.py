"""What every penalty has in common: from a matrix to a scalar that is added to the loss."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

#: What a penalty remembers of one layer between steps (warm starts, projectors). Owned by the caller, empty at first.
Memory = dict[str, Tensor]


class Penalty(ABC):
    """A differentiable scalar of a matrix. Subclasses are frozen dataclasses that check their own fields.

    The penalty never hears of whitening: the caller hands it ``W``, or ``W`` in another metric.

    Attributes:
        needs_rank: The penalty aims at a target rank.
        default_strength: Factor in the loss where the user gives none; penalties have no common scale.
    """

    needs_rank: ClassVar[bool] = False
    default_strength: ClassVar[float] = 1.0

    @abstractmethod
    def __call__(self, matrix: Tensor, rank: int | None = None, memory: Memory | None = None) -> Tensor:
        """The penalty of one layer.

        Args:
            matrix: Shape ``(m, n)``, float32 or float64; the result is differentiable in it.
            rank: Target rank of the layer, for penalties that need one.
            memory: Carried from step to step for this layer; None computes without a warm start.

        Returns:
            Scalar of the dtype of ``matrix``.
        """


def start_vector(size: int, like: Tensor) -> Tensor:
    """A fixed pseudo-random unit vector of the dtype and device of ``like``; the global random state is not touched."""
    generator = torch.Generator().manual_seed(size)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    unit: Tensor = vector / vector.norm()
    return unit.to(like)
