"""The passes over a model on disk: forward block by block, then back, with what calibration sees of each on the way."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import StatisticsError
from lightning_prehab.offload.chain import Call, Chain, Entrance
from lightning_prehab.offload.skeleton import Skeleton
from lightning_prehab.offload.states import States
from lightning_prehab.offload.work import Work
from lightning_prehab.progress import counted
from lightning_prehab.statistics.backward import gradients_for
from lightning_prehab.statistics.batches import batch_size, explained
from lightning_prehab.statistics.calibration import loss_of
from lightning_prehab.statistics.collector import Collector
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.targets.locate import Target


class Sweep:
    """Runs the parts of a model one at a time over all batches, exactly as the whole model would run.

    The hidden states before each block lie on disk, in the dtype in which the model computes them; so do the gradients
    of the loss in them. With a backward pass the parts are observed from the last one to the first, else in the order
    of the model.

    Args:
        skeleton: The model.
        chain: Its blocks.
        batches: As calibration gets them.
        wanted: What is collected.
        work: Where everything lies.
    """

    def __init__(self, skeleton: Skeleton, chain: Chain, batches: Sequence[Any], wanted: Wanted, work: Work) -> None:
        self._skeleton, self._chain, self._batches, self._wanted = skeleton, chain, batches, wanted
        self._calls: list[list[Call]] = []  # of each batch, of each block
        self._states = States(work)
        if work.done("states-0"):
            self._enter(lambda states: None)
        else:
            with self._states.writing("states-0") as file:
                self._enter(file.add)
            work.finish("states-0")

    def _enter(self, take: Callable[[Tensor], None]) -> None:
        for batch in self._batches:
            entrance = entered(self._chain, batch)
            self._calls.append(entrance.calls)
            self._states.note(entrance.states)
            take(entrance.states)
        self._chain.rest()

    def forward(self, number: int) -> None:
        """Sees to it that the hidden states before a block are there."""
        missing = [at for at in range(number + 1) if not self._states.is_there(f"states-{at}")]
        there = [at for at in range(number + 1) if at not in missing]
        for at in counted(range(there[-1] + 1, number + 1), "forward"):
            block = self._chain.blocks[at - 1]
            with self._skeleton.loaded(block), self._states.writing(f"states-{at}") as file, torch.no_grad():
                for index in range(len(self._batches)):
                    states = self._states.read(f"states-{at - 1}", index)
                    with _asked(self._batches[index]):
                        found = self._chain.run(at - 1, states, self._calls[index][at - 1])
                    file.add(found)

    def block(self, number: int, targets: Mapping[str, Target]) -> dict[str, LayerStatistics]:
        """What calibration sees of targets in a block; what comes next is on disk then."""
        backward, chain = self._wanted.backward, self._chain
        if backward:
            self.forward(number)
        block = chain.blocks[number]
        name = f"gradients-{number}" if backward else f"states-{number + 1}"
        collector = Collector(targets, self._wanted, own_pass=True)
        with (
            self._skeleton.loaded(block),
            self._states.writing(name) as file,
            gradients_for(block, targets, backward, cheap=True),
            _collecting(collector),
        ):
            for index, batch in enumerate(counted(self._batches, "calibrate")):
                states = self._states.read(f"states-{number}", index).requires_grad_(backward)
                collector.begin_batch(batch, index)
                with torch.set_grad_enabled(backward), _asked(batch):
                    found = chain.run(number, states, self._calls[index][number])
                if backward:
                    gradient = self._states.read(f"gradients-{number + 1}", index)
                    found.backward(gradient)  # type: ignore[no-untyped-call]
                    block.zero_grad(set_to_none=True)
                    file.add(states.grad)
                else:
                    file.add(found)
                collector.end_batch()
        return collector.statistics

    def head(self, targets: Mapping[str, Target]) -> dict[str, LayerStatistics]:
        """The same of what comes after the blocks, where the loss and its gradient are computed."""
        backward, chain = self._wanted.backward, self._chain
        last = len(chain.blocks)
        self.forward(last)
        collector = Collector(targets, self._wanted, own_pass=True)
        generator = torch.Generator().manual_seed(0)  # of the labels, as in memory
        with self._observing(collector, targets), self._gradients(last) as file:
            for index, batch in enumerate(counted(self._batches, "calibrate")):
                states = self._states.read(f"states-{last}", index).requires_grad_(backward)
                collector.begin_batch(batch, index)
                with torch.set_grad_enabled(backward):
                    with _asked(batch):
                        output = chain.leave(batch, states)
                    if backward:
                        loss = loss_of(output, batch_size(batch), generator)
                        del output
                        if not loss.requires_grad:
                            raise StatisticsError("The loss does not depend on the blocks of the model.")
                        loss.backward()  # type: ignore[no-untyped-call]
                        self._model.zero_grad(set_to_none=True)
                        file.add(states.grad)
                        del loss
                collector.end_batch()
        return collector.statistics

    def front(self, targets: Mapping[str, Target]) -> dict[str, LayerStatistics]:
        """The same of what comes before the blocks."""
        backward, chain = self._wanted.backward, self._chain
        collector = Collector(targets, self._wanted, own_pass=True)
        with self._observing(collector, targets):
            for index, batch in enumerate(counted(self._batches, "calibrate")):
                collector.begin_batch(batch, index)
                with _asked(batch):
                    states = chain.enter(batch, differentiable=backward).states
                if backward:
                    states.backward(self._states.read("gradients-0", index))  # type: ignore[no-untyped-call]
                    self._model.zero_grad(set_to_none=True)
                collector.end_batch()
        return collector.statistics

    def passed(self, number: int) -> None:
        """Lets go of what only a block and those after it (with a backward pass) or before it need."""
        if self._wanted.backward:
            self._states.remove(f"states-{number + 1}")
            self._states.remove(f"gradients-{number + 1}")
        elif number:
            self._states.remove(f"states-{number}")

    @property
    def _model(self) -> nn.Module:
        return self._skeleton.model

    @contextmanager
    def _observing(self, collector: Collector, targets: Mapping[str, Target]) -> Iterator[None]:
        """Inside, the collector watches what lies outside of the blocks, which is loaded as it is needed."""
        try:
            with gradients_for(self._model, targets, self._wanted.backward, cheap=True), _collecting(collector):
                yield
        finally:
            self._chain.rest()

    @contextmanager
    def _gradients(self, number: int) -> Iterator[Any]:
        """The file of the gradients before a block, if there is a backward pass."""
        if not self._wanted.backward:
            yield None
            return
        with self._states.writing(f"gradients-{number}") as file:
            yield file


def _asked(batch: Any) -> AbstractContextManager[None]:
    """Inside, the model or a part of it works on a batch, and what it raises is told as such."""
    return explained(batch, way_out="give data of this model, in rows that are not too long for it")


def entered(chain: Chain, batch: Any) -> Entrance:
    """What the blocks are given for a batch.

    Raises:
        ArgumentError: If the model does not take it.
        UnsupportedError: If the blocks cannot be run one at a time.
    """
    with _asked(batch):
        return chain.enter(batch)


@contextmanager
def _collecting(collector: Collector) -> Iterator[None]:
    collector.attach()
    try:
        yield
    finally:
        collector.detach()
