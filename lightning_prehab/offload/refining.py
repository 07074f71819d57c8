"""Refines the compressed model on disk: one block in memory at a time, its dense form first, then the cut one.

Hidden states go through three chains of files: those of the dense model, those of the compressed one, and, to tell what
it was worth before, on the rows held back, those of the compressed one without refinement. A refined block is written
beside the block as it was cut; which of them become the output is decided when the last one has been measured.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.errors import ArgumentError
from lightning_prehab.offload.chain import Call, Chain
from lightning_prehab.offload.skeleton import Skeleton
from lightning_prehab.offload.states import Each
from lightning_prehab.offload.way import Way
from lightning_prehab.offload.work import Work
from lightning_prehab.offload.writer import REFINED, FolderWriter, refined
from lightning_prehab.progress import counted
from lightning_prehab.refinement.attempt import attempt
from lightning_prehab.refinement.block_scope import refine_block_, relative_error
from lightning_prehab.refinement.course import Outcome
from lightning_prehab.refinement.pair import Pair
from lightning_prehab.refinement.sequences import Sequences
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.refinement.teacher import in_half
from lightning_prehab.refinement.trained import is_short, parameters_to_train
from lightning_prehab.report.refined import RefinementReport


def check_blocks_alone(refinement: Refinement) -> None:
    """Raises :class:`ArgumentError` for what needs the whole model in memory."""
    if refinement.scope == "model":
        raise ArgumentError(
            "Refinement(scope='model') trains all blocks at once, and of a folder one is in memory at a time; leave "
            "scope out, or say scope='blocks'."
        )
    if refinement.measure == "divergence":
        raise ArgumentError(
            "Refinement(measure='divergence') compares the predictions of whole models, and blocks are refined toward "
            "their hidden states here; leave measure out."
        )


class FolderRefinement:
    """The blocks of a compressed model, refined one after the other; what is done stays done.

    Args:
        skeleton: The compressed model, loaded from what the writer has written.
        dense: The dense one.
        sequences: What is trained and measured on.
        refinement: The settings.
        work: The folder for what is not finished.
        writer: Writes refined blocks.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        dense: Skeleton,
        sequences: Sequences,
        refinement: Refinement,
        work: Work,
        writer: FolderWriter,
    ) -> None:
        self._skeleton, self._dense_skeleton, self._work, self._writer = skeleton, dense, work, writer
        self._sequences, self._refinement = sequences, refinement
        self._half = in_half(refinement, torch.device("cpu"))
        parts, chain = [*sequences.training, *sequences.held_back], Chain(skeleton)
        self._first = len(sequences.training)  # of the parts that are held back
        self._dense = Way("dense", Chain(dense), parts, work)
        self._cut = Way("cut", chain, parts, work)
        self._plain = Way("plain", chain, sequences.held_back, work)
        self._ways = (self._dense, self._cut, self._plain)

    def run(self) -> RefinementReport:
        """Refines what is not refined yet, and says what came of all of it."""
        known = self._work.done(REFINED)
        if known is not None:
            return RefinementReport.from_dict(known)
        names = self._cut.chain.names
        done = next((at for at, name in enumerate(names) if self._work.done(refined(name)) is None), len(names))
        for way in self._ways:
            way.enter(begin=done == 0)
        for _ in range(done):  # as if they were refined now
            list(self._sequences.order(self._refinement.steps_in("blocks")))
        for number in counted(range(done, len(names)), "refine blocks"):
            self._work.finish(refined(names[number]), self._refine(number))
            for way in self._ways:
                way.leave(number)
        report = self._report()
        self._work.finish(REFINED, report.to_dict())
        return report

    def _refine(self, number: int) -> dict[str, Any]:
        """Refines a block, and takes all states through it; the answer is the note of it."""
        began = time.perf_counter()
        block, dense = self._cut.chain.blocks[number], self._dense.chain.blocks[number]
        pair = Pair(block, dense, self._half)
        if not self._dense.has_passed(number):
            with self._dense_skeleton.loaded(dense):
                self._dense.go(number, pair, dense=True)
        with self._skeleton.loaded(block):
            self._plain.go(number, pair)
            outcome = self._train(pair, number)
            stored = self._writer.store(self._cut.chain.names[number]) if outcome.kept else None
            self._cut.go(number, pair)
        return {"stored": stored, **outcome._asdict(), "seconds": time.perf_counter() - began}

    def _train(self, pair: Pair, number: int) -> Outcome:
        """Trains a block that is loaded, unless it comes to nothing."""
        calls: Sequence[Call] = self._cut.calls(number)
        inputs, right = self._cut.states(number), self._dense.states(number + 1)
        if any(map(is_short, pair.model.parameters())):  # it is trained in float32
            calls, inputs = Each(calls, Call.lifted), Each(inputs, Tensor.float)

        @torch.no_grad()
        def measure() -> float:
            return self._error(self._cut.outputs(number, pair)[self._first :], number)

        return attempt(
            pair,
            parameters_to_train(pair.model),
            lambda: refine_block_(pair, pair.model, calls, inputs, right, self._sequences, self._refinement),
            measure,
        )

    def _error(self, outputs: Sequence[Tensor], number: int) -> float:
        """How far what a block returns is from what its dense form does, on the parts that are held back."""
        return relative_error(outputs, self._dense.states(number + 1)[self._first :], self._sequences.held_back)

    def _report(self) -> RefinementReport:
        """Of the output of the last block."""
        names = self._cut.chain.names
        count, notes = len(names), [self._work.done(refined(name)) for name in names]
        before = self._error(self._plain.states(count), count - 1)
        after = self._error(self._cut.states(count)[self._first :], count - 1)
        kept = after < before
        steps, seconds = (sum(note[name] for note in notes) for name in ("steps", "seconds"))
        end, data = after if kept else before, f"{self._sequences.data}, after the last block"
        return RefinementReport("blocks", "squared", before, end, steps, seconds, kept, data)
