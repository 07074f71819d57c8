"""What every rank policy has in common: from the spectra of all targets to a rank for each."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.linalg.matrices import require_finite
from lightning_prehab.linalg.storage import Layout, stored_parameters

#: What ``keep`` is a share of: the parameters of the targets, or those of the whole model.
Scope = Literal["targets", "model"]


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
        singular_values: Spectrum in the metric of the factorization, shape ``(min(m / groups, n),)``, descending,
            float64 on the CPU.
        ranks: Ranks that may be chosen, ascending, none that saves nothing.
        dense: Whether the layer may also stay dense.
        new_bias: Parameters that a cut adds beside the low-rank matrix: a new bias, the values of a sparse part.
        components: Predicted change of the loss when component ``i`` alone is removed, first order, with its sign;
            same shape; None unless the policy asks for weight gradients.
        probe: Measured effect of a small cut of this layer alone, or None.
        positions: Tokens that go through the layer per sample; FLOPs are parameters times positions.
        latencies: Measured seconds at some ranks and dense (None), or None.
        groups: Number of groups of a grouped convolution; each has its factors, all of the same rank.
        layout: How a cut is stored, which :meth:`parameters` counts by: ``"factors"`` or ``"pivot"``.
    """

    name: str
    out_features: int
    in_features: int
    singular_values: Tensor
    ranks: tuple[int, ...]
    dense: bool = True
    new_bias: int = 0
    components: Tensor | None = None
    probe: Probe | None = None
    positions: float = 1.0
    latencies: Mapping[int | None, float] | None = None
    groups: int = 1
    layout: Layout = "factors"

    def __post_init__(self) -> None:
        size = min(self.out_features // self.groups, self.in_features)
        for what, values in (("spectrum", self.singular_values), ("predicted changes", self.components)):
            if values is None:
                continue
            if values.shape != (size,):
                raise PlanError(f"{self}: the {what} must have shape ({size},), got {tuple(values.shape)}.")
            require_finite(values, f"{self}: the {what}")

    def __str__(self) -> str:
        return f"Layer {self.name!r} ({self.out_features}x{self.in_features})"

    def options(self, min_rank: int = 1) -> tuple[int | None, ...]:
        """Ranks of at least ``min_rank`` (or the largest there is), then None for dense where that is allowed."""
        ranks = tuple(r for r in self.ranks if r >= min_rank) or self.ranks[-1:]
        return (*ranks, None) if self.dense else ranks

    def parameters(self, rank: int | None) -> int:
        """Parameters at ``rank``, with a new bias; None means dense."""
        m, n = self.out_features, self.in_features
        return m * n if rank is None else stored_parameters(m, n, rank, self.layout, self.groups) + self.new_bias

    def retained(self) -> Tensor:
        """``sum of s_i^2 over i <= r`` at index ``r``, one more than singular values."""
        squares = self.singular_values.square()
        return torch.cat([squares.new_zeros(1), squares.cumsum(0)])


class RankPolicy(ABC):
    """Chooses a rank for each target. Subclasses are frozen dataclasses that check their own fields.

    A new policy needs only ``__call__``; the rest says what it reads and promises, for those who call it.

    Attributes:
        needs_weight_gradients: The policy reads :attr:`LayerChoices.components`.
        needs_probes: The policy reads :attr:`LayerChoices.probe`.
        probe_keep: Share of its parameters that a layer is cut to for its probe, in ``(0, 1)``.
        latency_tokens: Tokens per call at which latencies are measured.
    """

    needs_weight_gradients: ClassVar[bool] = False
    needs_probes: ClassVar[bool] = False
    probe_keep: float = 0.9
    latency_tokens: int = 1024

    @property
    def needs_positions(self) -> bool:
        """Whether the policy reads :attr:`LayerChoices.positions`."""
        return False

    @property
    def needs_latencies(self) -> bool:
        """Whether the policy reads :attr:`LayerChoices.latencies`."""
        return False

    @abstractmethod
    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """A rank out of ``layer.options()`` for each layer, by name; None leaves it dense."""

    def for_model(self, targets: int, model: int | None) -> "RankPolicy":
        """The policy with what is asked of the whole model said of the targets; most policies stay as they are.

        Args:
            targets: Weight parameters of the targets.
            model: Parameters of the whole model, or None if unknown.
        """
        return self

    def parameter_limit(self, layers: Sequence[LayerChoices]) -> int | None:
        """Parameters that the chosen ranks are promised not to exceed, or None if there is no such promise."""
        return None

    def check(self, layers: Sequence[LayerChoices]) -> None:  # noqa: B027 - most policies promise nothing
        """Raises what a call would raise whatever the spectra and measurements are; they are not read."""


@dataclass(frozen=True)
class BudgetPolicy(RankPolicy):
    """A policy that is given a share to keep.

    Args:
        keep: Share that is kept in total, in ``(0, 1]``.
        min_rank: Smallest rank of any layer, at least 1.
        scope: What ``keep`` is a share of: the weight parameters of the ``"targets"``, or all parameters of the
            ``"model"``, of which the targets then give up enough for all the rest.

    Raises:
        ArgumentError: If a value is out of range.
    """

    keep: float
    min_rank: int = 1
    scope: Scope = "targets"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_min_rank(self.min_rank)
        check_choice("scope", self.scope, get_args(Scope))

    def for_model(self, targets: int, model: int | None) -> "BudgetPolicy":
        """With ``scope="model"``: the same policy with the share of the targets that meets the wish for the model.

        Raises:
            PlanError: If the size of the model is unknown, or the rest of it alone is too large.
        """
        if self.scope == "targets":
            return self
        if model is None:
            raise PlanError(
                f"{self} needs the size of the whole model, which a plain mapping of layers does not tell; pass the "
                "targets as find_targets(model) returns them, or use scope='targets'."
            )
        rest = model - targets
        allowed = math.floor(self.keep * model + 1e-6) - rest
        if allowed <= 0:
            raise PlanError(
                f"keep={self.keep} of the model allows {allowed + rest:,} of {model:,} parameters, those outside of "
                f"the targets alone are {rest:,}. Raise keep above {rest / model:.3f}, cut more layers, or use "
                "scope='targets'."
            )
        return replace(self, keep=allowed / targets, scope="targets")

    def budget(self, layers: Sequence[LayerChoices]) -> int:
        """Parameters that ``keep`` allows the targets to hold."""
        if self.scope != "targets":
            raise PlanError(f"{self} must be told the size of the model first; call for_model, as make_plan does.")
        return parameter_budget(layers, self.keep)

    def parameter_limit(self, layers: Sequence[LayerChoices]) -> int | None:
        """The budget."""
        return self.budget(layers)

    def check(self, layers: Sequence[LayerChoices]) -> None:
        """Checks that the smallest ranks fit into the budget.

        Raises:
            PlanError: If they do not.
        """
        limit = self.parameter_limit(layers)
        if limit is not None:
            costs = (min(layer.parameters(rank) for rank in layer.options(self.min_rank)) for layer in layers)
            require_within(sum(costs), limit, f"keep={self.keep}", "parameters", len(layers))


def require_within(least: int, budget: int, wish: str, unit: str, layers: int) -> None:
    """Raises :class:`PlanError` if even the smallest choice is above the budget."""
    if least > budget:
        raise PlanError(
            f"{wish} allows {budget:,} {unit} for the {layers} targets, their smallest ranks hold {least:,}. Raise "
            "keep, lower min_rank, rank_multiple_of or the overridden ranks, or exclude small layers."
        )


def check_keep(keep: object) -> None:
    """Raises :class:`ArgumentError` unless ``0 < keep <= 1``."""
    if isinstance(keep, int | float) and not isinstance(keep, bool):
        if 0.0 < keep <= 1.0:
            return
        hint = f" For {keep:g} % write {keep / 100:g}." if 1.0 < keep <= 100.0 else ""
    elif isinstance(keep, RankPolicy):
        hint = " A policy is given by its name: policy=..."
    elif isinstance(keep, Iterable) and not isinstance(keep, str):
        hint = " Batches come after it: compress_(model, 0.5, batches)."
    else:
        hint = " Give a Python number."
    raise ArgumentError(
        f"keep is the share of the targeted parameters that is kept and must lie in (0, 1], got {show(keep)}.{hint}"
    )


def check_min_rank(min_rank: int) -> None:
    """Raises :class:`ArgumentError` unless ``min_rank`` is an integer of at least 1."""
    check_whole("min_rank", min_rank, 1)


def check_probe_keep(probe_keep: float) -> None:
    """Raises :class:`ArgumentError` unless ``0 < probe_keep < 1``."""
    check_real("probe_keep", probe_keep, "(0, 1)")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises :class:`ArgumentError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def parameter_budget(layers: Sequence[LayerChoices], keep: float) -> int:
    """``floor(keep * sum m n)``; a product that misses an integer by rounding alone counts as that integer."""
    return math.floor(keep * sum(layer.out_features * layer.in_features for layer in layers) + 1e-6)
