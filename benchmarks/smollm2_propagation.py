"""Should a cut make up for what the cuts before it have done? Closed-form propagation of errors on SmolLM2-135M.

    python benchmarks/smollm2_propagation.py FOLDER                 # runs what is missing in smollm2_propagation.jsonl
    python benchmarks/smollm2_propagation.py FOLDER --device cuda --seeds 0
    python benchmarks/smollm2_propagation.py --table                # prints the stored results only

Layer after layer, in the order of the network, with the ranks of the default: with ``A`` the inputs of a layer in the
dense network and ``B`` those in the network that is cut up to there, the best answer to ``B`` is ``W A B^T (B B^T)^-1``
(AA-SVD, 2026, https://arxiv.org/abs/2604.02119, Theorem 3.2; here with the metric ``G`` of the output gradients on the
left, as in the default cut). It is cut in the metric of ``B``. Both moments get a share of their mean diagonal, which
draws the answer toward ``W``. Rows:

- ``dense inputs``: the default cut, each matrix in the metric of the dense network's inputs;
- ``cut inputs``: ``W``, in the metric of ``B``;
- ``propagated``: the above.

Each is scored right after the cut and after the default ``Refinement`` on the same 64 blocks of 512 tokens, as in
``smollm2.py``; ``smollm2_parts.py`` says where the model comes from and what FOLDER holds.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from smollm2_parts import AT_ONCE, IN_A_STEP, TRIED, Batch, Texts, perplexity, read_model, split
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.linalg.decomposition import decompose
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.progress import counted, shown
from lightning_prehab.surgery.swap import swap_

SEEDS, KEEPS = (0, 1, 2), (0.8, 0.6, 0.4)
DENSE_INPUTS, CUT_INPUTS, PROPAGATED = ROWS = ("dense inputs", "cut inputs", "propagated")
#: Of the mean diagonal, added to both moments of the inputs.
RIDGE = 1e-3
#: Layers of a block that have the same input, in the order in which they are called.
STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
#: Blocks of text at a time, where nothing but inputs is wanted.
PASSED = 16
Record = dict[str, Any]


class _SeenError(Exception):
    """What was wanted of a forward pass is there."""


def inputs_of(network: Any, name: str, batch: Batch) -> Tensor:
    """What a layer is given: shape ``(tokens, n)``, float64."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].flatten(0, -2).double())
        raise _SeenError

    handle = network.get_submodule(name).register_forward_pre_hook(look)
    try:
        network(input_ids=batch["input_ids"])
    except _SeenError:
        pass
    finally:
        handle.remove()
    return seen[0]


def moments(dense: nn.Module, cut: nn.Module, name: str, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """``E[a b^T]`` and ``E[b b^T]`` of the inputs of a layer, in the dense network and in the cut one."""
    pairs = [[inputs_of(network, name, batch) for network in (dense, cut)] for batch in batches]
    tokens = sum(len(b) for _, b in pairs)
    cross, square = sum(a.mT @ b for a, b in pairs) / tokens, sum(b.mT @ b for _, b in pairs) / tokens
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    return cross + ridge, square + ridge


@torch.no_grad()
def factors_in_order(
    row: str, dense: Any, plan: lp.CompressionPlan, known: Mapping[str, lp.LayerStatistics], batches: Sequence[Batch]
) -> dict[str, Factors]:
    """Factors of all layers that the plan cuts, each made for what the cuts before it have left."""
    found: dict[str, Factors] = {}
    cut, kronecker = copy.deepcopy(dense), lp.KroneckerSVD()
    for block in counted(range(len(dense.model.layers)), "block"):
        for stage in STAGES:
            names = [name for name in plan.ranks if f".layers.{block}." in name and name.endswith(stage)]
            cross, square = moments(dense, cut, names[0], batches) if row != DENSE_INPUTS else (None, None)
            for name in names:
                rank, weight = plan.ranks[name], dense.get_submodule(name).weight
                if rank is None:
                    continue
                left, right = kronecker.metric(known[name])
                if row == PROPAGATED:
                    weight = torch.linalg.solve(square, (weight.double() @ cross).mT).mT.to(weight)
                metric = right if square is None else square
                found[name] = Factors(*(one.float() for one in decompose(weight, left, metric).low_rank(rank)))
                cut.get_submodule(name).weight.copy_(found[name].B @ found[name].A)
    return found


class Trial:
    """The model, its texts, and what rows of one seed share."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.model, tokenizer = read_model()
        self.model.to(device)
        self.texts = Texts(folder, tokenizer)
        self.targets = lp.find_targets(self.model)
        self._known: tuple[int, Mapping[str, lp.LayerStatistics]] | None = None

    def run(self, row: str, seed: int, keep: float) -> Record:
        """One result."""
        given = {name: rows[:-TRIED].to(self.device) for name, rows in self.texts.calibration("wikitext", seed).items()}
        known = self.statistics(seed, given)
        plan = lp.make_plan(self.targets, lp.ParameterBudget(keep), lp.KroneckerSVD(), known)
        model = copy.deepcopy(self.model)
        swap_(model, plan, factors_in_order(row, self.model, plan, known, split(given, PASSED)))
        found: Record = {"after": self.score(model)}
        batches = split({"input_ids": given["input_ids"]}, IN_A_STEP)
        lp.refine_(model, self.model, batches, lp.Refinement(scope="model", seed=seed))
        return found | {"refined": self.score(model)}

    def statistics(self, seed: int, given: Batch) -> Mapping[str, lp.LayerStatistics]:
        """Of the dense network."""
        if self._known is None or self._known[0] != seed:
            wanted = lp.KroneckerSVD().wanted
            self._known = seed, lp.collect_statistics(self.model, self.targets, split(given, AT_ONCE), wanted=wanted)
        return self._known[1]

    def score(self, model: nn.Module) -> Record:
        return {name: round(perplexity(model, blocks), 4) for name, blocks in self.texts.scored.items()}


def stored(results: Path) -> list[Record]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def run(given: argparse.Namespace) -> None:
    trial = Trial(given.folder, given.device)
    for seed in given.seeds:
        for keep in given.keeps:
            for row in ROWS:
                setting = {"row": row, "seed": seed, "keep": keep}
                if any(setting.items() <= one.items() for one in stored(given.results)):
                    continue
                line = json.dumps({**setting, **trial.run(row, seed, keep)})
                with given.results.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)


def print_table(records: Sequence[Record]) -> None:
    columns = [(keep, moment) for keep in KEEPS for moment in ("after", "refined")]
    for text in ("wikitext", "shakespeare"):
        print(f"\n| perplexity, {text} | " + " | ".join(f"keep {keep}, {moment}" for keep, moment in columns) + " |")
        print("|---" * (1 + len(columns)) + "|")
        for row in ROWS:
            cells = [
                [one[moment][text] for one in records if (one["row"], one["keep"]) == (row, keep)]
                for keep, moment in columns
            ]
            print(f"| {row} | " + " | ".join(map(shown_values, cells)) + " |")


def shown_values(found: Sequence[float]) -> str:
    """A mean with its standard deviation."""
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.1f}{spread}" if found else ""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?", type=Path)
    arguments.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = arguments.parse_args()
    if not given.table:
        if given.folder is None:
            arguments.error("the folder of the texts is missing")
        with shown():
            run(given)
    print_table(stored(given.results))


if __name__ == "__main__":
    main()
