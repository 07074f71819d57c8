"""Who works on which layer, where several processes share the spectral work of a model."""

from collections import Counter
from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.sharding import is_distributed, local_part
from lightning_prehab.plan.spectra import Solver
from lightning_prehab.targets.locate import Target

#: Of each entry of a weight while it is decomposed, in float64: the Gram matrix, vectors, and what they are made of.
WORKSPACE_BYTES = 32


def owners_of(targets: Mapping[str, Target], world_size: int) -> dict[str, int]:
    """The process of each target: the costliest target first, each to the process that has least to do so far.

    The busiest process then has at most ``4/3`` of what the best plan would give it (Graham, 1969), and a third of the
    costliest target less than that. The same everywhere, and in the order of the targets.

    >>> from torch import nn
    >>> layers = [nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 4), nn.Linear(8, 6)]
    >>> owners_of({str(index): layer for index, layer in enumerate(layers)}, 2)
    {'0': 0, '1': 1, '2': 1, '3': 1}
    """
    costs = {name: cost_of(target) for name, target in targets.items()}
    load = [0.0] * world_size
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):  # of equals the first one first: sorting is stable
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return {name: owners[name] for name in targets}


def cost_of(target: Target) -> float:
    """How long it takes to decompose a target, in products of its smaller side: ``m n min(m, n)`` for each group.

    One that has been cut before is decomposed by its factors, at its rank.
    """
    view = view_of(target)
    rows = view.out_features // view.group_count
    smaller = min(rows, view.in_features) if view.rank is None else view.rank
    return float(view.group_count * rows * view.in_features * smaller)


def in_rounds(targets: Mapping[str, Target], owners: Mapping[str, int]) -> list[list[str]]:
    """The names in rounds, in which each process has one to work on at most, those of a round of about equal cost.

    >>> from torch import nn
    >>> layers = {"a": nn.Linear(4, 4), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)}
    >>> in_rounds(layers, owners_of(layers, 2))
    [['b', 'c'], ['a']]
    """
    rounds: list[list[str]] = []
    done: Counter[int] = Counter()
    for name in sorted(targets, key=lambda name: -cost_of(targets[name])):
        number = done[owners[name]]
        done[owners[name]] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(name)
    return rounds


def say_memory(model: nn.Module, solver: Solver, owners: Mapping[str, int], world_size: int) -> None:
    """Says, once, what the work is going to take on each process beside the model and the optimizers, at most.

    Args:
        model: The model. Of sharded weights one is gathered at a time, and factors stay where they were computed.
        solver: What is to be decomposed.
        owners: By whom.
        world_size: How many processes there are; a single one says nothing.
    """
    if world_size == 1 or not owners:
        return
    sums = {id(t): t.nbytes for layer in (solver.statistics or {}).values() for _, t in layer.tensors()}
    kept: Counter[int] = Counter()
    made: Counter[int] = Counter()
    largest, sharded = 0, False
    for name, owner in owners.items():
        view = view_of(solver.targets[name])
        size, whole = view.parameter.dtype.itemsize, is_distributed(view.parameter)
        entries = solver.rank_limit(name) * (view.out_features + view.group_count * view.in_features)
        kept[owner] += entries * max(size, 4)
        made[owner] += entries * size
        largest = max(largest, view.out_features * view.in_features * (WORKSPACE_BYTES + whole * size))
        sharded |= whole
    weights = sum(local_part(parameter).nbytes for parameter in model.parameters())
    decomposing = {"sums": sum(sums.values()), "decompositions": max(kept.values()), "the largest layer": largest}
    trying = {"factors": max(made.values()) if sharded else sum(made.values())}
    if solver.factorization.comparable:
        trying["a copy of the model and its changes"] = 3 * weights
    (one, said), (other, also) = _listed(decomposing), _listed(trying)
    rank_zero_info(
        f"Surgery on {world_size} processes: beside model and optimizer each needs at most {max(one, other):,.1f} MB "
        f"({said}; later {also})."
    )


def _listed(parts: Mapping[str, int]) -> tuple[float, str]:
    """The sum in MB, and a list."""
    return sum(parts.values()) / 1e6, ", ".join(f"{what} {size / 1e6:,.1f}" for what, size in parts.items() if size)
