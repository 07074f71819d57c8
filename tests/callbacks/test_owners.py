"""Who works on which layer: everything is owned once, the same everywhere, and nobody has much more to do."""

import itertools
import logging

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.callbacks import _distributed
from lightning_prehab.callbacks._owners import cost_of, in_rounds, owners_of, say_memory
from lightning_prehab.plan.spectra import Solver


def layers(sizes):
    return {str(index): nn.Linear(n, m, device="meta") for index, (m, n) in enumerate(sizes)}


def loads(targets, owners, world_size):
    load = [0.0] * world_size
    for name, owner in owners.items():
        load[owner] += cost_of(targets[name])
    return load


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_busiest_process_has_at_most_four_thirds_of_the_least_possible(world_size):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        targets = layers(torch.randint(1, 40, (6, 2), generator=generator).tolist())
        owners = owners_of(targets, world_size)
        assert list(owners) == list(targets)
        plans = itertools.product(range(world_size), repeat=len(targets))
        best = min(max(loads(targets, dict(zip(targets, plan, strict=True)), world_size)) for plan in plans)
        assert max(loads(targets, owners, world_size)) <= 4 / 3 * best


def test_a_transformer_is_shared_out_better_than_by_turns():
    """Of each block one layer is as costly as all others together: by turns, one process gets all of these."""
    targets = layers([(64, 64), (64, 64), (256, 64), (64, 256)] * 8)
    load = loads(targets, owners_of(targets, 4), 4)
    assert max(load) == min(load)
    by_turns = loads(targets, {name: index % 4 for index, name in enumerate(targets)}, 4)
    assert max(by_turns) > 1.5 * max(load)


def test_what_was_cut_before_costs_what_its_rank_says():
    (low,) = lp.find_targets(nn.Sequential(lp.LowRankLinear(8, 8, rank=2)), cut_again=True).values()
    assert cost_of(low) == 8 * 8 * 2
    assert cost_of(nn.Conv2d(8, 8, 3, groups=2)) == 2 * 4 * 36 * 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rounds_have_each_name_once_and_no_process_twice(world_size):
    targets = layers([(4, 4), (9, 9), (3, 5), (9, 9), (2, 2), (7, 7)])
    owners = owners_of(targets, world_size)
    rounds = in_rounds(targets, owners)
    assert sorted(itertools.chain(*rounds)) == sorted(targets)
    for names in rounds:
        assert len({owners[name] for name in names}) == len(names)
    assert len(rounds) == max(list(owners.values()).count(rank) for rank in range(world_size))


@pytest.mark.parametrize("method", [lp.SVD(), lp.WhitenedSVD(), lp.KroneckerSVD()], ids=lambda m: type(m).__name__)
def test_the_memory_is_stated_once_with_its_parts(method, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.INFO)
    model = nn.ModuleDict({name: nn.Linear(400, 400) for name in "ab"})
    statistics = {name: lp.LayerStatistics(400, 400, magnitudes=False, device="meta") for name in model}
    statistics["b"].share_inputs_(statistics["a"])
    solver = Solver(dict(model.items()), method, statistics)
    with caplog.at_level(logging.INFO):
        say_memory(model, solver, {"a": 0, "b": 1}, 1)
        assert not caplog.messages  # one process shares nothing
        say_memory(model, solver, {"a": 0, "b": 1}, 2)
    (said,) = caplog.messages
    sums = 4 * (400 * 400 + 400) + 3 * 8  # the counts of samples are each layer's own
    # of two layers each process keeps one, at rank 200 of 400: as many numbers as the weight has
    tried = ", a copy of the model and its changes 3.8" if method.comparable else ""
    parts = f"(sums {sums / 1e6:.1f}, decompositions 0.6, the largest layer 5.1; later factors 1.3{tried})"
    assert said.endswith(f"at most 6.4 MB {parts}.")


def test_buckets_hold_one_sort_each_and_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(_distributed, "BUCKET_BYTES", 100)
    tensors = [torch.zeros(size) for size in (10, 10, 5, 30, 1)] + [torch.zeros(3, dtype=torch.int64)]
    buckets = _distributed._buckets([*tensors, torch.zeros(2, 2)])
    assert [[t.numel() for t in bucket] for bucket in buckets] == [[10, 10, 5], [30], [1, 4], [3]]
    rooms = _distributed._rooms_for(buckets)
    assert {sort[0]: room.numel() for sort, room in rooms.items()} == {torch.float32: 25, torch.int64: 0}
