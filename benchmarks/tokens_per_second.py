"""How many tokens a second does a cut language model read and write, in each layout, on this processor?

    python benchmarks/tokens_per_second.py --threads 2   # measures anew and replaces tokens_per_second.json
    python benchmarks/tokens_per_second.py --table       # prints the stored results only

A LLaMA of the shape of SmolLM2-135M with random weights, since weights make no difference to time: 30 blocks of width
576, vocabulary of 49,152, float32, one sequence. Every matrix keeps the same share (``RankRatio``), so all blocks are
alike. *Read*: a prompt of 512 tokens, up to the scores of its last token. *Write*: one more token behind 512 that lie
in the cache of keys and values. Dense and all cut models take turns; medians of nine. Compiled: each block by
``torch.compile``.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

import lightning_prehab as lp
from lightning_prehab.progress import counted, shown

RESULTS = Path(__file__).with_suffix(".json")
KEEPS, LAYOUTS, MULTIPLES, LENGTH, REPEATS = (0.8, 0.6, 0.4), ("factors", "pivot"), (1, 32), 512, 9
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

    def __init__(self, config: transformers.LlamaConfig) -> None:
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm, self.rotary = LlamaRMSNorm(config.hidden_size), LlamaRotaryEmbedding(config)
        self.block = LlamaDecoderLayer(config, 0).eval()
        shape = (1, config.num_key_value_heads, LENGTH, config.hidden_size // config.num_attention_heads)
        self.past = [Past(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers)]

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
        cosine, sine = self.rotary(states, torch.arange(start, start + tokens.shape[1])[None])
        for block, past in zip(blocks, self.past, strict=True):
            states = step(block, states, cosine, sine, past if write else None)
        return self.norm(states[:, -1:]) @ self.embedding.weight.T


def in_turns(calls: dict[int, Callable[[], object]], least: float) -> dict[int, float]:
    """Median seconds of each call; a measurement repeats it until it has lasted so many seconds at least."""
    often = {}
    for key, call in counted(calls.items(), "warm up"):
        call()
        call()
        often[key] = max(1, round(least / max(seconds_of(call), 1e-9)))
    found: dict[int, list[float]] = {key: [] for key in calls}
    for _ in counted(range(REPEATS), "measure"):
        for key, call in calls.items():
            found[key].append(seconds_of(call, often[key]))
    return {key: statistics.median(each) for key, each in found.items()}


def seconds_of(call: Callable[[], object], often: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(often):
        call()
    return (time.perf_counter() - start) / often


@torch.no_grad()
def measure(config: transformers.LlamaConfig, least: float = 0.2) -> list[Row]:
    """One row for each model, phase and mode."""
    torch.manual_seed(0)
    model = Model(config)
    prompt = torch.randint(config.vocab_size, (1, LENGTH))
    variants: list[tuple[Row, lp.Recipe | None]] = [({"keep": 1.0, "layout": "dense", "multiple": 1}, None)]
    for keep in KEEPS:
        for layout in LAYOUTS:
            for multiple in MULTIPLES:
                recipe = lp.Recipe(
                    policy=lp.RankRatio(keep), factorization=lp.SVD(), layout=layout, rank_multiple_of=multiple
                )
                variants.append(({"keep": keep, "layout": layout, "multiple": multiple}, recipe))
    made = [model.blocks(recipe) for _, recipe in variants]
    torch._dynamo.config.recompile_limit = 2 * len(variants)
    modes = {"eager": through, "compiled": torch.compile(through, dynamic=False)}
    rows: list[Row] = []
    for mode, step in modes.items():
        for phase, tokens in (("read", prompt), ("write", prompt[:, :1])):
            calls: dict[int, Callable[[], object]] = {
                index: lambda blocks=blocks, step=step, tokens=tokens, write=phase == "write": (  # type: ignore[misc]
                    model.call(blocks, step, tokens, write=write)
                )
                for index, (blocks, _) in enumerate(made)
            }
            seconds = in_turns(calls, least)
            for index, (setting, _) in enumerate(variants):
                speed = {
                    "tokens_per_second": round(tokens.shape[1] / seconds[index], 1),
                    "times_as_fast": round(seconds[0] / seconds[index], 3),
                    "kept": round(made[index][1], 4),
                }
                rows.append({"mode": mode, "phase": phase, **setting, **speed})
    return rows


def print_table() -> None:
    stored = json.loads(RESULTS.read_text())
    columns = [(mode, phase) for phase in ("read", "write") for mode in ("eager", "compiled")]
    print("| layout | keep | ranks | " + " | ".join(f"{phase}, {mode}" for mode, phase in columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    settings = dict.fromkeys((row["layout"], row["keep"], row["multiple"]) for row in stored["rows"])
    for layout, keep, multiple in settings:
        cells = []
        for column in columns:
            (row,) = [
                row
                for row in stored["rows"]
                if (row["layout"], row["keep"], row["multiple"], row["mode"], row["phase"])
                == (layout, keep, multiple, *column)
            ]
            cells.append(
                f"{row['tokens_per_second']:.1f} a second" if layout == "dense" else f"{row['times_as_fast']:.2f}"
            )
        ranks = "" if layout == "dense" else "any" if multiple == 1 else f"multiples of {multiple}"
        print(f"| {layout} | {keep} | {ranks} | " + " | ".join(cells) + " |")
    print(f"\n{stored['threads']} threads, torch {stored['torch']}, {stored['processor']}")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if info.exists() and names else platform.processor()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--threads", type=int, default=2)
    given = arguments.parse_args()
    if not given.table:
        torch.set_num_threads(given.threads)
        with shown():
            rows = measure(transformers.LlamaConfig(**CONFIG))
        found = {"threads": given.threads, "torch": torch.__version__, "processor": processor(), "rows": rows}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print_table()


if __name__ == "__main__":
    main()
