"""Writes the compressed folder, one file for each block, as they are cut."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.files.beside import REPORT, copy_beside, write_index
from lightning_prehab.files.folders import STRUCTURE, describe_structure
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.offload.chain import Chain
from lightning_prehab.offload.skeleton import Skeleton, nothing_of
from lightning_prehab.offload.tensors import Written, entries_in, write_tensors
from lightning_prehab.offload.work import Work
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.progress import counted
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.origin import Origin
from lightning_prehab.surgery.structure import follow_state_dict_
from lightning_prehab.surgery.swap import swap_
from lightning_prehab.targets.find import count_parameters
from lightning_prehab.targets.locate import locate

#: The stage after which the new folder is whole; its note is the checksum of the structure.
COMPLETE = "complete"
#: The stage after which all blocks are refined.
REFINED = "refined"


def refined(place: str) -> str:
    """The stage after which a block is refined."""
    return f"{REFINED}-{place}"


def check_writable(output: Path) -> None:
    """Raises :class:`ArgumentError` if nothing can be written beside the output."""
    near = next(folder for folder in output.parents if folder.exists())
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        raise ArgumentError(f"{output} cannot be written: {near} is not a folder to write in.")


def check_place(output: Path, source: Path, overwrite: bool) -> None:
    """Before any work: whether the output may be written.

    Raises:
        ArgumentError: If something is there already.
    """
    if output.resolve() == source.resolve():
        raise ArgumentError(f"{output} is the model that is read; give another output.")
    inside = next((folder for folder in output.parents if (folder / STRUCTURE).is_file()), None)
    if inside is not None:
        raise ArgumentError(f"{output} lies inside {inside}, a compressed model; give another output.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ArgumentError(f"{output} exists; give overwrite=True (--force) to replace it, or another output.")
    if not (output / STRUCTURE).is_file():
        raise ArgumentError(f"{output} holds no compressed model, so it is left as it is; give another output.")


def is_over(work: Work) -> bool:
    """Whether the process ended right after the new folder was put in its place, with nothing left but to clear up."""
    return work.done(COMPLETE) is not None and not _new(work).exists()


def written(work: Work, output: Path) -> CompressionReport | None:
    """The report of the folder that was put in its place; None if it is not there any more, or another one is."""
    structure = output / STRUCTURE
    if not structure.is_file() or _checksum(structure) != work.done(COMPLETE):
        return None
    return CompressionReport.load_json(output / REPORT)


class FolderWriter:
    """Cuts a model part by part, each written before the next one is read, and puts the folder in its place.

    Args:
        skeleton: The model.
        chain: Its blocks.
        work: The folder for what is not finished.
        output: The folder to write, whole or not at all; one that is there is replaced.
    """

    def __init__(self, skeleton: Skeleton, chain: Chain, work: Work, output: Path) -> None:
        self._skeleton, self._chain, self._work, self._output = skeleton, chain, work, output
        self._new = _new(work)

    def write(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> CompressionReport:
        """Cuts and writes everything but the report, see :meth:`finish`; what was written before is left as it is.

        Args:
            plan: Of the whole model.
            factors: Of a layer that is in memory.
        """
        self._new.mkdir(exist_ok=True)
        wish = [layer.to_dict() for layer in plan.layers]
        if self._work.done("plan") != wish:  # a policy that measures times may decide otherwise
            for place in self._places():
                for stage in (f"shard-{place}", refined(place), REFINED):
                    self._work.remove(f"{stage}.done")
            self._work.finish("plan", wish)
        before = count_parameters(self._skeleton.model)
        errors: dict[str, float] = {}
        for place in counted(self._places(), "write"):
            errors |= self._write(place, plan, factors)
        names = [layer.name for layer in plan.layers if layer.rank is not None]
        model = self._skeleton.model
        ordered = {name: errors[name] for name in names}
        return CompressionReport(plan, ordered, before, count_parameters(model), origin=Origin.of(model))

    def adopt(self) -> None:
        """Lets the model be loaded from what has been written."""
        for place in self._places():
            file = self._file_of(place)
            if file is not None:
                self._skeleton.adopt(entries_in(file))

    def store(self, place: str) -> dict[str, Any]:
        """Writes a part that is loaded as it is now, beside what was written of it before.

        Returns:
            The file and its checksum: in the note of a refined part they take the place of the others.
        """
        return self._store(self._tensors_of(place)[0])

    def finish(self, report: CompressionReport) -> None:
        """Writes what lies beside the weights, and puts the folder in its place."""
        notes = [self._work.done(f"shard-{place}") for place in self._places()]
        if report.refinement is not None and report.refinement.kept:
            notes = [
                {**note, **((self._work.done(refined(place)) or {}).get("stored") or {})}
                for place, note in zip(self._places(), notes, strict=True)
            ]
        files = {note["file"]: note["sha256"] for note in notes if note["file"] is not None}
        tensors = {name: one for note in notes for name, one in note["tensors"].items()}
        aliases = {name: first for note in notes for name, first in note["aliases"].items()}
        model: Any = self._skeleton.model
        for old in self._new.iterdir():  # of another plan
            if old.name not in files and old.suffix == ".safetensors":
                old.unlink()
        structure = describe_structure(model, report, files, tensors, aliases)
        (self._new / STRUCTURE).write_text(structure, encoding="utf-8")
        report.save_json(self._new / REPORT)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(self._new)
        where = {name: note["file"] for note in notes for name in note["tensors"]}
        write_index(self._new, where, sum(p.numel() * p.element_size() for p in model.parameters()))
        copy_beside(self._skeleton.source.folder, self._new)
        self._work.finish(COMPLETE, _checksum(self._new / STRUCTURE))
        self._work.remove("old")
        old_output = self._work.folder / "old"
        if self._output.exists():
            os.replace(self._output, old_output)
        os.replace(self._new, self._output)
        self._work.clear()

    def _places(self) -> list[str]:
        return ["around", *self._chain.names]

    def _write(self, place: str, plan: CompressionPlan, factors: Mapping[str, Factors]) -> dict[str, float]:
        """Cuts and writes what lies in a block, or around all of them; the answer is the errors of its layers."""
        note = self._work.done(f"shard-{place}")
        if note is None:
            note = self._cut(place, plan, factors)
            self._work.finish(f"shard-{place}", note)
        elif note["file"] is not None and note["errors"]:
            self._follow(place)
        errors: dict[str, float] = note["errors"]
        return errors

    def _cut(self, place: str, plan: CompressionPlan, factors: Mapping[str, Factors]) -> dict[str, Any]:
        skeleton, model = self._skeleton, self._skeleton.model
        mine = replace(plan, layers=tuple(layer for layer in plan.layers if self._place_of(layer.name) == place))
        cuts = [layer.name for layer in mine.layers if layer.rank is not None]
        modules = [model.get_submodule(place)] if place in self._chain.names else _modules(model, mine)
        errors: Mapping[str, float] = {}
        with skeleton.loaded(*modules):
            if cuts:
                errors = swap_(model, mine, {name: factors[name] for name in cuts}).weight_errors
            tensors, aliases = self._tensors_of(place)
            stored = self._store(tensors)
        described = {name: {"shape": list(one.shape), "dtype": str(one.dtype)} for name, one in tensors.items()}
        return {
            **stored,
            "tensors": described,
            "aliases": aliases,
            "errors": dict(errors),
        }

    def _store(self, tensors: Mapping[str, Written]) -> dict[str, Any]:
        if not tensors:
            return {"file": None, "sha256": None}
        with self._work.writing("shard.safetensors") as path:
            digest = write_tensors(path, tensors)
        file = f"weights-{digest[:16]}.safetensors"
        os.replace(self._work.folder / "shard.safetensors", self._new / file)
        return {"file": file, "sha256": digest}

    def _tensors_of(self, place: str) -> tuple[dict[str, Written], dict[str, str]]:
        """The entries of the state dict that belong to a place, tied ones once, and their other names."""
        first: dict[int, str] = {}
        found: dict[str, Written] = {}
        aliases: dict[str, str] = {}
        for name, tensor in self._skeleton.model.state_dict(keep_vars=True).items():
            known = first.setdefault(id(tensor), name)
            if self._place_of(name) != place:
                continue
            if known != name:
                aliases[name] = known
            else:
                found[name] = self._skeleton.written(tensor)
        return found, aliases

    def _place_of(self, name: str) -> str:
        block = self._chain.place_of(name)
        return "around" if block is None else self._chain.names[block]

    def _file_of(self, place: str) -> Path | None:
        """What was written of a part, cut or refined: both have one structure, and in the end one of them is left."""
        notes = (self._work.done(f"shard-{place}"), (self._work.done(refined(place)) or {}).get("stored"))
        files = [self._new / note["file"] for note in notes if note and note["file"] is not None]
        return next((file for file in files if file.is_file()), None)

    def _follow(self, place: str) -> None:
        """Gives the model the structure of a part that was cut before."""
        file = self._file_of(place)
        assert file is not None
        entries = entries_in(file)
        state: dict[str, Tensor] = {
            name: nothing_of(one.shape, one.dtype) if one.dtype.is_floating_point else one.read()
            for name, one in entries.items()
        }
        follow_state_dict_(self._skeleton.model, state)
        self._skeleton.unload(self._skeleton.model)


def _new(work: Work) -> Path:
    """Where the folder is written."""
    return work.folder / "new"


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _modules(model: nn.Module, plan: CompressionPlan) -> list[nn.Module]:
    """The layers that a plan cuts."""
    cuts = {layer.name: (layer.out_features, layer.in_features) for layer in plan.layers if layer.rank is not None}
    return [layer.module for layer, _ in locate(model, cuts).values()]
