import dataclasses
import itertools
import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.linalg import break_even_rank
from lightning_prehab.rank_policies import LayerChoices, RankPolicy


def layer(index, m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(min(m, n), generator=generator, dtype=torch.float64) * 3).sort(descending=True).values
    return LayerChoices(f"layer{index}", m, n, values, tuple(range(1, break_even_rank(m, n) + 1)))


def retained(layers, ranks):
    return sum(
        float(one.retained()[len(one.singular_values) if ranks[one.name] is None else ranks[one.name]])
        for one in layers
    )


def spent(layers, ranks):
    return sum(one.parameters(ranks[one.name]) for one in layers)


problems = st.lists(st.tuples(st.integers(2, 8), st.integers(2, 8), st.integers(0, 10**6)), min_size=1, max_size=3)


@settings(max_examples=250, deadline=None)
@given(problems, st.floats(0.2, 1.0))
def test_parameter_budget_equals_brute_force(shapes, keep):
    layers = [layer(i, *shape) for i, shape in enumerate(shapes) if break_even_rank(*shape[:2]) > 0]
    if not layers:
        return
    budget = math.floor(keep * sum(one.out_features * one.in_features for one in layers) + 1e-6)
    allowed = [
        dict(zip([one.name for one in layers], choice, strict=True))
        for choice in itertools.product(*(one.options() for one in layers))
    ]
    allowed = [ranks for ranks in allowed if spent(layers, ranks) <= budget]
    if not allowed:
        with pytest.raises(PlanError, match="targets, their smallest ranks hold"):
            lp.ParameterBudget(keep)(layers)
        return
    ranks = lp.ParameterBudget(keep)(layers)
    assert retained(layers, ranks) == pytest.approx(max(retained(layers, other) for other in allowed), rel=1e-9)
    # within the budget, and no further component of any layer would fit
    left = budget - spent(layers, ranks)
    assert left >= 0
    for one in layers:
        now = one.parameters(ranks[one.name])
        steps = [one.parameters(rank) - now for rank in one.options() if one.parameters(rank) > now]
        assert not steps or left < min(steps)


def test_parameter_budget_spends_where_the_energy_is():
    flat = LayerChoices("flat", 20, 20, torch.ones(20, dtype=torch.float64), tuple(range(1, 10)))
    steep = LayerChoices("steep", 20, 20, torch.logspace(1, -3, 20, dtype=torch.float64), tuple(range(1, 10)))
    ranks = lp.ParameterBudget(0.7)([flat, steep])
    assert ranks["steep"] < (ranks["flat"] or 20)


def test_min_rank():
    layers = [
        layer(0, 20, 20, 1),
        LayerChoices("weak", 20, 20, torch.full((20,), 1e-6, dtype=torch.float64), tuple(range(1, 10))),
    ]
    assert lp.ParameterBudget(0.5)(layers)["weak"] == 1
    assert lp.ParameterBudget(0.5, min_rank=3)(layers)["weak"] == 3


@given(st.integers(2, 60), st.integers(2, 60), st.floats(0.01, 0.99))
def test_rank_ratio_is_the_formula(m, n, keep):
    if break_even_rank(m, n) == 0:
        return
    rank = lp.RankRatio(keep)([layer(0, m, n, 0)])["layer0"]
    assert rank == max(1, min(math.floor(keep * m * n / (m + n) + 1e-9), break_even_rank(m, n)))


def test_rank_ratio_respects_admissible_ranks():
    one = LayerChoices("a", 64, 64, torch.ones(64, dtype=torch.float64), (8, 16, 24))
    assert lp.RankRatio(0.6)([one]) == {"a": 16}
    assert lp.RankRatio(0.1)([one]) == {"a": 8}


@pytest.mark.parametrize(
    "kind", [kind for kind in RankPolicy.__subclasses__() if kind.__module__.startswith("lightning_prehab")]
)
def test_conformance(kind):
    policy = kind(0.5)
    assert eval(repr(policy), vars(lp)) == policy
    assert kind(**yaml.safe_load(yaml.safe_dump(dataclasses.asdict(policy)))) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.keep = 0.1
    layers = [layer(i, 9, 7, i) for i in range(3)]
    ranks = policy(layers)
    assert list(ranks) == [one.name for one in layers]
    assert all(ranks[one.name] in one.options() for one in layers)
    assert policy(layers) == ranks
    for keep in (0, -1, 1.5, float("nan"), True, "0.5"):
        with pytest.raises(ArgumentError, match=r"must lie in \(0, 1\], got"):
            kind(keep)


def test_wrong_min_rank():
    with pytest.raises(ArgumentError, match="min_rank must be at least 1, got 0"):
        lp.ParameterBudget(0.5, 0)
