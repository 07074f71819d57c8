"""Which factorization and which rank policy cut best? MiniLM on SST-2, right after the cut, nothing trained after it.

    python benchmarks/methods_sst2.py DATA_FOLDER                 # runs what is missing in methods_sst2.json
    python benchmarks/methods_sst2.py DATA_FOLDER --seeds 0 --only "Kronecker.*global"
    python benchmarks/methods_sst2.py --table                     # prints the tables of the stored results only

All 36 linear layers of the encoder are targets, the head stays dense. Statistics come from 1,024 training sentences
with their labels, or with labels sampled from the model where a row says so. A seed changes the fine-tuned model and
these sentences. Accuracy and cross-entropy are those of dev + test (2,693 sentences: one standard error of a single run
is about 0.6 points); shrinkage and the like are to be chosen on the 692 validation sentences, held out of the training
file. Rows of methods that the installed lightning_prehab does not have are left out. ``sst2.py`` beside this file says
where to get the data and the model; needs the ``hf`` extra.
"""

import argparse
import copy
import json
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from sst2 import DEFAULT_CACHE, SST2, TARGETS, SentenceClassifier, dense_model, load_data, machine, measure

import lightning_prehab as lp
import lightning_prehab.statistics.sums
from lightning_prehab.__about__ import __version__
from lightning_prehab.progress import counted, shown

RESULTS = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
KEEPS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
CALIBRATION = 1024  # sentences
PROBED = 256  # of them, for policies that measure small cuts
MIN_RANK = 8


def named(name: str, **settings: object) -> Callable[..., object]:
    """Builds a class of lightning_prehab; looked up late, as not every version has every method."""
    return lambda *args: getattr(lp, name)(*args, **settings)


