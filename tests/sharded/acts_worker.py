"""Whole runs with every act, in float64, on the processes that torchrun starts: they end as one process does.

All global batches are the same, and each process has its share of each. In float64 roundings are so small that what
training makes of them stays far below the tolerance: what is larger is a mistake.
"""

import logging
import os
import re
import sys
import tempfile
import types
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, UnsupportedError

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
#: Relative to the largest entry of a tensor. Seen on two and on four processes: at most 3e-10.
TOLERANCE = 1e-8
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
ROWS, STEPS = 16, 8  # of a global batch, of an epoch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(14), nn.Linear(14, 23), nn.Linear(23, 14)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Lit(pl.LightningModule):
    """Blocks between two layers; sharded where the strategy shards, in two dimensions (HSDP) if that is asked for."""

    def __init__(self, way):
        super().__init__()
        self.way, self.net = way, None

    def configure_model(self):
        if self.net is not None:
            return
        blocks = [Block(), Block()]
        self.net = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), *blocks, nn.Linear(14, 6)).double()
        generator = torch.Generator().manual_seed(0)  # what torch draws depends on the dtype that is set
        for name, parameter in self.net.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        if self.way == "hsdp":
            mesh = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("copies", "shards"))
        for module in (*blocks, self.net):
            fully_shard(module, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


#: One process; "turned": with the rows of each batch the other way round, which sums are rounded otherwise by.
ALONE = ("one", "turned")


def loader(way):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, ROWS, 10, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(2, 0.3, 10, dtype=torch.float64)
    y = (x @ torch.randn(10, 6, generator=generator, dtype=torch.float64)).argmax(-1)
    share = ROWS // WORLD
    own = list(range(ROWS)) if way in ALONE else list(range(RANK * share, (RANK + 1) * share))
    own = own[::-1] if way == "turned" else own
    x, y = x[:, own], y[:, own]
    return DataLoader(TensorDataset(x.flatten(0, 1), y.flatten(0, 1)), x.shape[1])


def strategy_of(way):
    if way in ALONE:
        return {"devices": 1, "strategy": SingleDeviceStrategy("cpu"), "precision": "64-true"}
    if way == "ddp":
        return {"devices": WORLD, "strategy": DDPStrategy(), "precision": "64-true"}
    return {"devices": WORLD, "strategy": ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)}


def fit(callbacks, way, epochs=4):
    lit = Lit(way)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        use_distributed_sampler=False,
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tempfile.gettempdir(),
        **strategy_of(way),
    )
    trainer.fit(lit, loader(way))
    return lit, trainer


#: Every act: what leads to the cut, the cut (or several), and what comes after it.
ACTS = {
    "defaults": lambda: [lp.PrehabCallback(), lp.CompressionCallback(2, 0.5), lp.RehabSchedule(warmup_steps=3)],
    "all at once, several cuts": lambda: [
        lp.PrehabCallback(self_distillation=0.5, update_steps=3),
        lp.CompressionCallback([1, 2, 3], [0.8, 0.65, 0.5]),
        lp.RehabSchedule(warmup_steps=2, end_factor=0.1),
        lp.RehabDistillation(0.5),
        lp.FactorTraining(product_decay=0.1, rate_B=2.0),
    ],
    "factors": lambda: [
        lp.PrehabCallback(lp.StableRank(), strength_share=0.2, space="loss"),
        lp.CompressionCallback(2, 0.5),
        lp.RehabSchedule(warmup_steps=3),
        lp.RehabDistillation(0.5),
        lp.FactorTraining(product_decay=0.1, rebalance_every=3, rate_B=2.0, train="factors_norms_biases"),
    ],
}


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def end_of(callbacks, lit, trainer):
    """Of a run: ranks, weights (of the factors, what they stand for too), moments."""
    weights = {name: whole(one) for name, one in lit.named_parameters()}
    products = {
        name: weights[f"{name}.B.weight"] @ weights[f"{name}.A.weight"]
        for name in (key.removesuffix(".A.weight") for key in weights if key.endswith(".A.weight"))
    }
    state = trainer.optimizers[0].state
    moments = {
        f"{key} of {name}": whole(state[parameter][key])
        for name, parameter in lit.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
        if parameter in state
    }
    cut = next(one for one in callbacks if isinstance(one, lp.CompressionCallback))
    assert cut.done
    assert len(products) >= 3, products.keys()
    return types.SimpleNamespace(ranks=[report.ranks for report in cut.reports], tensors=weights | products | moments)


def run(callbacks, way):
    lit, trainer = fit(callbacks, way)
    return lit, end_of(callbacks, lit, trainer)


def references():
    """The ends of one process; each is computed on one of the processes."""
    own = {name: run(ACTS[name](), "one")[1] for number, name in enumerate(ACTS) if number % WORLD == RANK}
    found = [None] * WORLD
    distributed.all_gather_object(found, own)
    return {name: end for part in found for name, end in part.items()}


