"""What the command line writes and prints: folders, and the words that say how to load them."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_prehab.documents.folders import missing_around, remove_empty
from lightning_prehab.errors import ArgumentError
from lightning_prehab.files.beside import REPORT, copy_beside, write_index
from lightning_prehab.files.folders import STRUCTURE, save_compressed
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.report.compression_report import CompressionReport


def check_output(output: Path, force: bool) -> None:
    """Before any work: an existing folder is replaced only when asked, and only if it is one of ours."""
    inside = next((folder for folder in output.absolute().parents if (folder / STRUCTURE).is_file()), None)
    if inside is not None:
        raise ArgumentError(f"{output} lies inside {inside}, a compressed model; give another --output.")
    check_writable(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise ArgumentError(f"{output} exists; give --force to replace it, or another --output.")
    if not (output / STRUCTURE).is_file():
        raise ArgumentError(f"{output} does not hold a compressed model, so --force leaves it; give another --output.")


def check_writable(output: Path) -> None:
    """Raises :class:`ArgumentError` if nothing can be written there."""
    near = next(folder for folder in output.absolute().parents if folder.exists())
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        raise ArgumentError(f"{output} cannot be written: {near} is not a folder to write in.")


def write_model(model: nn.Module, report: CompressionReport, source: Path, output: Path) -> None:
    """Writes a compressed model into a folder, whole or not at all.

    One of a Hugging Face folder is one that ``from_pretrained`` reads too: the index of its weights names the file that
    ``save_compressed`` has written, so nothing is stored twice.
    """
    with beside(output) as work:
        made = save_compressed(model, work / "new", report)
        report.save_json(made / REPORT)
        if source.is_dir():
            _make_pretrained(model, source, made)
        if output.exists():
            os.replace(output, work / "old")
        try:
            os.replace(made, output)
        except BaseException:
            if (work / "old").exists():
                os.replace(work / "old", output)
            raise


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A folder beside the output, on the same disk, that is gone afterwards; on failure new ones around it are, too."""
    missing = missing_around(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        remove_empty(missing)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _make_pretrained(model: nn.Module, source: Path, folder: Path) -> None:
    """Adds to a folder of ``save_compressed`` what ``from_pretrained`` reads."""
    structure = json.loads((folder / STRUCTURE).read_bytes())
    weights = structure["weights"]["file"]
    write_index(folder, dict.fromkeys(structure["tensors"], weights), round(megabytes(model) * 1e6))
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    copy_beside(source, folder)


def megabytes(model: nn.Module) -> float:
    """Of the parameters of a model."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6


def how_to_load(model: nn.Module, source: Path, output: Path, class_path: str | None) -> str:
    """Lines of Python that load what was written."""
    if source.is_dir():
        name = _auto_class(model)
        lines = [
            "import lightning_prehab",
            f"from transformers import {name}",
            f'model = {name}.from_pretrained("{output}")',
        ]
    else:
        module, _, name = str(class_path).replace(":", ".").rpartition(".")
        dense = f'lp.load_from_checkpoint({name}, "{source}")'
        lines = [
            "import lightning_prehab as lp",
            f"from {module} import {name}",
            f'model = lp.load_compressed("{output}", {dense})',
        ]
    return "\n".join(["To load it:", *(f"    {line}" for line in lines)])


def _auto_class(model: nn.Module) -> str:
    """The class of transformers whose ``from_pretrained`` gives this model: an ``Auto`` one, where it does."""
    import transformers

    task = re.search(r"(For[A-Z]\w+|LMHeadModel)$", type(model).__name__)
    ending = "ForCausalLM" if task and task[0] == "LMHeadModel" else task[0] if task else ""
    auto: Any = getattr(transformers, f"AutoModel{ending}", None)
    known = getattr(auto, "_model_mapping", {})
    return auto.__name__ if known.get(type(model.config), None) is type(model) else type(model).__name__


def show(settings: Any, data: object, *shown: object) -> None:
    """Prints the data as JSON if asked, else what is shown, one after the other."""
    if settings.json:
        print(json.dumps(data, indent=1))
        return
    console = _terminal()
    for place, item in enumerate(shown):
        if place:
            print()
        if getattr(settings, "all", False) and isinstance(item, CompressionPlan | CompressionReport):
            item = item.table(every_layer=True)  # noqa: PLW2901
        if isinstance(item, str) or console is None:
            print(item)  # in files and pipes: whole lines, whatever the width
        else:
            console.print(item)


def note(text: str) -> None:
    """Says something that is no result."""
    print(text, file=sys.stderr)


def _terminal() -> Any:
    """Where rich can print; None if that is not installed, or the output goes somewhere else."""
    try:
        import rich.console
    except ImportError:
        return None
    console = rich.console.Console()
    return console if console.is_terminal else None
