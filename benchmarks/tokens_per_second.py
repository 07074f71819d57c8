"""How many tokens a second does a cut language model read and write, in each layout, on this processor?

    python benchmarks/tokens_per_second.py --threads 2   # measures anew and replaces tokens_per_second.json
    python benchmarks/tokens_per_second.py --device cuda # on a GPU, into tokens_per_second.cuda.json
    python benchmarks/tokens_per_second.py --table       # prints the stored results only

A LLaMA of the shape of SmolLM2-135M with random weights, since weights make no difference to time: 30 blocks of width
576, vocabulary of 49,152, float32, one sequence. Every matrix keeps the same share (``RankRatio``), so all blocks are
alike. *Read*: a prompt of 512 tokens, up to the scores of its last token. *Write*: one more token behind 512 that lie
in the cache of keys and values. The dense model and the cut ones of a keep take turns; medians of five. Compiled: each
block by ``torch.compile``.
"""

import argparse
import copy
import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from on_device import add_device_, device_name, print_tables, processor, timed
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

import lightning_prehab as lp
from lightning_prehab.progress import counted, shown

RESULTS = Path(__file__).with_suffix(".json")
ON_CUDA = Path(__file__).with_suffix(".cuda.json")
KEEPS, LAYOUTS, MULTIPLES, LENGTH, REPEATS = (0.8, 0.6, 0.4), ("factors", "pivot"), (1, 32), 512, 5
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "attn_implementation": "sdpa",
}
Row = dict[str, Any]
CPU = torch.device("cpu")


