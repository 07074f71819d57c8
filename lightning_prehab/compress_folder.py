"""Compression of a model on disk that is larger than memory."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.__about__ import __version__
from lightning_prehab.linalg.modes import outside_inference_mode
from lightning_prehab.offload.chain import Chain
from lightning_prehab.offload.site import FolderSite, check_possible
from lightning_prehab.offload.skeleton import Skeleton, Source
from lightning_prehab.offload.work import Work
from lightning_prehab.offload.writer import FolderWriter
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.progress import shown
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.road import operate
from lightning_prehab.statistics.batches import check_batches


@outside_inference_mode
def compress_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    keep: float | Recipe = 0.5,
    data: Iterable[Any] | None = None,
    *,
    memory: int | str | None = None,
    refine: None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CompressionReport:
    recipe = Recipe.of(keep).where_calibrated(data is not None)
    check_batches(data)
    check_possible(recipe)
    source, output = Path(source), Path(output)
    batches = None if data is None else list(data)
    skeleton = Skeleton(Source(source))
    chain = Chain(skeleton)
    work = Work(output, _wish(skeleton, recipe, batches))
    try:
        writer = FolderWriter(skeleton, chain, work, output)
        report = writer.written()
        if report is None:
            site = FolderSite(skeleton, chain, batches, work, writer)
            with shown(progress):
                report = operate(recipe, site)
            writer.finish(report)
        work.clear()
        return report
    finally:
        work.close()


def _wish(skeleton: Skeleton, recipe: Recipe, batches: list[Any] | None) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        "source": str(skeleton.source.folder.resolve()),
        "files": skeleton.source.facts(),
        "recipe": repr(recipe),
        "data": None if batches is None else _digest(batches),
        "versions": {"lightning_prehab": __version__, "torch": str(torch.__version__)},
    }


def _digest(batches: Any) -> str:
    """A checksum of nested tensors."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, Mapping):
            digest.update(repr([str(key) for key in part]).encode())
            for value in part.values():
                add(value)
        elif isinstance(part, tuple | list):
            digest.update(f"{len(part)}".encode())
            for value in part:
                add(value)
        else:
            digest.update(repr(part).encode())

    add(batches)
    return digest.hexdigest()
