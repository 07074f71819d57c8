"""What does collecting statistics cost: on training steps while it is on, and in a pass of its own?

    python benchmarks/calibration_overhead.py                 # measures, writes its .json, prints the table
    python benchmarks/calibration_overhead.py --only LLaMA    # one model; the others keep their results
    python benchmarks/calibration_overhead.py --device cuda   # on a GPU, into calibration_overhead.cuda.json
    python benchmarks/calibration_overhead.py --table         # prints the tables only

ViT-tiny (12 blocks), two blocks of ViT-B, a LLaMA of 4 layers; random weights, random data. Training: a real Trainer
with AdamW in which every other step collects. The cost is that of eight such steps, of which two are looked at, against
the eight plain ones between them; the median over repeats. "prehab" is the default PrehabCallback beside a
CompressionCallback, before the regularizer begins; "ride" a CompressionCallback alone in the epoch before its surgery.
Own pass: collect_statistics as compress_ calls it, against forward and backward passes of the same batches, with all
gradients, in turns. Times are those of the processor, not of the clock, so that a busy machine does little to them; on
a GPU they are those of the clock, whenever it is done.
"""

import argparse
import json
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from on_device import add_device_, clock, device_name, print_tables
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab import progress
from lightning_prehab.factorizations import Factorization
from lightning_prehab.statistics.collector import EVERY

RESULTS = Path(__file__).with_suffix(".json")
ON_CUDA = Path(__file__).with_suffix(".cuda.json")
CYCLE = 2 * EVERY  # collecting steps after which the same is done again
METHODS: dict[str, Callable[[], Factorization]] = {
    "prehab, KroneckerSVD (default)": lp.KroneckerSVD,
    "ride, KroneckerSVD (default)": lp.KroneckerSVD,
    "ride, KroneckerSVD('auto')": partial(lp.KroneckerSVD, "auto"),
    "ride, WhitenedSVD": lp.WhitenedSVD,
    "ride, FisherSVD": lp.FisherSVD,
}
OWN_PASS = "own pass, KroneckerSVD (default)"
CPU = torch.device("cpu")


class Vision(nn.Module):
    """Random images and labels for a Vision Transformer."""

    def __init__(self, model: nn.Module, size: int, batch: int) -> None:
        super().__init__()
        self.model = model
        self.size, self.samples = size, batch

    def batch(self) -> tuple[Tensor, Tensor]:
        return torch.randn(self.samples, 3, self.size, self.size), torch.randint(10, (self.samples,))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(images), labels)


class Language(nn.Module):
    """Random tokens for a LLaMA."""

    def __init__(self, sizes: dict[str, int], sequences: int, length: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, max_position_embeddings=length, **sizes))
        self.shape = sequences, length

    def batch(self) -> tuple[Tensor]:
        return (torch.randint(1000, self.shape),)

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss


def llama(sequences: int = 4, length: int = 512, layers: int = 4, width: int = 512, hidden: int = 1376) -> Language:
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 8}
    return Language(sizes, sequences, length)


MODELS: dict[str, Callable[[], Vision | Language]] = {
    "ViT-tiny, 32 images": lambda: Vision(timm.create_model("vit_tiny_patch16_224", num_classes=10), 224, 32),
    "ViT-B, two blocks, 32 images": lambda: Vision(
        VisionTransformer(depth=2, embed_dim=768, num_heads=12, num_classes=10), 224, 32
    ),
    "LLaMA, 4 layers, 2,048 tokens": llama,
}


class Lit(L.LightningModule):
    """Trains one of these on one batch again and again."""

    def __init__(self, net: Vision | Language) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(*batch)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Prehab(lp.PrehabCallback):
    """Collects in odd batches only."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 1:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx // 2)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 1:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx // 2)


class Ride(lp.CompressionCallback):
    """Collects in odd batches only."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 1:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx // 2)


class Start(L.Callback):
    """Notes when a batch begins; stands first."""

    now = 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.now = clock(trainer.strategy.root_device)


class Stop(L.Callback):
    """Notes how long a batch took; stands last."""

    def __init__(self, start: Start) -> None:
        self.start, self.seconds = start, list[float]()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seconds.append(clock(trainer.strategy.root_device) - self.start.now)


