"""Decomposes the targets, each once for all ranks, and says what planning needs to know of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prehab.errors import PrehabError
from lightning_prehab.factorizations import Decomposition, Factorization, Factors
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.storage import Layout, largest_saving_rank
from lightning_prehab.progress import counted, naming_items
from lightning_prehab.statistics.sums import LayerStatistics
from lightning_prehab.targets.layouts import layout_of
from lightning_prehab.targets.locate import Target, group_names


class Spectrum(NamedTuple):
    """What planning knows of one layer.

    Attributes:
        singular_values: In the metric of the factorization: shape ``(min(m, n),)``, descending, float64 on the CPU.
        components: Change of the loss when component ``i`` alone is removed, to first order, or None; same shape.
        positions: Tokens per sample, or 1 where no statistics were collected.
    """

    singular_values: Tensor
    components: Tensor | None = None
    positions: float = 1.0

    def to_lists(self) -> tuple[list[float], list[float] | None, float]:
        """Plain numbers, for other processes."""
        components = None if self.components is None else self.components.tolist()
        return self.singular_values.tolist(), components, self.positions

    @classmethod
    def of_lists(cls, values: list[float], components: list[float] | None, positions: float) -> "Spectrum":
        """What :meth:`to_lists` has written."""
        tensor = None if components is None else torch.tensor(components, dtype=torch.float64, device="cpu")
        return cls(torch.tensor(values, dtype=torch.float64, device="cpu"), tensor, positions)


def decompose_targets(
    targets: Mapping[str, Target],
    factorization: Factorization,
    statistics: Mapping[str, LayerStatistics] | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, Decomposition]:
    """Decomposes the targets (or those of ``names``); an error names the layer."""
    wanted = list(targets if names is None else names)
    again = [name for name in wanted if view_of(targets[name]).rank is not None]
    found = _decompose_again({name: targets[name] for name in again}, factorization, statistics or {})
    wanted = [name for name in wanted if name not in found]
    items: dict[str, list[tuple[Tensor, LayerStatistics | None]]] = {}
    for name in wanted:
        groups = zip(group_names(name, targets[name]), view_of(targets[name]).groups(), strict=True)
        items[name] = [(view.weight.detach(), (statistics or {}).get(group)) for group, view in groups]
    flat = [item for groups in items.values() for item in groups]
    numbered = [name for name, groups in items.items() for _ in groups]
    if not flat:
        return found
    devices = {weight.device.type for weight, _ in flat}
    with torch.no_grad(), torch.autocast(next(iter(devices), "cpu"), enabled=False):
        try:
            with naming_items("decompose", numbered):
                solved = iter(factorization.decompose(flat))
        except PrehabError:
            for name in wanted:
                with naming(name, targets[name]):
                    factorization.decompose(items[name])
            raise
    return found | {name: _stacked([next(solved) for _ in items[name]]) for name in wanted}


def _decompose_again(
    targets: Mapping[str, Target], factorization: Factorization, statistics: Mapping[str, LayerStatistics]
) -> dict[str, Decomposition]:
    """Decomposes targets that have been cut before, by their factors."""
    found = {}
    for name, target in counted(targets.items(), "decompose") if targets else ():
        pairs = zip(group_names(name, target), view_of(target).groups(), strict=True)
        device = view_of(target).parameter.device.type
        with naming(name, target), torch.no_grad(), torch.autocast(device, enabled=False):
            groups = [(view.product(), statistics.get(group)) for group, view in pairs]
            found[name] = _stacked(
                [factorization.decompose_product(one, seen) for one, seen in groups if one is not None]
            )
    return found


class Solution(NamedTuple):
    """A decomposed target.

    Attributes:
        decomposition: For factors at any rank.
        spectrum: What planning needs to know of it.
    """

    decomposition: Decomposition
    spectrum: Spectrum


@dataclass(frozen=True)
class Solver:
    """Decomposes targets by name: the method and what it reads, for a place that knows who does which, and when.

    Attributes:
        targets: By the name of the form, see :mod:`lightning_prehab.targets.forms`.
        factorization: The method.
        statistics: What it reads, or None.
        components: Whether planning wants the effect of each component.
        layout: How a cut is going to be stored, which says what ranks are of use.
    """

    targets: Mapping[str, Target]
    factorization: Factorization
    statistics: Mapping[str, LayerStatistics] | None = None
    components: bool = False
    layout: Layout = "factors"

    def rank_limit(self, name: str) -> int:
        """The largest rank of a target that can be asked for, at least 1."""
        view = view_of(self.targets[name])
        limit = largest_saving_rank(*view.shape, layout_of(self.targets[name], self.layout), view.group_count)
        return max(limit if view.rank is None else min(limit, view.rank), 1)

    def __call__(self, names: Sequence[str]) -> dict[str, Solution]:
        """Decomposes the named targets; an error names the layer."""
        found = decompose_targets(self.targets, self.factorization, self.statistics, names)
        return {name: Solution(one, self._spectrum(name, one)) for name, one in found.items()}

    def _spectrum(self, name: str, decomposition: Decomposition) -> Spectrum:
        return spectrum(name, self.targets[name], decomposition, self.statistics, self.components)


def _stacked(groups: Sequence[Decomposition]) -> Decomposition:
    """One decomposition of matrices that stand one below the other and share a rank, but no factors."""
    if len(groups) == 1:
        return groups[0]

    def factors(rank: int) -> Factors:
        parts = [group.factors(rank) for group in groups]
        shifts = [part.bias_shift for part in parts if part.bias_shift is not None]
        shift = torch.cat(shifts) if shifts else None
        return Factors(torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts]), shift)

    def compact(rank: int) -> None:
        for group in groups:
            if group.compact is not None:
                group.compact(rank)

    squares = torch.stack([group.singular_values.square() for group in groups]).sum(0)
    return Decomposition(squares.sqrt(), factors, compact)


def spectrum(
    name: str,
    target: Target,
    decomposition: Decomposition,
    statistics: Mapping[str, LayerStatistics] | None = None,
    components: bool = False,
) -> Spectrum:
    """What planning needs of a decomposed layer.

    Args:
        name: Name of the target.
        target: The target.
        decomposition: Of the target.
        statistics: As they were collected, or None.
        components: Whether the policy reads the effect of each component. To first order, removing component ``i``
            changes the loss by ``-<dL/dW, b_i a_i^T>``.
    """
    values = decomposition.singular_values.detach().to("cpu", torch.float64)
    seen = [(statistics or {}).get(group) for group in group_names(name, target)]
    known = [layer for layer in seen if layer is not None]
    if len(known) < len(seen):
        return Spectrum(values)
    changes = None
    if components:
        a, b, *_ = decomposition.factors(len(values))
        parts = zip(a.chunk(len(seen)), b.chunk(len(seen)), known, strict=True)
        slopes = [((b.mT @ layer.mean_weight_gradient().to(a)) * a).sum(1) for a, b, layer in parts]
        changes = -torch.stack(slopes).sum(0).to("cpu", torch.float64)
    return Spectrum(values, changes, int(known[0].tokens) / max(int(known[0].samples), 1))


@contextmanager
def naming(name: str, target: Target) -> Iterator[None]:
    """Puts the layer's name and shape in front of errors of this package."""
    try:
        yield
    except PrehabError as error:
        view = view_of(target)
        raise type(error)(f"Layer {name!r} ({view.out_features}x{view.in_features}): {error}") from error
