"""Refines a model block by block (AA-SVD, 2026, https://arxiv.org/abs/2604.02119)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.progress import counted
from lightning_prehab.refinement.block_inputs import Call, record_calls
from lightning_prehab.refinement.blocks import find_blocks
from lightning_prehab.refinement.course import Course, Outcome
from lightning_prehab.refinement.distance import Distance, distance
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
    calls: Sequence[Call],
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

    def error(number: int, part: Any) -> Distance:
        output = _run(pair, block, calls[number], inputs[number])
        return distance("squared", output, right[number].to(output.device), part)

    @torch.no_grad()
    def measure() -> float:
        found = [error(first + number, part) for number, part in enumerate(sequences.held_back)]
        return sum(float(one.total) for one in found) / max(sum(one.weight for one in found), 1e-30)

    steps = refinement.steps_in("blocks")
    parameters = parameters_to_train(block, pair.stand_ins)
    return Course(parameters, steps, refinement.rate_in("blocks"), refinement.patience).run(
        sequences.order(steps),
        lambda number: error(number, sequences.training[number]).mean,
        measure,
        lambda: balance_(block),
        pair.stand_ins.came_further,
    )


def _dense_form(teacher: nn.Module, name: str) -> nn.Module:
    try:
        return teacher.get_submodule(name)
    except AttributeError as error:
        raise ArgumentError(f"The teacher has no block {name!r}; it must be the dense form of the model.") from error


def _record(
    pair: Pair, model: nn.Module, names: Sequence[str], blocks: Sequence[nn.Module], part: Any
) -> tuple[Tensor, list[Call]]:
    return record_calls(list(zip(names, blocks, strict=True)), lambda: pair.ask(model, part))


def _run(pair: Pair, block: nn.Module, call: Call, hidden: Tensor, dense: bool = False) -> Tensor:
    found: Tensor = pair.precisely(lambda: call.again(block, hidden), hidden.device, dense)
    return found