def assert_same_end(found, expected, tolerance=TOLERANCE):
    """To a share of the largest entry of each tensor; the largest difference of all."""
    assert found.ranks == expected.ranks, (found.ranks, expected.ranks)
    assert found.tensors.keys() == expected.tensors.keys()
    differences = {
        key: float((found.tensors[key] - wish).abs().max() / wish.abs().max().clamp_min(1e-300))
        for key, wish in expected.tensors.items()
    }
    assert max(differences.values()) <= tolerance, differences
    return max(differences.values())


def assert_same_on_all_ranks(lit, end):
    """Bit by bit: what every process has whole, what it gathers, and the copies of its shards."""
    for name, tensor in end.tensors.items():
        everywhere = [torch.empty_like(tensor) for _ in range(WORLD)]
        distributed.all_gather(everywhere, tensor.contiguous())
        assert all(torch.equal(one, tensor) for one in everywhere), name
    for name, parameter in lit.named_parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 2:
            local, group = parameter.to_local().detach(), parameter.device_mesh.get_group("copies")
            copies = [torch.empty_like(local) for _ in range(2)]
            distributed.all_gather(copies, local.contiguous(), group=group)
            assert torch.equal(*copies), name


def check(name, way, expected):
    lit, found = run(ACTS[name](), way)
    assert all(parameter.dtype == torch.float64 for parameter in lit.parameters())
    worst = assert_same_end(found, expected)
    if RANK == 0:
        print(f"difference: {worst:.1e} ({name}, {way})", flush=True)
    assert_same_on_all_ranks(lit, found)


class Cut(lp.CompressionCallback):
    """One of a user's own, with something that may differ."""

    def __init__(self, epoch, keep=0.5, folder=None, **settings):
        super().__init__(epoch, keep, **settings)
        self.folder = folder


#: What is given to all processes but the last one, to the last one, and what is said of it.
DIFFERENT = (
    (
        lambda: [lp.CompressionCallback(2, 0.5)],
        lambda: [lp.CompressionCallback(2, 0.4)],
        f"keep is 0.5 on rank 0 and 0.4 on rank {WORLD - 1}",
    ),
    (
        lambda: [lp.CompressionCallback(2)],
        lambda: [lp.CompressionCallback([2, 3], [0.6, 0.5])],
        "CompressionCallback: ",
    ),
    (lambda: [Cut(2, factorization=lp.SVD())], lambda: [Cut(2, folder="b")], "Cut: factorization is SVD() on rank 0"),
    (
        lambda: [lp.PrehabCallback(lp.StableRank(), 0.1), lp.CompressionCallback(2)],
        lambda: [lp.PrehabCallback(lp.StableRank(), 0.2), lp.CompressionCallback(2)],
        "PrehabCallback: strength is 0.1 on rank 0 and 0.2",
    ),
    (
        lambda: [lp.CompressionCallback(2), lp.FactorTraining(rate_B=2.0)],
        lambda: [lp.CompressionCallback(2), lp.FactorTraining(rate_B=3.0)],
        "FactorTraining: rate_B is 2.0 on rank 0 and 3.0",
    ),
    (
        lambda: [lp.CompressionCallback(2), lp.RehabSchedule(3)],
        lambda: [lp.CompressionCallback(2)],
        "Rank 0 was given CompressionCallback, RehabSchedule, in this order, and rank",
    ),
)


def check_settings_that_differ():
    """All processes say which, and none of them has begun; what is a process's own may differ."""
    for first, last, said in DIFFERENT:
        for way in ("ddp", "fsdp2"):
            with pytest.raises(ArgumentError, match=re.escape(said)):
                fit(last() if RANK == WORLD - 1 else first(), way)
    fit([Cut(2, folder=f"of rank {RANK}"), lp.RehabSchedule(warmup_steps=3)], "ddp")


WAYS = ("ddp", "fsdp2", "hsdp")


def checks(world, sharded=True):
    """What is run on so many processes: HSDP takes four, for two copies of two shards."""
    ways = [way for way in WAYS if way == "ddp" or (sharded and (way != "hsdp" or world >= 4))]
    return [(name, way) for name in ACTS for way in ways]


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    ends = references()
    for name, way in checks(WORLD, VERSION >= (2, 10)):
        check(name, way, ends[name])
        if RANK == 0:
            print(f"passed: {name}, {way}", flush=True)
    check_settings_that_differ()
    if VERSION < (2, 10):
        with pytest.raises(UnsupportedError, match="on the CPU needs torch 2.10 or newer"):
            fit(ACTS["defaults"](), "fsdp2")
    if RANK == 0:
        print("passed: settings that differ", flush=True)
    distributed.destroy_process_group()
    sys.exit(0)
