import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError
from lightning_prehab.plan import timing
from lightning_prehab.plan.timing import measure_latencies, spread, time_calls
from lightning_prehab.rank_policies import LayerChoices, ParameterBudget


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-6)


def test_every_target_gets_a_curve_and_each_shape_is_measured_once(monkeypatch):
    shapes = []
    real = timing._measure

    def counting(layer, tokens, grid, layout):
        shapes.append((layer.out_features, layer.in_features, layer.bias is None, tokens, grid))
        return real(layer, tokens, grid, layout)

    monkeypatch.setattr(timing, "_measure", counting)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 20), nn.Linear(12, 20, bias=False))
    model[1].half()
    model[0].weight.grad = torch.ones(20, 12)
    state, hooked = torch.get_rng_state(), []
    model[0].register_forward_hook(lambda *_: hooked.append(1))
    weights = [p.clone() for p in model.parameters()]
    latencies = measure_latencies(lp.find_targets(model), tokens=5)
    assert list(latencies) == ["0", "1", "2", "3"]
    assert shapes == [
        (20, 12, False, 5, (1, 2, 3, 5, 6, 7)),
        (12, 20, False, 5, (1, 2, 3, 5, 6, 7)),
        (20, 12, True, 5, (1, 2, 3, 5, 6, 7)),
    ]
    for curve in latencies.values():
        assert list(curve) == [None, 1, 2, 3, 5, 6, 7]
        assert all(seconds > 0 for seconds in curve.values())
    assert latencies["0"] == latencies["2"]
    assert latencies["0"] is not latencies["2"]
    assert torch.equal(torch.get_rng_state(), state)
    assert not hooked
    assert all(torch.equal(one, other) for one, other in zip(weights, model.parameters(), strict=True))
    assert torch.equal(model[0].weight.grad, torch.ones(20, 12))


def test_only_the_ranks_that_may_be_chosen_are_measured():
    targets = {"a": nn.Linear(40, 40), "b": nn.Linear(40, 40)}
    latencies = measure_latencies(targets, 3, {"a": (8, 16), "b": ()})
    assert list(latencies["a"]) == [None, 8, 16]
    assert list(latencies["b"]) == [None]


def test_the_result_feeds_the_policy():
    layer = nn.Linear(24, 24)
    choices = LayerChoices(
        "a",
        24,
        24,
        torch.linspace(2, 1, 24).double(),
        tuple(range(1, 12)),
        latencies=measure_latencies({"a": layer}, 4)["a"],
    )
    assert ParameterBudget(1.0, cost="latency")([choices]) == {"a": None}


def test_the_median_of_turns_counts(monkeypatch):
    clock = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    order = []

    def call(key, seconds):
        def run():
            nonlocal clock
            order.append(key)
            clock += seconds[min(sum(k == key for k in order), len(seconds)) - 1]

        return run

    # the first calls (warm-up) and every third one are slow
    calls = {None: call(None, [9.0] * 4 + [1.0, 1.0, 50.0] * 3), 4: call(4, [7.0] * 4 + [3.0, 3.0, 3.0] * 3)}
    assert time_calls(calls, torch.device("cpu")) == {None: 1.0, 4: 3.0}
    assert order[8:] == [None, 4] * timing.REPEATS


def test_short_calls_are_repeated(monkeypatch):
    clock = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1.0)
    calls = 0

    def run():
        nonlocal clock, calls
        clock, calls = clock + 0.25, calls + 1

    assert time_calls({1: run}, torch.device("cpu")) == {1: 0.25}
    assert calls == 4 + 4 * timing.REPEATS


@pytest.mark.parametrize(("last", "count"), [(0, 0), (1, 1), (2, 2), (6, 6), (7, 6), (1000, 6)])
def test_spread(last, count):
    grid = spread(range(1, last + 1))
    assert len(grid) == count
    assert list(grid) == sorted(set(grid))
    assert not grid or (grid[0], grid[-1]) == (1, last)


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True, None])
def test_wrong_tokens(tokens):
    with pytest.raises(ArgumentError, match=f"tokens must be at least 1, got {tokens}"):
        measure_latencies({"a": nn.Linear(4, 4)}, tokens)


def test_wrong_ranks():
    with pytest.raises(ArgumentError, match=r"rank must lie in \[1, 4\]"):
        measure_latencies({"a": nn.Linear(4, 4)}, 2, {"a": (5,)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    layer = nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)
    state = torch.cuda.get_rng_state()
    assert all(seconds > 0 for seconds in measure_latencies({"a": layer}, 32)["a"].values())
    assert torch.equal(torch.cuda.get_rng_state(), state)
