"""Refines a model block by block (AA-SVD, 2026, https://arxiv.org/abs/2604.02119)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.progress import counted
from lightning_prehab.refinement.block_inputs import Call, Calling, record_calls
from lightning_prehab.refinement.blocks import find_blocks
from lightning_prehab.refinement.course import Course, Outcome
from lightning_prehab.refinement.distance import distance
from lightning_prehab.refinement.pair import Pair
from lightning_prehab.refinement.sequences import Sequences
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.refinement.trained import balance_, parameters_to_train


def refine_blocks_(pair: Pair, sequences: Sequences, refinement: Refinement) -> list[Outcome]:
    """Trains one block after the other.

    Each on the inputs that it gets in the cut network, toward what its dense form gives on those of the dense network;
    one that is not measured to be better on the rows held back keeps its old weights.

    Args:
        pair: The model and its teacher; the model is ready to be trained.
        sequences: What it is trained and measured on.
        refinement: The settings.

    Returns:
        What came of each block.

    Raises:
        UnsupportedError: If the blocks do not run one after the other.
        TargetError: If there are none.
        ArgumentError: If the teacher has others.
    """
    names = [name for name, _ in find_blocks(pair.model)]
    ours = [pair.model.get_submodule(name) for name in names]
    dense = [_dense_form(pair.teacher, name) for name in names]
    parts = [*sequences.training, *sequences.held_back]
    theirs = [_record(pair, pair.teacher, names, dense, part) for part in parts]
    own = [_record(pair, pair.model, names, ours, part) for part in parts]
    right, inputs = [hidden for hidden, _ in theirs], [hidden for hidden, _ in own]
    outcomes = []
    for place in counted(range(len(names)), "refine blocks"):
        with torch.no_grad():
            right = [
                _run(pair, dense[place], calls[place], x, True) for x, (_, calls) in zip(right, theirs, strict=True)
            ]
        calls = [found[place] for _, found in own]
        outcomes.append(refine_block_(pair, ours[place], calls, inputs, right, sequences, refinement))
        with torch.no_grad():
            inputs = [_run(pair, ours[place], call, x) for call, x in zip(calls, inputs, strict=True)]
    return outcomes


def refine_block_(
    pair: Pair,
    block: nn.Module,
    calls: Sequence[Calling],
    inputs: Sequence[Tensor],
    right: Sequence[Tensor],
    sequences: Sequences,
    refinement: Refinement,
) -> Outcome:
    """Trains one block.

    Args:
        pair: For the precision.
        block: What is trained.
        calls: How it is called, for each part of the sequences: first those of training, then those held back.
        inputs: Hidden states that it is given.
        right: What it should make of them.
        sequences: Of these parts.
        refinement: The settings.
    """
    first = len(sequences.training)
    steps = refinement.steps_in("blocks")
    order = list(sequences.order(steps))  # whatever comes of it: the next block begins where this one ends

    def run_on(number: int) -> Tensor:
        return _run(pair, block, calls[number], inputs[number])

    def loss_of(number: int) -> Tensor:
        output = run_on(number)
        return distance("squared", output, right[number].to(output.device), sequences.training[number]).mean

    @torch.no_grad()
    def measure() -> float:
        numbers = range(first, first + len(sequences.held_back))
        return relative_error(map(run_on, numbers), (right[number] for number in numbers), sequences.held_back)

    parameters = parameters_to_train(block, pair.stand_ins)
    if not parameters:
        before = measure()
        return Outcome(before, before, 0, False, "there is nothing to train")
    return Course(parameters, steps, refinement.rate_in("blocks"), refinement.patience).run(
        order, loss_of, measure, lambda: balance_(block), pair.stand_ins.came_further
    )


def relative_error(outputs: Iterable[Tensor], right: Iterable[Tensor], parts: Sequence[Any]) -> float:
    """The squared error of hidden states, relative to the square of the right ones.

    Args:
        outputs: One for each part.
        right: What they should be.
        parts: What both were made of: positions that are padding do not count.
    """
    found = [distance("squared", x, y.to(x.device), part) for x, y, part in zip(outputs, right, parts, strict=True)]
    return sum(float(one.total) for one in found) / max(sum(one.weight for one in found), 1e-30)


def _dense_form(teacher: nn.Module, name: str) -> nn.Module:
    try:
        return teacher.get_submodule(name)
    except AttributeError as error:
        raise ArgumentError(f"The teacher has no block {name!r}; it must be the dense form of the model.") from error


def _record(
    pair: Pair, model: nn.Module, names: Sequence[str], blocks: Sequence[nn.Module], part: Any
) -> tuple[Tensor, list[Call]]:
    return record_calls(list(zip(names, blocks, strict=True)), lambda: pair.ask(model, part))


def _run(pair: Pair, block: nn.Module, call: Calling, hidden: Tensor, dense: bool = False) -> Tensor:
    found: Tensor = pair.precisely(lambda: call.again(block, hidden), hidden.device, dense)
    return found
