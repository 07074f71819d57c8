"""Decomposes the targets, each once for all ranks, and says what planning needs to know of them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_prehab.errors import PrehabError
from lightning_prehab.factorizations import Decomposition, Factorization
from lightning_prehab.statistics import LayerStatistics


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
        tensor = None if components is None else torch.tensor(components, dtype=torch.float64)
        return cls(torch.tensor(values, dtype=torch.float64), tensor, positions)


def decompose_targets(
    targets: Mapping[str, nn.Linear],
    factorization: Factorization,
    statistics: Mapping[str, LayerStatistics] | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, Decomposition]:
    """Decomposes the targets (or those of ``names``); an error names the layer."""
    wanted = list(targets if names is None else names)
    items = [(targets[name].weight.detach(), (statistics or {}).get(name)) for name in wanted]
    devices = {weight.device.type for weight, _ in items}
    with torch.no_grad(), torch.autocast(next(iter(devices), "cpu"), enabled=False):
        try:
            return dict(zip(wanted, factorization.decompose(items), strict=True))
        except PrehabError:
            for name, item in zip(wanted, items, strict=True):
                with naming(name, targets[name]):
                    factorization.decompose([item])
            raise


def spectrum(decomposition: Decomposition, statistics: LayerStatistics | None, components: bool = False) -> Spectrum:
    """What planning needs of a decomposed layer.

    Args:
        decomposition: Of the layer.
        statistics: Of the layer, or None.
        components: Whether the policy reads the effect of each component. To first order, removing component ``i``
            changes the loss by ``-<dL/dW, b_i a_i^T>``.
    """
    values = decomposition.singular_values.detach().to("cpu", torch.float64)
    if statistics is None:
        return Spectrum(values)
    changes = None
    if components:
        a, b, *_ = decomposition.factors(len(values))
        gradient = statistics.mean_weight_gradient().to(a)
        changes = -((b.mT @ gradient) * a).sum(1).to("cpu", torch.float64)
    return Spectrum(values, changes, int(statistics.tokens) / max(int(statistics.samples), 1))


@contextmanager
def naming(name: str, layer: nn.Linear) -> Iterator[None]:
    """Puts the layer's name and shape in front of errors of this package."""
    try:
        yield
    except PrehabError as error:
        raise type(error)(f"Layer {name!r} ({layer.out_features}x{layer.in_features}): {error}") from error
