"""What will happen to one layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from lightning_prehab.documents import settings
from lightning_prehab.documents.numbers import format_error, format_increase
from lightning_prehab.errors import PlanError
from lightning_prehab.linalg.storage import Layout, largest_saving_rank, stored_parameters
from lightning_prehab.targets.layouts import AS_FACTORS

#: How the reason begins for a rank that is no multiple of what was asked for.
NO_MULTIPLE = "not a multiple of"
#: Of a layer that has been cut before, and not now.
AS_IT_WAS = "the rank stays as it was"
#: Between two reasons.
AND = "; "


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one target.

    Attributes:
        name: Dotted name.
        out_features: ``m``.
        in_features: ``n``.
        rank: Rank that the layer is cut to, or None if it stays dense.
        relative_error: Predicted ``|error| / |W|`` in the metric of the factorization, in [0, 1]; None if unknown.
        reason: Why the layer stays dense, or has a rank of another kind than was asked for; else None.
        new_bias: Parameters of a bias that the factorization adds to a layer without one, if it is cut.
        nonzeros: Values of a sparse part beside the factors, if the layer is cut.
        groups: Number of groups of a grouped convolution; each has its factors, all of the same rank.
        form: Which of several ways to see the layer as a matrix, such as ``"spatial"`` for a convolution; ``""`` for
            the ordinary one. The shape tells it too.
        loss_increase: Predicted increase of the mean loss by cutting this layer, in units of the loss; only for
            factorizations whose spectrum measures the loss (KroneckerSVD), else None.
        layout: How the matrix is stored, if the layer is cut: ``"factors"`` or ``"pivot"``.
        was: The rank that the layer has been cut to before, if this is not its first cut; it is then never more than
            that, and parameters are counted against those of the dense weight all the same.
    """

    name: str
    out_features: int
    in_features: int
    rank: int | None
    relative_error: float | None = None
    reason: str | None = None
    new_bias: int = 0
    nonzeros: int = 0
    loss_increase: float | None = None
    groups: int = 1
    form: str = ""
    layout: Layout = "factors"
    was: int | None = None

    @property
    def dense_parameters(self) -> int:
        """Weight parameters before: ``m n``."""
        return self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        """Parameters after: ``m n`` if the layer stays dense.

        Else ``r (m + groups n)``, or ``r (m + n - r)`` in the pivot layout, with a new bias and a sparse part.
        """
        if self.rank is None:
            return self.dense_parameters
        stored = stored_parameters(self.out_features, self.in_features, self.rank, self.layout, self.groups)
        return stored + self.new_bias + self.nonzeros

    @property
    def max_rank(self) -> int:
        """The largest rank that saves parameters, or leaves a layer that has been cut as it is; 0 if there is none."""
        beside = self.new_bias + self.nonzeros
        limit = largest_saving_rank(self.out_features, self.in_features, self.layout, self.groups, beside)
        return limit if self.was is None else min(limit, self.was)

    def with_rank(self, rank: int | str | None) -> "LayerPlan":
        """The same layer at another rank, its predictions dropped.

        Args:
            rank: From 1 to :attr:`max_rank`, or ``"dense"`` (or None) to leave the layer as it is.

        Raises:
            PlanError: If the rank cannot be used.
        """
        if rank == "dense":
            rank = None
        if not self._allows(rank):
            way_out = f"give a rank from 1 to {self.max_rank} (above, nothing is saved), or 'dense'"
            if self.was is not None:
                way_out = f"give a rank from 1 to {self.max_rank}, which it has been cut to"
            elif self.max_rank < 1:
                way_out = "no rank saves parameters here, give 'dense'"
            raise PlanError(
                f"Layer {self.name!r} ({self.out_features}x{self.in_features}): "
                f"the rank {settings.show(rank)} cannot be used; {way_out}."
            )
        if rank == self.rank:
            return self
        assert rank is None or isinstance(rank, int)
        said = (self.reason or "").split(AND)
        if rank is None:
            kept = [part for part in said if part and not part.startswith((NO_MULTIPLE, AS_FACTORS))]
            reason: str | None = AND.join(kept) or "chosen by hand"
        else:
            reason = next((part for part in said if part.startswith(AS_FACTORS)), None)
        return replace(self, rank=rank, relative_error=None, loss_increase=None, reason=reason)

    def _allows(self, rank: object) -> bool:
        if rank is None:
            return self.was is None
        return isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= self.max_rank

    def cells(self) -> dict[str, str]:
        """What a table says of this layer, by column; predictions of a layer that stays dense are left out."""
        before = "" if self.was is None else f"{self.was} -> "
        cells = {
            "layer": self.name,
            "shape": f"{self.out_features}x{self.in_features}" + (f" {self.form}" if self.form else ""),
            "rank": "dense" if self.rank is None else f"{before}{self.rank}",
            "before": f"{self.dense_parameters:,}",
            "after": f"{self.parameters:,}",
            "why": self.reason or "",
        }
        if self.rank is not None:
            cells["predicted error"] = format_error(self.relative_error)
            cells["predicted loss increase"] = format_increase(self.loss_increase, self.relative_error)
        return cells

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; what is zero for nearly every layer is left out."""
        rank = "dense" if self.rank is None else self.rank
        return {
            "name": self.name,
            "shape": [self.out_features, self.in_features],
            "rank": rank,
            "reason": self.reason,
            **({"new_bias": self.new_bias} if self.new_bias else {}),
            **({"nonzeros": self.nonzeros} if self.nonzeros else {}),
            **({"groups": self.groups} if self.groups > 1 else {}),
            **({"form": self.form} if self.form else {}),
            **({"layout": self.layout} if self.layout != "factors" else {}),
            **({"was": self.was} if self.was is not None else {}),
            "predicted": {"rank": rank, "relative_error": self.relative_error, "loss_increase": self.loss_increase},
        }

    @classmethod
    def from_dict(cls, data: object) -> "LayerPlan":
        """The layer that :meth:`to_dict` has written; predictions for another rank than the present one are dropped.

        Raises:
            PlanError: If something is wrong; the layer, the value and the way out are named.
        """
        name = data.get("name") if isinstance(data, Mapping) else None
        where = "A layer" if name is None else f"Layer {settings.show(name)}"
        optional = ["reason", "new_bias", "nonzeros", "groups", "form", "layout", "was", "predicted"]
        entries = settings.read_mapping(data, where, ["name", "shape", "rank"], optional)
        shape, rank, reason = entries["shape"], entries["rank"], entries.get("reason")
        if not isinstance(shape, list | tuple) or len(shape) != 2:
            raise PlanError(f"{where}: shape must be [out_features, in_features], got {settings.show(shape)}.")
        m, n = (settings.read_integer(size, f"{where}: shape", 1) for size in shape)
        predicted = {"rank": "dense"} if entries.get("predicted") is None else entries["predicted"]
        numbers = ["relative_error", "loss_increase"]
        predicted = settings.read_mapping(predicted, f"{where}: predicted", ["rank"], numbers)
        layer = cls(
            settings.read_text(name, f"{where}: name"),
            m,
            n,
            None,
            reason=None if reason is None else settings.read_text(reason, f"{where}: reason"),
            new_bias=settings.read_integer(entries.get("new_bias", 0), f"{where}: new_bias", 0, m),
            nonzeros=settings.read_integer(entries.get("nonzeros", 0), f"{where}: nonzeros", 0, m * n),
            groups=settings.read_integer(entries.get("groups", 1), f"{where}: groups", 1, m),
            form=settings.read_text(entries.get("form", ""), f"{where}: form"),
            layout=_read_layout(entries.get("layout", "factors"), where),
            was=settings.read_integer(entries["was"], f"{where}: was", 1, min(m, n)) if "was" in entries else None,
        )
        if layer.layout == "pivot" and (layer.groups > 1 or layer.nonzeros):
            what = "a grouped convolution" if layer.groups > 1 else "a sparse part"
            raise PlanError(f"{where}: {what} goes with two factors alone; leave layout out, or make it 'factors'.")
        if rank is None:
            raise PlanError(f"{where}: rank is empty; give a rank from 1 to {layer.max_rank}, or 'dense'.")
        if predicted["rank"] != "dense":
            layer = replace(layer, rank=settings.read_integer(predicted["rank"], f"{where}: predicted rank", 1))
        planned = replace(
            layer,
            relative_error=settings.read_number(predicted.get("relative_error"), f"{where}: relative_error"),
            loss_increase=settings.read_number(predicted.get("loss_increase"), f"{where}: loss_increase"),
        )
        return planned.with_rank(rank)


def _read_layout(value: object, where: str) -> Layout:
    for layout in get_args(Layout):
        if value == layout:
            found: Layout = layout
            return found
    raise PlanError(
        f"{where}: layout must be one of {', '.join(map(repr, get_args(Layout)))}, got {settings.show(value)}."
    )
