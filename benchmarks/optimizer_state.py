"""What should an optimizer know of the factors right after the cut? Each answer beside a fresh start, over 50 steps.

    python benchmarks/optimizer_state.py input.txt                 # runs what is missing in optimizer_state.jsonl
    python benchmarks/optimizer_state.py input.txt --device cuda
    python benchmarks/optimizer_state.py --table                   # prints the tables of the stored results only

The small GPT of ``prehab_gpt.py``, pretrained. 100 steps of 6 x 64 characters with an optimizer at a constant rate,
then the default cut (one budget, statistics of 24 batches), then 50 steps with the same optimizer at the same rate,
without a warm-up. All answers see the same factors and the same batches. First moments are carried exactly by all but
the two fresh starts; of second moments there are these answers:

- fresh optimizer: a new one, for all parameters: what one has after ``configure_optimizers``.
- fresh factors: the factors start with nothing, all other parameters go on.
- uncorrelated: those of the weight, as if the entries of its gradient were uncorrelated: ``(B * B)^T v``.
- uncorrelated, raised: the same, raised to the square of the first moment where that is larger.
- statistics: the same, times what ``C = E[x x^T]`` and ``G = E[g g^T]`` say of the correlations,
  ``(B^T G B)_ii / (B * B)^T diag(G)``.
- first moment: the same, times the share that the first moment ``M`` has of these correlations,
  ``|(B^T M)_i|^2 / (B * B)^T (M * M) 1``.
- gradients: the mean square of the gradients of 8 batches after the cut, without a step.
- shipped: what the package does: the first moment's answer, raised to a sixteenth of the square; without a first moment
  uncorrelated.

Mean loss: of the 50 batches, each before its step. Spike: the largest loss on four fixed batches within ten steps,
divided by that right after the cut. Medians and paired differences are over seeds.
"""

import argparse
import copy
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from prehab_gpt import DEFAULT_CACHE, Shakespeare
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.__about__ import __version__

RESULTS = Path(__file__).with_suffix(".jsonl")
SEEDS, KEEPS = (0, 1, 2), (0.3, 0.15)
BEFORE, AFTER, FIRST = 100, 50, 10
CALIBRATION, MEASURED, FIXED, ROWS = 24, 8, 4, 6  # batches, and rows of each
Record = dict[str, Any]
State = dict[str, Any]
#: Keys of second moments, as the optimizers of torch call them; the last two are those of Adafactor.
SQUARES = ("exp_avg_sq", "square_avg", "sum")


def with_adamw(kind: type[torch.optim.Optimizer], lr: float, **settings: Any) -> Callable[[nn.Module], list[Any]]:
    """An optimizer of the matrices in the blocks; AdamW has the rest."""

    def make(model: nn.Module) -> list[Any]:
        matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")]
        rest = [p for p in model.parameters() if all(p is not one for one in matrices)]
        return [kind(matrices, lr=lr, **settings), torch.optim.AdamW(rest, lr=1e-3)]  # type: ignore[call-arg]

    return make


