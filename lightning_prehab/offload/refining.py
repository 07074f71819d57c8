"""Refines the compressed model on disk: one block in memory at a time, its dense form first, then the cut one.

Hidden states go through three chains of files: those of the dense model, those of the compressed one, and, to tell what
it was worth before, on the rows held back, those of the compressed one without refinement. A refined block is written
beside the block as it was cut; which of them become the output is decided when the last one has been measured.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.errors import ArgumentError
from lightning_prehab.offload.chain import Call, Chain
from lightning_prehab.offload.skeleton import Skeleton
from lightning_prehab.offload.states import Each, States
from lightning_prehab.offload.sweep import entered
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

_DENSE, _CUT, _PLAIN = "refinement-dense", "refinement-cut", "refinement-plain"


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
        self._skeleton, self._dense, self._work, self._writer = skeleton, dense, work, writer
        self._sequences, self._refinement = sequences, refinement
        self._half = in_half(refinement, torch.device("cpu"))
        self._cut_chain, self._dense_chain = Chain(skeleton), Chain(dense)
        self._parts = [*sequences.training, *sequences.held_back]
        self._first = len(sequences.training)  # of the parts that are held back
        self._states, self._held = States(work), States(work)
        self._cut_calls: list[list[Call]] = []  # of each part, of each block
        self._dense_calls: list[list[Call]] = []

    def run(self) -> RefinementReport:
        """Refines what is not refined yet, and says what came of all of it."""
        known = self._work.done(REFINED)
        if known is not None:
            return RefinementReport.from_dict(known)
        names = self._cut_chain.names
        done = next((at for at, name in enumerate(names) if self._work.done(refined(name)) is None), len(names))
        self._enter(begin=done == 0)
        for _ in range(done):  # as if they were refined now
            list(self._sequences.order(self._refinement.steps_in("blocks")))
        for number in counted(range(done, len(names)), "refine blocks"):
            self._work.finish(refined(names[number]), self._refine(number))
            for kind in (_DENSE, _CUT, _PLAIN):
                self._states.remove(f"{kind}-{number}")
        report = self._report()
        self._work.finish(REFINED, report.to_dict())
        return report

    def _enter(self, begin: bool) -> None:
        """What the blocks are called with; the states before the first ones are written if they begin."""
        chains = ((self._dense_chain, self._dense_calls, _DENSE), (self._cut_chain, self._cut_calls, _CUT))
        for chain, calls, kind in chains:
            with self._states.writing(f"{kind}-0") if begin else nullcontext() as file:
                for number, part in enumerate(self._parts):
                    entrance = entered(chain, part, number)
                    calls.append(entrance.calls)
                    if kind == _CUT:
                        self._states.note(entrance.states)
                    if kind == _CUT and number >= self._first:
                        self._held.note(entrance.states)
                    if file is not None:
                        file.add(entrance.states)
            chain.rest()
        if begin:
            with self._held.writing(f"{_PLAIN}-0") as file:
                for states in self._states.all(f"{_CUT}-0")[self._first :]:
                    file.add(states)

    def _refine(self, number: int) -> dict[str, Any]:
        """Refines a block, and takes all states through it; the answer is the note of it."""
        began = time.perf_counter()
        block, dense = self._cut_chain.blocks[number], self._dense_chain.blocks[number]
        pair = Pair(block, dense, self._half)
        right = f"{_DENSE}-{number + 1}"
        if not self._states.is_there(right):
            with self._dense.loaded(dense):
                self._write(self._states, right, self._outputs(pair, number, _DENSE))
        with self._skeleton.loaded(block):
            self._write(self._held, f"{_PLAIN}-{number + 1}", self._outputs(pair, number, _PLAIN))
            outcome = self._train(pair, number, self._states.all(right))
            stored = self._writer.store(self._cut_chain.names[number]) if outcome.kept else None
            self._write(self._states, f"{_CUT}-{number + 1}", self._outputs(pair, number, _CUT))
        return {"stored": stored, **outcome._asdict(), "seconds": time.perf_counter() - began}

    def _train(self, pair: Pair, number: int, right: Sequence[Tensor]) -> Outcome:
        """Trains a block that is loaded, unless it comes to nothing."""
        calls: Sequence[Call] = [part[number] for part in self._cut_calls]
        inputs = self._states.all(f"{_CUT}-{number}")
        if any(map(is_short, pair.model.parameters())):  # it is trained in float32
            calls, inputs = Each(calls, Call.lifted), Each(inputs, Tensor.float)

        @torch.no_grad()
        def measure() -> float:
            outputs = self._outputs(pair, number, _CUT)[self._first :]
            return relative_error(outputs, right[self._first :], self._sequences.held_back)

        return attempt(
            pair,
            parameters_to_train(pair.model),
            lambda: refine_block_(pair, pair.model, calls, inputs, right, self._sequences, self._refinement),
            measure,
        )

    def _outputs(self, pair: Pair, number: int, kind: str) -> Sequence[Tensor]:
        """What a block that is loaded, as it is, makes of the states of one chain."""
        chain, calls = self._cut_chain, self._cut_calls
        states, parts = self._states, range(len(self._parts))
        if kind == _DENSE:
            chain, calls = self._dense_chain, self._dense_calls
        elif kind == _PLAIN:
            states, calls, parts = self._held, calls[self._first :], range(len(self._parts) - self._first)

        def output(part: int) -> Tensor:
            given = states.read(f"{kind}-{number}", part)
            run: Callable[[], Tensor] = partial(chain.run, number, given, calls[part][number])
            found: Tensor = pair.precisely(run, given.device, dense=kind == _DENSE)
            return found

        return Each(parts, output)

    @staticmethod
    @torch.no_grad()
    def _write(states: States, name: str, tensors: Sequence[Tensor]) -> None:
        with states.writing(name) as file:
            for tensor in counted(tensors, "forward"):
                file.add(tensor)

    def _report(self) -> RefinementReport:
        """Of the output of the last block."""
        names = self._cut_chain.names
        notes = [self._work.done(refined(name)) for name in names]
        right = self._states.all(f"{_DENSE}-{len(names)}")[self._first :]
        found = self._states.all(f"{_CUT}-{len(names)}")[self._first :]
        plain = self._held.all(f"{_PLAIN}-{len(names)}")
        before, after = (relative_error(one, right, self._sequences.held_back) for one in (plain, found))
        kept = after < before
        steps, seconds = (sum(note[name] for note in notes) for name in ("steps", "seconds"))
        end, data = after if kept else before, f"{self._sequences.data}, after the last block"
        return RefinementReport("blocks", "squared", before, end, steps, seconds, kept, data)
