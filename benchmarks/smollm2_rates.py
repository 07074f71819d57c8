"""Which learning rate should a refinement have? The cuts of ``smollm2.py``, refined with several.

    python benchmarks/smollm2_rates.py FOLDER --cache CACHE --device cuda   # runs what is missing in its .jsonl
    python benchmarks/smollm2_rates.py --table                             # prints the stored results only

FOLDER, CACHE and the protocol are those of ``smollm2.py``. Each cut is refined in 128 steps of four blocks, from the 64
blocks of its calibration, or from 512 of the same text. What is measured before and after is the divergence from the
dense model on the blocks that the refinement holds back.
"""

import argparse
import copy
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import smollm2
import torch
from smollm2_parts import IN_A_STEP, SEQUENCES, TRIED, perplexity, split

import lightning_prehab as lp
from lightning_prehab.progress import shown

RESULTS = Path(__file__).with_suffix(".jsonl")
RATES, BLOCKS, STEPS = (2e-5, 5e-5, 1e-4, 2e-4, 4e-4), (SEQUENCES, smollm2.MORE), 128
SETTING = ("row", "text", "seed", "keep", "blocks", "rate")
Record = dict[str, Any]


def stored() -> list[Record]:
    return list(map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())) if RESULTS.exists() else []


def run(given: argparse.Namespace) -> None:
    """Makes a cut once, and refines copies of it."""
    study = smollm2.Study(given.folder, given.cache, given.device)
    for row, text, seed, keep in itertools.product(given.rows, given.texts, given.seeds, given.keeps):
        done = {tuple(one[name] for name in SETTING) for one in stored()}
        wishes = itertools.product(given.blocks, given.rates)
        missing = [wish for wish in wishes if (row, text, seed, keep, *wish) not in done]
        if not missing:
            continue
        blocks, _ = study.given(text, seed)
        model = copy.deepcopy(study.model)
        site = smollm2.StudySite(model, split({name: part[-TRIED:] for name, part in blocks.items()}, TRIED))
        rows = {name: part[:-TRIED] for name, part in blocks.items()}
        study.cut(site, smollm2.ROWS[row], keep, text, seed, rows, {})
        for count, rate in missing:
            refined = copy.deepcopy(model)
            more = rows if count == SEQUENCES else study.texts.calibration(text, seed + len(smollm2.SEEDS), count)
            batches = split({"input_ids": more["input_ids"]}, IN_A_STEP)
            wish = lp.Refinement(STEPS, scope="model", lr=rate, seed=seed)
            found = lp.refine_(refined, study.model, batches, wish)
            scored = {name: round(perplexity(refined, part), 4) for name, part in study.texts.scored.items()}
            setting = dict(zip(SETTING, (row, text, seed, keep, count, rate), strict=True))
            device = torch.cuda.get_device_name() if given.device == "cuda" else given.device
            line = {**setting, "divergence": [found.before, found.after], "perplexity": scored, "device": device}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def print_table() -> None:
    print("\n| cut | text | keep | blocks | rate | divergence | WikiText-2 | Shakespeare |")
    print("|---" * 8 + "|")
    for one in sorted(
        stored(), key=lambda one: [one["row"], *(-one[name] if name == "keep" else one[name] for name in SETTING[1:])]
    ):
        before, after = (f"{value:.3g}" for value in one["divergence"])
        text = {"wikitext": "WikiText-2", "mixed": "half and half"}.get(one["text"], one["text"])
        cut = {"refined": "pivot, calibrated", "svd-llm-refined": "SVD-LLM, pivot"}.get(one["row"], one["row"])
        scored = [f"{one['perplexity'][name]:.1f}" for name in ("wikitext", "shakespeare")]
        cells = [cut, text, str(one["keep"]), str(one["blocks"]), f"{one['rate']:g}", f"{before} → {after}", *scored]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?", type=Path)
    arguments.add_argument("--cache", type=Path)
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--rows", nargs="+", default=["refined"], metavar="ROW", help="rows of smollm2.py")
    arguments.add_argument("--texts", nargs="+", choices=smollm2.TEXTS, default=["wikitext"])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments.add_argument("--keeps", nargs="+", type=float, default=list(smollm2.KEEPS))
    arguments.add_argument("--blocks", nargs="+", type=int, default=list(BLOCKS))
    arguments.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = arguments.parse_args()
    if not given.table:
        if given.folder is None or given.cache is None:
            sys.exit("Give the folder of the texts and --cache, a folder for statistics; or --table.")
        with shown():
            run(given)
    print_table()


if __name__ == "__main__":
    main()