OPTIMIZERS: dict[str, Callable[[nn.Module], list[Any]]] = {
    "AdamW": with_adamw(torch.optim.AdamW, 1e-3),
    "AdamW, 3 times the rate": with_adamw(torch.optim.AdamW, 3e-3),
    "Adamax": with_adamw(torch.optim.Adamax, 2e-3),
    "Adagrad": with_adamw(torch.optim.Adagrad, 1e-2),
    "Adafactor": with_adamw(torch.optim.Adafactor, 1e-2),
    "SGD": with_adamw(torch.optim.SGD, 0.1, momentum=0.9),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = with_adamw(torch.optim.Muon, 1e-2)
FRESH = ("fresh optimizer", "fresh factors")
UNCORRELATED, RAISED, GRADIENTS = "uncorrelated", "uncorrelated, raised", "gradients"
STATISTICS, MOMENTUM, SHIPPED = "statistics", "first moment", "shipped"


def answers(name: str) -> tuple[str, ...]:
    """Those that differ for an optimizer; without a first moment there is nothing to raise to."""
    if name == "AdamW":
        return (*FRESH, UNCORRELATED, RAISED, MOMENTUM, STATISTICS, GRADIENTS, SHIPPED)
    if name.startswith("AdamW"):
        return (FRESH[0], RAISED, MOMENTUM, STATISTICS, SHIPPED)
    if name in ("Adagrad", "Adafactor"):
        return (*FRESH, UNCORRELATED, STATISTICS, GRADIENTS)
    return (*FRESH, SHIPPED)


class Trial:
    """One model, cut to one keep under one optimizer; answers are tried on copies."""

    def __init__(self, task: Shakespeare, model: nn.Module, optimizers: list[Any], make: Any, keep: float, seed: int):
        self.task, self.make, self.seed = task, make, seed
        self.device = next(model.parameters()).device
        batches = self.draw(1, CALIBRATION)
        targets = lp.find_targets(model, "blocks.*")
        seen = lp.collect_statistics(model, targets, batches, forward=task.loss, gradients=True)
        plan = lp.make_plan(targets, lp.ParameterBudget(keep, min_rank=8), statistics=seen)
        self.old = {name: self.state_of(optimizers, layer.weight) for name, layer in targets.items()}
        self.seen = {name: (one.input_second_moment(), one.gradient_second_moment()) for name, one in seen.items()}
        lp.apply_plan_(model, plan, seen, optimizers)
        self.model, self.optimizers = model, optimizers
        self.fixed = self.draw(3, FIXED)

    def draw(self, part: int, count: int) -> list[Tensor]:
        """Training batches that no other part has."""
        return [batch[:ROWS].to(self.device) for batch in self.task.draw(1000 * (self.seed + 1) + 7 + part, count)]

    @staticmethod
    def state_of(optimizers: list[Any], weight: Tensor) -> State:
        """What is known of a weight; Adafactor's rows and columns as the matrix that they stand for."""
        state = next(dict(one.state[weight]) for one in optimizers if weight in one.state)
        if "row_var" in state:
            rows, columns = state.pop("row_var"), state.pop("col_var")
            state["sum"] = rows @ columns / rows.mean()
        return state

    def run(self, answer: str) -> Record:
        """50 steps."""
        model, optimizers = copy.deepcopy((self.model, self.optimizers))
        if answer == FRESH[0]:
            optimizers = self.make(model)
        elif answer != SHIPPED:
            self.answer_(answer, model, optimizers)
        start, losses, fixed = self.fixed_loss(model), [], []
        for index, batch in enumerate(self.draw(2, AFTER)):
            loss = self.task.loss(model, batch)
            loss.backward()
            losses.append(float(loss.detach()))
            for one in optimizers:
                one.step()
                one.zero_grad()
            if index < FIRST:
                fixed.append(self.fixed_loss(model))
        found = {"mean": statistics.mean(losses), "first": statistics.mean(losses[1 : FIRST + 1])}
        found |= {"start": start, "spike": max(fixed) / start, "end": self.fixed_loss(model)}
        return {key: round(value, 5) for key, value in found.items()}

    @torch.no_grad()
    def fixed_loss(self, model: nn.Module) -> float:
        return statistics.mean(float(self.task.loss(model, batch)) for batch in self.fixed)

    def answer_(self, answer: str, model: nn.Module, optimizers: list[Any]) -> None:
        """Changes what the optimizers know of the factors."""
        measured = self.squares(model) if answer == GRADIENTS else {}
        for name, layer in model.named_modules():
            if not isinstance(layer, lp.LowRankLinear):
                continue
            holder = next(one for one in optimizers if any(p is layer.A.weight for p in one.param_groups[0]["params"]))
            if answer == FRESH[1]:
                for factor in (layer.A.weight, layer.B.weight):
                    holder.state.pop(factor, None)
                    if isinstance(holder, torch.optim.Adagrad):  # it makes its states when it is made
                        holder.state[factor] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(factor)}
                continue
            for factor, moved in zip((layer.A.weight, layer.B.weight), self.moved(answer, name, layer), strict=True):
                if answer == GRADIENTS:
                    scale = float(self.old[name]["step"]) if isinstance(holder, torch.optim.Adagrad) else 1.0
                    moved.update({key: scale * measured[id(factor)] for key in SQUARES if key in moved})
                holder.state[factor] = factored(moved) if isinstance(holder, torch.optim.Adafactor) else moved

    def squares(self, model: nn.Module) -> dict[int, Tensor]:
        """The mean squares of gradients, by the id of the parameter."""
        batches = self.draw(4, MEASURED)
        found = {id(p): torch.zeros_like(p) for p in model.parameters()}
        for batch in batches:
            self.task.loss(model, batch).backward()
            for parameter in model.parameters():
                found[id(parameter)] += parameter.grad.square() / len(batches)
                parameter.grad = None
        return found

    @torch.no_grad()
    def moved(self, answer: str, name: str, layer: Any) -> tuple[State, State]:
        """States of ``A`` and of ``B``."""
        a, b = layer.A.weight, layer.B.weight
        of_a, of_b = torch.ones(len(a), 1, device=a.device), torch.ones(1, len(a), device=a.device)
        if answer == STATISTICS:
            c, g = (one.to(a) for one in self.seen[name])
            of_a = ((b.mT @ g @ b).diagonal() / (b.square().mT @ g.diagonal())).clamp_min(0)[:, None]
            of_b = ((a @ c @ a.mT).diagonal() / (a.square() @ c.diagonal())).clamp_min(0)[None, :]
        if answer == MOMENTUM:
            m = self.old[name]["exp_avg"]
            of_a = ((b.mT @ m).square().sum(1) / (b.square().mT @ m.square().sum(1)))[:, None]
            of_b = ((m @ a.mT).square().sum(0) / (m.square().sum(0) @ a.square().mT))[None, :]
        for_a: State = {}
        for_b: State = {}
        for key, value in self.old[name].items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                for_a[key], for_b[key] = copy.deepcopy(value), copy.deepcopy(value)
            elif key in SQUARES:
                for_a[key], for_b[key] = of_a * (b.square().mT @ value), of_b * (value @ a.square().mT)
            else:
                for_a[key], for_b[key] = b.mT @ value, value @ a.mT
        if answer == RAISED and "exp_avg" in for_a:
            for state in (for_a, for_b):
                state["exp_avg_sq"] = state["exp_avg_sq"].maximum(state["exp_avg"].square())
        return for_a, for_b