class Past:
    """Keys and values of one block; a step adds its own to them and forgets them again."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


def through(block: nn.Module, states: Tensor, cosine: Tensor, sine: Tensor, past: Past | None) -> Tensor:
    mask = positions = None
    found: Tensor = block(states, mask, positions, past, position_embeddings=(cosine, sine))
    return found


class Model:
    """Blocks between an embedding and a head, which all models share."""

    def __init__(self, config: transformers.LlamaConfig, device: torch.device = CPU) -> None:
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size).to(device)
        self.norm, self.rotary = LlamaRMSNorm(config.hidden_size).to(device), LlamaRotaryEmbedding(config).to(device)
        self.block = LlamaDecoderLayer(config, 0).eval().to(device)
        shape = (1, config.num_key_value_heads, LENGTH, config.hidden_size // config.num_attention_heads)
        pairs = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers)]
        self.past = [Past(keys.to(device), values.to(device)) for keys, values in pairs]

    def blocks(self, recipe: lp.Recipe | None) -> tuple[list[nn.Module], float]:
        """The blocks of a model, dense or cut, and the kept share of their matrices."""
        block, keep = copy.deepcopy(self.block), 1.0
        if recipe is not None:
            keep = lp.compress_(block, recipe, progress=False).keep
        return [copy.deepcopy(block) for _ in self.past], keep

    def call(self, blocks: list[nn.Module], step: Callable[..., Tensor], tokens: Tensor, *, write: bool) -> Tensor:
        """Scores of what comes next."""
        states = self.embedding(tokens)
        start = LENGTH if write else 0
        cosine, sine = self.rotary(states, torch.arange(start, start + tokens.shape[1], device=tokens.device)[None])
        for block, past in zip(blocks, self.past, strict=True):
            states = step(block, states, cosine, sine, past if write else None)
        return self.norm(states[:, -1:]) @ self.embedding.weight.T


def in_turns(calls: dict[int, Callable[[], object]], least: float, device: torch.device = CPU) -> dict[int, float]:
    """Median seconds of each call; a measurement repeats it until it has lasted so many seconds at least."""
    often = {}
    for key, call in counted(calls.items(), "warm up"):
        call()
        call()
        often[key] = max(1, round(least / max(timed(call, device), 1e-9)))
    found: dict[int, list[float]] = {key: [] for key in calls}
    for _ in counted(range(REPEATS), "measure"):
        for key, call in calls.items():
            found[key].append(timed(call, device, often[key]))
    return {key: statistics.median(each) for key, each in found.items()}


@torch.no_grad()
def measure(config: transformers.LlamaConfig, keep: float, least: float = 0.2, device: torch.device = CPU) -> list[Row]:
    """One row for each phase, mode and model: the dense one and the cut ones of a keep, in turns."""
    torch.manual_seed(0)
    model = Model(config, device)
    prompt = torch.randint(config.vocab_size, (1, LENGTH)).to(device)
    variants: list[tuple[Row, lp.Recipe | None]] = [({"layout": "dense", "multiple": 1}, None)]
    for layout, multiple in itertools.product(LAYOUTS, MULTIPLES):
        wish = {"policy": lp.RankRatio(keep), "factorization": lp.SVD(), "layout": layout}
        recipe = lp.Recipe(**wish, rank_multiple_of=multiple)
        variants.append(({"layout": layout, "multiple": multiple}, recipe))
    made = [model.blocks(recipe) for _, recipe in variants]
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 4 * len(variants)
    modes = {"eager": through, "compiled": torch.compile(through, dynamic=False)}
    rows: list[Row] = []
    for (mode, step), phase in itertools.product(modes.items(), ("read", "write")):
        tokens = prompt if phase == "read" else prompt[:, :1]
        calls: dict[int, Callable[[], object]] = {
            index: partial(model.call, blocks, step, tokens, write=phase == "write")
            for index, (blocks, _) in enumerate(made)
        }
        seconds = in_turns(calls, least, device)
        for index, (setting, _) in enumerate(variants):
            speed = {
                "tokens_per_second": round(tokens.shape[1] / seconds[index], 1),
                "times_as_fast": round(seconds[0] / seconds[index], 3),
                "kept": round(made[index][1], 4),
            }
            rows.append({"keep": keep, "mode": mode, "phase": phase, **setting, **speed})
    return rows


def print_table(path: Path) -> None:
    stored = json.loads(path.read_text()) if path.exists() else {"rows": []}
    columns = [(mode, phase) for phase in ("read", "write") for mode in ("eager", "compiled")]
    print("| layout | keep | ranks | " + " | ".join(f"{phase}, {mode}" for mode, phase in columns) + " |")
    print("|---" * (3 + len(columns)) + "|")

    def found(what: str, column: tuple[str, str], **setting: object) -> float:
        wanted = {"mode": column[0], "phase": column[1], **setting}
        return statistics.fmean(row[what] for row in stored["rows"] if wanted.items() <= row.items())

    if stored["rows"]:
        speeds = [f"{found('tokens_per_second', column, layout='dense'):.1f} a second" for column in columns]
        print("| dense | 1.0 | | " + " | ".join(speeds) + " |")
    cut = (row for row in stored["rows"] if row["layout"] != "dense")
    for keep, layout, multiple in dict.fromkeys((row["keep"], row["layout"], row["multiple"]) for row in cut):
        times = [
            f"{found('times_as_fast', column, keep=keep, layout=layout, multiple=multiple):.2f}" for column in columns
        ]
        ranks = "any" if multiple == 1 else f"multiples of {multiple}"
        print(f"| {layout} | {keep} | {ranks} | " + " | ".join(times) + " |")
    if stored["rows"]:
        where = f"torch {stored['torch']}, {stored.get('device', stored['processor'])}"
        print(f"\n{where}" if "device" in stored else f"\n{stored['threads']} threads, {where}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--threads", type=int, default=2)
    add_device_(arguments)
    given = arguments.parse_args()
    if not given.table:
        torch.set_num_threads(given.threads)
        made_with = {"threads": given.threads, "torch": torch.__version__, "processor": processor()}
        on_gpu = given.device.type == "cuda"
        made_with |= {"device": device_name(given.device)} if on_gpu else {}
        rows: list[Row] = []
        for keep in KEEPS:
            with shown():
                rows += measure(transformers.LlamaConfig(**CONFIG), keep, device=given.device)
            (ON_CUDA if on_gpu else RESULTS).write_text(json.dumps({**made_with, "rows": rows}, indent=1) + "\n")
    print_tables(print_table, RESULTS, ON_CUDA)


if __name__ == "__main__":
    main()
