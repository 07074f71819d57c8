"""The spectrum of one layer, thinned for a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

#: Singular values that a report keeps of a layer, at most: half of them evenly spread, half in geometric progression.
POINTS = 64
#: Significant digits of a value: it is shown, not computed with.
DIGITS = 6


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of a layer before its cut, in the metric of the cut.

    The cut to rank ``r`` keeps the first ``r`` of them and drops the others: the truncation of the decomposed matrix.

    Attributes:
        indices: Their places, counted from 1, ascending; the last one is the full rank ``min(m, n)``.
        values: The singular values at these places, at least 0.
    """

    indices: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, singular_values: Tensor, rank: int | None = None) -> "LayerSpectrum | None":
        """Thins a spectrum; the values on both sides of the rank stay in it.

        Args:
            singular_values: Shape ``(min(m, n),)``, descending.
            rank: Of the cut, or None if the layer stays dense.

        Returns:
            The spectrum, or None if there is none to show: it is empty or a value is not finite.

        >>> LayerSpectrum.of(torch.tensor([3.0, 2.0, 1.0]))
        LayerSpectrum(indices=(1, 2, 3), values=(3.0, 2.0, 1.0))
        """
        values = singular_values.detach().to("cpu", torch.float64).clamp_min(0.0)
        size = len(values)
        if size == 0 or not bool(torch.isfinite(values).all()):
            return None
        places = set(range(1, size + 1))
        if size > POINTS:
            steps = POINTS // 2 - 1
            places = {round(1 + (size - 1) * step / steps) for step in range(steps + 1)}
            places |= {round(size ** (step / steps)) for step in range(steps)}
            places |= set() if rank is None else {rank, rank + 1}
        indices = tuple(sorted(place for place in places if place <= size))
        return cls(indices, tuple(float(f"{float(values[place - 1]):.{DIGITS}g}") for place in indices))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, ready for JSON."""
        return {"indices": list(self.indices), "values": list(self.values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerSpectrum":
        """The spectrum that :meth:`to_dict` has written.

        Raises:
            ValueError: If the places do not ascend from 1, or a value is not a finite number of at least 0.
        """
        indices, values = tuple(map(int, data["indices"])), tuple(map(float, data["values"]))
        ascending = indices[:1] == (1,) and all(one < other for one, other in pairwise(indices))
        if not ascending or len(indices) != len(values) or not all(0.0 <= value < float("inf") for value in values):
            raise ValueError("a spectrum holds ascending indices from 1, and a finite value of at least 0 for each")
        return cls(indices, values)
