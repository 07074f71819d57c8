"""What will happen to one layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_prehab.documents import settings
from lightning_prehab.documents.numbers import format_error, format_increase
from lightning_prehab.errors import PlanError

#: How the reason begins for a rank that is no multiple of what was asked for.
NO_MULTIPLE = "not a multiple of"


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one target.

    Attributes:
        name: Dotted name.
        out_features: ``m``.
        in_features: ``n``.
        rank: Rank of the factors, or None if the layer stays dense.
        relative_error: Predicted ``|error| / |W|`` in the metric of the factorization, in [0, 1]; None if unknown.
        reason: Why the layer stays dense, or has a rank of another kind than was asked for; else None.
        new_bias: Parameters of a bias that the factorization adds to a layer without one, if it is cut.
        nonzeros: Values of a sparse part beside the factors, if the layer is cut.
        groups: Number of groups of a grouped convolution; each has its factors, all of the same rank.
        form: Which of several ways to see the layer as a matrix, such as ``"spatial"`` for a convolution; ``""`` for
            the ordinary one. The shape tells it too.
        loss_increase: Predicted increase of the mean loss by cutting this layer, in units of the loss; only for
            factorizations whose spectrum measures the loss (KroneckerSVD), else None.
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

    @property
    def dense_parameters(self) -> int:
        """Weight parameters before: ``m n``."""
        return self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        """Parameters after: ``r (m + groups n)``, a new bias and a sparse part, or ``m n`` if it stays dense."""
        if self.rank is None:
            return self.dense_parameters
        return self.rank * (self.out_features + self.groups * self.in_features) + self.new_bias + self.nonzeros

    @property
    def max_rank(self) -> int:
        """The largest rank that saves parameters; 0 if there is none."""
        spare = self.dense_parameters - self.new_bias - self.nonzeros - 1
        return max(spare, 0) // (self.out_features + self.groups * self.in_features)

    def with_rank(self, rank: int | str | None) -> "LayerPlan":
        """The same layer at another rank, its predictions dropped.

        Args:
            rank: From 1 to :attr:`max_rank`, or ``"dense"`` (or None) to leave the layer as it is.

        Raises:
            PlanError: If the rank cannot be used.
        """
        if rank == "dense":
            rank = None
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= self.max_rank):
            way_out = f"give a rank from 1 to {self.max_rank} (above, nothing is saved), or 'dense'"
            if self.max_rank < 1:
                way_out = "no rank saves parameters here, give 'dense'"
            raise PlanError(
                f"Layer {self.name!r} ({self.out_features}x{self.in_features}): "
                f"the rank {settings.show(rank)} cannot be used; {way_out}."
            )
        if rank == self.rank:
            return self
        said = None if self.reason is None or self.reason.startswith(NO_MULTIPLE) else self.reason
        reason = (said or "chosen by hand") if rank is None else None
        return replace(self, rank=rank, relative_error=None, loss_increase=None, reason=reason)

    def cells(self) -> dict[str, str]:
        """What a table says of this layer, by column; predictions of a layer that stays dense are left out."""
        cells = {
            "layer": self.name,
            "shape": f"{self.out_features}x{self.in_features}" + (f" {self.form}" if self.form else ""),
            "rank": "dense" if self.rank is None else str(self.rank),
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
        optional = ["reason", "new_bias", "nonzeros", "groups", "form", "predicted"]
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
        )
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
