"""Started by torchrun in two processes; every check runs on both ranks. Rank 0 prints the name of each that passed."""

import copy
import logging
import os
import sys
import types
import warnings
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.callbacks._injection import add_to_gradients_, pull_of
from lightning_prehab.callbacks._regularized import RegularizedLayer, matrices
from lightning_prehab.callbacks._shared_work import shrink_together_
from lightning_prehab.callbacks._sharded_layers import ShardedLayer, figures, restore_shards, states_of_shards
from lightning_prehab.kinds import kind_again
from lightning_prehab.linalg.sharding import local_part
from lightning_prehab.regularizers import GradientRatio, Penalty, Shrinkage
from lightning_prehab.regularizers.metric import Metric
from lightning_prehab.sharded.gathered import dtensor_like
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


def nets(**settings):
    torch.manual_seed(0)
    plain = Net()
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
    return Metric(*(None if root is None else root.float() for root in (metric.left, metric.right)))


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
    return layers_of(sharded, ShardedLayer, space), layers_of(plain, RegularizedLayer, space)


def check_penalties():
    penalties = (
        lp.StableRank(),
        lp.TailEnergy(refresh=2),
        lp.NuclearNorm(refresh=2),
        lp.EffectiveRank(refresh=2),
        OwnPenalty(),
    )
    for space in SPACES:
        for penalty in penalties:
            ours, theirs = both(space)
            assert [layer.name for layer in ours] == [layer.name for layer in theirs]
            assert any(layer.rows() is not None and len(layer.rows().own) == RANK - 1 for layer in ours) or not RANK
            for step in range(3):
                move_(ours, step)
                move_(theirs, step)
                (found, mean), (expected, wish) = (pull_of(TWO, penalty, one, one) for one in (ours, theirs))
                assert_near(mean, wish, f"{penalty}, {space}, step {step}")
                for (weight, part), (_, gradient) in zip(found, expected, strict=True):
                    name = next(one.name for one in ours if any(weight is held for held in one.parameters))
                    assert_near(whole(dtensor_like(part, weight)), gradient, f"{penalty}, {space}, {name}, step {step}")


def check_shrinkages():
    shrinkages = (
        lp.TailShrinkage(start=0.2, refresh=4, every=2),
        LateTail(start=0.2, refresh=4, every=2),
        lp.SpectralWeightDecay(decay=0.5, every=3),
        OwnShrinkage(),
    )
    for space in SPACES:
        for shrinkage in shrinkages:
            ours, theirs = both(space)
            for step, progress in enumerate((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)):
                for layers, trainer in ((ours, TWO), (theirs, ONE)):
                    move_(layers, step)
                    rates = {id(one): 0.1 for layer in layers if layer.name != "unit" for one in layer.parameters}
                    shrink_together_(trainer, layers, shrinkage, progress, rates)
                for one, other in zip(parameters(ours), parameters(theirs), strict=True):
                    name = next(layer.name for layer in ours if any(one is held for held in layer.parameters))
                    assert_near(whole(one.detach()), other.detach(), f"{shrinkage}, {space}, {name}, {progress}")


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


CHECKS = {
    "penalties": check_penalties,
    "shrinkages": check_shrinkages,
    "figures and states": check_figures_and_states,
    "gradients are added": check_gradients_are_added,
}

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for name, check in CHECKS.items():
        check()
        if RANK == 0:
            print(f"passed: {name}", flush=True)
    distributed.destroy_process_group()
    sys.exit(0)