def on_steps(make: Callable[[], Vision | Language], row: str, repeats: int, device: torch.device = CPU) -> list[float]:
    """Ratios of steps with and without collection; the first two pairs of each warm up."""
    torch.manual_seed(0)
    net = make()
    method = METHODS[row]()
    callbacks: list[L.Callback] = [Ride(epoch=1, keep=0.5, factorization=method)]
    if row.startswith("prehab"):
        callbacks = [Prehab(), lp.CompressionCallback(epoch=2, keep=0.5, factorization=method)]
    start = Start()
    stop = Stop(start)
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=3,
        max_steps=2 * CYCLE * repeats + 4,
        callbacks=[start, *callbacks, stop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader([net.batch()] * 64, batch_size=None)  # one window of statistics, as by default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Lit(net), loader)
    off, on = stop.seconds[4::2], stop.seconds[5::2]
    starts = range(0, CYCLE * repeats, CYCLE)
    return [sum(on[start : start + CYCLE]) / sum(off[start : start + CYCLE]) for start in starts]


def own_pass(make: Callable[[], Vision | Language], repeats: int, device: torch.device = CPU) -> list[float]:
    """Ratios of collecting statistics and of forward and backward passes of two batches; the first pair warms up."""
    torch.manual_seed(0)
    net = make().eval().to(device)
    targets = lp.find_targets(net)
    batches = [tuple(part.to(device) for part in net.batch()) for _ in range(2)]
    ratios = []
    for _ in range(repeats + 1):
        start = clock(device)
        for batch in batches:
            net(*batch).backward()
            net.zero_grad()
        middle = clock(device)
        lp.collect_statistics(net, targets, batches, wanted=lp.KroneckerSVD().wanted)
        ratios.append((clock(device) - middle) / (middle - start))
    return ratios[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored results only")
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name has it")
    parser.add_argument("--repeats", type=int, default=3, help="at most 3")
    parser.add_argument("--threads", type=int, default=1)
    add_device_(parser)
    arguments = parser.parse_args()
    device = arguments.device
    path = ON_CUDA if device.type == "cuda" else RESULTS
    results = read(path)
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        threads = f"{platform.machine()}, {arguments.threads} threads"
        where = device_name(device) if device.type == "cuda" else threads
        for model, make in MODELS.items():
            if arguments.only in model:
                rows = list(METHODS) if "ViT-B" in model else list(METHODS)[:2]
                with progress.shown(), progress.naming_items("run", rows):
                    counted = progress.counted(rows, "run")
                    ratios = {row: on_steps(make, row, arguments.repeats, device) for row in counted}
                    ratios[OWN_PASS] = own_pass(make, arguments.repeats, device)
                results[model] = {
                    "command": " ".join(["python", "benchmarks/calibration_overhead.py", *sys.argv[1:]]),
                    "machine": f"{where}, torch {torch.__version__}",
                    "ratios": {row: [round(value, 3) for value in values] for row, values in ratios.items()},
                }
                path.write_text(json.dumps(results, indent=1) + "\n")
    print_tables(print_table, RESULTS, ON_CUDA)


def read(path: Path) -> dict[str, Any]:
    """The stored results, in the order of the models."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    return {model: stored[model] for model in MODELS if model in stored}


def print_table(path: Path) -> None:
    results = read(path)
    if path == ON_CUDA:
        print("; ".join(dict.fromkeys(stored["machine"] for stored in results.values())) + "\n")
    print("| statistics | " + " | ".join(results) + " |\n|---|" + "---|" * len(results))
    for row in [*METHODS, OWN_PASS]:
        cells = [shown(row, stored["ratios"].get(row)) for stored in results.values()]
        print(f"| {row} | " + " | ".join(cells) + " |")


def shown(row: str, ratios: list[float] | None) -> str:
    """A cell of the table: the cost of a step, or how many forward and backward passes a pass of its own is worth."""
    if ratios is None:
        return ""
    median = statistics.median(ratios)
    return f"{median:.2f} passes" if row == OWN_PASS else f"{100 * (median - 1):+.1f} %"


if __name__ == "__main__":
    main()
