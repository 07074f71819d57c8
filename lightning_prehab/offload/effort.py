"""About how long a folder takes here: counted work, and how fast a little of each kind is done on this machine."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.matrices import symmetric_eigh
from lightning_prehab.offload.chain import Chain
from lightning_prehab.offload.skeleton import Skeleton
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.refinement.course import MEASUREMENTS
from lightning_prehab.refinement.sequences import Sequences
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.refinement.teacher import in_half
from lightning_prehab.statistics.batches import count_positions
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import in_all_forms

#: Products of all tokens with all matrices: on the way forward; on the way back, where each block runs once more.
FORWARD, BACK = 1.0, 2.0
#: The same for the Gram matrices of what layers are fed with, and of the gradients of what they return: at most one
#: each, less where layers share their inputs (counted on a LLaMA).
GRAMS = 0.7
#: Products of the size of the weight and of its larger side that a decomposition takes beside the eigenproblem, in a
#: metric and without one (counted).
AROUND, ALONE = 4.0, 1.25
#: Rows and columns of what is measured, how often at least, and for how many seconds.
SIZE, REPEATS, ENOUGH = 512, 3, 0.2


@dataclass(frozen=True)
class Effort:
    """Work in numbers.

    Attributes:
        products: Multiplications and additions in matrix products, by dtype.
        eigen: Cubes of the sizes of eigenproblems, summed.
    """

    products: Mapping[torch.dtype, float]
    eigen: float

    @classmethod
    def of(
        cls,
        skeleton: Skeleton,
        chain: Chain,
        recipe: Recipe,
        batches: Sequence[Any] | None,
        refinement: Refinement | None = None,
    ) -> "Effort":
        """What the model, the wish and the data ask for."""
        model: Any = skeleton.model
        targets, method, wanted = recipe.find_targets(model), recipe.factorization_or_default, recipe.wanted
        dtype = next(iter(model.parameters())).dtype
        products: Counter[torch.dtype] = Counter()
        eigen = 0.0
        for target in in_all_forms(targets).values():
            m, n = view_of(target).shape
            times = method.rounds * (1 if method.is_nested(m, n) else 2)  # once more when the rank is known
            eigen += times * min(m, n) ** 3
            around = AROUND if any(wanted) else ALONE
            products[torch.float32] += times * around * 2 * m * n * max(m, n)  # type: ignore[assignment]
        if any(wanted) and batches:
            tokens = sum(map(count_positions, batches))
            passes = FORWARD + (BACK if wanted.backward else 0.0)
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            products[dtype] += 2 * tokens * passes * sum(map(_matrices, chain.blocks))  # type: ignore[assignment]
            if wanted.backward and head is not None:
                products[dtype] += 2 * tokens * BACK * _matrices(head)  # type: ignore[assignment]
            sums = GRAMS * (wanted.inputs + wanted.gradients)
            products[torch.float32] += 2 * tokens * sums * _cut(targets)  # type: ignore[assignment]
        if refinement is not None and batches:
            narrow = torch.bfloat16 if in_half(refinement, torch.device("cpu")) else torch.float32
            products[narrow] += _refined(chain, recipe, targets, Sequences(batches, refinement), refinement)  # type: ignore[assignment]
        return cls(products, eigen)

    def seconds(self) -> float:
        """About how long it takes, by a short measurement. Reading and writing are not in it."""
        found = self.eigen * _seconds_of_eigen() / SIZE**3
        for dtype, count in self.products.items():
            if count > 0:
                found += count * _seconds_of_product(dtype) / (2 * SIZE**3)
        return found


def _matrices(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters() if one.dim() > 1)


def _cut(targets: Targets) -> int:
    return sum(view_of(target).parameter.numel() for target in targets.values())


def _refined(chain: Chain, recipe: Recipe, targets: Targets, sequences: Sequences, refinement: Refinement) -> float:
    """Of all blocks: the dense form once, the cut one on its way, in training, and whenever it is measured."""
    whole = sum(map(_matrices, chain.blocks))
    keep = getattr(recipe.policy_or_default, "keep", recipe.keep)
    low = whole - (1.0 - keep) * _cut(targets)
    training, held = (sum(map(count_positions, part)) for part in (sequences.training, sequences.held_back))
    trained = refinement.steps_in("blocks") * training / max(len(sequences.training), 1)
    measured = (MEASUREMENTS + 3) * held  # before, after, on the way of the cut model that is not refined
    return 2 * ((training + held) * (whole + low) + (3 * trained + measured) * low)


def _seconds_of_product(dtype: torch.dtype) -> float:
    """Of one product of two square matrices."""
    one = torch.ones(SIZE, SIZE, dtype=dtype)
    return _mean_time(lambda: one @ one)


def _seconds_of_eigen() -> float:
    """Of one eigenproblem in float64."""
    source = torch.Generator().manual_seed(0)
    one = torch.randn(SIZE, SIZE, generator=source, dtype=torch.float64)
    return _mean_time(lambda: symmetric_eigh(one @ one.mT))


def _mean_time(work: Callable[[], object]) -> float:
    """With whatever else the machine does just now."""
    work()
    began, count = time.perf_counter(), 0
    while count < REPEATS or time.perf_counter() - began < ENOUGH:
        work()
        count += 1
    return (time.perf_counter() - began) / count
