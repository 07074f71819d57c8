"""A depth multiplier of the predicted losses, and the search for it."""

import itertools
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prehab.errors import ArgumentError
from lightning_prehab.linalg.matrices import break_even_rank
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.rank_policies import (
    CalibratedBudget,
    EnergyThreshold,
    LayerChoices,
    ParameterBudget,
    Probe,
    ProbeBudget,
    RankRatio,
    ZeroSum,
)
from lightning_prehab.rank_policies.compass import Lean, search
from lightning_prehab.rank_policies.depth import blocks_of, multipliers


def named(*names, size=None):
    return [LayerChoices(name, *(size or {}).get(name, (2, 2)), torch.ones(2), ()) for name in names]


def by_the_formula(block, blocks, alpha, gamma):
    """Straight from the paper, with blocks counted from 0."""
    sums = [sum(1.0 / (k + 1) ** alpha for k in range(b, blocks)) for b in range(blocks)]
    low, high = min(sums), max(sums)
    norm = (sums[block] - low) / (high - low) if high > low else 0.0
    return 1.0 + gamma * norm


@given(st.integers(1, 40), st.floats(0.0, 3.0), st.floats(0.0, 7.0))
def test_the_multiplier_is_that_of_the_formula(blocks, alpha, gamma):
    expected = [by_the_formula(block, blocks, alpha, gamma) for block in range(blocks)]
    assert multipliers(blocks, alpha, gamma) == pytest.approx(expected)
    assert multipliers(blocks, alpha, -gamma) == pytest.approx(expected[::-1])
    assert expected == sorted(expected, reverse=True)


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["h.0.q", "h.0.k", "h.1.q", "h.1.k", "lm_head"], [0, 0, 1, 1, 2]),
        (["0", "2", "4"], [0, 1, 2]),
        (["a", "b", "c"], [0, 1, 2]),
        (["one"], [0]),
        (
            [
                "layers.0.mlp.experts.0.w",
                "layers.0.mlp.experts.1.w",
                "layers.1.mlp.experts.0.w",
                "layers.1.mlp.experts.1.w",
            ],
            [0, 0, 1, 1],
        ),
        (["0.h.0.q", "0.h.1.q", "1.pool"], [0, 1, 2]),  # a list of different things is none
        (["encoder.h.0.q", "encoder.h.1.q", "decoder.h.0.q", "decoder.h.1.q"], [0, 1, 2, 3]),
        ([f"h.{number}.q" for number in range(12)], list(range(12))),
    ],
)
def test_blocks_are_told_by_the_numbers_in_names(names, blocks):
    assert blocks_of(named(*names)) == blocks


def test_stages_of_different_widths_are_no_blocks_what_is_repeated_in_them_is():
    names = [f"stages.{stage}.blocks.{block}.fc" for stage in (0, 1) for block in (0, 1, 2)]
    sizes = {name: (2, 2) if ".0.blocks" in name else (4, 2) for name in names}
    assert blocks_of(named(*names, size=sizes)) == list(range(6))
    assert blocks_of(named(*names)) == [0, 0, 0, 1, 1, 1]


def layer(name, m, n, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(min(m, n), generator=generator, dtype=torch.float64) * 3).sort(descending=True).values
    return LayerChoices(name, m, n, values, tuple(range(1, break_even_rank(m, n) + 1)), **more)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.4, 0.9), st.floats(0.0, 3.0), st.floats(-7.0, 7.0))
def test_the_weighted_sum_is_as_large_as_brute_force_finds_it(seed, keep, alpha, gamma):
    layers = [layer(f"h.{block}.fc", 6, 5, seed + block) for block in range(3)]
    factors = [by_the_formula(block, 3, alpha, abs(gamma)) for block in range(3)]
    factors = factors if gamma >= 0 else factors[::-1]
    budget = int(keep * 90 + 1e-6)

    def retained(ranks):
        kept = (one.singular_values[:rank].square().sum() for one, rank in zip(layers, ranks, strict=True))
        return sum(factor * float(value) for factor, value in zip(factors, kept, strict=True))

    def cost(ranks):
        return sum(one.parameters(rank) for one, rank in zip(layers, ranks, strict=True))

    choices = itertools.product(*(one.options() for one in layers))
    best = max(retained(ranks) for ranks in choices if cost(ranks) <= budget)
    found = CalibratedBudget(keep, trials=0, alpha=alpha, gamma=gamma)(layers)
    assert cost(list(found.values())) <= budget
    assert retained(list(found.values())) == pytest.approx(best, rel=1e-9)


def test_without_a_multiplier_it_is_its_base():
    layers = [layer(f"h.{block}.fc", 9, 7, block, probe=Probe(2, 0.1 + block)) for block in range(3)]
    for trials in (0, 10):
        assert CalibratedBudget(0.6, trials=trials)(layers) == ParameterBudget(0.6)(layers)
        assert CalibratedBudget(0.6, trials=trials, base=ProbeBudget(1.0))(layers) == ProbeBudget(0.6)(layers)


