"""Started by torchrun in two processes or four; every check runs on all. Rank 0 prints the name of each that passed."""

import gc
import sys
import types
import warnings
import weakref
from functools import partial

import pytest
import torch
from alive import Alive
from nets import RANKS, SIZE, Collectives, Net, kinds_net, make, mesh_of, planned, shard_blocks, steps, svd_factors
from torch import distributed
from torch.distributed._composable import checkpoint
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lightning_prehab as lp
from lightning_prehab.callbacks._owners import owners_of
from lightning_prehab.callbacks._rounds import whole_in_rounds
from lightning_prehab.errors import PrehabError, UnsupportedError
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg import blocks as large
from lightning_prehab.linalg.sharding import is_distributed
from lightning_prehab.road import operate
from lightning_prehab.sharded.engine import check_engine, managed_by, reshard_
from lightning_prehab.sharded.gathered import gathered_on
from lightning_prehab.sharded.served import leave_unserved
from lightning_prehab.sharded.shares import full
from lightning_prehab.sharded.structure import drop_structure_, put_structure_
from lightning_prehab.sharded.swap import prepare_sharded_swap
from lightning_prehab.sites import ProcessSite
from lightning_prehab.surgery.structure import follow_state_dict_
from lightning_prehab.surgery.swap import prepare_swap

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
AdamW = partial(torch.optim.AdamW, lr=0.01)
Even = partial(Net, 22)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
SQUARE = 64
COLUMNS = {"shard_placement_fn": lambda parameter: Shard(1)}


def together(work):
    """As in a Trainer: an error on one process is raised on all."""
    answer = error = None
    try:
        answer = work()
    except Exception as caught:
        error = caught
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(found):
        if message is not None:
            raise PrehabError(f"Rank {rank} failed: {message}")
    return answer


def whole(net):
    reshard_(net)
    return {name: full(one) for name, one in net.named_parameters()}


def assert_same(net, ref, optimizer=None, theirs=None, **close):
    close = close or CLOSE
    for (name, own), (key, one) in zip(whole(net).items(), ref.named_parameters(), strict=True):
        assert name == key
        torch.testing.assert_close(own, one.detach(), **close, msg=lambda text, name=name: f"{name}: {text}")
    if optimizer is None:
        return
    for (name, own), one in zip(net.named_parameters(), ref.parameters(), strict=True):
        state, expected = optimizer.state.get(own, {}), theirs.state.get(one, {})
        assert state.keys() == expected.keys(), name
        for key, value in state.items():
            if isinstance(own, DTensor) and value.dim() > 0 and value.shape == own.shape:
                assert value.placements == own.placements, (name, key)
                assert value.to_local().shape == own.to_local().shape, (name, key)
            torch.testing.assert_close(full(value), expected[key], rtol=1e-4, atol=1e-6, msg=f"{name}.{key}")


def blocks(net, **settings):
    return shard_blocks(net, mesh_of(distributed.get_world_size()), **settings)


