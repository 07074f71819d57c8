"""A tiny model of blocks, sharded in many ways, and cuts of it by hand: for processes that are started by torchrun."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_prehab as lp
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.surgery.factors import planned_targets

SIZE = 12


class Block(nn.Module):
    def __init__(self, hidden, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.up = nn.Linear(SIZE, hidden, bias)
        self.down = nn.Linear(hidden, SIZE, bias)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, hidden=21):
        super().__init__()
        self.blocks = nn.ModuleList([Block(hidden), Block(hidden, bias=False), Block(hidden)])
        self.head = nn.Linear(SIZE, 9)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Collectives(TorchDispatchMode):
    """Counts what processes send; torch has a CommDebugMode, which leaves hooks in modules (2.10).

    Attributes:
        counts: By the name of the operator.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


RANKS = {"blocks.0.up": 5, "blocks.0.down": 1, "blocks.1.up": 3, "blocks.2.down": 4, "head": 2}


class Fixed(RankPolicy):
    """These ranks and no others."""

    def __init__(self, ranks: Mapping[str, int]):
        self.ranks = ranks

    def __call__(self, layers):
        return {layer.name: self.ranks.get(layer.name) for layer in layers}


def make(kind=Net, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return kind().to(dtype)


def mesh_of(*shape, names=None):
    return distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)


def shard_blocks(net, mesh, **settings):
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **settings)
    fully_shard(net, mesh=mesh, **settings)
    return net


def steps(net, optimizer, number, first=0, accumulate=1):
    """Some steps; with a sharded net each process has its part of the same batches. Returns the mean losses."""
    sharded = lp_is_sharded(net)
    rank, count = (distributed.get_rank(), distributed.get_world_size()) if sharded else (0, 1)
    losses = []
    for step in range(first, first + number):
        for part in range(accumulate):
            generator = torch.Generator().manual_seed(1000 * part + step)
            x = torch.randn(8, SIZE, generator=generator)
            y = torch.tanh(x @ torch.randn(SIZE, 9, generator=torch.Generator().manual_seed(7)))
            own = slice(rank * 8 // count, (rank + 1) * 8 // count)
            if hasattr(net, "set_requires_gradient_sync"):
                net.set_requires_gradient_sync(part == accumulate - 1)
            loss = nn.functional.mse_loss(net(x[own].to(next(net.parameters()).dtype)).float(), y[own]) / accumulate
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach().clone()
        if sharded:
            distributed.all_reduce(value)
        losses.append(float(value) / count)
    return losses


def lp_is_sharded(net):
    from lightning_prehab.sharded.engine import is_sharded

    return is_sharded(net)


def planned(net, ranks=RANKS, factorization=None, **settings):
    targets = lp.find_targets(net, target_modules=list(ranks), **settings)
    return lp.make_plan(targets, Fixed(ranks), factorization or lp.SVD())


def svd_factors(net, plan):
    """Factors of a plain net, by hand."""
    found = {}
    for name, target in planned_targets(net, plan).items():
        rank = plan.ranks[name]
        if rank is not None:
            u, s, v = torch.linalg.svd(view_of(target).weight.detach().double(), full_matrices=False)
            found[name] = Factors((s[:rank, None] * v[:rank]).float(), u[:, :rank].float().contiguous())
    return found


class KindsNet(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.qkv = nn.Linear(16, 48)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.other = nn.MultiheadAttention(16, 2, batch_first=True, kdim=12, vdim=12)
        self.last = nn.Linear(16, 10, bias=False)

    def forward(self, x):
        x = x + torch.tanh(self.fc(x))
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.attention(q, k, v, need_weights=False)[0]
        x = x + self.other(x, x[..., :12], x[..., 4:], need_weights=False)[0]
        image = self.conv(x.unflatten(-1, (4, 4)))[:, :8]
        return self.last(x + self.grouped(x) + image.flatten(2))


def kinds_net():
    return KindsNet()