def test_all_that_a_base_may_read_of_a_loss_is_weighed():
    generator = torch.Generator().manual_seed(0)
    components = [torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3)]
    layers = [
        layer(f"h.{block}.fc", 9, 7, block, probe=Probe(2, 0.2), components=components[block]) for block in range(3)
    ]
    for base in (ParameterBudget(0.5), ProbeBudget(0.5), ZeroSum(0.5)):
        early, late = (CalibratedBudget(0.5, trials=0, base=base, alpha=1, gamma=g)(layers) for g in (7, -7))
        assert early != late, base


def test_a_base_gets_the_settings_of_the_whole_and_passes_on_its_needs():
    policy = CalibratedBudget(0.4, 3, "model", base=ProbeBudget(0.9, probe_keep=0.7))
    assert policy.base == ProbeBudget(0.4, 3, "model", probe_keep=0.7)
    assert (policy.needs_probes, policy.probe_keep, policy.trials) == (True, 0.7, 10)
    assert replace(policy, keep=0.2).base.keep == 0.2
    assert CalibratedBudget(0.4, base=ParameterBudget(0.4, cost="flops")).needs_positions
    assert CalibratedBudget(0.4, base=ParameterBudget(0.4, cost="latency", latency_tokens=9)).latency_tokens == 9
    assert CalibratedBudget(0.4, base=ZeroSum(0.4)).needs_weight_gradients
    for base in (RankRatio(0.5), EnergyThreshold(0.5), CalibratedBudget(0.5), ParameterBudget, 0.5):
        with pytest.raises(ArgumentError, match="base must be a budget that is spent by the spectra.*got"):
            CalibratedBudget(0.5, base=base)
    recipe = Recipe(policy=policy)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"trials": -1}, "trials must not be negative"),
        ({"trials": 2.5}, "trials must not be negative"),
        ({"trials": 0, "alpha": 3.1}, r"alpha must lie in \[0, 3\], got 3.1"),
        ({"trials": 0, "gamma": -7.5}, r"gamma must lie in \[-7, 7\]"),
        ({"gamma": 2.0}, "are what trials look for; give them with trials=0"),
    ],
)
def test_wrong_settings(wrong, said):
    with pytest.raises(ArgumentError, match=said):
        CalibratedBudget(0.5, **wrong)


def walk(trials, cost):
    """All points that a search tries, in order."""
    points, seen = search(trials), []
    try:
        point = next(points)
        while True:
            seen.append(point)
            point = points.send(cost(point))
    except StopIteration:
        return seen


@given(st.integers(1, 25), st.integers(-8, 8), st.integers(0, 12))
def test_a_search_begins_with_nothing_repeats_nothing_and_keeps_to_its_trials(trials, gamma, alpha):
    def cost(point):
        return abs(point.gamma_step - gamma) + abs(point.alpha_step - alpha) / 3

    seen = walk(trials, cost)
    assert seen[0] == Lean()
    assert len(seen) == len(set(seen)) <= trials
    assert all(0 <= point.alpha <= 3 and -7 <= point.gamma <= 7 and point.gamma for point in seen[1:])
    assert seen == walk(trials, cost)


@given(st.integers(-8, 8), st.integers(0, 12))
def test_with_time_the_best_point_is_found_on_either_side(gamma, alpha):
    def cost(point):
        return (point.gamma_step - gamma) ** 2 + (0.2 * (point.alpha_step - alpha) ** 2 if gamma else 0)

    best = min(walk(200, cost), key=cost)
    assert best.gamma_step == gamma
    assert not gamma or best.alpha_step == alpha
    near = min(walk(10, cost), key=cost)
    assert abs(near.gamma_step - gamma) <= 2


def test_where_nothing_helps_the_search_ends_early_with_the_base():
    assert len(walk(100, lambda point: abs(point.gamma_step))) == 7
    assert len(walk(100, lambda point: 1.0)) == 7


def test_what_a_search_says():
    def said(cost):
        def trials():
            found = yield from CalibratedBudget(0.5).search()
            heard.append(found)

        heard, search = [], trials()
        policy = next(search)
        while not heard:
            with suppress(StopIteration):
                policy = search.send(cost(policy))
        return heard[0]

    assert said(lambda policy: 1.0 + abs(policy.gamma)) == "no depth multiplier: effect 1, best of 7 trials"
    found = said(lambda policy: 1.0 - policy.gamma / 10)
    assert found == "depth multiplier alpha=2, gamma=7: effect 0.3 instead of 1, best of 10 trials"


def test_trials_are_the_same_budget_without_trials_of_their_own():
    policy = CalibratedBudget(0.5, 2, trials=4, base=ProbeBudget(0.5))
    trials = policy.search()
    tried = [next(trials), *(trials.send(cost) for cost in (3.0, 2.0, 1.0))]
    assert tried[0] == replace(policy, trials=0)
    assert all(one == replace(policy, trials=0, alpha=one.alpha, gamma=one.gamma) for one in tried)
    assert len({(one.alpha, one.gamma) for one in tried}) == 4
    with pytest.raises(StopIteration):
        trials.send(0.5)
    assert list(ParameterBudget(0.5).search()) == [ParameterBudget(0.5)]
