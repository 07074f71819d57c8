import dataclasses
import inspect
import itertools
import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prehab import rank_policies
from lightning_prehab.errors import ArgumentError, NumericalError, PlanError
from lightning_prehab.linalg.storage import largest_saving_rank
from lightning_prehab.rank_policies import (
    BudgetPolicy,
    EnergyThreshold,
    LayerChoices,
    ParameterBudget,
    Probe,
    ProbeBudget,
    RankPolicy,
    RankRatio,
)

LAYOUTS = st.sampled_from(["factors", "pivot"])
both_layouts = pytest.mark.parametrize("layout", ["factors", "pivot"])


def layer(index, m, n, seed, layout="factors"):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(min(m, n), generator=generator, dtype=torch.float64) * 3).sort(descending=True).values
    ranks = tuple(range(1, largest_saving_rank(m, n, layout) + 1))
    return LayerChoices(f"layer{index}", m, n, values, ranks, layout=layout)


def retained(layers, ranks):
    return sum(
        float(one.retained()[len(one.singular_values) if ranks[one.name] is None else ranks[one.name]])
        for one in layers
    )


def spent(layers, ranks):
    return sum(one.parameters(ranks[one.name]) for one in layers)


problems = st.lists(st.tuples(st.integers(2, 8), st.integers(2, 8), st.integers(0, 10**6)), min_size=1, max_size=3)


@settings(max_examples=250, deadline=None)
@given(problems, st.floats(0.2, 1.0), st.lists(LAYOUTS, min_size=3, max_size=3), st.integers(1, 3), st.booleans())
def test_parameter_budget_equals_brute_force(shapes, keep, layouts, multiple, overridden):
    layers = [layer(i, *shape, layout) for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=False))]
    layers = [
        dataclasses.replace(one, ranks=one.ranks[multiple - 1 :: multiple] or one.ranks) for one in layers if one.ranks
    ]
    if not layers:
        return
    if overridden:
        layers[0] = dataclasses.replace(layers[0], ranks=layers[0].ranks[:1], dense=False)
    budget = math.floor(keep * sum(one.out_features * one.in_features for one in layers) + 1e-6)
    allowed = [
        dict(zip([one.name for one in layers], choice, strict=True))
        for choice in itertools.product(*(one.options() for one in layers))
    ]
    allowed = [ranks for ranks in allowed if spent(layers, ranks) <= budget]
    if not allowed:
        with pytest.raises(PlanError, match="targets, their smallest ranks hold"):
            ParameterBudget(keep)(layers)
        return
    ranks = ParameterBudget(keep)(layers)
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
    ranks = ParameterBudget(0.7)([flat, steep])
    assert ranks["steep"] < (ranks["flat"] or 20)


def test_min_rank():
    layers = [
        layer(0, 20, 20, 1),
        LayerChoices("weak", 20, 20, torch.full((20,), 1e-6, dtype=torch.float64), tuple(range(1, 10))),
    ]
    assert ParameterBudget(0.5)(layers)["weak"] == 1
    assert ParameterBudget(0.5, min_rank=3)(layers)["weak"] == 3


@given(st.integers(2, 60), st.integers(2, 60), st.floats(0.01, 0.99), LAYOUTS)
def test_rank_ratio_is_the_formula(m, n, keep, layout):
    one = layer(0, m, n, 0, layout)
    if not one.ranks:
        return
    wanted = keep * m * n / (m + n)
    if layout == "pivot":
        wanted = ((m + n) - math.sqrt((m + n) ** 2 - 4 * keep * m * n)) / 2
    rank = RankRatio(keep)([one])["layer0"]
    assert rank == max(1, min(math.floor(wanted + 1e-9), one.ranks[-1]))
    assert rank == 1 or one.parameters(rank) <= keep * m * n + 1e-6
    assert rank == one.ranks[-1] or one.parameters(rank + 1) > keep * m * n - 1e-6


def test_rank_ratio_respects_admissible_ranks():
    one = LayerChoices("a", 64, 64, torch.ones(64, dtype=torch.float64), (8, 16, 24))
    assert RankRatio(0.6)([one]) == {"a": 16}
    assert RankRatio(0.1)([one]) == {"a": 8}


