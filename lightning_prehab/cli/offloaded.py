"""``compress --offload``: a folder that is larger than memory."""

from pathlib import Path
from typing import Any

from lightning_prehab.cli.calibration_text import NONE, SELF, check_data, note_of_no_data
from lightning_prehab.cli.inputs import describe, is_compressed, read_batches
from lightning_prehab.cli.outputs import check_output, how_to_load, note, show
from lightning_prehab.cli.recipes import read_recipe
from lightning_prehab.errors import ArgumentError
from lightning_prehab.larger_than_memory import compress_folder
from lightning_prehab.offload.site import check_possible
from lightning_prehab.offload.skeleton import Skeleton, Source

#: Options that need the whole model in memory, and why.
_NOT_HERE = {
    "plan": "--offload plans by itself; leave --plan out",
    "model": "--offload is for Hugging Face folders; leave --model out",
    "trials": "--trials tries cuts on the whole model, and --offload never has it in memory; leave one out",
    "self_sequences": "--self-sequences has the whole model write text, and --offload never has it; leave one out",
    "self_share": "--self-share has the whole model write text, and --offload never has it in memory; leave one out",
    "layers_at_once": "--offload chooses by --memory how many layers it observes at a time; leave --layers-at-once out",
}


def compress_offloaded(settings: Any) -> None:
    """Writes a compressed folder and the report of it, with one block of the model in memory at a time."""
    source, output = Path(settings.source), Path(settings.output)
    for name, way_out in _NOT_HERE.items():
        if getattr(settings, name) is not None:
            raise ArgumentError(f"{way_out}.")
    if settings.evaluate:
        raise ArgumentError("--evaluate needs the whole model in memory, and --offload never has it; leave one out.")
    if settings.device != "cpu":
        raise ArgumentError(f"--offload computes on the CPU, not on {settings.device!r}; leave --device out.")
    if not source.is_dir():
        raise ArgumentError(f"{source} is no folder; --offload is for Hugging Face folders with safetensors.")
    if is_compressed(source):
        raise ArgumentError(
            f"{source} is compressed already: give the dense model that it was made of, or leave out "
            "--offload for a deeper cut."
        )
    check_output(output, settings.force)
    recipe = read_recipe(settings, settings.keep)
    if settings.data == SELF:
        raise ArgumentError(
            f"--data {SELF} has the whole model write text, and --offload never has it in memory; give --data FILE."
        )
    if settings.data == NONE:
        settings.data = None
    check_possible(recipe)
    check_data(recipe, settings)
    if settings.refine is not None and settings.data is None:
        raise ArgumentError("--refine trains on text or batches; with --offload give --data FILE.")
    batches = None
    if settings.data is not None:
        batches = read_batches(settings.data, settings.source, settings.batch_size, settings.max_length)
        text = Path(settings.data).suffix not in (".pt", ".safetensors")
        note(f"{settings.data}: {describe(batches, text=text)}")
    given = {"memory": settings.memory, "refine": settings.refine, "overwrite": settings.force}
    report = compress_folder(source, output, recipe, batches, **given)
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6 for folder in (source, output)]
    note_of_no_data(settings, report.plan)
    written = f"written to {output}: {sizes[0]:,.1f} -> {sizes[1]:,.1f} MB of weights"
    loading = how_to_load(Skeleton(Source(source)).model, source, output, None)
    show(settings, {"folder": str(output), "report": report.to_dict()}, report, written, loading)
