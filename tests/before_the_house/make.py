"""What lightning_prehab computed at commit cb4161a, and files that it wrote: later code is compared with them.

That was the code before all roads to the surgery became one. This script made the files beside it, with
torch 2.14.1 and lightning 2.6.6, at the root of a checkout of that commit:

    PYTHONPATH=. python tests/before_the_house/make.py tests/before_the_house

It is kept so that people see what the files are, and the tests call its functions, with the code of today. It uses
public names only. Do not run it again to make a failing test pass: then nothing is compared any more.

- ``expected.pt``: ``machine``; ``results`` by model, method and entry point; ``run`` and ``planned``, which belong to
  the files.
- ``files/calibrating.ckpt``: in the middle of calibration, three of its six batches seen, prehab under way.
- ``files/compressed.ckpt``: after the surgery, in the middle of an epoch and of the warm-up.
- ``files/weights.ckpt``: the end of the same run, ``save_weights_only``.
- ``files/report.json``: the report of that run.
- ``files/folder``: what ``python -m lightning_prehab compress`` writes.
- ``files/plan.yaml``: what ``CompressionPlan.to_yaml`` writes.
"""

import contextlib
import io
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prehab as lp
from lightning_prehab.cli import main

BATCHES, ROWS = 8, 32
State = dict[str, Tensor]
#: ``{"plan": as to_dict gives it, "states": {moment: state dict}}``
Result = dict[str, Any]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """One thread and a seed inside, both as before outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def machine() -> dict[str, str]:
    """Where the same bits are expected. Virtual machines hide the model of the processor, not what it can do."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().partition("\n\n")[0].splitlines() if cpuinfo.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "torch": str(torch.__version__),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": ", ".join(found.get(key, "") for key in ("model name", "cpu family", "model", "stepping")),
        "features": " ".join(sorted(found.get("flags", "").split())),
        "cache": found.get("cache size", ""),
    }


class Transformer(nn.Module):
    """Two ways to hold an attention: torch's own module, and a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(3)])
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norms[1](x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norms[2](x))).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32),
        nn.Tanh(),
        nn.Linear(32, 48),
        nn.Tanh(),
        nn.Linear(48, 24, bias=False),
        nn.Tanh(),
        nn.Linear(24, 6),
    )


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(32, 6),
    )


@dataclass(frozen=True)
class Model:
    """How it is built, the shape of one sample, the dimension of its features, its classes."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    features: int
    classes: int


MODELS = {
    "mlp": Model(_mlp, (20,), 0, 6),
    "conv": Model(_conv, (3, 6, 6), 0, 6),
    "transformer": Model(Transformer, (7, 12), 1, 5),
}


@dataclass(frozen=True)
class Method:
    """Arguments for Python, and for the command line."""

    keep: float
    arguments: Callable[[], dict[str, Any]]
    words: tuple[str, ...]
    data: bool = True


METHODS = {
    "default": Method(0.4, dict, ()),
    "whitened": Method(
        0.5, lambda: {"factorization": lp.WhitenedSVD(), "policy": lp.RankRatio(0.5)}, ("--method", "whitened")
    ),
    "svd": Method(0.6, lambda: {"factorization": lp.SVD()}, ("--method", "svd"), data=False),
}