def measured_layer(index, m, n, seed, layout="factors"):
    """With everything that any policy reads."""
    generator = torch.Generator().manual_seed(seed)
    one = layer(index, m, n, seed, layout)
    return dataclasses.replace(
        one,
        components=torch.randn(min(m, n), generator=generator, dtype=torch.float64),
        probe=Probe(2, float(torch.rand(1, generator=generator))),
        positions=3.0,
        latencies={None: 1e-3, 1: 2e-4, one.ranks[-1]: 8e-4},
    )


def kinds(base=RankPolicy):
    for kind in base.__subclasses__():
        if kind.__module__.startswith("lightning_prehab"):
            if not inspect.isabstract(kind):
                yield kind
            yield from kinds(kind)


POLICIES = [
    *(kind(0.5) for kind in kinds()),
    ParameterBudget(0.5, cost="flops"),
    ParameterBudget(0.5, cost="latency", latency_tokens=64),
    ProbeBudget(0.6, 2, probe_keep=0.8),
    RankRatio(0.6, min_rank=2),
]


@both_layouts
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_conformance(policy, layout):
    kind = type(policy)
    assert eval(repr(policy), vars(rank_policies)) == policy
    assert kind(**yaml.safe_load(yaml.safe_dump(dataclasses.asdict(policy)))) == policy
    share = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, share, 0.1)
    layers = [measured_layer(i, 9, 7, i, layout) for i in range(3)]
    policy.check(layers)
    ranks = policy(layers)
    assert list(ranks) == [one.name for one in layers]
    assert all(ranks[one.name] in one.options(policy.min_rank) for one in layers)
    assert policy(layers) == ranks
    limit = policy.parameter_limit(layers)
    assert limit is None or spent(layers, ranks) <= limit
    assert policy.for_model(189, 1000) == policy
    for wrong in (0, -1, 1.5, float("nan"), True, "0.5", None):
        with pytest.raises(ArgumentError, match=r"must lie in \(0, 1\], got"):
            dataclasses.replace(policy, **{share: wrong})
    for wrong in (0, -3, 1.0, True, None):
        with pytest.raises(ArgumentError, match=f"min_rank must be at least 1, got {wrong}"):
            dataclasses.replace(policy, min_rank=wrong)


@both_layouts
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_overridden_ranks_are_kept(policy, layout):
    one, other, third = (measured_layer(i, 20, 16, i, layout) for i in range(3))
    layers = [
        dataclasses.replace(one, ranks=(5,), dense=False),
        dataclasses.replace(other, ranks=(), dense=True),
        third,
    ]
    policy = dataclasses.replace(policy, **{dataclasses.fields(policy)[0].name: 0.8})
    ranks = policy(layers)
    assert (ranks["layer0"], ranks["layer1"]) == (5, None)


@both_layouts
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("value", [0.0, 1e-170])
def test_a_layer_of_zeros_does_not_disturb(policy, value, layout):
    zeros = dataclasses.replace(
        measured_layer(0, 9, 7, 0, layout), singular_values=torch.full((7,), value).double(), probe=Probe(2, 0.0)
    )
    layers = [zeros, measured_layer(1, 9, 7, 1, layout)]
    ranks = policy(layers)
    assert all(ranks[one.name] in one.options(policy.min_rank) for one in layers)


@both_layouts
@pytest.mark.parametrize("kind", list(kinds(BudgetPolicy)))
def test_whole_model_budget(kind, layout):
    layers = [measured_layer(i, 9, 7, i, layout) for i in range(3)]
    targets, model = 189, 250
    policy = kind(0.7, scope="model")
    with pytest.raises(PlanError, match="must be told the size of the model"):
        policy(layers)
    with pytest.raises(PlanError, match="needs the size of the whole model"):
        policy.for_model(targets, None)
    mine = policy.for_model(targets, model)
    assert type(mine) is kind
    assert mine.parameter_limit(layers) == 175 - 61
    assert spent(layers, mine(layers)) + 61 <= 0.7 * model
    assert kind(1.0, scope="model").for_model(targets, model).keep == 1.0
    with pytest.raises(PlanError, match=r"allows 60 of 250 parameters, .* alone are 61.* Raise keep above 0.244"):
        kind(0.24, scope="model").for_model(targets, model)
    with pytest.raises(ArgumentError, match="scope must be one of 'targets', 'model', got 'all'"):
        kind(0.5, scope="all")


