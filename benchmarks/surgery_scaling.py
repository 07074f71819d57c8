"""How is the work of the surgery shared by several processes, what is sent for it, and what memory does each need?

    python benchmarks/surgery_scaling.py
    python benchmarks/surgery_scaling.py --table

Statistics, decompositions and swap of layers in the shape of Llama-3.2-1B, in bfloat16 on the CPU: two blocks of its
sixteen, without the projection back from the inner size. A real Trainer, gloo, one thread for each process. Bytes are
those of the tensors that a process hands to collectives, to send or to receive into, counted where torch hands them to
the backend; the peak is the largest memory of a process during the surgery beside what it held before. On a machine
with fewer cores than processes the times say nothing of scaling: the work of the busiest process does.
"""

import argparse
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_prehab as lp
from lightning_prehab.callbacks._owners import cost_of
from lightning_prehab.callbacks._site import TrainerSite

RESULTS = Path(__file__).with_name("surgery_scaling.json")
SIZES = {"hidden": 2048, "keys": 512, "inner": 8192, "blocks": 2}
ROWS = (("ddp", 1), ("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4))
TOKENS, STEPS, KEEP = 256, 2, 0.5
PHASES = ("observe", "decompose", "factors", "swap")


class Block(nn.Module):
    """The linear layers of a block, fed with what has their shape."""

    def __init__(self, hidden: int, keys: int, inner: int) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k, self.v = nn.Linear(hidden, keys, bias=False), nn.Linear(hidden, keys, bias=False)
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q(x) + (self.k(x) * self.v(x)).repeat_interleave(x.shape[-1] // self.k.out_features, -1)
        x = x + self.o(mixed)
        wide = nn.functional.silu(self.gate(x)) * self.up(x)
        return x + wide.unflatten(-1, (-1, x.shape[-1])).sum(-2)


class Lit(pl.LightningModule):
    """Some blocks, sharded where the strategy shards."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes, self.net = sizes, None

    def configure_model(self) -> None:
        hidden, keys, inner, count = self.sizes.values()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(Block(hidden, keys, inner).bfloat16() for _ in range(count)))
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            for part in (*self.net, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class Sent(TorchDispatchMode):
    """Counts the bytes that this process gives to collectives, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            sources = args[1] if name.startswith("_allgather") or "allgather" in name else args[0]
            tensors = [one for one in tree_leaves(sources) if isinstance(one, Tensor)]
            self.bytes[re.sub(r"[^a-z]", "", name)] += sum(one.nbytes for one in tensors)
        return func(*args, **(kwargs or {}))


def memory(word: str) -> int:
    """Of this process, in bytes: ``VmRSS`` now, ``VmHWM`` at the peak."""
    return 1024 * int(re.search(rf"{word}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Measured(pl.Callback):
    """What the surgery takes on this process."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"phases": {}, "said": None}
        for phase in PHASES:
            self.watch(phase)

    def watch(self, phase: str) -> None:
        """Times a step of the site, and counts what it sends."""
        for site in (TrainerSite, *TrainerSite.__subclasses__()):
            if phase not in vars(site):
                continue
            method = vars(site)[phase]

            def watched(this: Any, *args: Any, method: Any = method) -> Any:
                if phase == PHASES[0]:
                    self.forget()
                began, processor, sent = time.perf_counter(), time.process_time(), Sent()
                with sent:
                    answer = method(this, *args)
                if phase == "decompose":
                    costs = {name: cost_of(args[0].targets[name]) for name in this._decompositions}
                    self.found |= {"layers": len(costs), "cost": sum(costs.values())}
                    self.found["all_cost"] = sum(map(cost_of, args[0].targets.values()))
                self.found["phases"][phase] = {
                    "seconds": time.perf_counter() - began,
                    "processor_seconds": time.process_time() - processor,
                    "bytes": dict(sent.bytes),
                }
                return answer

            setattr(site, phase, watched)

    def forget(self) -> None:
        """Of the peak of the training."""
        Path("/proc/self/clear_refs").write_text("5")
        self.held = memory("VmRSS")

    def on_surgery(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: Any) -> None:
        self.found["peak"] = memory("VmHWM") - self.held
        self.found["kept"] = report.keep


def work(way: str, folder: Path, sizes: dict[str, int], tokens: int) -> None:
    """One process of a run; writes what it has measured."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(handler)
    strategy: Strategy = DDPStrategy(process_group_backend="gloo")
    if way == "fsdp2":
        strategy = ModelParallelStrategy(processes, 1)
    measured = Measured()
    cut = lp.CompressionCallback(1, KEEP, factorization=lp.WhitenedSVD(), calibration_batches=STEPS)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_epochs=2,
        limit_train_batches=STEPS,
        callbacks=[cut, measured],
        enable_model_summary=False,
        **quiet,
    )
    generator = torch.Generator().manual_seed(rank)
    data = torch.randn(STEPS * processes, tokens, sizes["hidden"], generator=generator, dtype=torch.bfloat16)
    trainer.fit(Lit(sizes), torch.utils.data.DataLoader(data))
    measured.found["said"] = next((line for line in said if line.startswith("Surgery on")), None)
    (folder / f"{rank}.json").write_text(json.dumps(measured.found))


def run(way: str, processes: int, sizes: dict[str, int], tokens: int) -> dict[str, Any]:
    """A row of the table: what each process has measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        worker = [__file__, "--worker", way, "--folder", folder, "--sizes", json.dumps(sizes), "--tokens", str(tokens)]
        subprocess.run([*command, *worker], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]
    return {"way": way, "processes": processes, "ranks": ranks}


def sent(row: dict[str, Any]) -> Counter[str]:
    """Bytes that the process that sends most gives to collectives, by the step of the surgery."""
    return Counter({p: max(sum(r["phases"][p]["bytes"].values()) for r in row["ranks"]) for p in PHASES})


def table(result: dict[str, Any]) -> str:
    """The results as tables."""
    rows = result["rows"]
    seconds = {
        (row["way"], row["processes"]): max(sum(p["seconds"] for p in r["phases"].values()) for r in row["ranks"])
        for row in rows
    }
    processor = {  # of the process that takes most
        (row["way"], row["processes"]): max(
            sum(p["processor_seconds"] for p in r["phases"].values()) for r in row["ranks"]
        )
        for row in rows
    }
    lines = [
        "| | work of the busiest process | its processor time | time | layers of each | peak, MB | said, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ranks = row["ranks"]
        share = max(rank["cost"] for rank in ranks) / ranks[0]["all_cost"]
        said = re.search(r"at most ([\d.,]+) MB", next(filter(None, (rank["said"] for rank in ranks)), ""))
        lines.append(
            f"| {row['way']}, {row['processes']} | {share:.2f} "
            f"| {processor[row['way'], row['processes']] / processor['ddp', 1]:.2f} "
            f"| {seconds[row['way'], row['processes']] / seconds['ddp', 1]:.2f} "
            f"| {', '.join(str(rank['layers']) for rank in ranks)} "
            f"| {max(rank['peak'] for rank in ranks) / 1e6:.1f} | {said[1] if said else ''} |"
        )
    lines += ["", "| MB sent by a process | statistics | decompositions | factors | swap |", "|---|---|---|---|---|"]
    for row in rows:
        if row["processes"] > 1:
            cells = " | ".join(f"{sent(row)[phase] / 1e6:.1f}" for phase in PHASES)
            lines.append(f"| {row['way']}, {row['processes']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rows", nargs="*", default=[f"{way}-{count}" for way, count in ROWS])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step and process")
    parser.add_argument("--sizes", type=json.loads, default=SIZES)
    parser.add_argument("--worker")
    parser.add_argument("--folder", type=Path)
    settings = parser.parse_args()
    if settings.worker:
        work(settings.worker, settings.folder, settings.sizes, settings.tokens)
        return
    if not settings.table:
        rows = []
        for row in settings.rows:
            way, count = row.split("-")
            rows.append(run(way, int(count), settings.sizes, settings.tokens))
            result = {
                "sizes": settings.sizes,
                "tokens": settings.tokens,
                "keep": KEEP,
                "method": repr(lp.WhitenedSVD()),
                "rows": rows,
                "torch": torch.__version__,
                "cores": os.cpu_count(),
                "machine": platform.machine(),
            }
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
