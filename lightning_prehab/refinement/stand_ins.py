"""Layers in the pivot layout are trained as two balanced factors, and packed again at the end.

Measured: at equal steps and the best learning rate of each, factors come further than pivot rows and what makes the
others of them. One whose parts carry more than their weights (adapters, parametrizations, hooks) is trained as it is.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_prehab.layers import LowRankLinear
from lightning_prehab.layers.conv import LowRankConv
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.pivot import from_factor
from lightning_prehab.surgery.hooks import hooks_of
from lightning_prehab.targets.attached import has_hooks


def are_plain(parts: Iterable[nn.Module]) -> bool:
    """Whether the weights of these modules are all there is to them: no adapter, parametrization, hook."""
    return all(
        type(part) in (nn.Linear, nn.Conv1d, nn.Conv2d)
        and not (hooks_of(part) or "forward" in part.__dict__ or any(map(has_hooks, part.parameters())))
        for part in parts
    )


class StandIns:
    """Two factors for each layer of a model in the pivot layout, with the same function and the same bias."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, PivotLayer)]
        self._layers = [layer for layer in layers if are_plain(layer.children()) and layer.D.weight.is_floating_point()]
        self._places: dict[int, LowRankLinear | LowRankConv] = {}
        self._further = False

    def __bool__(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the layers compute with the factors as they are now or have been trained; no module is exchanged."""
        with torch.no_grad():
            for layer in self._layers:
                made = layer.low_rank().eval()
                assert isinstance(made, LowRankLinear | LowRankConv)
                made.A.weight.requires_grad_(True)
                made.B.weight.requires_grad_(True)
                self._places[id(layer)] = made
        theirs = [layer.__dict__.get("forward") for layer in self._layers]
        try:
            for layer in self._layers:
                layer.forward = self._places[id(layer)].forward
            yield
        finally:
            for layer, forward in zip(self._layers, theirs, strict=True):
                del layer.__dict__["forward"]
                if forward is not None:
                    layer.__dict__["forward"] = forward

    def parameters_for(self, layer: nn.Module) -> list[nn.Parameter] | None:
        """What is trained instead of the parts of a layer; None if nothing stands for it."""
        made = self._places.get(id(layer))
        parts: list[Any] = [] if made is None else [made.A, made.B]
        return [part.weight for part in parts] or None

    def came_further(self) -> None:
        """The factors are worth to be kept from now on."""
        self._further = True

    @torch.no_grad()
    def pack_(self) -> None:
        """Puts what the factors are now into the layers; bit by bit the same layers, if they never came further."""
        for layer in self._layers if self._further else []:
            made = self._places[id(layer)]
            a, b = (made.A.weight, made.B.weight) if isinstance(made, LowRankLinear) else made.factors()
            found = Factors(a, b).pivoted()
            assert found.order is not None
            layer.D.weight.copy_(found.A.view_as(layer.D.weight))
            layer.C.weight.copy_(from_factor(found.B, found.order).view_as(layer.C.weight))
            layer.order.copy_(found.order)