def factored(state: State) -> State:
    """The same for Adafactor of torch."""
    squares = state.pop("sum")
    return {**state, "row_var": squares.mean(1, keepdim=True), "col_var": squares.mean(0, keepdim=True)}


def trained(task: Shakespeare, name: str, seed: int, device: torch.device) -> tuple[nn.Module, list[Any]]:
    """The model, and optimizers that have made steps."""
    model = task.model(seed).to(device)
    optimizers = OPTIMIZERS[name](model)
    for batch in task.draw(1000 * (seed + 1), BEFORE):
        task.loss(model, batch[:ROWS].to(device)).backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
    return model, optimizers


def load() -> list[Record]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run_missing(task: Shakespeare, device: torch.device, seeds: list[int], only: str) -> None:
    for seed in seeds:
        for name in (name for name in OPTIMIZERS if only in name):
            done = {(r["keep"], r["answer"]) for r in load() if (r["optimizer"], r["seed"]) == (name, seed)}
            wanted = {keep: [one for one in answers(name) if (keep, one) not in done] for keep in KEEPS}
            before = trained(task, name, seed, device) if any(wanted.values()) else None
            for keep, missing in wanted.items():
                if not missing:
                    continue
                trial = Trial(task, *copy.deepcopy(before), OPTIMIZERS[name], keep, seed)
                for answer in missing:
                    add({"optimizer": name, "keep": keep, "answer": answer, "seed": seed, **trial.run(answer)})


def add(record: Record) -> None:
    versions = {"torch": torch.__version__, "lightning_prehab": __version__}
    line = json.dumps({**record, "versions": versions, "cpu": platform.machine(), "threads": torch.get_num_threads()})
    with RESULTS.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def table(records: list[Record]) -> Iterator[str]:
    """Lines of a markdown table: for each keep the mean loss, its difference to a fresh optimizer, and the spike."""
    keeps = sorted({r["keep"] for r in records}, reverse=True)
    heads = ("mean loss of 50 steps", "less than fresh", "spike")
    yield f"| optimizer | second moments | {' | '.join(f'{head}, keep {keep}' for keep in keeps for head in heads)} |"
    yield "|" + "---|" * (2 + 3 * len(keeps))
    for name in OPTIMIZERS:
        for answer in answers(name):
            cells = []
            for keep in keeps:
                of = {
                    one: {
                        r["seed"]: r for r in records if (r["optimizer"], r["keep"], r["answer"]) == (name, keep, one)
                    }
                    for one in (answer, FRESH[0])
                }
                found, fresh = of[answer], of[FRESH[0]]
                if not found:
                    cells += [""] * 3
                    continue
                less = [fresh[seed]["mean"] - r["mean"] for seed, r in found.items() if seed in fresh]
                spread = f" ± {statistics.stdev(less):.3f}" if len(less) > 1 and answer != FRESH[0] else ""
                cells += [f"{statistics.mean(r['mean'] for r in found.values()):.3f}"]
                cells += ["" if answer == FRESH[0] else f"{statistics.mean(less):.3f}{spread}"]
                cells += [f"{statistics.median(r['spike'] for r in found.values()):.2f}"]
            if any(cells):
                yield f"| {name} | {answer} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="input.txt of tiny Shakespeare")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results only")
    parser.add_argument("--only", default="", metavar="NAME", help="the optimizers whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", default=DEFAULT_CACHE, help="folder for the pretrained models")
    args = parser.parse_args()
    if args.data is None and not args.table:
        parser.error("the file input.txt is missing")
    if not args.table:
        torch.set_num_threads(args.threads)
        warnings.filterwarnings("ignore")
        run_missing(Shakespeare(args.data, args.cache), torch.device(args.device), args.seeds, args.only)
    print("\n".join(table(load())))


if __name__ == "__main__":
    main()
