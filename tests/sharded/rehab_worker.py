"""Started by torchrun in two processes; every check runs on both. The first prints the name of each that passed."""

import logging
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.callbacks._factor_steps import FactorSteps
from lightning_prehab.layers.pairs import factor_pairs
from lightning_prehab.sharded.copies import copy_of_sharded, places_of

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Tied weights, buffers, parameters in the root and in units."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(12)
        self.head, self.out = nn.Linear(12, 5), nn.Linear(12, 7, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(12), persistent=False)
        self.extra = nn.Parameter(torch.rand(12))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.float()).to(x.dtype) * self.scale.to(x.dtype) * self.extra.to(x.dtype)
        return self.head(x), self.out(x)


def sharded(kind, mesh):
    torch.manual_seed(0)
    net = Net()
    settings = {"mesh": mesh}
    if kind == "mixed":
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        net.norm = nn.Identity()
    if kind == "ignored":
        settings["ignored_params"] = {net.extra}
    for block in net.blocks:
        if kind == "layers":
            fully_shard(block.up, **settings)
            fully_shard([block.norm, block.down], **settings)
        fully_shard(block, **settings)
    fully_shard(net, reshard_after_forward=kind != "kept", **settings)
    return net


def check_copy(kind):
    """The same answers bit by bit, without the hooks, before and after the model has gone on."""
    mesh, calls = init_device_mesh("cpu", (2,)), []
    net = sharded(kind, mesh)
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    inputs = torch.randint(0, 7, (8,), generator=torch.Generator().manual_seed(distributed.get_rank()))
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)

    def step():
        sum(one.float().square().mean() for one in net(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.no_grad():
        net.eval()(inputs)  # leaves the root whole
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    half = [one.up.weight for one in net.blocks] if kind == "mixed" else []
    made = copy_of_sharded(net, {id(one): torch.bfloat16 for one in half})
    own = {one.to_local().data_ptr() for one in net.parameters() if isinstance(one, DTensor)}
    parameters = dict(made.named_parameters())
    assert all(isinstance(one, DTensor) for name, one in parameters.items() if name != "extra" or kind != "ignored")
    assert isinstance(made.extra, DTensor) == (kind != "ignored")
    assert not own & {one.to_local().data_ptr() for one in parameters.values() if isinstance(one, DTensor)} - {0}
    assert type(made) is type(net)
    assert (made.blocks[0].up.weight.dtype is torch.bfloat16) == (kind == "mixed")
    made.eval().requires_grad_(False)
    calls.clear()
    with torch.no_grad():
        first, right = made(inputs), net(inputs)
    assert len(calls) == 1
    torch.testing.assert_close(first, right, atol=0, rtol=0)
    assert made.out.weight is made.embed.weight
    net.train()
    step()
    with torch.no_grad():
        torch.testing.assert_close(made(inputs), right, atol=0, rtol=0)
        assert not torch.allclose(net.eval()(inputs)[0], right[0])
    assert {one.name for one in places_of(net)} == {one.name for one in places_of(made)}


def full(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def whole(module):
    """All weights of a module, gathered; its units are resharded."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()
    return {name: full(parameter).clone() for name, parameter in module.named_parameters()}


def on_all_ranks(tensor):
    """The tensors of all ranks, one after the other: the batch that one process would have seen."""
    gathered = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def make_net(cut):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 5)
    )
    if cut:
        net[0] = lp.LowRankLinear.from_linear(net[0], 3)
        net[4] = lp.LowRankLinear.from_linear(net[4], 5)
    return net


class Lit(pl.LightningModule):
    """Each process notes its batches and the whole gradients that the optimizer sees."""

    def __init__(self, cut, optimizer=None, groups=False, dropout=0.0, manual=False):
        super().__init__()
        self.cut, self.optimizer, self.groups, self.dropout = cut, optimizer, groups, dropout
        self.automatic_optimization = not manual
        self.batches, self.seen, self.net = [], [], None

    def configure_model(self):
        if self.net is not None:
            return
        self.net = make_net(self.cut)
        self.net[3].p = self.dropout
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[4], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer):
        self.seen.append({name: full(one.grad) for name, one in self.net.named_parameters() if one.grad is not None})

    def configure_optimizers(self):
        parameters = [*self.net.parameters()]
        if not self.groups:
            return self.optimizer(parameters)
        return self.optimizer([{"params": parameters[:2], "name": "first"}, {"params": parameters[2:], "name": "rest"}])


def rows():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(96, 12, generator=generator)
    return DataLoader(TensorDataset(x, (x @ torch.randn(12, 5, generator=generator)).argmax(-1)), 8)


def fit(lit, callbacks, epochs, path=None, in_parts=True, **settings):
    """Six steps an epoch."""
    torch.manual_seed(5 + distributed.get_rank())
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=in_parts
        ),
        max_epochs=epochs,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        **{"logger": False, "enable_checkpointing": False, **settings},
    )
    trainer.fit(lit, rows(), ckpt_path=path)
    return trainer


def shared_folder():
    """One for both."""
    found = [tempfile.mkdtemp() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(found)
    return Path(found[0])


class Rates(pl.Callback):
    def __init__(self):
        self.used = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.used.append([group["lr"] for group in optimizer.param_groups])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.5)


def check_schedule():
    """The factor of each group, what LearningRateMonitor shows, and a resume in the middle of the warm-up."""
    folder, monitor, rates = shared_folder(), LearningRateMonitor("step"), Rates()

    def callbacks(*others):
        return [lp.RehabSchedule(10, start_factor=0.0, end_factor=0.5, group_factors={"rest": 0.5}), *others]

    logger = CSVLogger(folder)
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    lit = Lit(True, sgd, groups=True)
    settings = {"logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True}
    fit(lit, callbacks(monitor, rates, saves), 3, **settings)
    factors = [min(step / 10, 1.0) if step <= 10 else 1.0 - 0.5 * (step - 10) / 8 for step in range(18)]
    expected = torch.tensor([[0.05 * factor, 0.025 * factor] for factor in factors])
    torch.testing.assert_close(torch.tensor(rates.used), expected)
    again, other = Lit(True, sgd, groups=True), Rates()
    fit(again, callbacks(other), 3, path=folder / "epoch=0.ckpt")
    assert other.used == rates.used[6:]
    assert_same(whole(lit.net), whole(again.net), atol=0, rtol=0)
    if distributed.get_rank() == 0:
        lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        shown = [float(line.split(",")[lines[0].split(",").index("lr-SGD/first")]) for line in lines[1:]]
        torch.testing.assert_close(torch.tensor(shown), expected[:, 0])


FACTORS = {
    "decoupled": {"product_decay": 0.3},
    "gradient": {"product_decay": 0.3, "decay_form": "gradient"},
    "rebalance": {"rebalance_every": 3},
    "rates": {"rate_A": 0.5, "rate_B": 3.0},
    "alternate": {"alternate": 2},
    "train factors": {"train": "factors"},
    "all": {
        "product_decay": 0.3,
        "rebalance_every": 3,
        "rate_B": 2.0,
        "alternate": 2,
        "train": "factors_norms_biases",
    },
}


def check_factor_training(name):
    """Weights and moments are those of one process without a Trainer that sees all the data."""
    settings = FACTORS[name]

    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.2)

    lit = Lit(True, optimizer)
    uneven = name == "rebalance"
    trainer = fit(lit, [*([Uneven()] if uneven else []), lp.FactorTraining(**settings)], 2)
    net = make_net(True)
    net[3].p = 0.0
    if uneven:
        uneven_(net)
    chosen = settings.get("train", "all")
    for key, parameter in net.named_parameters():
        factor = ".A." in key or key.endswith("B.weight")
        parameter.requires_grad_(chosen == "all" or factor or (chosen != "factors" and parameter.dim() < 2))
    by_hand = optimizer([*net.parameters()])
    callback = lp.FactorTraining(**settings)
    steps = FactorSteps(callback.settings, by_hand, [by_hand], factor_pairs(net), 0)
    for x, y in lit.batches:
        nn.functional.cross_entropy(net(on_all_ranks(x)), on_all_ranks(y)).backward()
        by_hand.step()
        by_hand.zero_grad()
        steps.forget()
    steps.remove()
    assert_same(whole(lit.net), {key: one.detach() for key, one in net.named_parameters()}, atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in lit.parameters())
    ours, theirs = trainer.optimizers[0].state, by_hand.state
    for mine, other in zip(lit.net.parameters(), net.parameters(), strict=True):
        assert (mine in ours) == (other in theirs)
        if mine in ours:
            assert ours[mine]["exp_avg"].placements == mine.placements
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(full(ours[mine][moment]), theirs[other][moment], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def uneven_(net):
    """Factors of very different sizes."""
    for layer in (net[0], net[4]):
        for factor, by in ((layer.A.weight, 16.0), (layer.B.weight, 1 / 16)):
            (factor.to_local() if isinstance(factor, DTensor) else factor).mul_(by)


class Uneven(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        uneven_(pl_module.net)


CHECKS = {
    **{f"copy, {kind}": partial(check_copy, kind) for kind in ("plain", "kept", "mixed", "layers", "ignored")},
    "schedule": check_schedule,
    **{f"factors, {name}": partial(check_factor_training, name) for name in FACTORS},
}


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    wanted = sys.argv[1:]
    for name, check in CHECKS.items():
        if not wanted or any(one in name for one in wanted):
            check()
            distributed.barrier()
            if distributed.get_rank() == 0:
                print(f"passed: {name}", flush=True)
    distributed.destroy_process_group()