@given(st.integers(1, 10**10), st.integers(0, 10**10), st.floats(0.01, 1.0))
def test_whole_model_budget_is_exact(targets, rest, keep):
    allowed = math.floor(keep * (targets + rest) + 1e-6) - rest
    if allowed <= 0:
        return
    mine = RankRatio(keep, scope="model").for_model(targets, targets + rest)
    assert math.floor(mine.keep * targets + 1e-6) in (allowed, allowed - 1)


@pytest.mark.parametrize("kind", list(kinds(BudgetPolicy)))
def test_impossible_budgets_are_refused_before_anything_is_read(kind):
    bare = [LayerChoices("a", 9, 7, torch.zeros(7, dtype=torch.float64), (1, 2, 3))]
    kind(0.5).check(bare)
    with pytest.raises(PlanError, match="allows 6 parameters for the 1 targets, their smallest ranks hold 16"):
        kind(0.1).check(bare)


def test_what_a_layer_looks_like_is_checked():
    for values in (torch.ones(6), torch.tensor(1.0), torch.ones(7, 1)):
        with pytest.raises(PlanError, match=r"Layer 'fc' \(9x7\): the spectrum must have shape \(7,\)"):
            LayerChoices("fc", 9, 7, values, (1,))
    with pytest.raises(NumericalError, match=r"Layer 'fc' \(9x7\): the spectrum has 7 NaN"):
        LayerChoices("fc", 9, 7, torch.full((7,), torch.nan), (1,))
    with pytest.raises(NumericalError, match="the predicted changes has 7 NaN or Inf"):
        LayerChoices("fc", 9, 7, torch.ones(7), (1,), components=torch.full((7,), torch.inf))


@settings(max_examples=200, deadline=None)
@given(problems, st.floats(0.01, 1.0), st.integers(1, 3), st.integers(1, 4), st.booleans(), LAYOUTS)
def test_energy_threshold_equals_brute_force(shapes, energy, min_rank, multiple, dense, layout):
    layers = [layer(i, *shape, layout) for i, shape in enumerate(shapes)]
    layers = [one for one in layers if len(one.ranks) >= multiple]
    layers = [dataclasses.replace(one, ranks=one.ranks[multiple - 1 :: multiple], dense=dense) for one in layers]
    ranks = EnergyThreshold(energy, min_rank)(layers)
    for one in layers:
        kept = one.retained()
        # the fewest parameters among all options that retain enough, or else what retains most
        enough = [r for r in one.options(min_rank) if kept[-1 if r is None else r] >= energy * kept[-1]]
        expected = enough[0] if enough else one.options(min_rank)[-1]
        assert ranks[one.name] == expected


def test_energy_threshold_by_hand():
    values = torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]).double()
    one = LayerChoices("a", 8, 8, values, (1, 2, 3))
    assert EnergyThreshold(4 / 6)([one]) == {"a": 1}
    assert EnergyThreshold(0.7)([one]) == {"a": 2}
    assert EnergyThreshold(1.0)([one]) == {"a": 3}
    assert EnergyThreshold(1.0)([dataclasses.replace(one, ranks=(2,))]) == {"a": None}
    assert EnergyThreshold(0.1, min_rank=2)([one]) == {"a": 2}
    assert EnergyThreshold(0.7)([dataclasses.replace(one, ranks=(1, 3))]) == {"a": 3}


def test_a_probe_that_says_nothing_counts_as_the_median():
    values = torch.logspace(0, -2, 20, dtype=torch.float64)

    def ranks(silent):
        increases = {"a": 1.0, "b": 2.0, "c": 100.0, "silent": silent}
        layers = [
            LayerChoices(name, 20, 20, values, tuple(range(1, 10)), probe=Probe(8, increase))
            for name, increase in increases.items()
        ]
        return ProbeBudget(0.5)(layers)

    assert ranks(0.0) == ranks(2.0)
    assert ranks(0.0) not in (ranks(1.0), ranks(100.0))