FACTORIZATIONS: dict[str, Callable[..., object]] = {
    "SVD": named("SVD"),
    "FisherSVD": named("FisherSVD"),
    "ActivationSVD": named("ActivationSVD"),
    "WhitenedSVD": named("WhitenedSVD"),
    "WhitenedSVD, centered": named("WhitenedSVD", centered=True),
    "KroneckerSVD": named("KroneckerSVD"),
    "KroneckerSVD, auto shrinkage": named("KroneckerSVD", gradient_shrinkage="auto", input_shrinkage="auto"),
}
POLICIES: dict[str, Callable[..., object]] = {
    "uniform": named("RankRatio"),
    "global": named("ParameterBudget", min_rank=MIN_RANK),
    "ZeroSum": named("ZeroSum"),
    "ProbeBudget": named("ProbeBudget"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    factorization: str
    policy: str
    labels: str = "data"

    @property
    def name(self) -> str:
        """What ``--only`` is matched against."""
        sampled = "" if self.labels == "data" else f", {self.labels} labels"
        return f"{self.factorization}{sampled}, {self.policy}"

    def exists(self) -> bool:
        """Whether this version of the package has the method."""
        try:
            self.build(0.5)
        except (AttributeError, TypeError, lp.PrehabError):
            return False
        return True

    def build(self, keep: float) -> tuple[object, object]:
        return FACTORIZATIONS[self.factorization](), POLICIES[self.policy](keep)


ROWS = [
    *(Row(name, policy) for name in ("SVD", "FisherSVD", "ActivationSVD") for policy in ("uniform", "global")),
    *(Row(name, policy) for name in ("WhitenedSVD", "KroneckerSVD") for policy in ("uniform", "global")),
    Row("WhitenedSVD, centered", "uniform"),
    Row("KroneckerSVD, auto shrinkage", "global"),
    Row("KroneckerSVD", "global", "sampled"),
    Row("WhitenedSVD", "ZeroSum"),
    Row("WhitenedSVD", "ProbeBudget"),
    Row("KroneckerSVD", "ProbeBudget"),
]


class Trial:
    """The dense model of one seed, with statistics and probes that all rows share."""

    def __init__(self, seed: int, data: SST2, model: SentenceClassifier) -> None:
        self.data, self.model = data, model
        self.targets = lp.find_targets(model, TARGETS)
        self.calibration = data.train.sample(CALIBRATION, seed)
        self.collected: dict[str, dict[str, lp.LayerStatistics]] = {}
        self.probed: dict[object, object] = {}

    def statistics(self, labels: str) -> dict[str, lp.LayerStatistics]:
        """All that any method reads, collected when first asked for."""
        if labels not in self.collected:
            batches = self.calibration.sorted_batches(32, labels=labels == "data")
            self.collected[labels] = lp.collect_statistics(self.model, self.targets, batches, **everything())
        return self.collected[labels]

    def probes(self, factorization: object, collected: Mapping[str, lp.LayerStatistics], probe_keep: float) -> object:
        """The measured effect of a small cut of each layer alone, on some of the calibration sentences."""
        from lightning_prehab.plan.probes import measure_probes

        key = factorization, probe_keep
        if key not in self.probed:

            def factors(name: str, rank: int) -> object:
                return factorization(self.targets[name].weight.detach(), rank, collected[name])

            batches = self.calibration.subset(range(PROBED)).sorted_batches(labels=False)
            self.probed[key] = measure_probes(self.model, self.targets, factors, batches, probe_keep)
        return self.probed[key]

    def run(self, row: Row, keep: float) -> dict[str, object]:
        """Cuts a copy of the model and measures it."""
        factorization, policy = row.build(keep)
        data_free = isinstance(factorization, lp.SVD) and row.policy in ("uniform", "global")
        collected = None if data_free else self.statistics(row.labels)
        settings = {}
        if getattr(policy, "needs_probes", False):
            settings["probes"] = self.probes(factorization, collected, policy.probe_keep)
        model = copy.deepcopy(self.model)
        start = time.perf_counter()
        plan = lp.make_plan(lp.find_targets(model, TARGETS), policy, factorization, collected, **settings)
        report = lp.apply_plan_(model, plan, collected)
        seconds = time.perf_counter() - start
        found = {"achieved_keep": round(report.keep, 4), **measure(model, self.data)}
        return {**found, "seconds_to_cut": round(seconds, 1)}


def everything() -> dict[str, object]:
    """Settings of collect_statistics that collect all it can; older versions know no ``wanted``."""
    wanted = getattr(lightning_prehab.statistics.sums, "Wanted", None)
    return {"gradients": True} if wanted is None else {"wanted": wanted(*[True] * len(wanted._fields))}


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "lightning_prehab": __version__}


def load() -> dict[str, list[dict[str, object]]]:
    if RESULTS.exists():
        return json.loads(RESULTS.read_text())
    return {"command": "python benchmarks/methods_sst2.py DATA_FOLDER", "dense": [], "runs": []}


def identity(entry: Mapping[str, object]) -> tuple[object, ...]:
    return entry.get("row"), entry.get("keep"), entry["seed"]


def add(kind: str, entry: Mapping[str, object]) -> None:
    """Stores a result at once. The file is read anew each time, so several processes may run different rows or seeds;
    should two write in the same instant, one result is lost and the next call makes it again.
    """
    entry = {**entry, "versions": versions(), "machine": machine()}
    results = load()
    results[kind] = [old for old in results[kind] if identity(old) != identity(entry)] + [entry]
    temporary = RESULTS.with_suffix(f".{os.getpid()}.tmp")
    lists = {key: value for key, value in results.items() if isinstance(value, list)}
    head = {key: value for key, value in results.items() if key not in lists}
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, entries in lists.items():  # one result a line
        parts.append(f" {json.dumps(key)}: [\n" + ",\n".join(f"  {json.dumps(e)}" for e in entries) + "\n ]")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    temporary.replace(RESULTS)
    print(json.dumps(entry), flush=True)


def cell(values: list[float], percent: bool) -> str:
    """Mean and, with several seeds, standard deviation."""
    if not values:
        return ""
    digits, scale = (1, 100) if percent else (3, 1)
    text = f"{scale * statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {scale * statistics.stdev(values):.{digits}f}"


def table(results: dict[str, list[dict[str, object]]], metric: str) -> str:
    """One metric as markdown: a line for each row, a column for each keep."""
    percent = metric.endswith("accuracy")
    header = ["factorization", "labels", "ranks", *(f"keep {keep}" for keep in KEEPS), "seeds"]
    dense = cell([entry[metric] for entry in results["dense"]], percent)
    lines = [header, ["---"] * len(header), ["dense", "", "", *[dense] * len(KEEPS), str(len(results["dense"]))]]
    for row in ROWS:
        runs = [entry for entry in results["runs"] if entry["row"] == row.name]
        if runs:
            cells = [cell([r[metric] for r in runs if r["keep"] == keep], percent) for keep in KEEPS]
            seeds = str(len({r["seed"] for r in runs}))
            lines.append([row.factorization, row.labels, row.policy, *cells, seeds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_tables() -> None:
    titles = {
        "accuracy": "Accuracy on dev + test in %",
        "loss": "Cross-entropy on dev + test",
        "validation_accuracy": "Accuracy on validation in %",
        "validation_loss": "Cross-entropy on validation",
    }
    results = load()
    for metric, title in titles.items():
        print(f"{title}\n\n{table(results, metric)}\n")


def run_missing(args: argparse.Namespace) -> None:
    rows = [row for row in ROWS if re.search(args.only, row.name)]
    missing = [row.name for row in rows if not row.exists()]
    if missing:
        print(f"not in lightning_prehab {__version__}: {'; '.join(missing)}", flush=True)
    data = load_data(args.data, args.model)
    for seed in args.seeds:
        results = load()
        done = {identity(entry) for entry in results["runs"]}
        jobs = [(row, keep) for row in rows if row.name not in missing for keep in KEEPS]
        jobs = [(row, keep) for row, keep in jobs if args.again or (row.name, keep, seed) not in done]
        measured = not args.again and any(entry["seed"] == seed for entry in results["dense"])
        if measured and not jobs:
            continue
        trial = Trial(seed, data, dense_model(seed, data, args.cache, args.model))
        if not measured:
            add("dense", {"seed": seed, **measure(trial.model, data)})
        for row, keep in counted(jobs, "run"):
            add("runs", {"row": row.name, "keep": keep, "seed": seed, **trial.run(row, keep)})


def main() -> None:
    parser = argparse.ArgumentParser(description="Factorizations and rank policies on MiniLM and SST-2.")
    parser.add_argument("data", nargs="?", help="folder with train.tsv, dev.tsv and test.tsv; see sst2.py")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored results only")
    parser.add_argument("--only", default="", metavar="REGEX", help="run the rows whose name the pattern fits")
    parser.add_argument("--again", action="store_true", help="run rows that are stored already, and replace them")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--cache", default=DEFAULT_CACHE, help="folder for the fine-tuned models")
    parser.add_argument("--model", help="folder or hub name of all-MiniLM-L6-v2; see sst2.py")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not args.table:
        if args.data is None:
            parser.error("DATA_FOLDER is missing; sst2.py says where to get the data")
        torch.set_num_threads(args.threads)
        warnings.filterwarnings("ignore")
        with shown():
            run_missing(args)
    print_tables()


if __name__ == "__main__":
    main()
