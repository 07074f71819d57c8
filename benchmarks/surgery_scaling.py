"""How is the work of the surgery shared by several processes, what is sent for it, and what memory does each need?

    python benchmarks/surgery_scaling.py
    python benchmarks/surgery_scaling.py --table
    python benchmarks/surgery_scaling.py --rows fsdp2-2 fsdp2-4

Statistics, decompositions and swap of layers in the shape of Llama-3.2-1B, in bfloat16 on the CPU: one block of its
sixteen, without the projection back from the inner size. A real Trainer, gloo, one thread for each process. Bytes are
those of the tensors that a process hands to collectives, to send or to receive into, counted where torch hands them to
the backend; the peak is the largest memory of a process during the surgery beside what it held before. What of that
is whole layers, rather than the float64 of a decomposition, is told by counting tensors while they live: those that
were put together to be decomposed, and all that the swap makes. On a machine with fewer cores than processes the times
say nothing of scaling: the work of the busiest process does. Rows that are stored are not run again.
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
import weakref
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
from lightning_prehab.callbacks import _rounds
from lightning_prehab.callbacks._owners import cost_of
from lightning_prehab.callbacks._site import TrainerSite

RESULTS = Path(__file__).with_name("surgery_scaling.json")
SIZES = {"hidden": 2048, "keys": 512, "inner": 8192, "blocks": 1}
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


class Watched(TorchDispatchMode):
    """Counts the bytes that this process gives to collectives, by their names, and those of the tensors that it makes.

    Attributes:
        bytes: Given to collectives.
        now: Bytes of what has been made inside and is still there.
        most: The same at the worst time.
        most_whole: Of tensors of ``whole`` bytes and more.
    """

    def __init__(self, whole: int) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.now = self.most = self.most_whole = 0
        self._whole, self._sizes = whole, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what it does to its parts comes by again
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            sources = args[1] if name.startswith("_allgather") or "allgather" in name else args[0]
            self.bytes[re.sub(r"[^a-z]", "", name)] += sum(one.nbytes for one in plain(sources))
        known = {one.untyped_storage()._cdata for one in plain((args, kwargs))}
        answer = func(*args, **(kwargs or {}))
        for one in plain(answer):
            storage = one.untyped_storage()
            key = storage._cdata
            if key not in known and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                self.most_whole = max(self.most_whole, sum(n for n in self._sizes.values() if n >= self._whole))
                weakref.finalize(storage, self._forget, key)
        return answer

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def plain(things: Any) -> list[Tensor]:
    """The tensors in something that have memory of their own."""
    kinds = (Tensor, nn.Parameter)
    return [one for one in tree_leaves(things) if type(one) in kinds and one.device.type != "meta"]


class Gathered:
    """Counts the bytes of the layers that are put together on this process, as long as they are there."""

    def __init__(self) -> None:
        self.now = self.most = 0
        gather = _rounds.gathered_on

        def counted(*args: Any) -> Any:
            found = gather(*args)
            if found is not None:
                storage = found.parameter.untyped_storage()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, storage.nbytes())
            return found

        _rounds.gathered_on = counted

    def _forget(self, size: int) -> None:
        self.now -= size


def memory(word: str) -> int:
    """Of this process, in bytes: ``VmRSS`` now, ``VmHWM`` at the peak."""
    return 1024 * int(re.search(rf"{word}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Measured(pl.Callback):
    """What the surgery takes on this process."""

    def __init__(self, whole: int) -> None:
        self.found: dict[str, Any] = {"phases": {}, "said": None}
        self.whole, self.gathered = whole, Gathered()
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
                    self.held = memory("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
                began, processor, watched = time.perf_counter(), time.process_time(), Watched(self.whole)
                with watched:
                    answer = method(this, *args)
                if phase == "decompose":
                    costs = {name: cost_of(args[0].targets[name]) for name in this._decompositions}
                    self.found |= {"layers": len(costs), "cost": sum(costs.values())}
                    self.found["all_cost"] = sum(map(cost_of, args[0].targets.values()))
                self.found["phases"][phase] = {
                    "seconds": time.perf_counter() - began,
                    "processor_seconds": time.process_time() - processor,
                    "bytes": dict(watched.bytes),
                    "peak": memory("VmHWM") - self.held,
                    "beyond_what_stays": watched.most - watched.now,
                    "whole": watched.most_whole,
                }
                return answer

            setattr(site, phase, watched)

    def on_surgery(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: Any) -> None:
        self.found["peak"] = max(phase["peak"] for phase in self.found["phases"].values())
        self.found["gathered"] = self.gathered.most
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
    measured = Measured(largest_layer(sizes))
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


def of_one_process(numbers: dict[tuple[str, int], float], row: dict[str, Any]) -> str:
    """A number of a row, as a share of what one process has, once that is known."""
    one = numbers.get(("ddp", 1))
    return "" if one is None else f"{numbers[row['way'], row['processes']] / one:.2f}"


def largest_layer(sizes: dict[str, int]) -> int:
    """Bytes of the largest weight, in bfloat16."""
    return 2 * sizes["hidden"] * max(sizes["inner"], sizes["hidden"])


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
            f"| {of_one_process(processor, row)} | {of_one_process(seconds, row)} "
            f"| {', '.join(str(rank['layers']) for rank in ranks)} "
            f"| {max(rank['peak'] for rank in ranks) / 1e6:.1f} | {said[1] if said else ''} |"
        )
    lines += ["", "| MB sent by a process | statistics | decompositions | factors | swap |", "|---|---|---|---|---|"]
    for row in rows:
        if row["processes"] > 1:
            cells = " | ".join(f"{sent(row)[phase] / 1e6:.1f}" for phase in PHASES)
            lines.append(f"| {row['way']}, {row['processes']} | {cells} |")
    whole = largest_layer(result["sizes"])
    lines += [
        "",
        "| MB of a process at a time | one whole layer | put together to be decomposed | swap, beyond what stays "
        "| whole layers in the swap |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        swaps = [rank["phases"]["swap"] for rank in row["ranks"]]
        numbers = [
            whole,
            max(rank["gathered"] for rank in row["ranks"]),
            max(swap["beyond_what_stays"] for swap in swaps),
            max(swap["whole"] for swap in swaps),
        ]
        cells = " | ".join(f"{number / 1e6:.1f}" for number in numbers)
        lines.append(f"| {row['way']}, {row['processes']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rows", nargs="*", help="these anew, as fsdp2-4; without it those that are not stored yet")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where they are stored")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step and process")
    parser.add_argument("--sizes", type=json.loads, default=SIZES)
    parser.add_argument("--worker")
    parser.add_argument("--folder", type=Path)
    settings = parser.parse_args()
    if settings.worker:
        work(settings.worker, settings.folder, settings.sizes, settings.tokens)
        return
    if not settings.table:
        run_rows(settings)
    print(table(json.loads(settings.results.read_text())))


def run_rows(settings: argparse.Namespace) -> None:
    """Runs what is asked for, and stores each row as soon as it is there, beside those that are there already."""
    setting = {
        "sizes": settings.sizes,
        "tokens": settings.tokens,
        "keep": KEEP,
        "method": repr(lp.WhitenedSVD()),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    stored = json.loads(settings.results.read_text()) if settings.results.exists() else {**setting, "rows": []}
    if {**stored, "rows": []} != {**setting, "rows": []}:
        raise SystemExit(f"{settings.results} has rows of another setting; give --results for a file of its own.")
    rows = {f"{row['way']}-{row['processes']}": row for row in stored["rows"]}
    names = [f"{way}-{count}" for way, count in ROWS]
    for name in [name for name in names if name not in rows] if settings.rows is None else settings.rows:
        way, count = name.split("-")
        rows[name] = run(way, int(count), settings.sizes, settings.tokens)
        result = {**setting, "rows": [rows[one] for one in [*names, *sorted({*rows} - {*names})] if one in rows]}
        settings.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
