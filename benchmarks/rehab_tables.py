"""The tables of ``rehab_sst2.py`` and ``rehab_gpt.py``, from stored results: everything is paired over seeds.

An interval is the mean difference over seeds and the half width of its 95 % interval (Student's t). Shares of steps are
geometric means, and their intervals are those of the logarithms. A seed is run on one machine, all rows of it.
"""

import math
import statistics
from collections.abc import Iterator, Sequence

from prehab_trial import Record, cell, load
from rehab_rows import CONTROLS, ROWS, SHARES, TUNED_AT, RehabTask, cut_first_beside, loss_over

#: 97.5 % of Student's t, by degrees of freedom.
T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
BySeed = dict[int, float]


def interval(values: Sequence[float], digits: int) -> str:
    """The mean, and the half width of its 95 % interval; nothing of the latter for one seed."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):+.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def paired(ours: BySeed, theirs: BySeed, digits: int) -> str:
    """What is ours minus what is theirs, over the seeds that both have."""
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())], digits)


def form(metric: str) -> tuple[float, int]:
    """Factor and digits of a metric."""
    return (100.0, 2) if metric == "accuracy" else (1.0, 3)


def share_of(ours: BySeed, theirs: BySeed, most: int) -> str:
    """Our steps to the goal as a share of theirs; a bound where one of the two is not back.

    From three seeds on with its 95 % interval. Seeds whose cut leaves them at the goal say nothing.
    """
    both = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    pairs = [pair for pair in both if 0 < min(pair) < math.inf]
    late, early = any(a == math.inf for a, _ in pairs), any(b == math.inf for _, b in pairs)
    if not pairs or (late and early):
        return ""
    logs = [math.log(min(a, most) / min(b, most)) for a, b in pairs]
    mean, bound = statistics.mean(logs), "≥ " * late + "≤ " * early
    if len(logs) < 3:
        return f"{bound}{math.exp(mean):.2f}"
    half = T[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(mean - half), math.exp(mean + half)
    return f"{bound}{math.exp(mean):.2f} [{low:.2f}, {high:.2f}]" if high < 100 else f"{bound}{math.exp(mean):.2f}"


def machines(runs: Sequence[Record]) -> str:
    """Which seeds were run where."""
    seeds: dict[str, set[int]] = {}
    for record in runs:
        seeds.setdefault(record["device"], set()).add(record["job"]["seed"])
    return "; ".join(f"{device}: seed {', '.join(map(str, sorted(found)))}" for device, found in sorted(seeds.items()))


class Stored:
    """The results of a task."""

    def __init__(self, task: RehabTask) -> None:
        self.task, self.records = task, load(task)
        self.dense = {r["job"]["seed"]: r["end"] for r in self.records if r["job"]["kind"] == "dense"}
        cut = [r for r in self.records if (r["job"]["kind"], r["job"]["part"]) == ("run", "recovery")]
        self.dense |= {r["job"]["seed"]: r["before"][0] for r in cut}  # on the machine of the runs

    def of(self, part: str, row: str, keep: float, share: float = 1.0) -> dict[int, Record]:
        """Runs that are reported, by seed."""
        wanted = {"kind": "run", "part": part, "row": row, "keep": keep, "share": share}
        return {r["job"]["seed"]: r for r in self.records if r["job"].items() >= wanted.items()}

    def metric(self, runs: dict[int, Record], metric: str, moment: str = "end") -> BySeed:
        scale, _ = form(metric)
        at = {seed: r[moment] if moment == "end" else r[moment][-1] for seed, r in runs.items() if r.get(moment)}
        return {seed: scale * found[metric] for seed, found in at.items()}

    def at(self, runs: dict[int, Record], metric: str, step: int) -> BySeed:
        """A metric so many steps after the cut."""
        found = {seed: dict(r["course"]).get(step) for seed, r in runs.items()}
        return {seed: form(metric)[0] * now[metric] for seed, now in found.items() if now}

    def steps(self, runs: dict[int, Record]) -> BySeed:
        """Steps until recovered; infinite if that never was."""
        return {seed: self.first(record) for seed, record in runs.items()}

    def level_with(self, runs: dict[int, Record], control: dict[int, Record]) -> BySeed:
        """Steps until the lowest loss that the control ever has."""
        goals = {seed: min(now["loss"] for _, now in r["course"]) for seed, r in control.items()}
        return {
            seed: next((step for step, now in runs[seed]["course"] if now["loss"] <= goals[seed]), math.inf)
            for seed in sorted(runs.keys() & goals.keys())
        }

    def first(self, record: Record) -> float:
        dense = record["before"][0]
        return next((step for step, now in record["course"] if self.task.reached(now, dense)), math.inf)


def rates(runs: dict[int, Record]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted({r["job"]["rate"] for r in runs.values()}))


def shown_steps(steps: BySeed, most: int) -> str:
    """The median, and all of them."""
    each = [str(steps[seed]) if steps[seed] <= most else f">{most}" for seed in sorted(steps)]
    middle = statistics.median(steps.values())
    return f"{middle:g} ({', '.join(each)})" if middle <= most else f">{most} ({', '.join(each)})"


def recovery(stored: Stored, share: float, keep: float) -> Iterator[str]:
    """Steps to the goal, or, where plain training is never there, to its lowest loss; and differences."""
    task, control = stored.task, stored.of("recovery", CONTROLS["recovery"], keep, share)
    equal = task.equal if share == 1 else task.recovery
    heads = [
        f"{title}, {when}"
        for when in ("right after", f"after {equal} steps", "less plain training's")
        for title in task.metrics.values()
    ]
    yield (
        "| row | rate | steps to the goal: median (each seed) | share of plain training's steps | "
        f"steps to plain training's lowest loss | {' | '.join(heads)} | seconds |"
    )
    yield "|" + "---|" * (6 + 3 * len(task.metrics))
    theirs = stored.steps(control)
    for row in ROWS["recovery"]:
        runs = stored.of("recovery", row, keep, share)
        if not runs:
            continue
        steps = stored.steps(runs)
        compared = share_of(steps, theirs, task.recovery) if row != CONTROLS["recovery"] else ""
        late = min(theirs.values(), default=0) == math.inf
        level = stored.level_with(runs, control) if late else {}
        cells = [rates(runs), shown_steps(steps, task.recovery), compared]
        cells += [shown_steps(level, task.recovery) if level else ""]
        for step in (0, equal):
            cells += [cell(list(stored.at(runs, m, step).values()), form(m)[1]) for m in task.metrics]
        cells += [
            paired(stored.at(runs, m, equal), stored.at(control, m, equal), form(m)[1])
            if row != CONTROLS["recovery"]
            else ""
            for m in task.metrics
        ]
        seconds = statistics.median(r["seconds"] for r in runs.values())
        yield f"| {row} | {' | '.join(cells)} | {seconds:.0f} |"


def recipe(stored: Stored, keep: float) -> Iterator[str]:
    """What there is in the end, beside cutting first with distillation, and with the same distillation."""
    task, control = stored.task, stored.of("recipe", CONTROLS["recipe"], keep)
    heads = ["before the cut", "right after", "in the end"]
    yield (
        "| row | rate | "
        + " | ".join(
            [*(f"{title}, {when}" for title in task.metrics.values() for when in heads)]
            + [f"{title}, less the control's" for title in task.metrics.values()]
            + [f"{title}, less cut first's with the same distillation" for title in task.metrics.values()]
            + ["seeds"]
        )
        + " |"
    )
    yield "|" + "---|" * (3 + 5 * len(task.metrics))
    for row in ROWS["recipe"]:
        runs = stored.of("recipe", row, keep)
        if not runs:
            continue
        cells = [rates(runs)]
        for metric in task.metrics:
            found = [stored.metric(runs, metric, moment) for moment in ("before", "after", "end")]
            cells += [cell(list(values.values()), form(metric)[1]) for values in found]
        for other in (control, stored.of("recipe", cut_first_beside(row), keep)):
            cells += [paired(stored.metric(runs, m), stored.metric(other, m), form(m)[1]) for m in task.metrics]
        yield f"| {row} | {' | '.join(cells)} | {len(runs)} |"


def spike(stored: Stored) -> Iterator[str]:
    """The loss at the first steps after the cut, as a share of the loss right after it."""
    keeps = stored.task.parts["spike"]
    yield "| row | " + " | ".join(f"keep {k}, {what}" for k in keeps for what in ("highest", "last")) + " | seeds |"
    yield "|" + "---|" * (2 + 2 * len(keeps))
    for row in ROWS["spike"]:
        cells, seeds = [], 0
        for keep in keeps:
            runs = stored.of("spike", row, keep)
            courses = [[now["loss"] for _, now in r["course"]] for r in runs.values()]
            highest = [max(course[1:]) / course[0] for course in courses]
            last = [course[-1] / course[0] for course in courses]
            seeds = len(runs)
            cells += [f"{statistics.median(part):.3f}" if part else "" for part in (highest, last)]
        if seeds:
            yield f"| {row} | {' | '.join(cells)} | {seeds} |"


def tuning(stored: Stored, part: str) -> Iterator[str]:
    """What was found on the validation split with each rate; the lowest loss chooses."""
    task, tried = stored.task, [r for r in stored.records if (r["job"]["kind"], r["job"]["part"]) == ("tuning", part)]
    what = "mean loss over the course" if part == "recovery" else "loss in the end"
    yield (
        f"| row | rate: {what} | best, right after | " + " | ".join(f"best, {t}" for t in task.metrics.values()) + " |"
    )
    yield "|" + "---|" * (3 + len(task.metrics))
    for row in ROWS[part]:
        found = {r["job"]["rate"]: r for r in tried if r["job"]["row"] == row}
        if not found:
            continue
        each = "; ".join(f"{rate:g}: {loss_over(found[rate], part):.3f}" for rate in sorted(found))
        best = min(found.values(), key=lambda record: loss_over(record, part))
        ends = [f"{form(m)[0] * best['end'][m]:.{form(m)[1]}f}" for m in task.metrics]
        yield f"| {row} | {each} | {best['after'][-1]['loss']:.3f} | {' | '.join(ends)} |"


def print_tables(task: RehabTask) -> None:
    """All of them."""
    stored = Stored(task)
    for metric, title in task.metrics.items():
        scale, digits = form(metric)
        print(f"{title} of the dense models: {cell([scale * r[metric] for r in stored.dense.values()], digits)}\n")
    for keep in task.parts.get("recovery", ()):
        for share in SHARES:
            lines = list(recovery(stored, share, keep))
            if len(lines) > 2:
                where = machines(
                    [r for row in ROWS["recovery"] for r in stored.of("recovery", row, keep, share).values()]
                )
                print(f"Recovery at keep {keep} with {share:.0%} of the training data ({where})\n")
                print("\n".join(lines) + "\n")
    for keep in task.parts["recipe"]:
        lines = list(recipe(stored, keep))
        if len(lines) > 2:
            where = machines([r for row in ROWS["recipe"] for r in stored.of("recipe", row, keep).values()])
            print(f"Recipes of {task.recipe} steps at keep {keep}; the control is {CONTROLS['recipe']} ({where})\n")
            print("\n".join(lines) + "\n")
    lines = list(spike(stored)) if "spike" in task.parts else []
    if len(lines) > 2:
        print("The first steps after the cut: loss as a share of the loss right after the cut, median over seeds\n")
        print("\n".join(lines) + "\n")
    for part in ("recovery", "recipe"):
        lines = list(tuning(stored, part))
        if len(lines) > 2:
            print(f"Tuning of the {part}: the validation split, seed 99, keep {TUNED_AT[part]}\n")
            print("\n".join(lines) + "\n")
