"""Started by torchrun in two processes; every check runs on both ranks. Rank 0 prints the name of each that passed."""

import copy
import logging
import os
import sys
import tempfile
import types
import warnings
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.callbacks._figures import figures
from lightning_prehab.callbacks._injection import add_to_gradients_, pull_of
from lightning_prehab.callbacks._regularized import RegularizedLayer, matrices
from lightning_prehab.callbacks._sharded_layers import ShardedLayer, share_out_
from lightning_prehab.callbacks._sharded_memories import restore_shards, states_of_shards
from lightning_prehab.callbacks._shared_work import shrink_together_
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.kinds import kind_again
from lightning_prehab.linalg.sharding import local_part
from lightning_prehab.regularizers import GradientRatio, Penalty, Shrinkage
from lightning_prehab.regularizers.metric import Metric
from lightning_prehab.sharded.shares import dtensor_like
from lightning_prehab.targets.forms import in_all_forms

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
RANK = int(os.environ["RANK"])
TWO = types.SimpleNamespace(world_size=2, global_rank=RANK)  # what work on shards asks of a Trainer
ONE = types.SimpleNamespace(world_size=1, global_rank=0)
SPACES = ("weight", "activation", "loss")


@dataclass(frozen=True)
class OwnPenalty(Penalty):
    """One of a user's own: it knows nothing of processes."""

    def __call__(self, matrix, rank=None, memory=None):
        return torch.linalg.matrix_norm(matrix, ord="nuc") / matrix.norm()


@dataclass(frozen=True)
class OwnShrinkage(Shrinkage):
    """The same."""

    def __call__(self, weight, rank=None, memory=None, progress=1.0, lr=0.0, metric=None):
        memory["calls"] = memory.get("calls", torch.zeros(())) + 1
        return weight - 0.1 * weight.cumsum(0) / memory["calls"]


@dataclass(frozen=True)
class LateTail(lp.TailShrinkage):
    """A subclass that has a call of its own: what its parent says of rows is not true of it."""

    def __call__(self, weight, rank=None, memory=None, progress=1.0, lr=0.0, metric=None):
        assert isinstance(weight, torch.Tensor)
        return super().__call__(weight, rank, memory, progress, lr, metric)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 19), nn.Linear(19, 12)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Tall and wide, one row for two processes, fused, in groups, attention, cut before, and one that is a unit."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.qkv = nn.Linear(12, 27)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.conv = nn.Conv2d(4, 10, 3, padding=1)
        self.image = nn.Conv2d(4, 10, 3, padding=1)
        self.grouped = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.row = nn.Linear(12, 1)
        self.unit = nn.Linear(12, 13)
        self.cut = lp.LowRankLinear(12, 12, 5)


def nets(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    plain = Net().to(dtype)
    sharded = copy.deepcopy(plain)
    for module in (*sharded.blocks, sharded.unit, sharded):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), **settings)
    return plain, sharded


def metric_of(view, space):
    generator = torch.Generator().manual_seed(view.out_features * 100 + view.in_features)
    found = []
    for size in view.shape:
        wide = torch.randn(4 * size, size, generator=generator, dtype=torch.float64) * torch.linspace(1, 0.5, size)
        found.append(wide.mT @ wide / len(wide))
    left, right = found
    metric = Metric.from_grams(left if space == "loss" else None, right if space != "weight" else None)
    dtype = view.parameter.dtype
    return Metric(*(None if root is None else root.to(dtype) for root in (metric.left, metric.right)))


def views_of(net):
    forms = in_all_forms(lp.find_targets(net)) | {"row": net.row}
    found = matrices({name: one for name, one in forms.items() if name not in ("conv:spatial", "image")})
    return found | {"cut": kind_again(net.cut).views(net.cut)[""]}


def layers_of(net, kind, space, rank=2):
    views = views_of(net).items()
    return [kind(name, view, min(rank, *view.shape), metric_of(view, space)) for name, view in views]


