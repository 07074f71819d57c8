"""The commands: plan, compress, report and bench for Hugging Face folders and Lightning checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prehab.cli.calibration_text import (
    SELF,
    check_data,
    note_of_no_data,
    own_text,
    settle_data,
    with_own_text,
)
from lightning_prehab.cli.evaluation import (
    FEWEST_ROWS,
    Measured,
    compare_scores,
    kept_evaluation,
    read_evaluation,
    scores_in,
)
from lightning_prehab.cli.inputs import (
    Batches,
    check_compressed,
    describe,
    example_batch,
    is_compressed,
    load_model,
    read_batches,
)
from lightning_prehab.cli.offloaded import compress_offloaded
from lightning_prehab.cli.outputs import check_output, how_to_load, megabytes, note, show, write_model
from lightning_prehab.cli.plans import PlanFiles, RecordingSite, beside_plan, read_plan
from lightning_prehab.cli.recipes import read_recipe
from lightning_prehab.compress import apply_plan_
from lightning_prehab.errors import ArgumentError, PrehabError, reason
from lightning_prehab.files.beside import REPORT
from lightning_prehab.files.folders import load_compressed
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.progress import doing, shown
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.figures import to_png
from lightning_prehab.report.latency import ModelLatency, compare_latencies
from lightning_prehab.road import operate, plan_budgets
from lightning_prehab.sites import ProcessSite
from lightning_prehab.statistics.batches import call_model, explained, to_device
from lightning_prehab.statistics.calibration import as_found
from lightning_prehab.statistics.sums import LayerStatistics
from lightning_prehab.surgery.factors import planned_targets
from lightning_prehab.targets.find import Targets


def plan(settings: Any) -> None:
    """What each budget would do; the model is not changed."""
    keeps = settings.keep or [None]
    recipes = [read_recipe(settings, keep) for keep in keeps]
    settle_data(settings, recipes[0])
    check_data(recipes[0], settings)
    files = None if settings.output is None else PlanFiles(settings.output, keeps, settings.force)
    model, batches = _inputs(settings, cut=True)
    batches, measured = read_evaluation(settings, batches)  # the calibration sees what that of compress would
    batches = with_own_text(model, batches, settings)
    given = {"layers_at_once": settings.layers_at_once, "evaluate": None if measured is None else measured.evaluation()}
    said: list[str] = []
    if files is None:
        with shown():
            plans = plan_budgets(recipes, ProcessSite(model, batches, **given))
    else:
        with files.writer() as writer:
            with shown():
                plans = plan_budgets(recipes, RecordingSite(model, batches, writer, **given))
            said = files.write(plans, writer, model, measured)
        said.append(f"Next: lightning-prehab compress {settings.source} {files.next_step} --output FOLDER")
    _note_what_is_not_known(settings, plans[0], measured)
    data = [{"keep": found.keep, "model_keep": found.model_keep, **found.to_dict()} for found in plans]
    show(settings, {"plans": data}, *plans, *said)


def compress(settings: Any) -> None:
    """Writes a compressed model and the report of it into a folder, whole or not at all."""
    if settings.offload:
        compress_offloaded(settings)
        return
    if settings.memory is not None:
        raise ArgumentError("--memory is for --offload; give both, or --layers-at-once.")
    source, output = Path(settings.source), Path(settings.output)
    check_output(output, settings.force)
    wish = read_recipe(settings, settings.keep) if settings.plan is None else read_plan(settings)
    settle_data(settings, wish)
    if settings.refine is not None and settings.data is None:
        raise ArgumentError(
            "--refine trains on text or batches; give --data FILE, or self where the model writes text."
        )
    if isinstance(wish, Recipe):
        check_data(wish, settings)
    model, batches = _inputs(settings, cut=True)
    batches, measured = read_evaluation(settings, batches)
    batches = with_own_text(model, batches, settings)
    before = megabytes(model)
    with shown():
        if isinstance(wish, CompressionPlan):
            report = _carry_out(wish, settings, model, batches, measured)
        else:
            evaluation = None if measured is None else measured.evaluation()
            site = ProcessSite(model, batches, layers_at_once=settings.layers_at_once, evaluate=evaluation)
            report = operate(wish, site, Refinement.of(settings.refine))
    with shown(), doing("write"):
        write_model(model, report, source, output)
    if settings.plan is None:
        _note_what_is_not_known(settings, report.plan, measured)
    written = f"written to {output}: {before:,.1f} -> {megabytes(model):,.1f} MB of weights"
    loading = how_to_load(model, source, output, settings.model)
    show(settings, {"folder": str(output), "report": report.to_dict()}, report, written, loading)


def report(settings: Any) -> None:
    """Shows a report that ``compress`` or ``CompressionReport.save_json`` has written."""
    found = CompressionReport.load_json(_report_of(Path(settings.path)))
    if settings.metrics is not None and settings.html is None:
        raise ArgumentError("--metrics is for the page; give --html too.")
    if settings.bench is not None:
        found = found.with_latency(ModelLatency.load_json(settings.bench))
        found = found if found.scores is not None else found.with_scores(scores_in(settings.bench))
    pictures = [(file, to_png(found.figure(name))) for name, file in settings.png or []]  # all, before one is kept
    for file, picture in pictures:
        Path(file).write_bytes(picture)
    if settings.html is not None:
        found.save_html(settings.html, settings.metrics)
    show(settings, found.to_dict(), found)


def bench(settings: Any) -> None:
    """Measures the dense and the compressed model in turn."""
    check_compressed(Path(settings.compressed))
    dense, batches = _inputs(settings)
    with shown():
        with doing("read"):
            low = load_compressed(settings.compressed, load_model(settings.source, settings.model)).to(settings.device)
        sized = [example_batch(dense, batches, size, settings.max_length) for size in settings.batch_sizes]
        latency = compare_latencies(dense, low, sized)
        scores = compare_scores(settings, dense, low, batches, Path(settings.compressed) / REPORT)
    data = {**latency.to_dict(), "scores": None if scores is None else scores.to_dict()}
    show(settings, data, latency, *([] if scores is None else [scores.summary()]))


COMMANDS: dict[str, Callable[[Any], None]] = {"plan": plan, "compress": compress, "report": report, "bench": bench}


def _carry_out(
    plan: CompressionPlan, settings: Any, model: nn.Module, batches: Batches | None, measured: Measured | None
) -> CompressionReport:
    """A plan out of a file, with what lies beside it, or with data for another calibration."""
    at_once = settings.layers_at_once
    statistics: Mapping[str, LayerStatistics] | None
    if batches is None:
        statistics, folder = beside_plan(Path(settings.plan), plan, model)
        if settings.evaluate is None and folder is not None:
            measured = kept_evaluation(folder, settings.source)
    elif at_once is not None:
        raise ArgumentError("--layers-at-once has no effect on --plan with --data; plan anew with --output instead.")
    else:
        targets = Targets(planned_targets(model, plan), {}, None)
        site = ProcessSite(model, batches)
        statistics = site.observe(targets, plan.factorization.wanted)
        site.warn_of_few_tokens()
    evaluation = None if measured is None else measured.evaluation()
    refine, train_on = settings.refine, None if settings.refine is None else batches
    return apply_plan_(
        model, plan, statistics, layers_at_once=at_once, batches=train_on, refine=refine, evaluate=evaluation
    )


def _note_what_is_not_known(settings: Any, plan: CompressionPlan, measured: Measured | None) -> None:
    """Says once more what a cut was made without, where no warning has said it."""
    note_of_no_data(settings, plan)
    if settings.data is not None and measured is None and settings.evaluate is None:
        note(f"not measured: fewer than {FEWEST_ROWS} rows of --data; --evaluate FILE says what the model is worth.")


def _inputs(settings: Any, *, cut: bool = False) -> tuple[nn.Module, Batches | None]:
    with shown(), doing("read"):
        try:
            model = load_model(settings.source, settings.model, cut=cut).to(settings.device)
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, PrehabError):
                raise
            raise ArgumentError(f"--device {settings.device!r} cannot be used: {reason(error)}.") from error
        batches = None
        if settings.data not in (None, SELF):
            batches = read_batches(settings.data, settings.source, settings.batch_size, settings.max_length)
            _check_fit(model, batches[0], settings)
            text = Path(settings.data).suffix not in (".pt", ".safetensors")
            note(f"{settings.data}: {describe(batches, text=text)}")
    if settings.data == SELF:
        batches = own_text(model, settings)
    return model, batches


def _check_fit(model: nn.Module, batch: Any, settings: Any) -> None:
    """One forward pass, so that data of another model is refused in one sentence, not in the middle of the work."""
    way_out = "give other data, or for lines that are too long a smaller --max-length"
    with explained(batch, f"--data {settings.data}: the model", way_out), as_found(model), torch.no_grad():
        call_model(model, to_device(batch, torch.device(settings.device)))


def _report_of(path: Path) -> Path:
    """The report in a folder, or the file itself."""
    if not path.is_dir():
        if not path.exists():
            raise ArgumentError(f"{path} does not exist; give a folder that compress has written, or its {REPORT}.")
        return path
    if (path / REPORT).is_file():
        return path / REPORT
    if is_compressed(path):
        raise ArgumentError(
            f"{path} is a compressed model without its report; compress_ gives it, and report.save_json writes it."
        )
    if (path / "config.json").is_file():
        raise ArgumentError(
            f"{path} is a dense model, there is no report of it; lightning-prehab compress {path} --output FOLDER "
            "writes a compressed one with its report."
        )
    raise ArgumentError(f"{path} holds no {REPORT}; give a folder that compress has written.")
