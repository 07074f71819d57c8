"""Started by torchrun in two processes; every check runs on both. The first prints the name of each that passed."""

import logging
import sys
import warnings

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

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
    half = [one.up.weight for one in net.blocks] if kind == "mixed" else []
    for module in net.modules():
        module.reshard() if isinstance(module, FSDPModule) else None
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


CHECKS = {
    f"copy, {kind}": lambda kind=kind: check_copy(kind) for kind in ("plain", "kept", "mixed", "layers", "ignored")
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
