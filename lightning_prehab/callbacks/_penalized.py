"""A target as the penalty sees it: its matrix in some metric, its target rank, its memory."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prehab.errors import PrehabError
from lightning_prehab.linalg import gram_root, singular_values, spectral_ranks
from lightning_prehab.regularizers import Memory, Penalty
from lightning_prehab.statistics import LayerStatistics, Wanted

Space = Literal["weight", "activation", "loss"]


def is_reached(space: Space, name: str, statistics: Mapping[str, LayerStatistics] | None) -> bool:
    """Whether the statistics of a layer suffice for a space."""
    return space == "weight" or statistics is None or statistics[name].missing(wanted_in(space)) is None


def wanted_in(space: Space) -> Wanted:
    """What a space wants to know of a layer."""
    return Wanted(inputs=space != "weight", gradients=space == "loss")


class PenalizedLayer:
    """A target with the metric it is seen in, its target rank and the memory of its penalty."""

    def __init__(
        self, name: str, module: nn.Linear, rank: int | None, left: Tensor | None, right: Tensor | None
    ) -> None:
        self.name = name
        self.module = module
        self._rank = rank
        self._left = left
        self._right = right
        self._memory: Memory = {}

    @classmethod
    def seen_in(
        cls,
        space: Space,
        name: str,
        module: nn.Linear,
        rank: int | None,
        statistics: Mapping[str, LayerStatistics] | None,
    ) -> "PenalizedLayer":
        """The layer in the metric of a space, from its statistics."""
        left = right = None
        try:
            if space != "weight" and statistics is not None:
                right = gram_root(statistics[name].input_second_moment())[0].float()
            if space == "loss" and statistics is not None:
                left = gram_root(statistics[name].gradient_second_moment())[0].float()
        except PrehabError as error:
            raise type(error)(f"Layer {name!r}: {error}") from error
        return cls(name, module, rank, left, right)

    def state_dict(self) -> dict[str, Any]:
        """Rank, metric and memory as plain data."""
        memory = {key: value.clone() for key, value in self._memory.items()}
        return {"rank": self._rank, "left": self._left, "right": self._right, "memory": memory}

    @classmethod
    def from_state_dict(cls, name: str, module: nn.Linear, state: Mapping[str, Any]) -> "PenalizedLayer":
        """The layer that :meth:`state_dict` describes."""
        layer = cls(name, module, state["rank"], state["left"], state["right"])
        layer._memory = dict(state["memory"])
        return layer

    def spectral_ranks(self) -> tuple[Tensor, Tensor]:
        """Stable and effective rank of the weight itself; NaN if it is not finite, since this is only shown."""
        weight = self.module.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            nan = torch.full((), float("nan"), device=weight.device)
            return nan, nan
        return spectral_ranks(singular_values(weight))

    def penalty(self, regularizer: Penalty) -> Tensor:
        """R(L^T W S) in float32."""
        matrix = self.module.weight.float()
        if self._left is not None:
            matrix = self._left.to(matrix.device) @ matrix
        if self._right is not None:
            matrix = matrix @ self._right.to(matrix.device)
        try:
            return regularizer(matrix, self._rank, self._memory)
        except PrehabError as error:
            raise type(error)(f"Layer {self.name!r}: {error}") from error