def parameters(layers):
    return list({id(one): one for layer in layers for one in layer.parameters}.values())


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def move_(layers, step):
    """As an optimizer would: the same in both models."""
    for number, parameter in enumerate(parameters(layers)):
        generator = torch.Generator().manual_seed(100 * step + number)
        change = 0.02 * torch.randn(parameter.shape, generator=generator)
        spread = layers[0].spreads[0] if isinstance(layers[0], ShardedLayer) else None
        if spread is None:
            parameter.add_(change)
        else:
            most = -(-len(change) // 2)
            local_part(parameter).add_(change[RANK * most :][: len(local_part(parameter))])


def assert_near(found, expected, what, tolerance=1e-5):
    scale = expected.abs().max().clamp_min(1e-2)
    worst = float((found - expected).abs().max() / scale)
    assert worst <= tolerance, f"{what}: {worst}"


def both(space, **settings):
    plain, sharded = nets(**settings)
    ours = layers_of(sharded, ShardedLayer, space)
    share_out_(ours)
    return ours, layers_of(plain, RegularizedLayer, space)


def check_penalties(dtype=torch.float32, spaces=SPACES, tolerance=1e-5):
    penalties = (
        lp.StableRank(),
        lp.TailEnergy(refresh=2),
        lp.NuclearNorm(refresh=2),
        lp.EffectiveRank(refresh=2),
        OwnPenalty(),
    )
    for space in spaces:
        for penalty in penalties:
            ours, theirs = both(space, dtype=dtype)
            assert [layer.name for layer in ours] == [layer.name for layer in theirs]
            assert any(layer.rows() is not None and len(layer.rows().own) == RANK - 1 for layer in ours) or not RANK
            for step in range(3):
                move_(ours, step)
                move_(theirs, step)
                (found, mean), (expected, wish) = (pull_of(TWO, penalty, one, one) for one in (ours, theirs))
                assert_near(mean, wish, f"{penalty}, {space}, step {step}", tolerance)
                for (weight, part), (_, gradient) in zip(found, expected, strict=True):
                    name = next(one.name for one in ours if any(weight is held for held in one.parameters))
                    what = f"{penalty}, {space}, {name}, step {step}"
                    assert_near(whole(dtensor_like(part, weight)), gradient, what, tolerance)


def check_shrinkages(dtype=torch.float32, spaces=SPACES, tolerance=1e-5):
    shrinkages = (
        lp.TailShrinkage(start=0.2, refresh=4, every=2),
        LateTail(start=0.2, refresh=4, every=2),
        lp.SpectralWeightDecay(decay=0.5, every=3),
        OwnShrinkage(),
    )
    for space in spaces:
        for shrinkage in shrinkages:
            ours, theirs = both(space, dtype=dtype)
            for step, progress in enumerate((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)):
                for layers, trainer in ((ours, TWO), (theirs, ONE)):
                    move_(layers, step)
                    rates = {id(one): 0.1 for layer in layers if layer.name != "unit" for one in layer.parameters}
                    shrink_together_(trainer, layers, shrinkage, progress, rates)
                for one, other in zip(parameters(ours), parameters(theirs), strict=True):
                    name = next(layer.name for layer in ours if any(one is held for held in layer.parameters))
                    what = f"{shrinkage}, {space}, {name}, {progress}"
                    assert_near(whole(one.detach()), other.detach(), what, tolerance)


def check_figures_and_states():
    ours, theirs = both("loss")
    for step in range(2):
        for of_layer in (RegularizedLayer.tail, RegularizedLayer.spectrum):
            found, expected = (figures(TWO, layers, of_layer) for layers in (ours, theirs))
            for layer, one, other in zip(ours, found, expected, strict=True):
                for number, wish in zip(one, other, strict=True):
                    assert_near(number, wish.double(), f"{layer.name}, {of_layer.__name__}, {step}")
        move_(ours, step)
        move_(theirs, step)
    for regularizer in (lp.NuclearNorm(refresh=5), lp.TailEnergy(refresh=5)):
        for layer in ours:
            layer.memory = {key: layer.memory[key] for key in layer.memory if key == "forecast"}
        pull_of(TWO, regularizer, ours, ours)
        states = states_of_shards(ours)
        again = restore_shards({layer.name: layer.view for layer in ours}, copy.deepcopy(states), regularizer)
        for layer, other in zip(ours, again, strict=True):
            assert layer.memory.keys() == other.memory.keys(), layer.name
            assert all(torch.equal(layer.memory[key], other.memory[key]) for key in layer.memory), layer.name
        (pull, _), (pulled, _) = (pull_of(TWO, regularizer, layers, layers) for layers in (ours, again))
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(pull, pulled, strict=True))


