"""A layer that has been cut before and what takes its place: smaller factors, and what optimizers know of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.kinds import MatrixView
from lightning_prehab.kinds.inside import low_rank_view
from lightning_prehab.kinds.low_rank import LowRankView
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.matrices import to_float64
from lightning_prehab.linalg.pivot import from_factor
from lightning_prehab.linalg.products import Product
from lightning_prehab.surgery.moments import mixed_state
from lightning_prehab.surgery.replacement import Replacement, StateOf
from lightning_prehab.targets.locate import Layer
from lightning_prehab.targets.names import join

#: A sum of products ``L g R``: see :func:`~lightning_prehab.surgery.moments.mixed_state`.
_Terms = list[tuple[Mapping[str, Any], Tensor, Tensor]]


def present_factors(view: MatrixView) -> Factors:
    """What a layer that has been cut before holds, bit by bit: for one that keeps its rank."""
    own = low_rank_view(view)
    a, b = own.sides()
    order = own.module.order if isinstance(own.module, PivotLayer) else None
    return Factors(a.detach(), b.detach(), order=order)


class Recut(Replacement):
    """Smaller factors in the place of factors; nothing is changed yet.

    With ``W = B A`` before and ``W' = B' A'`` after the cut, where ``B' = B X`` and ``A' = Y A`` (a cut stays within
    the spans that are there), the gradients ``B'^T G`` and ``G A'^T`` are ``X^T g_A`` and ``g_B Y^T``: first moments
    move exactly, as those of a dense weight do. In the pivot layout ``B`` holds rows of the identity and of ``C``, and
    its gradient is known from those of ``C`` and ``D``; see :class:`~lightning_prehab.surgery.layouts.Relaid`.
    """

    @classmethod
    def prepare(cls, layer: Layer, views: dict[str, MatrixView], factors: Mapping[str, Factors]) -> Replacement:
        """The smaller factors: each is trained if the one in its place was; in another layout both if any was."""
        made = super().prepare(layer, views, factors)
        assert isinstance(made, Recut)
        before = low_rank_view(views[""])
        flags = [one.requires_grad for one in before.parameters]
        if (before.layout == "pivot") != isinstance(made.new, PivotLayer):
            flags = [any(flags)] * 2
        for name, trained in zip(made._names(), flags, strict=True):
            made.new.get_parameter(name).requires_grad_(trained)
        return made

    def replaced(self) -> list[nn.Parameter]:
        """Both factors."""
        kept = {id(parameter) for parameter in self.new.parameters()}
        return [one for one in self.views[""].parameters if id(one) not in kept]

    def parameters(self, weight: Tensor) -> dict[str, Tensor]:
        """The first factor takes the place of the first, the second of the second; what is new stands behind it."""
        first, second = self._names()
        if weight is self.views[""].parameters[0]:
            return {first: self.new.get_parameter(first)}
        kept = {id(parameter) for parameter in self.old.parameters()} | {id(self.new.get_parameter(first))}
        found: dict[str, Tensor] = {second: self.new.get_parameter(second)}
        return found | {name: one for name, one in self.new.named_parameters() if id(one) not in kept}

    def states(self, weight: Tensor, state: Mapping[str, Any], of: StateOf) -> dict[Tensor, dict[str, Any]]:
        """What an optimizer knows of the factor in the place of one."""
        view = low_rank_view(self.views[""])
        first, second = view.parameters
        if weight is not first and weight is not second:
            return {}
        new = self.new.get_parameter(self._names()[weight is second])
        own = self._matrix_state(state, view, weight is first)
        if weight is first:
            terms, value = self._of_first(own), self._new_sides()[0]
        else:
            known = of(first)
            other = None if known is None else self._matrix_state(known, view, True)
            terms, value = self._of_second(own, other), self._new_sides()[1]
        moved = mixed_state(terms, value) if terms else {}
        folded = {key: self._folded(entry, weight is first, new) for key, entry in moved.items()}
        return {new: folded} if folded else {}

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """``|W - W'|_F / |W|_F``, from the factors alone."""
        view, found = self.views[""], self.factors[""]
        after_a, after_b = found.A.chunk(view.group_count), found.B.chunk(view.group_count)
        squares = torch.zeros(2, dtype=torch.float64)
        for group, a, b in zip(view.groups(), after_a, after_b, strict=True):
            before = group.product()
            assert before is not None
            before = Product(to_float64(before.b), to_float64(before.a))
            norms = torch.stack([before.minus(Product(b, a)).norm(), before.norm()])
            squares += norms.square().cpu()
        error = float((squares[0] / squares[1].clamp_min(torch.finfo(torch.float32).tiny)).sqrt())
        return {join(self.layer.name, ""): error}

    def _names(self) -> tuple[str, str]:
        return ("D.weight", "C.weight") if isinstance(self.new, PivotLayer) else ("A.weight", "B.weight")

    def _new_sides(self) -> tuple[Tensor, Tensor]:
        """The new factors as matrices; of the pivot layout ``D`` and ``C``."""
        found = self.factors[""]
        b = found.B if found.order is None else from_factor(found.B, found.order)
        return found.A, b

    def _maps(self) -> list[tuple[Tensor, Tensor]]:
        """``X`` and ``Y`` of each group, in float64."""
        view, found = low_rank_view(self.views[""]), self.factors[""]
        count = view.group_count
        sides = zip(*(to_float64(side).chunk(count) for side in (*view.sides(), found.A, found.B)), strict=True)
        return [(torch.linalg.pinv(b) @ new_b, new_a @ torch.linalg.pinv(a)) for a, b, new_a, new_b in sides]

    def _of_first(self, state: Mapping[str, Any]) -> _Terms:
        lefts = [x.mT for x, _ in self._maps()]
        left: Tensor = torch.block_diag(*lefts)  # type: ignore[no-untyped-call]
        return [(state, left, _identity(self.factors[""].A.shape[1], left))]

    def _of_second(self, state: Mapping[str, Any], of_first: Mapping[str, Any] | None) -> _Terms:
        """Of ``B'``, or of the rows of it that are ``C'``."""
        view, found = low_rank_view(self.views[""]), self.factors[""]
        rights = [y.mT for _, y in self._maps()]
        rows = _identity(view.out_features, rights[0])
        if found.order is not None:
            rows = rows[found.order.argsort()[found.B.shape[1] :].to(rows.device)]
        if not isinstance(view.module, PivotLayer):
            size = view.out_features // view.group_count
            blocks = torch.split(rows, size, 1)
            starts = range(0, view.out_features, size)
            if len(rights) == 1:
                return [(state, rows, rights[0])]
            zero = torch.zeros_like(rows)
            return [
                (state, zero.slice_scatter(block, 1, start, start + size), right)
                for block, start, right in zip(blocks, starts, rights, strict=True)
            ]
        if of_first is None:
            return []
        where = view.module.order.argsort().to(rows.device)
        pivots, others = where[: view.rank], where[view.rank :]
        d, c = (to_float64(one.flatten(1)) for one in view.parameters)
        # the gradient of the rows of B that are pivots is g_D D^T - C^T g_C
        return [
            (of_first, rows[:, pivots], d.mT @ rights[0]),
            (state, rows[:, others] - rows[:, pivots] @ c.mT, rights[0]),
        ]

    def _matrix_state(self, state: Mapping[str, Any], view: LowRankView, first: bool) -> dict[str, Any]:
        """The state with matrices in the place of kernels."""
        shape = view.parameters[not first].shape
        return {key: self._as_matrix(entry, view, first, shape) for key, entry in state.items()}

    @staticmethod
    def _as_matrix(entry: Any, view: LowRankView, first: bool, shape: torch.Size) -> Any:
        if not isinstance(entry, Tensor) or entry.shape != shape:
            return entry
        if first or isinstance(view.module, PivotLayer):
            return entry.flatten(1)
        return view.unfold(view.parameters[0].detach(), entry)[1]

    def _folded(self, entry: Any, first: bool, like: Tensor) -> Any:
        if not isinstance(entry, Tensor) or entry.dim() == 0:
            return entry
        if first or isinstance(self.new, PivotLayer):
            return entry.reshape(like.shape)
        return self.views[""].fold(self.factors[""].A, entry)[1].contiguous()


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
