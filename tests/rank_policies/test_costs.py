"""Budgets of something else than parameters."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.linalg.storage import largest_saving_rank
from lightning_prehab.rank_policies import LayerChoices, ParameterBudget
from lightning_prehab.rank_policies.costs import isotonic, option_costs

LAYOUTS = st.sampled_from(["factors", "pivot"])


def layer(index, m, n, seed, layout="factors", **settings):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(min(m, n), generator=generator, dtype=torch.float64) * 3).sort(descending=True).values
    ranks = tuple(range(1, largest_saving_rank(m, n, layout) + 1))
    return LayerChoices(f"layer{index}", m, n, values, ranks, layout=layout, **settings)


def by_interpolation(layer, rank):
    """Seconds from the measured points, for monotone measurements."""
    points = sorted((r, s) for r, s in layer.latencies.items() if r is not None)
    if rank is None:
        return layer.latencies[None]
    if rank <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in itertools.pairwise(points):
        if low <= rank <= high:
            return before + (after - before) * (rank - low) / (high - low)
    return points[-1][1]


def seconds(layers, ranks):
    return sum(by_interpolation(one, ranks[one.name]) for one in layers)


def flops(layers, ranks):
    return sum(one.parameters(ranks[one.name]) * one.positions for one in layers)


def retained(layers, ranks):
    return sum(float(one.retained()[-1 if ranks[one.name] is None else ranks[one.name]]) for one in layers)


def best_by_brute_force(layers, cost, budget, allowed=lambda one, rank: True):
    names = [one.name for one in layers]
    options = [[rank for rank in one.options() if allowed(one, rank)] for one in layers]
    choices = [dict(zip(names, choice, strict=True)) for choice in itertools.product(*options)]
    fitting = [retained(layers, ranks) for ranks in choices if cost(layers, ranks) <= budget]
    return max(fitting, default=None)


problems = st.lists(
    st.tuples(st.integers(3, 8), st.integers(3, 8), st.integers(0, 10**6), st.integers(0, 40)), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None)
@given(problems, st.floats(0.3, 1.0), LAYOUTS)
def test_flops_equal_brute_force(shapes, keep, layout):
    layers = [layer(i, m, n, seed, layout, positions=p / 4) for i, (m, n, seed, p) in enumerate(shapes)]
    total = sum(math.ceil(one.parameters(None) * one.positions) for one in layers)

    def rounded(layers, ranks):
        return sum(math.ceil(one.parameters(ranks[one.name]) * one.positions) for one in layers)

    budget = math.floor(keep * total + 1e-6)
    expected = best_by_brute_force(layers, rounded, budget)
    policy = ParameterBudget(keep, cost="flops")
    if expected is None:
        with pytest.raises(PlanError, match="multiply-adds per sample"):
            policy(layers)
        return
    ranks = policy(layers)
    assert flops(layers, ranks) <= budget
    assert retained(layers, ranks) == pytest.approx(expected, rel=1e-9)


@given(problems, st.floats(0.3, 1.0), LAYOUTS)
@settings(max_examples=60, deadline=None)
def test_flops_at_equal_positions_are_parameters(shapes, keep, layout):
    layers = [layer(i, m, n, seed, layout) for i, (m, n, seed, _) in enumerate(shapes)]
    try:
        expected = ParameterBudget(keep)(layers)
    except PlanError:
        return
    assert ParameterBudget(keep, cost="flops")(layers) == expected


@settings(max_examples=150, deadline=None)
@given(
    problems,
    st.lists(st.lists(st.floats(1e-6, 1e-3), min_size=4, max_size=4), min_size=3, max_size=3),
    st.floats(0.2, 1.0),
    LAYOUTS,
)
def test_latency_equals_brute_force(shapes, times, keep, layout):
    layers = []
    for i, ((m, n, seed, _), (dense, *measured)) in enumerate(zip(shapes, times, strict=False)):
        top = largest_saving_rank(m, n, layout)
        curve = dict(zip(sorted({1, (top + 1) // 2, top}), sorted(measured), strict=False))
        layers.append(layer(i, m, n, seed, layout, latencies={None: dense, **curve}))
    budget = keep * sum(one.latencies[None] for one in layers)

    def faster(one, rank):
        return rank is None or by_interpolation(one, rank) < one.latencies[None]

    tight, loose = (best_by_brute_force(layers, seconds, budget * f, faster) for f in (1 - 1e-4, 1 + 1e-4))
    policy = ParameterBudget(keep, cost="latency")
    try:
        ranks = policy(layers)
    except PlanError:
        assert tight is None
        return
    assert seconds(layers, ranks) <= budget * (1 + 1e-4)
    assert retained(layers, ranks) <= loose + 1e-9
    assert tight is None or retained(layers, ranks) >= tight - 1e-9


def test_no_rank_is_faster():
    one = layer(0, 8, 8, 0, latencies={None: 1e-4, 1: 1e-4, 3: 2e-4})
    two = layer(1, 8, 8, 0, latencies={None: 1e-4, 1: 2e-5, 3: 5e-5})
    ranks = ParameterBudget(0.8, cost="latency")([one, two])
    assert ranks == {"layer0": None, "layer1": 3}
    zeros = dataclasses.replace(one, singular_values=torch.zeros(8).double())
    assert ParameterBudget(1.0, cost="latency")([zeros]) == {"layer0": None}
    with pytest.raises(
        PlanError, match="keep=0.9 allows 90,000 hundred-thousandths of the dense time for the 1 targets"
    ):
        ParameterBudget(0.9, cost="latency")([one])


def test_ranks_that_take_the_same_time_are_not_wasted():
    one = layer(0, 8, 8, 0, latencies={None: 1e-4, 1: 5e-5, 3: 5e-5})
    assert ParameterBudget(0.5, cost="latency")([one]) == {"layer0": 3}


def test_a_measurement_that_falls_with_the_rank_is_smoothed():
    one = layer(0, 12, 12, 0, latencies={None: 9e-6, 1: 2e-6, 3: 4e-6, 5: 3e-6})
    (costs,) = option_costs([one], [[1, 2, 3, 4, 5, None]], "latency")
    assert costs == pytest.approx([2e5 / 9, 2.75e5 / 9, 3.5e5 / 9, 3.5e5 / 9, 3.5e5 / 9, 1e5], abs=1)


@given(st.lists(st.integers(-20, 20), max_size=7))
def test_isotonic_is_the_minimax_formula(values):
    """``max over a <= i of min over b >= i of mean(values[a:b+1])`` (Barlow et al., 1972)."""
    n = len(values)
    expected = [
        max(min(sum(values[a : b + 1]) / (b + 1 - a) for b in range(i, n)) for a in range(i + 1)) for i in range(n)
    ]
    assert isotonic(values) == pytest.approx(expected)


def test_missing_and_senseless_measurements():
    policy = ParameterBudget(0.5, cost="latency")
    for latencies in (None, {}, {None: 1.0}, {1: 1.0, 2: 2.0}):
        with pytest.raises(PlanError, match=r"Layer 'layer0' \(8x8\) has no measured latencies"):
            policy([layer(0, 8, 8, 0, latencies=latencies)])
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(PlanError, match="must be a positive number of seconds"):
            policy([layer(0, 8, 8, 0, latencies={None: 1.0, 1: wrong})])
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(PlanError, match="positions must be a number"):
            ParameterBudget(0.5, cost="flops")([layer(0, 8, 8, 0, positions=wrong)])


def test_wrong_settings():
    with pytest.raises(ArgumentError, match="cost must be one of 'parameters', 'flops', 'latency', got 'time'"):
        ParameterBudget(0.5, cost="time")
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ArgumentError, match=f"latency_tokens must be .* got {wrong}"):
            ParameterBudget(0.5, cost="latency", latency_tokens=wrong)
    with pytest.raises(ArgumentError, match="scope='model' counts parameters"):
        ParameterBudget(0.5, scope="model", cost="flops")


def test_an_unmeasured_budget_is_not_refused_early():
    bare = [layer(0, 8, 8, 0)]
    for cost in ("flops", "latency"):
        policy = ParameterBudget(0.01, cost=cost)
        assert policy.parameter_limit(bare) is None
        policy.check(bare)
