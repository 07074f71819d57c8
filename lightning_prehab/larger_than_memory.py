"""Compression of a model on disk that is larger than memory."""

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_prehab.documents.checks import check_path
from lightning_prehab.errors import CheckpointError, StatisticsError
from lightning_prehab.linalg.modes import outside_inference_mode
from lightning_prehab.offload.chain import Chain
from lightning_prehab.offload.effort import Effort
from lightning_prehab.offload.needs import Needs, bytes_in, fitting_batches
from lightning_prehab.offload.refining import check_blocks_alone
from lightning_prehab.offload.site import FolderSite, check_possible
from lightning_prehab.offload.skeleton import Skeleton, Source
from lightning_prehab.offload.wish import describe_wish
from lightning_prehab.offload.work import FIT, Work
from lightning_prehab.offload.writer import FolderWriter, check_place, check_writable, is_over, written
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.progress import shown
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.road import operate
from lightning_prehab.statistics.batches import NO_BATCHES, check_batches


@outside_inference_mode
def compress_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    keep: float | Recipe = 0.5,
    data: Iterable[Any] | None = None,
    *,
    memory: int | str | None = None,
    refine: Refinement | bool | int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CompressionReport:
    """Compresses a model of transformers on disk, with one of its blocks in memory at a time.

    The result is the one of :func:`~lightning_prehab.compress_` with the same batches, to rounding: the blocks run one
    after the other over all batches, what lies between them is kept on disk, and gradients come back the same way. The
    new folder is one that ``from_pretrained`` and :func:`~lightning_prehab.load_compressed` load.

    What it takes in memory, on disk and of time is said first. Whatever ends the process, the same call goes on where
    it was: what is done lies in a folder beside the output, which goes when the output is there.

    Args:
        source: A Hugging Face folder: ``config.json`` and weights in safetensors, in one file or several, in any
            floating dtype. The model is computed in the dtype of its config.
        output: The folder to write.
        keep: Share of the targets' weight parameters to keep, in ``(0, 1]``, or a whole
            :class:`~lightning_prehab.Recipe`. Policies that try cuts on the whole model are refused.
        data: Calibration batches, as for :func:`~lightning_prehab.collect_statistics`; None only for methods that need
            none. All of them are kept in memory.
        memory: What it may take, in bytes or as ``"3GB"``, ``"2.5GiB"``: batches are then cut into smaller ones of
            fewer rows (the result is that of the smaller ones) and the layers of a block are observed a few at a time,
            as far as that is necessary. None takes batches and blocks as they are.
        refine: Train the blocks of the cut model, one after the other, toward the dense ones, on the same batches; see
            :class:`~lightning_prehab.Refinement` with ``scope="blocks"``, which None means here. True, a number of
            steps for each block, or all settings. ``scope="model"`` is refused: it needs the whole model in memory.
        overwrite: Replace a compressed model that is there already; anything else is left.
        progress: Show on standard error what it takes and what is being done, as in
            :func:`~lightning_prehab.compress_`.

    Returns:
        The report; it also lies in the folder. Nothing is measured, and no loss is predicted; of a refinement it says
        how far the outputs of the last block are from the dense ones, on rows that were held back.

    Raises:
        ArgumentError: If something cannot be used, if the output is there already, if ``memory`` is too little for the
            largest block (the numbers are named), or if another process works on the same.
        StatisticsError: If ``data`` is empty.
        CheckpointError: If a file cannot be read, or was changed in the meantime.
        UnsupportedError: If the model cannot be run block by block; the reason is named.
        PrehabError: Whatever ``compress_`` raises. The output is then not there.
    """
    check_path("source", source)
    check_path("output", output)
    refinement = Refinement.of(refine)
    if refinement is not None:
        check_blocks_alone(refinement)
        refinement = replace(refinement, scope="blocks")
    recipe, given = Recipe.of(keep), None if data is None else _batches(data)
    recipe = recipe.where_calibrated(given is not None)
    limit = bytes_in(memory)
    check_possible(recipe)
    source, output = Path(source), Path(output).resolve()
    skeleton = Skeleton(Source(source))
    chain = Chain(skeleton)
    needs = Needs.of(skeleton, chain, recipe, given, refinement)
    check_writable(output)
    wish = describe_wish(skeleton.source, recipe, given, limit, refinement)
    work = Work(output, wish)
    try:
        if is_over(work):
            known = written(work, output)
            work.clear()
            if known is not None:
                return known
            work = Work(output, wish)
        check_place(output, source, overwrite)
        batches, needs = fitting_batches(needs, given, limit, work.done(FIT))
        writer = FolderWriter(skeleton, chain, work, output)
        needs.check_disk(output, work)
        if work.done(FIT) is None:
            work.finish(FIT, needs.fit)
        if progress:
            seconds = Effort.of(skeleton, chain, recipe, batches, refinement).seconds()
            print("\n".join(needs.lines(work, seconds)), file=sys.stderr)
        site = FolderSite(skeleton, chain, batches, work, writer, needs.sums_at_most)
        with shown(progress):
            report = operate(recipe, site, refinement)
        if skeleton.source.facts() != wish["files"]:
            raise CheckpointError(f"{source} was changed while it was read, so nothing is written; call again.")
        writer.finish(report)
        return report
    finally:
        work.close()


def _batches(data: Iterable[Any]) -> list[Any]:
    """Raises unless there are some."""
    check_batches(data)
    found = list(data)
    if not found:
        raise StatisticsError(NO_BATCHES)
    return found