def _uniform(source: random.Random, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """From -1 to 1: Python's generator gives the same numbers everywhere, whatever torch does."""
    return torch.tensor([source.uniform(-1.0, 1.0) for _ in range(math.prod(shape))]).reshape(shape)


def build(model: str) -> nn.Module:
    """The model with its weights."""
    module, source = MODELS[model].build(), random.Random(f"weights of {model}")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            numbers = _uniform(source, parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(numbers * math.sqrt(3 / parameter[0].numel()))
            else:
                parameter.copy_(0.1 * numbers + (0.0 if name.endswith("bias") else 1.0))
    return module


@cache
def _data(model: str) -> tuple[Tensor, Tensor]:
    found, source = MODELS[model], random.Random(f"data of {model}")
    size = found.shape[found.features]
    scales = torch.tensor([2.0 - 1.8 * index / (size - 1) for index in range(size)])
    x = _uniform(source, (BATCHES * ROWS, *found.shape)).movedim(found.features + 1, -1) * scales
    teacher = _uniform(source, (size, found.classes))
    y = (x.reshape(len(x), -1, size).mean(1) @ teacher).argmax(-1)
    return x.movedim(-1, found.features + 1).contiguous(), y


def batches(model: str) -> list[tuple[Tensor, Tensor]]:
    """Samples and their classes."""
    x, y = _data(model)
    return list(zip(x.split(ROWS), y.split(ROWS), strict=True))


def state_of(module: nn.Module) -> State:
    """A copy of its state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@undisturbed()
def logits_of(lit: pl.LightningModule, model: str) -> Tensor:
    """What it says of the first batch."""
    with torch.no_grad():
        return lit.eval()(batches(model)[0][0])


class Lit(pl.LightningModule):
    """A LightningModule as people have it."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = build(model)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        # eps: some gradients are nothing but rounding, such as those of the biases of keys
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3)


class Loader:
    """The batches in their order; goes on where it stopped when a run is resumed inside an epoch."""

    def __init__(self, model: str) -> None:
        self.batches = batches(model)
        self.given = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.given %= len(self)
        while self.given < len(self):
            self.given += 1
            yield self.batches[self.given - 1]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class AtSurgery(pl.Callback):
    """Keeps what the model is right after the cut."""

    def __init__(self) -> None:
        self.state: State = {}

    def on_surgery(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: lp.CompressionReport) -> None:
        self.state = state_of(pl_module)


def trainer_of(folder: Path, **settings: Any) -> pl.Trainer:
    """A quiet one."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **settings,
    )


@undisturbed()
def by_compress(model: str, method: str, folder: Path) -> Result:
    """``compress_`` with a loss of its own."""
    module, chosen = build(model), METHODS[method]
    report = lp.compress_(
        module,
        chosen.keep,
        batches(model) if chosen.data else None,
        loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        **chosen.arguments(),
    )
    return {"plan": report.plan.to_dict(), "states": {"surgery": state_of(module)}}


@undisturbed()
def by_callback(model: str, method: str, folder: Path) -> Result:
    """A training run with the surgery in the middle."""
    compression, at_surgery = (
        lp.CompressionCallback(1, METHODS[method].keep, **METHODS[method].arguments()),
        AtSurgery(),
    )
    lit = Lit(model)
    trainer_of(folder, max_epochs=2, callbacks=[compression, at_surgery]).fit(lit, Loader(model))
    assert compression.report is not None
    return {"plan": compression.report.plan.to_dict(), "states": {"surgery": at_surgery.state, "end": state_of(lit)}}


@undisturbed()
def by_command_line(model: str, method: str, folder: Path) -> Result:
    """``plan`` and ``compress`` on a checkpoint; labels are sampled from the model. Leaves ``folder/small``."""
    trainer = trainer_of(folder, max_epochs=0)
    trainer.fit(Lit(model), Loader(model))
    trainer.save_checkpoint(folder / "dense.ckpt")
    torch.save([x for x, _ in batches(model)], folder / "batches.pt")
    chosen = METHODS[method]
    words = [folder / "dense.ckpt", "--model", f"{Lit.__module__}.{Lit.__qualname__}", "--keep", chosen.keep]
    words += [*chosen.words, *(("--data", folder / "batches.pt") if chosen.data else ()), "--evaluate", 0, "--json"]
    (plan,) = _command("plan", *words)["plans"]
    _command("compress", *words, "--output", folder / "small")
    return {"plan": plan, "states": {"surgery": state_of(lp.load_compressed(folder / "small", Lit(model)))}}


def _command(*words: object) -> Any:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(word) for word in words]) == 0
    return json.loads(printed.getvalue())


ENTRIES = {"compress": by_compress, "callback": by_callback, "command line": by_command_line}

#: Of the run whose checkpoints are kept, of the folder, and of the plan.
RUN, FOLDER, PLAN = "transformer", ("conv", "default"), "conv"
EPOCHS, SURGERY = 4, 2
CHECKPOINTS = {13: "calibrating.ckpt", 26: "compressed.ckpt"}


class Save(pl.Callback):
    """Writes checkpoints after some steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in CHECKPOINTS:
            trainer.save_checkpoint(self.folder / CHECKPOINTS[trainer.global_step])


@undisturbed()
def run(
    folder: Path, ckpt_path: Path | None = None, others: tuple[pl.Callback, ...] = ()
) -> tuple[pl.Trainer, Lit, lp.CompressionReport]:
    """Prehab of some layers (the cut of these is free, that of the others is not), surgery and rehab.

    From the start, or from a checkpoint.
    """
    compression = lp.CompressionCallback(SURGERY, 0.4, calibration_batches=6)
    prehab = lp.PrehabCallback(target_modules=["mlp.*", "qkv"])
    callbacks = [prehab, compression, lp.RehabSchedule(warmup_steps=12), *others]
    lit = Lit(RUN)
    trainer = trainer_of(folder, max_epochs=EPOCHS, callbacks=callbacks)
    trainer.fit(lit, Loader(RUN), ckpt_path=ckpt_path)
    assert compression.report is not None
    return trainer, lit, compression.report


@undisturbed()
def calibrated() -> tuple[nn.Module, dict[str, lp.LayerStatistics], lp.CompressionPlan]:
    """A model, its statistics and its plan, step by step."""
    module = build(PLAN)
    targets = lp.find_targets(module)
    statistics = lp.collect_statistics(module, targets, [x for x, _ in batches(PLAN)], gradients=True)
    return module, statistics, lp.make_plan(targets, 0.3, statistics=statistics, rank_multiple_of=2)


@undisturbed()
def carried_out(module: nn.Module, statistics: dict[str, lp.LayerStatistics], plan: lp.CompressionPlan) -> State:
    """The weights after a plan."""
    lp.apply_plan_(module, plan, statistics)
    return state_of(module)


def write(folder: Path) -> None:
    """Writes everything."""
    files = folder / "files"
    files.mkdir(parents=True)
    results: dict[str, Any] = {}
    for model in MODELS:
        for method in METHODS:
            for entry, way in ENTRIES.items():
                with tempfile.TemporaryDirectory() as work:
                    result = way(model, method, Path(work))
                    results.setdefault(model, {}).setdefault(method, {})[entry] = result
                    if entry == "command line" and (model, method) == FOLDER:
                        Path(work, "small").rename(files / "folder")
    trainer, lit, report = run(files, others=(Save(files),))
    trainer.save_checkpoint(files / "weights.ckpt", weights_only=True)
    report.save_json(files / "report.json")
    module, statistics, plan = calibrated()
    plan.to_yaml(files / "plan.yaml")
    expected = {
        "machine": machine(),
        "results": results,
        "run": {"plan": report.plan.to_dict(), "end": state_of(lit), "logits": logits_of(lit, RUN)},
        "planned": {"plan": plan.to_dict(), "state": carried_out(module, statistics, plan)},
    }
    torch.save(expected, folder / "expected.pt")


if __name__ == "__main__":
    print(f"with {lp.__file__}")
    write(Path(sys.argv[1]))
