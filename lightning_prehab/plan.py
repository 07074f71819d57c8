"""What will happen to each layer, as a document: printable, changed nowhere."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prehab.factorizations import Factorization
from lightning_prehab.tables import format_table


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one target.

    Attributes:
        name: Dotted name.
        out_features: ``m``.
        in_features: ``n``.
        rank: Rank of the factors, or None if the layer stays dense.
        new_bias: Parameters of a bias that the factorization adds to a layer without one.
        relative_error: Predicted ``|error| / |W|`` in the metric of the factorization, in [0, 1]; 0 for a dense layer.
        reason: Why the layer stays dense, or None.
    """

    name: str
    out_features: int
    in_features: int
    rank: int | None
    relative_error: float = 0.0
    reason: str | None = None
    new_bias: int = 0

    @property
    def dense_parameters(self) -> int:
        """Weight parameters before: ``m n``."""
        return self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        """Parameters after: ``r (m + n)`` and a new bias, or ``m n`` if the layer stays dense."""
        if self.rank is None:
            return self.dense_parameters
        return self.rank * (self.out_features + self.in_features) + self.new_bias


@dataclass(frozen=True)
class CompressionPlan:
    """The decisions for a model. Nothing has changed yet; :func:`~lightning_prehab.apply_plan_` carries it out.

    Attributes:
        layers: One entry for each target, in model order.
        factorization: How the factors will be computed.
        skipped: ``{name: reason}`` for the layers that are not targets.
        model_parameters: Parameters of the whole model before, or None if unknown.
    """

    layers: tuple[LayerPlan, ...]
    factorization: Factorization
    skipped: Mapping[str, str]
    model_parameters: int | None = None

    @property
    def ranks(self) -> dict[str, int | None]:
        """The rank of each target by name; None for those that stay dense."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def dense_parameters(self) -> int:
        """Weight parameters of the targets before."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Weight parameters of the targets after."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def keep(self) -> float:
        """Achieved share of the targets' weight parameters, in (0, 1]."""
        return self.parameters / self.dense_parameters

    @property
    def model_keep(self) -> float | None:
        """Achieved share of all parameters of the model, or None if their number is unknown."""
        if self.model_parameters is None:
            return None
        return 1.0 - (self.dense_parameters - self.parameters) / self.model_parameters

    def __str__(self) -> str:
        rows = [
            [
                layer.name,
                f"{layer.out_features}x{layer.in_features}",
                "dense" if layer.rank is None else str(layer.rank),
                f"{layer.dense_parameters:,}",
                f"{layer.parameters:,}",
                "" if layer.rank is None else f"{layer.relative_error:.3f}",
                layer.reason or "",
            ]
            for layer in self.layers
        ]
        rows += [[name, "", "left", "", "", "", reason] for name, reason in self.skipped.items()]
        header = ["layer", "shape", "rank", "before", "after", "predicted error", "why"]
        return f"{format_table(header, rows)}\n{self.summary()}"

    def summary(self) -> str:
        """One line: achieved keep of the targets and of the whole model."""
        whole = ""
        if self.model_parameters is not None and self.model_keep is not None:
            after = self.model_parameters - self.dense_parameters + self.parameters
            whole = f"; whole model {self.model_parameters:,} -> {after:,} parameters (keep {self.model_keep:.3f})"
        return (
            f"{self.factorization}: targets {self.dense_parameters:,} -> {self.parameters:,} parameters "
            f"(keep {self.keep:.3f}){whole}"
        )
