"""What will happen to each layer, as a document: people print it, keep it in a file, edit it and apply it."""

import os
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_prehab.documents import settings
from lightning_prehab.documents.checks import check_path
from lightning_prehab.documents.numbers import format_increase, format_loss, format_times
from lightning_prehab.documents.tables import Table
from lightning_prehab.errors import PlanError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.plan.layer_groups import FEW, notes_of_left, table_of_groups
from lightning_prehab.plan.layer_plan import LayerPlan
from lightning_prehab.targets.names import match_names

__all__ = ["CompressionPlan", "LayerPlan"]

#: What is done to a layer: its name, its form and its rank, or None.
Cut = tuple[str, str, int | None]

#: Of the dictionary form.
VERSION = 1

_HEADER = """
To edit, change the rank of a layer: a whole number up to the limit beside it, or dense to leave the layer as it is.
Predictions belong to a rank and a factorization; where you change either they are dropped.
To apply: apply_plan_(model, CompressionPlan.from_yaml(path), statistics). Only read plans that you trust: the class
of the factorization is imported. The last line (...) says that the file is complete.
"""


@dataclass(frozen=True)
class CompressionPlan:
    """The decisions for a model. Nothing has changed yet; :func:`~lightning_prehab.apply_plan_` carries it out.

    ``print(plan)`` and ``rich.print(plan)`` show it, :meth:`to_yaml` makes a file of it that can be edited by hand.

    Attributes:
        layers: One entry for each target, in model order.
        factorization: How the factors will be computed.
        skipped: ``{name: reason}`` for the layers that are not targets.
        model_parameters: Parameters of the whole model before, or None if unknown.
        note: What the policy has to say of its choice, such as the best of its trials; or empty.
    """

    layers: tuple[LayerPlan, ...]
    factorization: Factorization
    skipped: Mapping[str, str]
    model_parameters: int | None = None
    note: str = ""

    @property
    def ranks(self) -> dict[str, int | None]:
        """The rank of each target by name; None for those that stay dense."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What is done to each layer, and nothing about why: plans that do the same are equal in it."""
        return tuple((layer.name, layer.form, layer.rank) for layer in self.layers)

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

    @property
    def loss_increase(self) -> float | None:
        """Predicted increase of the loss by all cuts, or None if it is unknown for one of them.

        In the unit of the loss, where it was tried (``compress_``, the callback, the command line). A plan out of
        statistics alone (``make_plan``) predicts the loss of one sample, to second order.
        """
        cuts = [layer.loss_increase for layer in self.layers if layer.rank is not None]
        known = [increase for increase in cuts if increase is not None]
        return sum(known, 0.0) if len(known) == len(cuts) else None

    def with_ranks(self, ranks: Mapping[str, int | str | None]) -> "CompressionPlan":
        """A plan with other ranks; the predictions of the layers that change are dropped.

        Args:
            ranks: ``{name or pattern: rank}``, the rank as in :meth:`LayerPlan.with_rank`. Later patterns win.

        Raises:
            TargetError: If a pattern matches no layer of the plan.
            PlanError: If a rank cannot be used (the layer is named).
        """
        layers = {layer.name: layer for layer in self.layers}
        chosen: dict[str, int | str | None] = {}
        for pattern, rank in ranks.items():
            if pattern in self.skipped:
                raise PlanError(f"Layer {pattern!r} has no rank, it is left out: {self.skipped[pattern]}.")
            chosen.update(dict.fromkeys(match_names(pattern, list(layers), "with_ranks"), rank))
        changed = {name: layers[name].with_rank(rank) for name, rank in chosen.items()}
        return replace(self, layers=tuple({**layers, **changed}.values()))

    def as_two_factors(self) -> "CompressionPlan":
        """The same ranks with two factors for each layer: the same matrices, without the work of a pivot layout."""
        return replace(self, layers=tuple(replace(layer, layout="factors") for layer in self.layers))

    def with_loss_increase(self, increase: float | None) -> "CompressionPlan":
        """The plan with another prediction for all cuts together; the layers keep their shares of it.

        Args:
            increase: Of the loss, at least 0, or None: it is not known. Without effect where nothing is predicted, or
                no increase at all.
        """
        predicted = self.loss_increase
        if increase is None:
            return replace(self, layers=tuple(replace(layer, loss_increase=None) for layer in self.layers))
        if not predicted:
            return self
        scale = increase / predicted
        layers = [
            layer if layer.loss_increase is None else replace(layer, loss_increase=scale * layer.loss_increase)
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON.

        Raises:
            PlanError: If the factorization cannot be written down (a class of your own, in most cases local).
        """
        return {
            "version": VERSION,
            "factorization": settings.describe(self.factorization),
            "predicted_with": repr(self.factorization),
            "model_parameters": self.model_parameters,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": dict(self.skipped),
            **({"note": self.note} if self.note else {}),
        }

    @classmethod
    def from_dict(cls, data: object) -> "CompressionPlan":
        """The plan that :meth:`to_dict` has written, edited or not. Predictions that no longer apply are dropped.

        Raises:
            PlanError: If something is wrong; the layer, the value and the way out are named.
        """
        if isinstance(data, Mapping) and data.get("version", VERSION) != VERSION:
            raise PlanError(
                f"A plan of version {settings.show(data['version'])} cannot be read, only version {VERSION}; "
                "update lightning_prehab."
            )
        required = ["version", "factorization", "layers", "skipped"]
        entries = settings.read_mapping(data, "Plan", required, ["predicted_with", "model_parameters", "note"])
        factorization = settings.build(entries["factorization"], Factorization, "factorization")  # type: ignore[type-abstract]
        if not isinstance(entries["layers"], list | tuple) or not entries["layers"]:
            raise PlanError(f"Plan: layers must be a list of layers, got {settings.show(entries['layers'])}.")
        layers = [LayerPlan.from_dict(layer) for layer in entries["layers"]]
        if entries.get("predicted_with") != repr(factorization):
            layers = [replace(layer, relative_error=None, loss_increase=None) for layer in layers]
        skipped = entries["skipped"]
        if not isinstance(skipped, Mapping):
            raise PlanError(f"Plan: skipped must map names to reasons, got {settings.show(skipped)}.")
        names = [settings.read_text(name, "Plan: a name in skipped") for name in skipped]
        for name, reason in skipped.items():
            settings.read_text(reason, f"Plan: the reason of {name!r} in skipped")
        names += [layer.name for layer in layers]
        for name, count in Counter(names).items():
            if count > 1:
                raise PlanError(f"Layer {name!r} stands twice in the plan; leave one of the two.")
        total = entries.get("model_parameters")
        if total is not None:
            settings.read_integer(total, "Plan: model_parameters", 1)
        note = settings.read_text(entries.get("note", ""), "Plan: note")
        return cls(tuple(layers), factorization, dict(skipped), total, note)

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The plan as YAML, with a comment that says how to edit it; written to a file too if a path is given.

        Raises:
            PlanError: As :meth:`to_dict`.
        """
        data = self.to_dict()
        layers, skipped = data.pop("layers"), data.pop("skipped")
        text = textwrap.indent(f"Compression plan, as written: {self.summary()}{_HEADER}", "# ")
        text += "".join(settings.format_yaml(key, value) for key, value in data.items()) + "layers:\n"
        for layer, entries in zip(self.layers, layers, strict=True):
            lines = {key: settings.format_yaml(key, value, one_line=True) for key, value in entries.items()}
            lines["rank"] = f"rank: {entries['rank']}  # at most {layer.max_rank}\n"
            text += "- " + "".join(lines.values()).rstrip("\n").replace("\n", "\n  ") + "\n"
        text += settings.format_yaml("skipped", skipped) + "...\n"
        if path is not None:
            check_path("path", path)
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, text_or_path: str | os.PathLike[str]) -> "CompressionPlan":
        """The plan that :meth:`to_yaml` has written, edited or not.

        Args:
            text_or_path: A text of several lines, or the path of a file.

        Raises:
            PlanError: If the file cannot be read, is cut off, or something in it is wrong.
        """
        if isinstance(text_or_path, str) and "\n" in text_or_path:
            return cls.from_dict(settings.parse_yaml(text_or_path))
        check_path("text_or_path", text_or_path)
        text = settings.read_file(text_or_path)
        try:
            return cls.from_dict(settings.parse_yaml(text))
        except PlanError as error:
            raise PlanError(f"{os.fspath(text_or_path)}: {error}") from error

    def summary(self) -> str:
        """One line: achieved keep of the targets and of the whole model, and the predicted loss increase."""
        whole = "" if self.model_parameters is None else f"; whole model {self._whole(self.model_parameters)}"
        return f"{self.factorization}: {self._targets()}{whole}{format_loss(self.loss_increase, self.worst_error)}"

    def headlines(self) -> list[str]:
        """What stands above a table: how much smaller the model gets, and what that is predicted to cost."""
        lines = [self.headline()]
        if self.model_parameters is not None:
            times = format_times(self.model_parameters, self._after(self.model_parameters))
            lines = [f"would be {times}", f"whole model {self._whole(self.model_parameters)}", *lines]
        return [*lines, *self.method_lines()]

    def method_lines(self) -> list[str]:
        """How it is cut, and what that is predicted to cost."""
        increase = format_increase(self.loss_increase, self.worst_error).lstrip("+")
        predicted = [] if self.loss_increase is None else [f"predicted loss increase {increase}"]
        pivot = any(layer.rank is not None and layer.layout == "pivot" for layer in self.layers)
        method = f"method {self.factorization}" + (", in the pivot layout" if pivot else "")
        return [method, *filter(None, [self.note]), *predicted]

    def headline(self) -> str:
        """One line about the targets: what is kept of them, and how many are cut."""
        cut = sum(layer.rank is not None for layer in self.layers)
        return f"{self._targets()}, {cut} of {len(self.layers)} layers cut"

    def table(self, every_layer: bool = False) -> Table:
        """The summary, and what happens to each layer; of many layers, to each group of them.

        Args:
            every_layer: A row for each target, however many there are, and the names of all layers that are left out.
        """
        if len(self.layers) > FEW and not every_layer:
            return table_of_groups("Compression plan", self.headlines(), self.layers, self.skipped)
        losses = any(layer.loss_increase is not None for layer in self.layers)
        columns = ["layer", "shape", "rank", "before", "after", "predicted error"]
        columns += ["predicted loss increase"] if losses else []
        footer = {
            "layer": "total",
            "before": f"{self.dense_parameters:,}",
            "after": f"{self.parameters:,}",
            "predicted loss increase": format_increase(self.loss_increase, self.worst_error),
        }
        rows = [layer.cells() for layer in self.layers]
        notes = notes_of_left(self.layers, self.skipped, every_layer)
        spare = ("before", "shape", "after", "predicted error")
        return Table("Compression plan", columns, rows, footer, self.headlines(), notes, spare)

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Table:
        return self.table()

    @property
    def worst_error(self) -> float | None:
        """The largest predicted error of a cut, or None if one of them is unknown."""
        errors = [layer.relative_error for layer in self.layers if layer.rank is not None]
        known = [error for error in errors if error is not None]
        return max(known, default=0.0) if len(known) == len(errors) else None

    def _targets(self) -> str:
        return f"targets {self.dense_parameters:,} -> {self.parameters:,} parameters (keep {self.keep:.3f})"

    def _after(self, model_parameters: int) -> int:
        return model_parameters - self.dense_parameters + self.parameters

    def _whole(self, before: int) -> str:
        return f"{before:,} -> {self._after(before):,} parameters (keep {self._after(before) / before:.3f})"
