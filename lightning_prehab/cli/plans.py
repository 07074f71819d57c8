"""Plans in files, with what calibration has seen beside them: one calibration is enough for all that follows."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_prehab.cli.evaluation import Measured
from lightning_prehab.cli.outputs import beside, check_writable
from lightning_prehab.errors import ArgumentError
from lightning_prehab.files.statistics import INDEX, StatisticsWriter, StoredStatistics, fingerprint
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.sites import ProcessSite
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.targets.find import Targets

#: Options that say what a plan has decided already.
_DECIDED = (
    "recipe",
    "keep",
    "method",
    "policy",
    "target_modules",
    "exclude_modules",
    "rank_override",
    "rank_multiple_of",
    "split_fused",
    "layout",
)


class RecordingSite(ProcessSite):
    """A model in this process; what is observed of it is written down too.

    Args:
        model: As for a :class:`ProcessSite`.
        batches: As for it.
        writer: What writes.
        **others: As for it.
    """

    def __init__(self, model: nn.Module, batches: Any, writer: StatisticsWriter, **others: Any) -> None:
        super().__init__(model, batches, **others)
        self._writer = writer

    def observe(self, targets: Targets, wanted: Wanted) -> Mapping[str, LayerStatistics] | None:
        """What is observed, written down before it is worked with."""
        found = super().observe(targets, wanted)
        if found is not None:
            self._writer.add(found)
        return found


class PlanFiles:
    """The files of some plans: ``plan.yaml``, or ``plan-0.4.yaml`` and so on for several, and ``plan.statistics``.

    Args:
        output: The path of the one plan.
        keeps: The shares that are planned.
        force: Whether files that are there may be replaced.

    Raises:
        ArgumentError: If something is there already, or nothing can be written there.
    """

    def __init__(self, output: str, keeps: Sequence[float | None], force: bool) -> None:
        path = Path(output)
        if path.suffix not in (".yaml", ".yml"):
            raise ArgumentError(f"--output {output}: a plan is a YAML file; give a name that ends in .yaml.")
        check_writable(path)
        several = len(set(keeps)) > 1
        self._path = path
        self._plans = [path.with_stem(f"{path.stem}-{keep:g}") if several else path for keep in keeps]
        self._statistics = path.with_suffix(".statistics")
        for made in (*self._plans, self._statistics):
            ours = (made / INDEX).is_file() if made == self._statistics else made.is_file()
            if made.exists() and not (force and ours):
                raise ArgumentError(
                    f"{made} exists; give --force to replace it, or another --output."
                    if ours
                    else f"{made} exists and is nothing that plan has written; give another --output."
                )

    @contextmanager
    def writer(self) -> Iterator[StatisticsWriter]:
        """Writes statistics into a folder of its own; :meth:`write` takes it from there."""
        with beside(self._path) as work:
            yield StatisticsWriter(work / "statistics")

    def write(
        self, plans: Sequence[CompressionPlan], writer: StatisticsWriter, model: nn.Module, measured: Measured | None
    ) -> list[str]:
        """Writes all files, inside of :meth:`writer`; says which, how large, and what can be done with them.

        What is there already is replaced once all that is new lies beside it.
        """
        said = []
        work = writer.folder.parent
        for path, plan in zip(self._plans, plans, strict=True):
            plan.to_yaml(work / path.name)
        if len(writer):
            if measured is not None:
                measured.save(writer.folder)
            size = writer.finish(fingerprint(model))
            if self._statistics.exists():
                os.replace(self._statistics, work / "old")
            os.replace(writer.folder, self._statistics)
            said.append(f"statistics written to {self._statistics} ({size / 1e6:,.1f} MB)")
        for path, plan in zip(self._plans, plans, strict=True):
            os.replace(work / path.name, path)
            said.append(f"plan written to {path} (keep {plan.keep:.3f}); ranks can be edited")
        return said

    @property
    def next_step(self) -> str:
        """The option that carries the last plan out."""
        return f"--plan {self._plans[-1]}"


def read_plan(settings: Any) -> CompressionPlan:
    """The plan of ``compress --plan``.

    Raises:
        ArgumentError: If an option beside it wants something else.
        PlanError: If the file cannot be read, or something in it is wrong.
    """
    for name in _DECIDED:
        if getattr(settings, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise ArgumentError(f"{option} has no effect with --plan: edit the ranks in {settings.plan}, or plan anew.")
    return CompressionPlan.from_yaml(Path(settings.plan))


def beside_plan(path: Path, plan: CompressionPlan, model: nn.Module) -> tuple[StoredStatistics | None, Path | None]:
    """The statistics that lie beside a plan, and their folder, if its method reads some.

    Raises:
        ArgumentError: If they are not there, or the model has other weights than the one that was planned.
        StatisticsError: If they cannot be read.
    """
    if not plan.factorization.needs_statistics:
        return None, None
    stems = dict.fromkeys((path.stem, re.sub(r"-[0-9.]+(e-[0-9]+)?$", "", path.stem)))  # without the share
    places = [path.with_name(f"{stem}.statistics") for stem in stems]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise ArgumentError(
            f"{plan.factorization} needs statistics, and beside {path} there is no {places[-1].name}; "
            "give --data to calibrate anew."
        )
    statistics = StoredStatistics(found)
    if statistics.model != fingerprint(model):
        raise ArgumentError(
            f"{found} was seen on a model with other weights than this one; plan anew, or give --data to calibrate "
            "anew for the ranks of the plan."
        )
    return statistics, found
