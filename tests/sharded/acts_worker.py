"""Whole runs with every act, in float64, on the processes that torchrun starts: they end as one process does.

All global batches are the same, and each process has its share of each. In float64 roundings are so small that what
training makes of them stays far below the tolerance: what is larger is a mistake.
"""

import logging
import os
import sys
import tempfile
import types
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp

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


def loader(way):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, ROWS, 10, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(2, 0.3, 10, dtype=torch.float64)
    y = (x @ torch.randn(10, 6, generator=generator, dtype=torch.float64)).argmax(-1)
    share = ROWS // WORLD
    own = slice(None) if way == "one" else slice(RANK * share, (RANK + 1) * share)
    x, y = x[:, own], y[:, own]
    return DataLoader(TensorDataset(x.flatten(0, 1), y.flatten(0, 1)), x.shape[1])


def strategy_of(way):
    if way == "one":
        return {"devices": 1, "strategy": SingleDeviceStrategy("cpu"), "precision": "64-true"}
    if way == "ddp":
        return {"devices": WORLD, "strategy": DDPStrategy(), "precision": "64-true"}
    return {"devices": WORLD, "strategy": ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)}


def fit(callbacks, way):
    lit = Lit(way)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=4,
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
        lp.FactorTraining(product_decay=0.1),
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
    return types.SimpleNamespace(
        ranks=[report.ranks for report in cut.reports], tensors=weights | products | moments, dtypes=weights
    )


def run(name, way):
    callbacks = ACTS[name]()
    lit, trainer = fit(callbacks, way)
    return lit, end_of(callbacks, lit, trainer)


def references():
    """The ends of one process; each is computed on one of the processes."""
    own = {name: run(name, "one")[1] for number, name in enumerate(ACTS) if number % WORLD == RANK}
    found = [None] * WORLD
    distributed.all_gather_object(found, own)
    return {name: end for part in found for name, end in part.items()}


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
    lit, found = run(name, way)
    assert all(parameter.dtype == torch.float64 for parameter in lit.parameters())
    assert found.ranks == expected.ranks, (found.ranks, expected.ranks)
    assert found.tensors.keys() == expected.tensors.keys()
    differences = {
        key: float((found.tensors[key] - wish).abs().max() / wish.abs().max().clamp_min(1e-300))
        for key, wish in expected.tensors.items()
    }
    worst = max(differences, key=differences.get)
    if RANK == 0:
        print(f"difference: {differences[worst]:.1e} ({worst}; {name}, {way})", flush=True)
    assert os.environ.get("LOOK") or differences[worst] <= TOLERANCE, differences
    assert_same_on_all_ranks(lit, found)


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
    distributed.destroy_process_group()
    sys.exit(0)
