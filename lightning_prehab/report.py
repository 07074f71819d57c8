"""What happened to each layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_prehab.errors import CheckpointError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.plan import CompressionPlan, LayerPlan
from lightning_prehab.tables import format_table

#: Of the dictionary form.
VERSION = 1


@dataclass(frozen=True)
class CompressionReport:
    """The facts of one surgery.

    Attributes:
        plan: The plan that was carried out.
        weight_errors: ``{name: |W - B A|_F / |W|_F}`` of the layers that were cut, in [0, 1] or above.
        parameters_before: Parameters of the whole model before, counted.
        parameters_after: Parameters of the whole model after, counted.
    """

    plan: CompressionPlan
    weight_errors: Mapping[str, float]
    parameters_before: int
    parameters_after: int

    @property
    def keep(self) -> float:
        """Achieved share of the targets' weight parameters, in (0, 1]."""
        return self.plan.keep

    @property
    def model_keep(self) -> float:
        """Achieved share of all parameters of the model."""
        return self.parameters_after / self.parameters_before

    @property
    def ranks(self) -> dict[str, int | None]:
        """The rank of each target by name; None for those that stayed dense."""
        return self.plan.ranks

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return {
            "version": VERSION,
            "factorization": repr(self.plan.factorization),
            "keep": self.keep,
            "model_keep": self.model_keep,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "layers": [
                {
                    "name": layer.name,
                    "shape": [layer.out_features, layer.in_features],
                    "rank": layer.rank,
                    "parameters_before": layer.dense_parameters,
                    "parameters_after": layer.parameters,
                    "predicted_error": layer.relative_error,
                    "weight_error": self.weight_errors.get(layer.name, 0.0),
                    "reason": layer.reason,
                }
                for layer in self.plan.layers
            ],
            "skipped": dict(self.plan.skipped),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], factorization: Factorization) -> "CompressionReport":
        """The report that :meth:`to_dict` has written; the factorization is given, since only its text is stored.

        Raises:
            CheckpointError: If the data is of an unknown version.
        """
        if data.get("version") != VERSION:
            raise CheckpointError(
                f"A compression report of version {data.get('version')!r} cannot be read, only version {VERSION}; "
                "update lightning_prehab."
            )
        layers = tuple(
            LayerPlan(
                layer["name"],
                m,
                n,
                layer["rank"],
                relative_error=layer["predicted_error"],
                reason=layer["reason"],
                new_bias=0 if layer["rank"] is None else layer["parameters_after"] - layer["rank"] * (m + n),
            )
            for layer in data["layers"]
            for m, n in [layer["shape"]]
        )
        plan = CompressionPlan(layers, factorization, data["skipped"], data["parameters_before"])
        errors = {layer["name"]: layer["weight_error"] for layer in data["layers"] if layer["rank"] is not None}
        return cls(plan, errors, data["parameters_before"], data["parameters_after"])

    def __str__(self) -> str:
        rows = [
            [
                layer.name,
                f"{layer.out_features}x{layer.in_features}",
                "dense" if layer.rank is None else str(layer.rank),
                f"{layer.dense_parameters:,} -> {layer.parameters:,}",
                "" if layer.rank is None else f"{layer.relative_error:.3f}",
                "" if layer.rank is None else f"{self.weight_errors[layer.name]:.3f}",
                layer.reason or "",
            ]
            for layer in self.plan.layers
        ]
        rows += [[name, "", "left", "", "", "", reason] for name, reason in self.plan.skipped.items()]
        header = ["layer", "shape", "rank", "parameters", "error (metric)", "error (weight)", "why"]
        return (
            f"{format_table(header, rows)}\n"
            f"{self.plan.factorization}: targets {self.plan.dense_parameters:,} -> {self.plan.parameters:,} parameters "
            f"(keep {self.keep:.3f}); whole model {self.parameters_before:,} -> {self.parameters_after:,} parameters "
            f"(keep {self.model_keep:.3f})"
        )
