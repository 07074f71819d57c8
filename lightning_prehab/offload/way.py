"""Hidden states on their way through the blocks of a model, which is read block by block."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.offload.chain import Call, Chain
from lightning_prehab.offload.states import Each, States
from lightning_prehab.offload.sweep import entered
from lightning_prehab.offload.work import Work
from lightning_prehab.progress import counted
from lightning_prehab.refinement.pair import Pair


class Way:
    """One file of hidden states before each block, with what the blocks are called with beside them.

    Args:
        name: Of the files.
        chain: The blocks.
        parts: What the model is called on.
        work: Where the files lie.
    """

    def __init__(self, name: str, chain: Chain, parts: Sequence[Any], work: Work) -> None:
        self.chain, self._name, self._parts = chain, name, parts
        self._states = States(work)
        self._calls: list[list[Call]] = []  # of each part, of each block

    def enter(self, begin: bool) -> None:
        """Learns what the blocks are called with; the states before the first one are written if it begins."""
        with self._states.writing(self._file(0)) if begin else nullcontext() as file:
            for part in self._parts:
                entrance = entered(self.chain, part)
                self._calls.append(entrance.calls)
                self._states.note(entrance.states)
                if file is not None:
                    file.add(entrance.states)
        self.chain.rest()

    def calls(self, number: int) -> list[Call]:
        """What a block is called with."""
        return [calls[number] for calls in self._calls]

    def states(self, number: int) -> Sequence[Tensor]:
        """Hidden states before a block; of the number of blocks those after the last one."""
        return self._states.all(self._file(number))

    def has_passed(self, number: int) -> bool:
        """Whether the states after a block are there."""
        return self._states.is_there(self._file(number + 1))

    def outputs(self, number: int, pair: Pair, dense: bool = False) -> Sequence[Tensor]:
        """What a block that is loaded makes of them, as it is now."""
        states, calls = self.states(number), self.calls(number)

        def output(part: int) -> Tensor:
            run = partial(self.chain.run, number, states[part], calls[part])
            found: Tensor = pair.precisely(run, pair.device, dense)
            return found

        return Each(range(len(calls)), output)

    @torch.no_grad()
    def go(self, number: int, pair: Pair, dense: bool = False) -> None:
        """Writes what a block that is loaded makes of them."""
        with self._states.writing(self._file(number + 1)) as file:
            for found in counted(self.outputs(number, pair, dense), "forward"):
                file.add(found)

    def leave(self, number: int) -> None:
        """Lets go of the states before a block."""
        self._states.remove(self._file(number))

    def _file(self, number: int) -> str:
        return f"refinement-{self._name}-{number}"
