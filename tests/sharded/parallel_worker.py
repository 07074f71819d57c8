"""Started by torchrun in two or four processes, for runs under tensor parallelism; rank 0 prints what has passed.

    torchrun --nproc_per_node=2 tests/sharded/parallel_worker.py FOLDER

Two processes share each layer out; four do that in pairs, with FSDP2 around (2x2). All in float64, where no rounding
hides a fault.
"""

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import lightning_prehab as lp
from lightning_prehab.callbacks import _distributed, _site, _trial
from lightning_prehab.errors import StatisticsError, UnsupportedError
from lightning_prehab.statistics.effect import measure_increase

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
EPOCHS, CUT, STEPS = 4, 2, 6
#: Samples of a batch of all processes together.
GLOBAL_BATCH, POSITIONS = 8, 4


class Block(nn.Module):
    def __init__(self, width, hidden, bias):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden, bias)
        self.down = nn.Linear(hidden, width, bias)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(torch.tanh(self.up(h)) * self.gate(h))


class Net(nn.Module):
    """Two blocks between layers that no plan divides."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 10)
        self.blocks = nn.ModuleList([Block(10, 14, True), Block(10, 16, False)])
        self.last = nn.Linear(10, 6)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


PLAN = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
#: The same, with positions shared out between the layers.
SEQUENCE = {
    "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True),
    "norm": SequenceParallel(use_local_output=True),
    "gate": ColwiseParallel(input_layouts=Shard(1)),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}
BACK = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())


class Loader:
    """The batches of one process, or the part of each that this process sees: those of a pair see the same."""

    def __init__(self, parts, part):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(STEPS, GLOBAL_BATCH, POSITIONS, 12, generator=generator, dtype=torch.float64)
        x = x @ torch.diag(torch.linspace(2, 0.1, 12, dtype=torch.float64))
        y = torch.tanh(x @ torch.randn(12, 6, generator=generator, dtype=torch.float64))
        self.batches = [[one.chunk(parts)[part] for one in both] for both in zip(x, y, strict=True)]

    def __len__(self):
        return STEPS

    def __iter__(self):
        return iter(self.batches)


class Lit(pl.LightningModule):
    def __init__(self, sequence=False):
        super().__init__()
        self.net, self.losses, self.sequence = None, [], sequence

    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(0)
        self.net = Net().double()
        mesh = self.device_mesh
        if mesh is None:
            return
        for block in self.net.blocks:
            parallelize_module(block, mesh["tensor_parallel"], SEQUENCE if self.sequence else PLAN)
            if self.sequence:
                parallelize_module(block, mesh["tensor_parallel"], BACK)
        if mesh["data_parallel"].size() > 1:
            for unit in (*self.net.blocks, self.net):
                fully_shard(unit, mesh=mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, foreach=False)
        schedule = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def fit(callbacks, *, path=None, lit=None, epochs=EPOCHS, distributed_checkpoint=True, fn="fit"):
    """A run on all processes there are, or on this one alone where there is one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parts = max(world // 2, 1)
    strategy = "auto"
    if world > 1:
        strategy = ModelParallelStrategy(
            parts, 2, save_distributed_checkpoint=distributed_checkpoint, process_group_backend="gloo"
        )
    lit = Lit() if lit is None else lit
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_epochs=epochs, callbacks=callbacks, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        use_distributed_sampler=False, default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    loader = Loader(parts, int(os.environ.get("RANK", "0")) // 2 if world > 1 else 0)
    getattr(trainer, fn)(lit, loader, ckpt_path=path)
    return trainer, lit


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def reshard(module):
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()


def end_state(trainer, lit):
    """Weights as products, and moments, of all parameters as a whole."""
    reshard(lit)
    found = {}
    for name, module in lit.named_modules():
        if isinstance(module, lp.LowRankLinear):
            found[f"{name}.product"] = whole(module.B.weight) @ whole(module.A.weight)
    state = trainer.optimizers[0].state
    for name, parameter in lit.named_parameters():
        if not name.endswith(("A.weight", "B.weight")):
            found[name] = whole(parameter)
        for key, value in state[parameter].items():
            known = whole(value)
            found[f"{name}:{key}"] = known.abs() if known.dim() else known  # factors are known up to signs
    return found


def cut(epoch=CUT, keep=0.5, **settings):
    return lp.CompressionCallback(epoch, keep=keep, calibration_batches=4, **settings)


#: Runs, by name: the callbacks of each.
RUNS = {
    "default": lambda: [lp.PrehabCallback(), cut(), lp.RehabSchedule(warmup_steps=3), lp.RehabDistillation()],
    "several": lambda: [lp.PrehabCallback(), cut([1, 3], [0.7, 0.4])],
    "several, penalty": lambda: [
        lp.PrehabCallback(lp.StableRank(), strength_share=0.3, space="loss"),
        cut([1, 3], [0.7, 0.4]),
    ],
    "activation": lambda: [
        lp.PrehabCallback(lp.TailEnergy(), 0.1, space="activation"),
        cut(factorization=lp.WhitenedSVD(centered=True)),
    ],
    "sequence": lambda: [cut(policy=lp.CalibratedBudget(0.5, trials=2))],
}
RUNS_OF_FOUR = ["default", "several, penalty"]


def results_of(name):
    callbacks = RUNS[name]()
    trainer, lit = fit(callbacks, lit=Lit(sequence=name == "sequence"))
    compression = next(one for one in callbacks if isinstance(one, lp.CompressionCallback))
    return {
        "state": end_state(trainer, lit),
        "ranks": compression.report.ranks,
        "loss": lit.losses,
        "increase": compression.report.plan.loss_increase,
    }


def on_all_ranks(value):
    gathered = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def check_like_one_process(name, folder):
    """The parent process compares with a run of its own; here all ranks must be the same."""
    found = results_of(name)
    first, *others = on_all_ranks(found["state"])
    for other in others:
        assert first.keys() == other.keys()
        for key in first:
            assert torch.equal(first[key], other[key]), key
    if distributed.get_rank() == 0:
        torch.save(found, Path(folder, f"{name}.pt"))


def parts_of(trainer, lit):
    """All that this process holds, bit by bit."""
    end_state(trainer, lit)  # reshards
    state = trainer.optimizers[0].state
    tensors = {name: one.detach() for name, one in lit.named_parameters()}
    tensors |= {f"{name}:{key}": value for name, one in lit.named_parameters() for key, value in state[one].items()}
    return {name: (one.to_local() if isinstance(one, DTensor) else one).clone() for name, one in tensors.items()}


def check_checkpoints(folder, resumed):
    """A run that goes on from a checkpoint of before, at or after the cut ends as the one that was never stopped.

    What is loaded without a fit has the structure of the checkpoint, and lies as what was built by the plan does.

    Args:
        folder: For the checkpoints.
        resumed: After which epochs, by the sort of checkpoint: a folder with a file of each process, or one file.
    """
    for sort, epochs in resumed.items():
        where, settings = Path(folder, sort), {"distributed_checkpoint": sort == "folder"}
        saves = ModelCheckpoint(where, "{epoch}", save_top_k=-1)
        trainer, lit = fit([*RUNS["default"](), saves], **settings)
        expected = parts_of(trainer, lit)
        for epoch in epochs:
            found = parts_of(*fit(RUNS["default"](), path=where / f"epoch={epoch}.ckpt", **settings))
            assert found.keys() == expected.keys(), (sort, epoch)
            for key, value in expected.items():
                assert torch.equal(found[key], value), (sort, epoch, key)
        dense, last = (where / f"epoch={epoch}.ckpt" for epoch in (0, EPOCHS - 1))
        assert last.is_dir() == (sort == "folder")
        results = []
        for fn, path, module in (("validate", None, lit), ("validate", last, Lit()), ("test", last, Lit())):
            loaded, _ = fit([cut()], lit=module, path=path, fn=fn, **settings)
            results.append(float(loaded.callback_metrics["val"]))
        assert results[1:] == results[:1] * 2, results
        fresh = Lit()
        for module in (lit, fresh):
            fit([cut()], lit=module, path=dense, fn="validate", **settings)
            reshard(module)
        assert not any(isinstance(module, lp.LowRankLinear) for module in lit.modules())
        for (name, one), (_, other) in zip(*(module.named_parameters() for module in (lit, fresh)), strict=True):
            assert getattr(one, "placements", None) == getattr(other, "placements", None), name
            assert torch.equal(whole(one), whole(other)), name


def check_tokens_count_once():
    """Though several processes see each of them; so do the losses by which a cut is tried."""
    seen, losses = [], []

    def noted(trainer, statistics):
        _distributed.sum_statistics_(trainer, statistics)
        seen.extend((int(one.samples), int(one.tokens)) for one in statistics.values())

    def measured(losses_at, batches):
        losses.append(len(losses_at(0, 0.0)))
        return measure_increase(losses_at, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_site, "sum_statistics_", noted)
        patch.setattr(_trial, "measure_increase", measured)
        fit([cut()], epochs=CUT + 1)
    assert len(seen) == 8
    assert losses == [distributed.get_world_size() // 2]
    assert set(seen) == {(4 * GLOBAL_BATCH, 4 * GLOBAL_BATCH * POSITIONS)}


def check_refusals():
    """What takes the place of a layer are two factors; anything else is told before the first step."""
    for callback in (cut(layout="pivot"), cut(factorization=lp.LowRankPlusSparse(0.1, lp.WhitenedSVD()))):
        lit = Lit()
        with pytest.raises(UnsupportedError, match="two factors there and nothing else"):
            fit([callback], lit=lit)
        assert lit.losses == []


def check_a_change_in_place_is_seen():
    """Of the tensor that the plan has made the input of a layer of; torch itself does not see it."""

    class Changes(Lit):
        def training_step(self, batch, batch_idx):
            x = self.net.first(batch[0])
            y = self.net.blocks[0].gate(x)
            x.mul_(2)
            return y.square().mean()

    with pytest.raises(StatisticsError, match="changed in place"):
        fit([cut()], lit=Changes())


def checks(folder, processes):
    if processes == 4:
        found = {name: lambda name=name: check_like_one_process(name, folder) for name in RUNS_OF_FOUR}
        return found | {
            "tokens": check_tokens_count_once,
            "checkpoints": lambda: check_checkpoints(folder, {"folder": [1]}),
        }
    found = {name: lambda name=name: check_like_one_process(name, folder) for name in RUNS}
    return found | {
        "tokens": check_tokens_count_once,
        "checkpoints": lambda: check_checkpoints(folder, {"folder": [0, 1, 2], "file": [1, 2]}),
        "refusals": check_refusals,
        "changes in place": check_a_change_in_place_is_seen,
    }


if __name__ == "__main__":
    for title, check in checks(sys.argv[1], int(os.environ["WORLD_SIZE"])).items():
        if len(sys.argv) < 3 or any(word in title for word in sys.argv[2:]):
            check()
            if os.environ["RANK"] == "0":
                print(f"passed: {title}", flush=True)
    distributed.destroy_process_group()
    sys.exit(0)