def check_gradients_are_added():
    for settings in ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        found = []
        for layers in both("activation", **settings):
            ratio, optimizer = GradientRatio(0.3), torch.optim.SGD(parameters(layers), lr=0.1)
            for number, parameter in enumerate(parameters(layers)):
                parameter.requires_grad_(number % 3 != 2)
                parameter.grad = torch.ones_like(parameter) if number % 2 else None
            trainer = TWO if isinstance(layers[0], ShardedLayer) else ONE
            pull = lambda mine, layers=layers, trainer=trainer: pull_of(trainer, lp.StableRank(), layers, mine)[0]  # noqa: E731
            used = add_to_gradients_(optimizer, layers, pull, ratio, 0.5, 2.0)
            found.append((used, [None if one.grad is None else whole(one.grad) for one in parameters(layers)]))
        (used, ours), (expected, theirs) = found
        assert_near(used, expected, "strength")
        assert [one is None for one in ours] == [one is None for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            if one is not None:
                assert_near(one, other, "gradient")


class Lit(pl.LightningModule):
    """Blocks and a last layer, sharded where the strategy shards."""

    def __init__(self):
        super().__init__()
        self.net = None
        self.logged = []

    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), Block(), nn.Tanh(), Block(), nn.Linear(12, 5))
        if self.device_mesh is not None:
            for module in (self.net[2], self.net[4], self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def on_train_epoch_end(self):
        self.logged.append({key: float(value) for key, value in self.trainer.callback_metrics.items()})

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def batches(sharded):
    """The same global batches: one process has all of it, one of two has its half."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 16, 6, generator=generator) @ torch.diag(torch.linspace(2, 0.3, 6))
    y = torch.tanh(x @ torch.randn(6, 5, generator=generator))
    own = slice(8 * RANK, 8 * RANK + 8) if sharded else slice(None)
    x, y = x[:, own], y[:, own]
    return DataLoader(TensorDataset(x.flatten(0, 1), y.flatten(0, 1)), x.shape[1])


def fit(callbacks, *, sharded=True, epochs=3, resume=None, lit=None, whole_checkpoint=False, **settings):
    lit = Lit() if lit is None else lit
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=not whole_checkpoint
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2 if sharded else 1,
        strategy=strategy if sharded else SingleDeviceStrategy("cpu"),
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
        **settings,
    )
    trainer.fit(lit, batches(sharded), batches(sharded), ckpt_path=resume)
    return lit, trainer


def weights_of(lit):
    return {name: whole(one.detach()) for name, one in lit.named_parameters()}


GRADIENT = {"injection": "gradient"}  # as "auto" chooses for shards; in the loss it is added twice in two batches
PREHABS = {
    "StableRank": lambda: lp.PrehabCallback(lp.StableRank(), 0.1, space="loss", update_steps=4, **GRADIENT),
    "TailEnergy": lambda: lp.PrehabCallback(
        lp.TailEnergy(3, 2), 1.0, space="activation", every_n_steps=2, ramp_steps=3, update_steps=0, **GRADIENT
    ),
    "NuclearNorm": lambda: lp.PrehabCallback(lp.NuclearNorm(refresh=2), strength_share=0.2),
    "a penalty of one's own": lambda: lp.PrehabCallback(OwnPenalty(), 0.1, **GRADIENT),
    "TailShrinkage": lambda: lp.PrehabCallback(lp.TailShrinkage(rank=3, start=0.1, refresh=3, every=2), stop_epoch=3),
    "SpectralWeightDecay": lambda: lp.PrehabCallback(lp.SpectralWeightDecay(decay=5.0, every=3)),
    "PaperPrehab": lambda: lp.PaperPrehab("nuclear_norm"),
}


def check_training(name):
    """Clipped, accumulated, with a schedule and validation: weights and logs of one process."""
    (ours, trainer), (theirs, _) = (fit([PREHABS[name]()], sharded=sharded) for sharded in (True, False))
    assert isinstance(trainer.strategy, ModelParallelStrategy)
    found, expected = weights_of(ours), weights_of(theirs)
    for key, weight in expected.items():
        # The way back divides by a root of a Gram matrix of few samples, which multiplies what has been rounded.
        assert_near(found[key], weight, f"{name}, {key}", 1e-3 if name == "PaperPrehab" else 1e-5)
    assert any(key.startswith("prehab/") for key in ours.logged[-1])
    for one, other in zip(ours.logged, theirs.logged, strict=True):
        assert one.keys() == other.keys(), (one, other)
        for key, value in other.items():
            assert one[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, key, one[key], value)


def check_refusals():
    with pytest.raises(UnsupportedError, match="injection='gradient'"):
        fit([lp.PrehabCallback(lp.StableRank(), injection="loss")])


def check_the_whole_act():
    """Toward the planned ranks, cut, and trained on: what one process makes of it."""
    found = []
    for sharded in (True, False):
        prehab, cut = lp.PrehabCallback(forecast_every_n_steps=4), lp.CompressionCallback(epoch=2, keep=0.5)
        lit, _ = fit([prehab, cut, lp.RehabSchedule()], sharded=sharded, epochs=4)
        found.append((lit, cut.report.ranks, weights_of(lit)))
    (ours, ranks, weights), (theirs, expected, wishes) = found
    assert ranks == expected
    for key, wish in wishes.items():
        assert_near(weights[key], wish, key, 1e-3)
    assert ours.logged[-1].keys() == theirs.logged[-1].keys()


def check_forecast():
    """What the cut would add to the loss is tried on a copy in shards."""
    found = []
    for sharded in (True, False):
        prehab = lp.PrehabCallback(
            lp.StableRank(), 0.1, space="loss", forecast_every_n_steps=2, start_epoch=0, **GRADIENT
        )
        lit, _ = fit([prehab, lp.CompressionCallback(epoch=3, keep=0.4)], sharded=sharded, epochs=4)
        found.append(lit.logged)
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-2), key
    assert found[0][-1]["prehab/forecast"] > 0.0


class Save(pl.Callback):
    def __init__(self, path, epoch):
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def check_resume(name, whole_checkpoint):
    """A run that is resumed ends where one does that is not, bit by bit."""
    folder = [tempfile.mkdtemp() if RANK == 0 else None]
    distributed.broadcast_object_list(folder, src=0)
    path = f"{folder[0]}/checkpoint"
    kind = {"whole_checkpoint": whole_checkpoint}
    through, _ = fit([PREHABS[name](), Save(path, 0)], **kind)
    again, _ = fit([PREHABS[name]()], resume=path, **kind)
    for (key, one), other in zip(through.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(local_part(one), local_part(other)), (name, key)


CHECKS = {
    "penalties": check_penalties,
    "shrinkages": check_shrinkages,
    "penalties in float64": lambda: check_penalties(torch.float64, ["loss"], 1e-9),
    "shrinkages in float64": lambda: check_shrinkages(torch.float64, ["loss"], 1e-9),
    "figures and states": check_figures_and_states,
    "gradients are added": check_gradients_are_added,
    "training, StableRank": lambda: check_training("StableRank"),
    "training, TailEnergy": lambda: check_training("TailEnergy"),
    "training, NuclearNorm": lambda: check_training("NuclearNorm"),
    "training, a penalty of one's own": lambda: check_training("a penalty of one's own"),
    "training, TailShrinkage": lambda: check_training("TailShrinkage"),
    "training, SpectralWeightDecay": lambda: check_training("SpectralWeightDecay"),
    "training, PaperPrehab": lambda: check_training("PaperPrehab"),
    "the whole act": check_the_whole_act,
    "forecast": check_forecast,
    "refusals": check_refusals,
    "resume, TailEnergy": lambda: check_resume("TailEnergy", whole_checkpoint=True),
    "resume, NuclearNorm": lambda: check_resume("NuclearNorm", whole_checkpoint=False),
    "resume, TailShrinkage": lambda: check_resume("TailShrinkage", whole_checkpoint=False),
}

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for name, check in CHECKS.items():
        if not any(word in name for word in sys.argv[1:] or [""]):
            continue
        check()
        if RANK == 0:
            print(f"passed: {name}", flush=True)
    distributed.destroy_process_group()
    sys.exit(0)
