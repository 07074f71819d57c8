"""Refines a whole model at once, end to end."""

from contextlib import nullcontext
from functools import partial

from lightning_prehab.refinement.checkpointing import checkpointed, is_due
from lightning_prehab.refinement.course import Course, Outcome
from lightning_prehab.refinement.exam import Exam
from lightning_prehab.refinement.pair import Pair
from lightning_prehab.refinement.sequences import Sequences
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.refinement.trained import balance_, parameters_to_train


def refine_model_(pair: Pair, sequences: Sequences, exam: Exam, refinement: Refinement) -> Outcome:
    """Trains all factors, norms and biases toward the answers of the teacher.

    Args:
        pair: The model and its teacher; the model is ready to be trained.
        sequences: What it is trained on.
        exam: What it is measured on.
        refinement: The settings.
    """
    parameters = parameters_to_train(pair.model, pair.stand_ins)
    steps = refinement.steps_in("model")
    twice = refinement.checkpointing
    exam.begin()
    if twice is None:
        twice = is_due(pair, sequences.training[0], parameters)
    with checkpointed(pair.model) if twice else nullcontext():
        return Course(parameters, steps, partial(_rate, pair, refinement), refinement.patience).run(
            sequences.order(steps),
            lambda number: pair.distance(sequences.training[number]).mean,
            exam.distance,
            lambda: balance_(pair.model),
            pair.stand_ins.came_further,
        )


def _rate(pair: Pair, refinement: Refinement, before: float) -> float:
    """The learning rate of the course, once it is known what is measured, and how much there is to win back."""
    return refinement.rate_in("model", before if pair.measure == "divergence" else None)
