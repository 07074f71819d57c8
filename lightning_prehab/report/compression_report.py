"""What happened to each layer."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_prehab.documents import settings
from lightning_prehab.documents.checks import check_path
from lightning_prehab.documents.tables import Table
from lightning_prehab.errors import ArgumentError, CheckpointError, PrehabError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.plan.compression_plan import CompressionPlan, LayerPlan
from lightning_prehab.report import figures
from lightning_prehab.report.course import PrehabCourse
from lightning_prehab.report.facts import Facts
from lightning_prehab.report.latency import ModelLatency
from lightning_prehab.report.origin import Origin
from lightning_prehab.report.page import build_page
from lightning_prehab.report.panels import spectra_figure
from lightning_prehab.report.refined import RefinementReport
from lightning_prehab.report.rows import headlines, table_of_layers
from lightning_prehab.report.scores import Scores
from lightning_prehab.report.thinned_spectrum import LayerSpectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of the dictionary form. Keys that may be missing are added without a new version: readers pass over those that they
#: do not know.
VERSION = 1
#: Class paths that a report may name: reading one imports nothing of others.
_OURS = "lightning_prehab."


@dataclass(frozen=True)
class CompressionReport(Facts):
    """The facts of one surgery.

    Attributes:
        plan: The plan that was carried out.
        weight_errors: ``{name: |W - W'|_F / |W|_F}`` of the layers that were cut, ``W'`` what replaces ``W``.
        parameters_before: Parameters of the whole model before, counted.
        parameters_after: Parameters of the whole model after, counted.
        spectra: ``{name: spectrum before the cut}`` of the layers that were decomposed.
        latency: Of the model before and after, or None: nothing is measured unless somebody asks.
        scores: What the model is worth before and after, or None, where nobody has asked or it cannot be measured.
        prehab: What a training run with :class:`~lightning_prehab.PrehabCallback` went through, else None.
        origin: Which model it was, and when. Reports that differ in it alone are equal.
        refinement: What training right after the cut has brought, or None where there was none.
    """

    @property
    def figure_names(self) -> tuple[str, ...]:
        """The figures that can be drawn out of what this report holds."""
        return tuple(name for name in figures.FIGURES if name not in self.missing_figures())

    def with_spectra(self, singular_values: Mapping[str, Tensor]) -> "CompressionReport":
        """The same report with the spectra of its layers, thinned; see :class:`LayerSpectrum`.

        Args:
            singular_values: ``{name: shape (min(m, n),), descending}``, in the metric of the factorization.
        """
        found = {
            name: LayerSpectrum.of(singular_values[name], rank)
            for name, rank in self.ranks.items()
            if name in singular_values
        }
        return replace(self, spectra={name: one for name, one in found.items() if one is not None})

    def with_latency(self, latency: ModelLatency) -> "CompressionReport":
        """The same report with latencies before and after.

        Args:
            latency: From :func:`~lightning_prehab.report.latency.compare_latencies`, or from ``bench --json``.

        Raises:
            ArgumentError: If it was measured on other models, told by the number of their parameters.
        """
        theirs = latency.parameters_before, latency.parameters_after
        ours = self.parameters_before, self.parameters_after
        if theirs != ours:
            raise ArgumentError(
                f"The latencies are those of a model of {theirs[0]:,} -> {theirs[1]:,} parameters, the report is about "
                f"{ours[0]:,} -> {ours[1]:,}; measure the models of this report."
            )
        return replace(self, latency=latency)

    def with_note(self, note: str) -> "CompressionReport":
        """The same report with a word on the cut in front of what the policy has to say; an empty one says nothing."""
        notes = "; ".join(filter(None, [note, self.plan.note]))
        return replace(self, plan=replace(self.plan, note=notes))

    def with_scores(self, scores: Scores | None) -> "CompressionReport":
        """The same report with what the model is worth before and after."""
        return replace(self, scores=scores)

    def with_refinement(self, refinement: RefinementReport | None) -> "CompressionReport":
        """The same report with what training right after the cut has brought."""
        return replace(self, refinement=refinement)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return {
            "version": VERSION,
            **self.origin.to_dict(),
            "factorization": repr(self.plan.factorization),
            "keep": self.keep,
            "model_keep": self.model_keep,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "loss_increase": self.plan.loss_increase,
            "layers": [
                {
                    "name": layer.name,
                    "shape": [layer.out_features, layer.in_features],
                    "rank": layer.rank,
                    "parameters_before": layer.dense_parameters,
                    "parameters_after": layer.parameters,
                    "new_bias": layer.new_bias,
                    "nonzeros": layer.nonzeros,
                    "groups": layer.groups,
                    "form": layer.form,
                    "layout": layer.layout,
                    **({} if layer.was is None else {"was": layer.was}),
                    "predicted_error": layer.relative_error,
                    "loss_increase": layer.loss_increase,
                    "weight_error": self.weight_errors.get(layer.name, 0.0),
                    "reason": layer.reason,
                    "spectrum": self.spectra[layer.name].to_dict() if layer.name in self.spectra else None,
                }
                for layer in self.plan.layers
            ],
            "skipped": dict(self.plan.skipped),
            **({"note": self.plan.note} if self.plan.note else {}),
            "latency": None if self.latency is None else self.latency.to_dict(),
            "scores": None if self.scores is None else self.scores.to_dict(),
            "prehab": None if self.prehab is None else self.prehab.to_dict(),
            "refinement": None if self.refinement is None else self.refinement.to_dict(),
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
        layers = tuple(_read_layer(layer) for layer in data["layers"])
        plan = CompressionPlan(layers, factorization, data["skipped"], data["parameters_before"], data.get("note", ""))
        errors = {layer["name"]: layer["weight_error"] for layer in data["layers"] if layer["rank"] is not None}
        spectra = {
            layer["name"]: LayerSpectrum.from_dict(layer["spectrum"])
            for layer in data["layers"]
            if layer.get("spectrum") is not None
        }
        latency, scores, prehab = data.get("latency"), data.get("scores"), data.get("prehab")
        refinement = data.get("refinement")
        return cls(
            plan,
            errors,
            data["parameters_before"],
            data["parameters_after"],
            spectra,
            None if latency is None else ModelLatency.from_dict(latency),
            None if scores is None else Scores.from_dict(scores),
            None if prehab is None else PrehabCourse.from_dict(prehab),
            Origin.from_dict(data),
            None if refinement is None else RefinementReport.from_dict(refinement),
        )

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_dict` and, under ``method``, the settings of the factorization into a file.

        The file is one JSON object. Errors are relative Frobenius norms without unit, loss increases are in units of
        the loss, parameters are counts, latencies are seconds; "or null" means not known.

        - ``version`` (int): of this form, 1; other versions are refused when read. Within a version keys are added
          only, and such keys may be missing: ``new_bias``, ``nonzeros``, ``groups``, ``form``, ``layout``, both
          ``loss_increase``, ``was``, ``spectrum``, ``latency``, ``scores``, ``prehab``, ``refinement``, ``model``,
          ``created``, ``versions`` and ``note`` were. Pass over keys that you do not know.
        - ``model`` (str): its class, and where it was loaded from. ``created`` (str): when it was cut, ISO 8601 in
          UTC. ``versions`` (object): ``{package: version}``.
        - ``factorization`` (str): for people. ``method`` (object): the same for :meth:`load_json`.
        - ``keep``, ``model_keep`` (float): share of the parameters kept, of the targets' weights, of the whole model.
        - ``parameters_before``, ``parameters_after`` (int): of the whole model.
        - ``loss_increase`` (float or null): predicted, of all cuts together.
        - ``skipped`` (object): ``{name: reason}`` of layers that were no targets.
        - ``note`` (str): what the rank policy has to say of its choice.
        - ``latency`` (object or null): medians of forward passes, dense and compressed in turn, as ``bench --json``
          prints them: ``device`` (str), ``threads``, ``parameters_dense``, ``parameters_compressed`` (int) and
          ``latency`` (list of objects, one for each batch: ``batch_size`` (int), ``dense_seconds`` and
          ``compressed_seconds`` (float), ``verdict`` (str), ``layers`` (list of objects, one for each replaced layer
          alone: ``name``, ``dense_seconds``, ``compressed_seconds``)).
        - ``scores`` (object or null): what the model is worth: ``data`` (str): where it was measured; ``before`` and
          ``after`` (objects), each with ``loss`` (float or null), a mean over ``count`` (int) of ``unit`` (str;
          ``"tokens"``: a language model's cross-entropy in nats), ``accuracy`` (float in [0, 1] or null),
          ``output_error`` (float or null): relative difference of the outputs to those of the dense model, and
          ``perplexity`` (float or null), the exponential of such a loss.
        - ``prehab`` (object or null): a training run with PrehabCallback at its ``start`` (when the regularizer began
          to act), right before the ``cut`` and at its ``end`` (null while it goes on), each an object with ``step``
          (int), ``loss`` (float or null): of training, smoothed, ``validation`` (object): ``{name: value}`` as logged,
          ``stable_rank``, ``effective_rank`` and ``tail_energy`` (float or null): means over the layers.
        - ``refinement`` (object or null): training right after the cut: ``scope`` (str), ``measure`` (str),
          ``before`` and ``after`` (float): of this measure, on ``data`` (str), ``steps`` (int), ``seconds`` (float),
          ``kept`` (bool), ``stopped`` (str or null): why it ended before its time.
        - ``layers`` (list of objects, in model order), each with:

          - ``name`` (str), ``shape`` (``[out_features, in_features]``), ``rank`` (int; null: stayed dense),
            ``reason`` (str or null): why it stayed dense, or is cut in another way than asked for.
          - ``parameters_before``, ``parameters_after`` (int): of the weight; after it, of all that replaces it.
          - ``new_bias``, ``nonzeros`` (int): parameters of a bias that the cut adds, values of a sparse part.
          - ``groups`` (int): of a grouped convolution, each with factors of its own; else 1.
          - ``form`` (str): which of several ways to see the layer as a matrix, such as ``"spatial"``; else empty.
          - ``layout`` (str): how it is stored: ``"factors"`` or ``"pivot"``.
          - ``was`` (int): rank before, of a layer that has been cut before; ``parameters_before`` is the dense weight
            all the same.
          - ``predicted_error`` (float or null): in the metric of the factorization.
          - ``weight_error`` (float): measured, ``|W - W'|_F / |W|_F``; 0 for dense layers.
          - ``loss_increase`` (float or null): predicted, of this cut.
          - ``spectrum`` (object or null): singular values before the cut in the metric of the factorization, at most
            about 64 of them: ``indices`` (list of int, from 1 to the full rank), ``values`` (list of float). The cut
            keeps those up to ``rank``.

        Raises:
            PlanError: If the factorization cannot be written down (a class of your own, in most cases local).
        """
        check_path("path", path)
        data = {**self.to_dict(), "method": settings.describe(self.plan.factorization)}
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load_json(cls, path: str | os.PathLike[str], factorization: Factorization | None = None) -> "CompressionReport":
        """The report that :meth:`save_json` has written.

        Args:
            path: The file.
            factorization: For reports of a class of your own: only classes of this package are imported.

        Raises:
            CheckpointError: If the file cannot be read, or holds something else; the file is named.
        """
        check_path("path", path)
        where = os.fspath(path)
        if Path(path).is_dir():
            inside = Path(path) / "report.json"
            way_out = f"read {str(inside)!r}" if inside.is_file() else "there is no report.json in it"
            raise CheckpointError(f"{where} is a folder, and a report is a file that save_json has written; {way_out}.")
        try:
            data = json.loads(settings.read_file(path))
            if not isinstance(data, dict):
                raise CheckpointError(f"this is not a compression report, but {settings.show(data)}")
            if "version" not in data or "format" in data:
                raise CheckpointError(
                    "this is JSON, but not a compression report; save_json writes one, and compress the report.json of "
                    "its folder."
                )
            if factorization is None and data.get("version") == VERSION:
                method = data.get("method")
                class_path = method.get("class_path") if isinstance(method, dict) else None
                if not isinstance(class_path, str) or not class_path.startswith(_OURS):
                    raise CheckpointError(
                        f"the method {settings.show(class_path)} is not one of this package; load it in Python with "
                        "CompressionReport.load_json(path, factorization)"
                    )
                factorization = settings.build(method, Factorization, "method")  # type: ignore[type-abstract]
            found = cls.from_dict(data, factorization)  # type: ignore[arg-type]  # refused before it is looked at
            str(found)  # whatever is wrong in it shows here, not later
        except PrehabError as error:
            raise CheckpointError(f"{where}: {error}") from error
        except RecursionError as error:
            raise CheckpointError(f"{where}: the file is nested too deeply to be a compression report.") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = f"{where} is not a whole compression report ({type(error).__name__}: {error}); copy it again."
            raise CheckpointError(text) from error
        return found

    def figure(self, name: str) -> "Figure":
        """A matplotlib figure; save it with its ``savefig``.

        Args:
            name: ``"ranks"``, ``"errors"``, ``"parameters"``; ``"spectra"`` and ``"latency"`` if the report holds them.

        Raises:
            ArgumentError: If there is no such figure, or the report does not hold what it shows.
            PrehabError: If matplotlib is missing.
        """
        missing = self.missing_figures().get(name)
        if missing is not None:
            raise ArgumentError(f"The figure {name!r} cannot be drawn. {missing}")
        if name == "spectra":
            return spectra_figure(self.spectra, self.ranks)
        if name == "latency" and self.latency is not None:
            return figures.latency_figure(self.latency)
        return figures.layer_figure(self.plan, self.weight_errors, name)

    def missing_figures(self) -> dict[str, str]:
        """For each figure that cannot be drawn the reason and the way out."""
        missing = {}
        if not self.spectra:
            missing["spectra"] = (
                "This report holds no spectra: it was written before reports had them, or the surgery was repeated "
                "from a checkpoint of weights alone."
            )
        if self.latency is None:
            missing["latency"] = (
                "Latencies were not measured. On the command line: bench SOURCE --compressed FOLDER --json > FILE, and "
                "report FOLDER --bench FILE; in Python: compare_latencies and CompressionReport.with_latency."
            )
        return missing

    def save_html(self, path: str | os.PathLike[str], metrics: str | os.PathLike[str] | None = None) -> None:
        """Writes one page: what came out in four tiles, a map of the ranks, the table, and figures.

        Long parts are folded. It loads nothing from elsewhere, and leaves out what the report does not hold.

        Args:
            path: The file.
            metrics: The ``metrics.csv`` of the run's CSVLogger, for a timeline with the surgery marked.

        Raises:
            ArgumentError: If the metrics cannot be read.
            PrehabError: If matplotlib is missing.
        """
        drawn = {name: figures.to_png(self.figure(name)) for name in self.figure_names}
        if metrics is not None:
            drawn["timeline"] = figures.to_png(figures.timeline_figure(metrics))
        check_path("path", path)
        Path(path).write_text(build_page(self, drawn), encoding="utf-8")

    def table(self, every_layer: bool = False) -> Table:
        """The summary, and what happened to each layer; of many layers, to each group of them.

        Args:
            every_layer: A row for each target, however many there are, and the names of all layers that are left out.
        """
        return table_of_layers(self, every_layer)

    def summary(self) -> str:
        """One line: how much smaller the model is, and what it is worth where that was measured."""
        return headlines(self)[0]

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Table:
        return self.table()


def _read_layer(layer: Mapping[str, Any]) -> LayerPlan:
    m, n = layer["shape"]
    rank = layer["rank"]
    beside_factors = 0 if rank is None else layer["parameters_after"] - rank * (m + layer.get("groups", 1) * n)
    return LayerPlan(
        layer["name"],
        m,
        n,
        rank,
        relative_error=layer["predicted_error"],
        reason=layer["reason"],
        new_bias=layer.get("new_bias", beside_factors),  # the first reports tell only the sum
        nonzeros=layer.get("nonzeros", 0),
        groups=layer.get("groups", 1),
        form=layer.get("form", ""),
        loss_increase=layer.get("loss_increase"),
        layout=layer.get("layout", "factors"),
        was=layer.get("was"),
    )