def layers_as_units(net):
    mesh = mesh_of(distributed.get_world_size())
    for block in net.blocks:
        for layer in (block.up, block.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(net.head, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def lists_as_units(net):
    mesh = mesh_of(distributed.get_world_size())
    for block in net.blocks:
        fully_shard([block.norm, block.down], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def columns(net):
    def where(parameter):
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % distributed.get_world_size() == 0 else None

    return blocks(net, shard_placement_fn=where)


def checkpointed(net):
    for block in net.blocks:
        checkpoint(block)
    return blocks(net)


def frozen(net):
    net.blocks[0].up.weight.requires_grad_(False)
    return net


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
#: How a model is sharded; whether it computes what one process does.
LAYOUTS = {
    "blocks": (blocks, True),
    "half stored": (partial(blocks, reshard_after_forward=False), True),
    "layers": (layers_as_units, True),
    "lists": (lists_as_units, True),
    "columns": (columns, True),
    "checkpointed": (checkpointed, True),
    "offloaded": (partial(blocks, offload_policy=CPUOffloadPolicy(pin_memory=False)), True),
    "mixed": (partial(blocks, mp_policy=BF16), False),
}
FOUR = {
    "four": (blocks, True),
    "pairs": (lambda net: shard_blocks(net, mesh_of(2, 2, names=("copies", "shards"))), True),
    "half of them": (partial(blocks, reshard_after_forward=2), True),
}


def twin_of(net, optimizer, shard, kind, make_net):
    """A compressed model with the same values and the same optimizer state that has been sharded when it was new."""
    plain = make_net()
    reshard_(net)
    state = {name: full(one) for name, one in net.state_dict().items()}
    follow_state_dict_(plain, state)
    plain.load_state_dict(state)
    flags = [one.requires_grad for one in net.parameters()]
    for one, flag in zip(plain.parameters(), flags, strict=True):
        one.requires_grad_(flag)
    twin = shard(plain)
    other = kind(twin.parameters())
    for own, one in zip(net.parameters(), twin.parameters(), strict=True):
        assert not is_distributed(own) or own.placements[-1] == one.placements[-1] or own.dim() == 2
        if own in optimizer.state:
            found = optimizer.state[own].items()
            other.state[one] = {
                key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in found
            }
    return twin, other


def check_layout(shard, exact, kind=AdamW, change=lambda net: net, accumulate=1, dtype=torch.float32, evaluate=False):
    ref, net = change(make(dtype=dtype)), shard(change(make(dtype=dtype)))
    check_engine(net)
    theirs, own = kind(ref.parameters()), kind(net.parameters())
    steps(ref, theirs, 2, accumulate=accumulate)
    steps(net, own, 2, accumulate=accumulate)
    if evaluate:
        net(torch.zeros(2, SIZE))
    plan = planned(ref)
    factors = svd_factors(ref if exact else make_plain(net), plan)
    report = prepare_swap(ref, plan, factors, [theirs]).commit()
    reshard_(net)
    weights = []
    for name, module in net.named_modules():
        if name in RANKS:
            weights.append(weakref.ref(module.weight))
    prepared = prepare_sharded_swap(net, plan, factors, [own], together)
    with Collectives() as sent:
        found = prepared.commit()
    assert not sent.counts
    del prepared, module
    gc.collect()
    assert len(weights) == len(RANKS)
    assert not any(one() is not None for one in weights)
    assert found.ranks == report.ranks
    if exact:
        assert_same(net, ref, own, theirs)
        torch.testing.assert_close(found.weight_errors, report.weight_errors, rtol=1e-4, atol=1e-6)
    twin, other = twin_of(net, own, shard, kind, lambda: change(make(dtype=dtype)))
    with Collectives() as after:
        losses = steps(net, own, 2, first=2, accumulate=accumulate)
    with Collectives() as fresh:
        assert steps(twin, other, 2, first=2, accumulate=accumulate) == losses
    if all(one.placements == two.placements for one, two in zip(net.parameters(), twin.parameters(), strict=True)):
        assert after.counts == fresh.counts
        assert after.counts
    for (name, one), two in zip(whole(net).items(), whole(twin).values(), strict=True):
        assert torch.equal(one, two), name
    if exact:
        steps(ref, theirs, 2, first=2, accumulate=accumulate)
        assert_same(net, ref, own, theirs)
    return net, ref, own, theirs


def make_plain(net):
    plain = make()
    plain.load_state_dict({name: one.float() for name, one in whole(net).items()})
    return plain


def check_all_layouts(layouts):
    for name, (shard, exact) in layouts.items():
        print(f"layout: {name}", flush=True)
        check_layout(shard, exact)


def check_more():
    check_layout(blocks, True, kind=SGD)
    check_layout(blocks, True, change=frozen)
    check_layout(blocks, True, accumulate=2)
    check_layout(blocks, True, evaluate=True)
    check_layout(blocks, False, dtype=torch.bfloat16)


def check_flags_names_and_a_second_surgery():
    net = blocks(make())
    named = [(name, one) for name, one in net.named_parameters() if "head" not in name]
    first = torch.optim.AdamW(named, lr=0.01)
    second = torch.optim.AdamW(net.head.named_parameters("head"), lr=0.01)

    class Both:
        def step(self):
            first.step(), second.step()

        def zero_grad(self):
            first.zero_grad(), second.zero_grad()

    steps(net, Both(), 2)
    net.blocks[1].set_requires_gradient_sync(False)
    ref = make_plain(net)
    prepare_sharded_swap(net, planned(ref), svd_factors(ref, planned(ref)), [first, second], together).commit()
    groups = {id(one.group): one.group for one in managed_by(net).values()}
    assert sorted(group.reduce_grads for group in groups.values()) == [False, True, True, True]
    for one in (first, second):
        for group in one.param_groups:
            names = {id(parameter): name for name, parameter in net.named_parameters()}
            assert [names[id(parameter)] for parameter in group["params"]] == group["param_names"]
    net.blocks[1].set_requires_gradient_sync(True)
    steps(net, Both(), 2)
    rest = {"blocks.0.down": None, "blocks.1.down": 3, "blocks.2.up": 2}
    again = make()
    follow_state_dict_(again, whole(net))
    again.load_state_dict(whole(net))
    plan = planned(again, {name: rank for name, rank in rest.items() if rank})
    prepare_sharded_swap(net, plan, svd_factors(again, plan), [first, second], together).commit()
    prepare_swap(again, plan, svd_factors(again, plan)).commit()
    assert_same(net, again)
    steps(net, Both(), 2)


def check_every_kind_of_layer():
    class Noting(ProcessSite):
        def swap(self, plan, factors):
            self.noted = plan, factors
            return super().swap(plan, factors)

    recipes = [
        {},
        {"layout": "pivot"},
        {"split_fused": True, "exclude_modules": ["*.k", "attention.v_proj"]},
        {"factorization": lp.LowRankPlusSparse(0.1, lp.SVD()), "target_modules": ["fc", "attention"]},
        {"factorization": lp.ActivationSVD()},
    ]
    for settings in recipes:
        ref, net = make(kinds_net), make(kinds_net)
        theirs = AdamW(ref.parameters())
        fully_shard(net.attention)
        fully_shard(net)
        own = AdamW(net.parameters())
        for model, optimizer in ((ref, theirs), (net, own)):
            for _ in range(2):
                model(torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(5))).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_same(net, ref, own, theirs)
        batches = [torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        for keep in (0.6, 0.35):
            site = Noting(ref, batches, optimizers=[theirs])
            report = operate(lp.Recipe(keep, **settings), site)
            plan, factors = site.noted
            found = prepare_sharded_swap(net, plan, factors, [own], together).commit()
            assert_same(net, ref, own, theirs)
            torch.testing.assert_close(found.weight_errors, report.weight_errors, rtol=1e-3, atol=1e-5)
            x = batches[0]
            torch.testing.assert_close(net(x), ref(x), rtol=1e-4, atol=1e-5)
            for model, optimizer in ((ref, theirs), (net, own)):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert_same(net, ref, own, theirs)
            if settings.get("factorization") is not None or "split_fused" in settings:
                break  # no second cut of these


def check_failures_leave_all_as_they_were():
    ref, net = make(), blocks(make())
    own = AdamW(net.parameters())
    steps(net, own, 1)
    ref = make_plain(net)
    plan = planned(ref)
    factors = svd_factors(ref, plan)
    before, params = whole(net), list(net.parameters())
    groups = [list(group["params"]) for group in own.param_groups]
    calls = []

    def count(work):
        calls.append(work)
        return together(work)

    prepare_sharded_swap(net, plan, factors, [own], count)
    steps_of_it = len(calls)
    for broken in range(0, steps_of_it, 3):
        calls.clear()

        def fails(work, broken=broken):
            calls.append(work)
            failing = len(calls) == broken + 1 and distributed.get_rank() == 1
            return together(partial(_broken, work) if failing else work)

        with pytest.raises(PrehabError, match="on purpose"):
            prepare_sharded_swap(net, plan, factors, [own], fails)
        assert all(one is two for one, two in zip(net.parameters(), params, strict=True))
        assert [list(group["params"]) for group in own.param_groups] == groups
    after = whole(net)
    assert all(torch.equal(before[name], after[name]) for name in before)
    steps(net, own, 1)


def _broken(work):
    work()
    raise PrehabError("on purpose")


class Squares(torch.nn.Module):
    """Layers of one size."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(SQUARE, SQUARE, bias=False) for _ in range(3))

    def forward(self, x):
        for layer in self.blocks:
            x = torch.tanh(layer(x))
        return x


def squares(optimizer, dtype, ranks=(2, 2, 2), **settings):
    """A sharded net, its optimizer after a step, a plan to cut its first layers and the factors."""
    plain, net = make(Squares, dtype=dtype), blocks(make(Squares, dtype=dtype), **settings)
    plan = planned(plain, {f"blocks.{index}": rank for index, rank in enumerate(ranks)})
    own = optimizer(net.parameters())
    net(torch.randn(4, SQUARE).to(dtype)).square().mean().backward()
    own.step()
    own.zero_grad()
    reshard_(net)
    return net, own, plan, svd_factors(plain, plan)


def check_one_whole_layer_lives_at_a_time():
    """On paper: where rows suffice none; else the one that is put together, with what the optimizer knows of it."""
    plain_steps = partial(torch.optim.SGD, lr=0.05)
    cases = [(SGD, {}, 0), (AdamW, {}, 0), (plain_steps, COLUMNS, 1), (SGD, COLUMNS, 2), (AdamW, COLUMNS, 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "ENTRIES", 256)
        for dtype in (torch.float32, torch.bfloat16):
            size = SQUARE * SQUARE * dtype.itemsize
            for optimizer, settings, expected in cases:
                net, own, plan, factors = squares(optimizer, dtype, **settings)
                gc.collect()
                with Alive(size, expected * size) as alive:
                    prepare_sharded_swap(net, plan, factors, [own], together).commit()
                assert (alive.most, alive.now) == (expected * size, 0), (dtype, optimizer, settings)
                steps_of_squares(net, own, dtype)


class Sent(dict):
    """Factors that come when they are asked for, as from their owner."""

    dtype = torch.float32

    def __getitem__(self, name):
        found = super().__getitem__(name)
        return found._replace(A=found.A.to(self.dtype, copy=True), B=found.B.to(self.dtype, copy=True))


def check_a_swap_needs_one_layer_beyond_what_stays():
    """A layer cut to half: its factors twice, or with what an optimizer will know of them, and a few blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "ENTRIES", 64)
        for dtype in (torch.float32, torch.bfloat16):
            for optimizer in (partial(torch.optim.SGD, lr=0.05), SGD, AdamW):
                net, own, plan, factors = squares(optimizer, dtype, ranks=(SQUARE // 4,))
                sent = Sent(factors)
                sent.dtype = dtype
                gc.collect()
                with Alive(256) as alive:
                    prepare_sharded_swap(net, plan, sent, [own], together).commit()
                beyond = alive.most - alive.now
                assert 0 < beyond <= SQUARE * SQUARE * dtype.itemsize + 4 * large.ENTRIES * 8, (dtype, optimizer)
                steps_of_squares(net, own, dtype)


def steps_of_squares(net, optimizer, dtype):
    net(torch.randn(4, SQUARE).to(dtype)).square().mean().backward()
    optimizer.step()


def check_one_whole_layer_is_worked_on_at_a_time():
    world, rank = distributed.get_world_size(), distributed.get_rank()
    trainer = types.SimpleNamespace(world_size=world, global_rank=rank)
    for settings in ({}, COLUMNS):
        net, *_ = squares(SGD, torch.float32, **settings)
        views = {name: view_of(module) for name, module in net.named_modules() if name.startswith("blocks.")}
        owners = owners_of(views, world)
        size, seen = SQUARE * SQUARE * 4, []

        def work(wholes, seen=seen):
            seen += wholes
            return [one.weight.detach().sum() for one in wholes.values()]

        expected = size * (rank in owners.values())
        with Alive(size, expected) as alive:
            gather = partial(gather_on, views, owners)
            for _, found in whole_in_rounds(trainer, views, owners, gather, work):
                assert len(found) <= 1
        assert seen == [name for name in views if owners[name] == rank]
        assert (alive.most, alive.now) == (expected, 0)


def gather_on(views, owners, name):
    return gathered_on(views[name], owners[name], together)


def check_structures_come_and_go():
    ref, net = make(), blocks(make())
    plan = planned(ref)
    factors = svd_factors(ref, plan)
    prepare_swap(ref, plan, factors).commit()
    own = AdamW(net.parameters())
    meta = {name: one._replace(A=one.A.to("meta"), B=one.B.to("meta")) for name, one in factors.items()}
    with Collectives() as sent:
        put_structure_(net, meta, [own])
    assert not sent.counts
    load(net, ref.state_dict())
    assert_same(net, ref)
    theirs = AdamW(ref.parameters())
    steps(net, own, 2), steps(ref, theirs, 2)
    assert_same(net, ref, own, theirs)
    with Collectives() as sent:
        drop_structure_(net, list(RANKS), [own])
    assert not sent.counts
    dense = make()
    load(net, dense.state_dict())
    assert_same(net, dense)
    assert sum(len(group["params"]) for group in own.param_groups) == len(list(dense.parameters()))
    steps(net, own, 2)


def load(net, state):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(net, state, options=StateDictOptions(full_state_dict=True))


def check_refusals():
    net = blocks(make())
    for call in (
        lambda: lp.compress_(net, 0.5),
        lambda: lp.to_dense_(net),
        lambda: lp.to_pivot_(net),
        lambda: lp.refine_(net, make(), [torch.zeros(2, SIZE)]),
    ):
        with pytest.raises(UnsupportedError, match="in shards"):
            call()
    own = AdamW(net.parameters())
    net.set_requires_gradient_sync(False)
    net(torch.zeros(2, SIZE)).sum().backward()
    plan = planned(make())
    with pytest.raises(UnsupportedError, match="gradients are waiting"):
        prepare_sharded_swap(net, plan, svd_factors(make(), plan), [own], together)
    tied = make()
    tied.blocks[2].up.weight = tied.blocks[0].up.weight
    tied = fully_shard(tied, mesh=mesh_of(distributed.get_world_size()))
    assert "tied" in lp.find_targets(tied).skipped["blocks.0.up"]


def parallel(net, mesh, data=None):
    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if data is not None:
        shard_blocks(net, data)
    return net


def check_tensor_parallel(data=1):
    world = distributed.get_world_size()
    mesh = mesh_of(data, world // data, names=("data", "tensor"))
    ref = make(Even)
    net = parallel(make(Even), mesh["tensor"], mesh["data"] if data > 1 else None)
    check_engine(net)
    own, theirs = AdamW(net.parameters(), foreach=False), AdamW(ref.parameters())

    def step(model, optimizer, seed):
        x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(seed))
        if model is net and data > 1:
            x = x.chunk(data)[mesh.get_coordinate()[0]]
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(2):
        step(net, own, seed), step(ref, theirs, seed)
    assert_same(net, ref, own, theirs) if data == 1 else assert_same(net, ref)
    plan = planned(ref)
    factors = svd_factors(ref, plan)
    factors = svd_factors(ref, plan)
    served = leave_unserved(net, lp.find_targets(net))
    assert set(served) >= set(RANKS)
    prepare_swap(ref, plan, factors, [theirs]).commit()
    prepare_sharded_swap(net, plan, factors, [own], together).commit()
    reshard_(net)
    up, down = net.blocks[0].up, net.blocks[0].down
    assert [type(one.weight.placements[-1]) for one in (up.A, up.B, down.A, down.B)] == [
        Replicate,
        Shard,
        Shard,
        Replicate,
    ]
    assert_same(net, ref, own, theirs)
    step(net, own, 3), step(ref, theirs, 3)
    assert_same(net, ref, own, theirs, rtol=1e-4, atol=1e-5)


CHECKS = {
    "layouts": partial(check_all_layouts, LAYOUTS),
    "more": check_more,
    "flags, names, second surgery": check_flags_names_and_a_second_surgery,
    "kinds": check_every_kind_of_layer,
    "failures": check_failures_leave_all_as_they_were,
    "memory of the swap": check_one_whole_layer_lives_at_a_time,
    "a swap beyond what stays": check_a_swap_needs_one_layer_beyond_what_stays,
    "memory of the rounds": check_one_whole_layer_is_worked_on_at_a_time,
    "structures": check_structures_come_and_go,
    "refusals": check_refusals,
    "tensor parallel": check_tensor_parallel,
}
CHECKS_OF_FOUR = {
    "four": partial(check_all_layouts, FOUR),
    "tensor parallel in shards": partial(check_tensor_parallel, 2),
}

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for name, check in (CHECKS if distributed.get_world_size() == 2 else CHECKS_OF_FOUR).items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        check()
        if distributed.get_rank() == 0:
            print(f"passed: {name}", flush=True)
    distributed.destroy_process_group()
