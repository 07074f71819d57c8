"""What every rank policy has in common: from the spectra of all targets to a rank for each."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_prehab.errors import ArgumentError


class Probe(NamedTuple):
    """The measured effect of cutting one layer alone.

    Attributes:
        rank: Rank that the layer was cut to.
        loss_increase: What the cut did to the loss, or to the output (KL divergence per sample); not negative.
    """

    rank: int
    loss_increase: float


@dataclass(frozen=True)
class LayerChoices:
    """One target as a rank policy sees it.

    Attributes:
        name: Dotted name.
        out_features: ``m``.
        in_features: ``n``.
        singular_values: Spectrum in the metric of the factorization, shape ``(min(m, n),)``, descending, float64 on the
            CPU.
        ranks: Ranks that may be chosen, ascending, none above break-even.
        dense: Whether the layer may also stay dense.
        new_bias: Parameters that a cut adds beside the two factors: a new bias, the values of a sparse part.
        components: Predicted change of the loss when component ``i`` alone is removed, first order, with its sign;
            shape ``(min(m, n),)``; None unless the policy asks for weight gradients.
        probe: Measured effect of a small cut of this layer alone, or None.
        positions: Tokens that go through the layer per sample; FLOPs are parameters times positions.
        latencies: Measured seconds at some ranks and dense (None), or None.
    """

    name: str
    out_features: int
    in_features: int
    singular_values: Tensor
    ranks: tuple[int, ...]
    dense: bool = True
    new_bias: int = 0
    components: Tensor | None = None
    probe: "Probe | None" = None
    positions: float = 1.0
    latencies: Mapping[int | None, float] | None = None

    def options(self, min_rank: int = 1) -> tuple[int | None, ...]:
        """Ranks of at least ``min_rank`` (or the largest there is), then None for dense where that is allowed."""
        ranks = tuple(r for r in self.ranks if r >= min_rank) or self.ranks[-1:]
        return (*ranks, None) if self.dense else ranks

    def parameters(self, rank: int | None) -> int:
        """Parameters at ``rank``, with a new bias; None means dense."""
        m, n = self.out_features, self.in_features
        return m * n if rank is None else rank * (m + n) + self.new_bias

    def retained(self) -> Tensor:
        """``sum of s_i^2 over i <= r`` at index ``r``, shape ``(min(m, n) + 1,)``."""
        squares = self.singular_values.square()
        return torch.cat([squares.new_zeros(1), squares.cumsum(0)])


class RankPolicy(ABC):
    """Chooses a rank for each target. Subclasses are frozen dataclasses that check their own fields.

    Attributes:
        needs_weight_gradients: The policy reads :attr:`LayerChoices.components`.
        needs_probes: The policy reads :attr:`LayerChoices.probe`.
    """

    needs_weight_gradients: ClassVar[bool] = False
    needs_probes: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """A rank out of ``layer.options()`` for each layer, by name; None leaves it dense."""


def check_keep(keep: float) -> None:
    """Raises :class:`ArgumentError` unless ``0 < keep <= 1``."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0.0 < keep <= 1.0:
        raise ArgumentError(
            f"keep is the share of the targeted parameters that is kept and must lie in (0, 1], got {keep!r}."
        )


def parameter_budget(layers: Sequence[LayerChoices], keep: float) -> int:
    """``floor(keep * sum m n)``; a product that misses an integer by rounding alone counts as that integer."""
    return math.floor(keep * sum(layer.out_features * layer.in_features for layer in layers) + 1e-6)
