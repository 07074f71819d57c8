"""Layers in shards, each whole on one process that works on it: in rounds, so that none has more than one at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import lightning.pytorch as pl

from lightning_prehab.callbacks._distributed import merge, together
from lightning_prehab.callbacks._owners import in_rounds
from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.plan.spectra import Solution, Solver, Spectrum
from lightning_prehab.sharded.gathered import gathered_on
from lightning_prehab.targets.locate import Target

T = TypeVar("T")
W = TypeVar("W")


def whole_in_rounds(
    trainer: "pl.Trainer",
    targets: Mapping[str, Target],
    owners: Mapping[str, int],
    gather: Callable[[str], W | None],
    work: Callable[[Mapping[str, W]], T],
) -> Iterator[tuple[list[str], T]]:
    """Puts layer after layer together and works on them; what was whole is gone before the next round.

    Args:
        trainer: The running Trainer.
        targets: The layers, of all processes the same, in the same order.
        owners: Who works on which.
        gather: Puts one together; None where another process works on it. Collective.
        work: Given those that are whole on this process: one, or none. What it raises on one is raised on all.

    Yields:
        The names of a round, and the answer of this process.
    """
    for names in in_rounds(targets, owners):
        yield names, _one_round(trainer, names, gather, work)


def _one_round(
    trainer: "pl.Trainer",
    names: Sequence[str],
    gather: Callable[[str], W | None],
    work: Callable[[Mapping[str, W]], T],
) -> T:
    wholes = {name: whole for name in names if (whole := gather(name)) is not None}
    return together(trainer, lambda: work(wholes))


def decompose_in_rounds(
    trainer: "pl.Trainer",
    solver: Solver,
    owners: Mapping[str, int],
    solve: Callable[[Solver, Sequence[str]], Mapping[str, Solution]],
) -> dict[str, Spectrum]:
    """The spectra of all targets, on every process.

    Args:
        trainer: The running Trainer.
        solver: Of targets in shards.
        owners: Who decomposes which.
        solve: Decomposes some targets here; what it does with the decompositions is its own affair.
    """

    def gather(name: str) -> MatrixView | None:
        return gathered_on(view_of(solver.targets[name]), owners[name], lambda work: together(trainer, work))

    def work(wholes: Mapping[str, Any]) -> dict[str, tuple[list[float], list[float] | None, float]]:
        solved = solve(replace(solver, targets=wholes), list(wholes))
        return {name: spectrum.to_lists() for name, (_, spectrum) in solved.items()}

    own: dict[str, tuple[list[float], list[float] | None, float]] = {}
    for _, found in whole_in_rounds(trainer, solver.targets, owners, gather, work):
        own |= found
    plain = merge(trainer, own)
    return {name: Spectrum.of_lists(*plain[name]) for name in solver.targets}
