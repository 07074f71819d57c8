"""A target as the regularizer sees it: its matrix in some metric, its target rank, its memory."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prehab.callbacks._said import named
from lightning_prehab.errors import CheckpointError, PrehabError
from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.kinds.inside import write_first_
from lightning_prehab.linalg.matrices import (
    gram_root,
    leading_subspace,
    singular_values,
    spectral_ranks,
    to_float64,
    widened,
    working_dtype,
)
from lightning_prehab.regularizers import Memory, Metric, Penalty, Shrinkage
from lightning_prehab.regularizers.metric import IDENTITY, Side, project
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.targets.locate import Target, group_names

Space = Literal["weight", "activation", "loss"]


def is_reached(space: Space, name: str, statistics: Mapping[str, LayerStatistics] | None) -> bool:
    """Whether the statistics of a layer suffice for a space."""
    return space == "weight" or statistics is None or statistics[name].missing(wanted_in(space)) is None


def wanted_in(space: Space) -> Wanted:
    """What a space wants to know of a layer."""
    return Wanted(inputs=space != "weight", gradients=space == "loss")


def space_of(wanted: Wanted) -> Space:
    """The space whose metric a factorization cuts in, told by what it wants to know; see :func:`wanted_in`."""
    if not (wanted.inputs or wanted.magnitudes):
        return "weight"
    return "loss" if wanted.gradients else "activation"


class RegularizedLayer:
    """A target with the metric it is seen in, its target rank and the memory of its regularizer.

    A layer that has been cut before, ``W = B A``, is shrunk by its first factor alone. Seen with the metric ``B^T G B``
    in the place of ``G``, ``A`` has the singular values of ``W``, and what a shrinkage does to it ``B`` carries to
    ``W``: ``W - eta (W - W_r)`` is ``B (A - eta (A - A_r))``. Nothing is multiplied out. A penalty sees the product.
    """

    def __init__(self, name: str, view: MatrixView, rank: int | None, metric: Metric) -> None:
        self.name = name
        self.view = view
        self.rank = rank
        self.metric = metric
        self.memory: Memory = {}

    @property
    def parameter(self) -> nn.Parameter:
        """What holds the matrix, and perhaps others beside it."""
        return self.view.parameter

    @property
    def device(self) -> torch.device:
        """Where there is work on it."""
        return self.parameter.device

    def here(self, tensor: Tensor | None = None) -> Tensor:
        """The matrix, or that in a tensor of the parameter's shape; of a sharded one the rows of this process."""
        return self.view.weight if tensor is None else self.view.matrix(tensor)

    def put_(self, matrix: Tensor, into: Tensor | None = None) -> None:
        """The way back from :meth:`here`, in place."""
        self.view.write_(matrix, into)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All that hold the matrix."""
        return self.view.parameters

    @classmethod
    def seen_in(
        cls,
        space: Space,
        name: str,
        view: MatrixView,
        rank: int | None,
        statistics: Mapping[str, LayerStatistics] | None,
    ) -> "RegularizedLayer":
        """The layer in the metric of a space, from its statistics."""
        left = right = None
        dtype = working_dtype(view.parameter.dtype)
        try:
            if space != "weight" and statistics is not None:
                right = gram_root(statistics[name].input_second_moment())[0].to(dtype)
            if space == "loss" and statistics is not None:
                left = gram_root(statistics[name].gradient_second_moment())[0].to(dtype)
        except PrehabError as error:
            raise named(error, name) from error
        return cls(name, view, rank, Metric(left, right))

    def state_dict(self) -> dict[str, Any]:
        """Rank, metric and memory as plain data."""
        memory = {key: value.clone() for key, value in self.memory.items()}
        return {"rank": self.rank, "left": self.metric.left, "right": self.metric.right, "memory": memory}

    @classmethod
    def from_state_dict(cls, name: str, view: MatrixView, state: Mapping[str, Any]) -> "RegularizedLayer":
        """The layer that :meth:`state_dict` describes."""
        layer = cls(name, view, state["rank"], IDENTITY)
        here = {"device": layer.device, "dtype": working_dtype(view.parameter.dtype)}
        layer.metric = Metric(*(None if state[side] is None else state[side].to(**here) for side in ("left", "right")))
        layer.load_memory(state["memory"])
        return layer

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Takes up what the state says of the memory."""
        # Single numbers (ages, sums of learning rates) are read at each step: on the CPU nothing waits for that.
        self.memory = {key: value.to(self.device if value.dim() else "cpu") for key, value in memory.items()}

    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the weight itself: stable rank, effective rank, share of its energy beyond the target rank.

        NaN if the weight is not finite, since this is only shown, and for the share if there is no target rank.
        """
        product = self.view.product()
        nan = torch.full((), math.nan, device=self.parameter.device)
        if not all(bool(torch.isfinite(one).all()) for one in self.parameters):
            return nan, nan, nan
        weight = self.view.weight.detach() if product is None else product.core()[1].to(self.parameter.device)
        values = singular_values(weight)
        energies = values.square()
        share = (
            nan
            if self.rank is None
            else energies[self.rank :].sum() / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny)
        )
        return *spectral_ranks(values), share

    @torch.no_grad()
    def tail(self) -> tuple[Tensor, Tensor]:
        """Energy beyond the target rank in the metric, and all energy; NaN if the weight is not finite.

        The leading directions are exact at the first call, later those of the call before, brought up to date by one
        subspace step: the tail is never underestimated.
        """
        assert self.rank is not None
        weight, metric = self._seen(anew=True)
        seen = metric.view(weight)
        energy = seen.square().sum()
        finite, nan = torch.isfinite(energy), torch.full_like(energy, math.nan)
        rows = seen if seen.shape[0] <= seen.shape[1] else seen.mT
        known = self.memory.get("forecast")
        if known is None and not bool(finite):
            return nan, nan
        basis = leading_subspace(rows, self.rank, known)
        # Without a look at the energy, which would wait for the device: once for each layer.
        self.memory["forecast"] = basis if known is None else torch.where(finite, basis, known)
        tail = (rows - basis @ (basis.mT @ rows)).square().sum()
        return torch.where(finite, tail, nan), torch.where(finite, energy, nan)

    @torch.no_grad()
    def cut(self) -> Tensor:
        """What a cut to the target rank would add to the matrix, by the directions that :meth:`tail` has found last."""
        weight, metric = self._seen(anew=True)
        side: Side = "left" if weight.shape[0] <= weight.shape[1] else "right"
        change = project(weight, side, *metric.projector(side, self.memory["forecast"])) - weight
        product = self.view.product()
        return change if product is None else widened(product.b.detach()) @ change

    def penalty(self, regularizer: Penalty) -> Tensor:
        """R(L^T W S)."""
        try:
            return regularizer.in_metric(widened(self.view.weight), self.metric, self.rank, self.memory)
        except PrehabError as error:
            raise named(error, self.name) from error

    def has_work(self, regularizer: Shrinkage, progress: float) -> bool:
        """Whether the next :meth:`shrink_` has spectral work to do that one process can do for all."""
        size = min(self.view.shape) if self.view.rank is None else self.view.rank
        below = self.rank is None or self.rank < size
        return below and regularizer.has_work(self.memory, progress, self.rank)

    @torch.no_grad()
    def prepare_(self, regularizer: Shrinkage, progress: float) -> None:
        """Does that work; its results are in the memory."""
        try:
            weight, metric = self._seen(anew=True)
            regularizer.prepare_(weight, self.rank, self.memory, progress, metric)
        except PrehabError as error:
            raise named(error, self.name) from error

    @torch.no_grad()
    def shrink_(self, regularizer: Shrinkage, progress: float, lr: float) -> None:
        """Replaces the weight by the shrunk one, in place."""
        plain = type(regularizer).has_work is Shrinkage.has_work  # it looks at the metric at each call
        try:
            weight, metric = self._seen(anew=plain or self.has_work(regularizer, progress))
            shrunk = regularizer(weight, self.rank, self.memory, progress, lr, metric)
            if shrunk.data_ptr() != weight.data_ptr():
                self._write_(shrunk)
        except PrehabError as error:
            raise named(error, self.name) from error

    def _seen(self, anew: bool) -> tuple[Tensor, Metric]:
        """What is shrunk, in float32 at least, and its metric: the matrix, or its first factor.

        Args:
            anew: The metric of a factor changes with the other one; else that of last time will do.
        """
        product = self.view.product()
        if product is None:
            return widened(self.view.weight.detach()), self.metric
        if anew or "core" not in self.memory:
            b = to_float64(product.b)
            wide = b if self.metric.left is None else to_float64(self.metric.left).to(b.device) @ b
            self.memory["core"] = gram_root(wide.mT @ wide)[0].to(self.parameter.device, working_dtype(product.a.dtype))
        return widened(product.a.detach()), Metric(self.memory["core"], self.metric.right)

    def _write_(self, shrunk: Tensor) -> None:
        if self.view.product() is None:
            self.view.write_(shrunk)
        else:
            write_first_(self.view, shrunk)


def matrices(targets: Mapping[str, Target]) -> dict[str, MatrixView]:
    """What can be regularized for itself, by name: the targets, and each group of a grouped convolution."""
    return {
        name: view
        for target_name, target in targets.items()
        for name, view in zip(group_names(target_name, target), view_of(target).groups(), strict=True)
    }


def restore_layers(
    views: Mapping[str, MatrixView],
    states: Mapping[str, Mapping[str, Any]],
    kind: type[RegularizedLayer] = RegularizedLayer,
) -> list[RegularizedLayer]:
    """The layers that :meth:`RegularizedLayer.state_dict` has described, by name.

    Raises:
        CheckpointError: If one of them is not a target now.
    """
    for name in states:
        if name not in views:
            raise CheckpointError(
                f"PrehabCallback: the checkpoint holds the state of layer {name!r}, which is not a target now. "
                "Resume with the target_modules and exclude_modules that the checkpoint was written with."
            )
    return [kind.from_state_dict(name, views[name], state) for name, state in states.items()]
