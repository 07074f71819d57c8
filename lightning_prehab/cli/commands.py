"""The command line: plan, compress, report and bench for Hugging Face folders and Lightning checkpoints.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 refused (the reason is one
sentence), 2 wrong arguments, 130 interrupted.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prehab.cli.arguments import build_parser, read_recipe
from lightning_prehab.cli.inputs import Batches, copy_settings, example_batch, load_model, read_batches
from lightning_prehab.errors import ArgumentError, PrehabError
from lightning_prehab.files.folders import STRUCTURE, load_compressed, save_compressed
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.figures import FIGURES, to_png
from lightning_prehab.report.latency import ModelLatency, compare_latencies
from lightning_prehab.road import operate, plan_budgets
from lightning_prehab.sites import ProcessSite
from lightning_prehab.statistics.batches import call_model, to_device
from lightning_prehab.statistics.calibration import as_found

#: Of a folder that ``compress`` has written.
REPORT = "report.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words of the command line; None takes those of the process.

    Returns:
        The exit code.
    """
    try:
        settings = build_parser().parse_args(arguments)
        command = settings.command
        _COMMANDS[command](settings[command])
    except PrehabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def plan(settings: Any) -> None:
    """What each budget would do; nothing is changed or written."""
    recipes = [read_recipe(settings, keep) for keep in settings.keep or [None]]
    model, batches = _inputs(settings)
    with _working("calibrating and decomposing"):
        plans = plan_budgets(recipes, ProcessSite(model, batches, layers_at_once=settings.layers_at_once))
    data = [{"keep": found.keep, "model_keep": found.model_keep, **found.to_dict()} for found in plans]
    _show(settings, {"plans": data}, *plans)


def compress(settings: Any) -> None:
    """Writes a compressed model and the report of it into a folder, whole or not at all."""
    output = Path(settings.output)
    _check_output(output, settings.force)
    recipe = read_recipe(settings, settings.keep)
    model, batches = _inputs(settings)
    with _working("compressing"):
        report = operate(recipe, ProcessSite(model, batches, layers_at_once=settings.layers_at_once))
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        made = save_compressed(model, work / "new", report)
        report.save_json(made / REPORT)
        copy_settings(Path(settings.source), made)
        if output.exists():
            os.replace(output, work / "old")
        try:
            os.replace(made, output)
        except BaseException:
            if (work / "old").exists():
                os.replace(work / "old", output)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _show(settings, {"folder": str(output), "report": report.to_dict()}, report, f"written to {output}")


def report(settings: Any) -> None:
    """Shows a report that ``compress`` or ``CompressionReport.save_json`` has written."""
    path = Path(settings.path)
    found = CompressionReport.load_json(path / REPORT if path.is_dir() else path)
    if settings.metrics is not None and settings.html is None:
        raise ArgumentError("--metrics is for the page; give --html too.")
    if settings.bench is not None:
        found = found.with_latency(ModelLatency.load_json(settings.bench))
    wishes = [wish.partition("=") for wish in settings.png or []]
    for name, _, file in wishes:
        if name not in FIGURES or not file:
            raise ArgumentError(
                f"--png takes NAME=FILE with a NAME of {', '.join(FIGURES)}, got {name!r} for {file!r}."
            )
    pictures = [(file, to_png(found.figure(name))) for name, _, file in wishes]  # all of them, before the first is kept
    for file, picture in pictures:
        Path(file).write_bytes(picture)
    if settings.html is not None:
        found.save_html(settings.html, settings.metrics)
    _show(settings, found.to_dict(), found)


def bench(settings: Any) -> None:
    """Measures the dense and the compressed model in turn."""
    if any(size < 1 for size in settings.batch_sizes):
        raise ArgumentError(f"--batch-sizes must be at least 1, got {settings.batch_sizes}.")
    dense, batches = _inputs(settings)
    low = load_compressed(settings.compressed, load_model(settings.source, settings.model)).to(settings.device)
    with _working("measuring"):
        sized = (example_batch(dense, batches, size, settings.max_length) for size in settings.batch_sizes)
        latency = compare_latencies(dense, low, sized)
    _show(settings, latency.to_dict(), latency)


_COMMANDS: dict[str, Callable[[Any], None]] = {"plan": plan, "compress": compress, "report": report, "bench": bench}


def _inputs(settings: Any) -> tuple[nn.Module, Batches | None]:
    if getattr(settings, "layers_at_once", None) is not None and settings.layers_at_once < 1:
        raise ArgumentError(f"--layers-at-once must be at least 1, got {settings.layers_at_once}.")
    if settings.batch_size < 1 or settings.max_length < 1:
        raise ArgumentError(
            f"--batch-size and --max-length must be at least 1, got {settings.batch_size} and {settings.max_length}."
        )
    if settings.device == "meta":
        raise ArgumentError("--device 'meta' cannot be used: it holds no values.")
    with _working("reading the model"):
        try:
            model = load_model(settings.source, settings.model).to(settings.device)
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, PrehabError):
                raise
            raise ArgumentError(f"--device {settings.device!r} cannot be used: {error}") from error
        batches = None
        if settings.data is not None:
            batches = read_batches(settings.data, settings.source, settings.batch_size, settings.max_length)
            _check_fit(model, batches[0], settings)
    return model, batches


def _check_fit(model: nn.Module, batch: Any, settings: Any) -> None:
    """One forward pass, so that data of another model is refused in one sentence, not in the middle of the work."""
    try:
        with as_found(model), torch.no_grad():
            call_model(model, to_device(batch, torch.device(settings.device)))
    except PrehabError:
        raise
    except Exception as error:  # whatever the user's model leads to
        raise ArgumentError(
            f"--data {settings.data}: the model cannot be called on its first batch ({type(error).__name__}: {error}); "
            "give other data, or for lines that are too long a smaller --max-length."
        ) from error


def _check_output(output: Path, force: bool) -> None:
    """Before any work: an existing folder is replaced only when asked, and only if it is one of ours."""
    inside = next((folder for folder in output.absolute().parents if (folder / STRUCTURE).is_file()), None)
    if inside is not None:
        raise ArgumentError(f"{output} lies inside {inside}, a compressed model; give another --output.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        near = next(folder for folder in output.absolute().parents if folder.exists())
        if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
            raise ArgumentError(f"{output} cannot be written: {near} is not a folder to write in.")
        return
    if not force:
        raise ArgumentError(f"{output} exists; give --force to replace it, or another --output.")
    if not (output / STRUCTURE).is_file():
        raise ArgumentError(f"{output} does not hold a compressed model, so --force leaves it; give another --output.")


def _show(settings: Any, data: object, *shown: object) -> None:
    if settings.json:
        print(json.dumps(data, indent=1))
        return
    import rich.console

    console = rich.console.Console()
    for place, item in enumerate(shown):
        if place:
            print()
        if getattr(settings, "all", False) and isinstance(item, CompressionPlan | CompressionReport):
            item = item.table(every_layer=True)  # noqa: PLW2901
        if isinstance(item, str) or not console.is_terminal:
            print(item)  # in files and pipes: whole lines, whatever the width
        else:
            console.print(item)


def _working(what: str) -> AbstractContextManager[object]:
    import rich.console

    return rich.console.Console(stderr=True).status(f"{what} ...")
