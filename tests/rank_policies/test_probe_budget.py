import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prehab.errors import ArgumentError, PlanError, StatisticsError
from lightning_prehab.linalg.storage import largest_saving_rank
from lightning_prehab.rank_policies import LayerChoices, ParameterBudget, Probe, ProbeBudget


def layer(index, m, n, seed, increase=1.0, layout="factors"):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(min(m, n), generator=generator, dtype=torch.float64) * 3 + 0.1).sort(descending=True).values
    top = largest_saving_rank(m, n, layout)
    ranks, probe = tuple(range(1, top + 1)), Probe(top, increase)
    return LayerChoices(f"layer{index}", m, n, values, ranks, probe=probe, layout=layout)


def matched(one, other):
    """With the probe that makes it as sensitive, per share of its energy, as the other layer."""

    def tail(x):
        return float(1 - x.retained()[x.probe.rank] / x.retained()[-1])

    return dataclasses.replace(one, probe=Probe(one.probe.rank, other.probe.loss_increase * tail(one) / tail(other)))


def loss(layers, ranks):
    """The predicted loss, straight from the definition of the curve."""
    total = 0.0
    for one in layers:
        if ranks[one.name] is not None:
            squares = [float(s) ** 2 for s in one.singular_values]
            total += one.probe.loss_increase * sum(squares[ranks[one.name] :]) / sum(squares[one.probe.rank :])
    return total


problems = st.lists(
    st.tuples(st.integers(3, 8), st.integers(3, 8), st.integers(0, 10**6), st.floats(1e-6, 10)), min_size=1, max_size=3
)


@settings(max_examples=200, deadline=None)
@given(problems, st.floats(0.2, 1.0), st.sampled_from(["factors", "pivot"]))
def test_equals_brute_force(shapes, keep, layout):
    layers = [layer(i, *shape, layout) for i, shape in enumerate(shapes)]
    budget = math.floor(keep * sum(one.parameters(None) for one in layers) + 1e-6)
    choices = [
        dict(zip([one.name for one in layers], choice, strict=True))
        for choice in itertools.product(*(one.options() for one in layers))
    ]
    allowed = [c for c in choices if sum(one.parameters(c[one.name]) for one in layers) <= budget]
    if not allowed:
        with pytest.raises(PlanError, match="their smallest ranks hold"):
            ProbeBudget(keep)(layers)
        return
    ranks = ProbeBudget(keep)(layers)
    assert sum(one.parameters(ranks[one.name]) for one in layers) <= budget
    scale = loss(layers, {one.name: 1 for one in layers})
    assert loss(layers, ranks) == pytest.approx(min(loss(layers, c) for c in allowed), rel=1e-9, abs=1e-9 * scale)


def test_the_scale_of_a_spectrum_does_not_count_but_the_probe_does():
    layers = [layer(i, 20, 20, i, 0.1) for i in range(3)]
    ranks = ProbeBudget(0.5)(layers)
    scaled = [dataclasses.replace(one, singular_values=one.singular_values * 10.0**i) for i, one in enumerate(layers)]
    assert ProbeBudget(0.5)(scaled) == ranks
    assert ParameterBudget(0.5)(scaled) != ranks
    sensitive = [dataclasses.replace(layers[0], probe=Probe(9, 10.0)), *layers[1:]]
    assert (ProbeBudget(0.5)(sensitive)["layer0"] or 20) > (ranks["layer0"] or 20)


def test_a_probe_that_says_nothing_counts_as_typical():
    one, two = layer(0, 20, 20, 0, 0.3), layer(1, 20, 20, 1, 0.4)
    low = torch.cat([torch.ones(6), torch.zeros(14)]).double()
    flat = LayerChoices("flat", 20, 20, low, tuple(range(1, 10)), probe=Probe(9, 1e-9))
    ranks = ProbeBudget(0.6)([one, two, flat])
    assert ranks["flat"] in (4, 5, 6)  # neither all its energy for nothing, nor none of it
    silent = dataclasses.replace(two, probe=Probe(9, 0.0))
    assert ProbeBudget(0.6)([one, silent]) == ProbeBudget(0.6)([one, matched(silent, one)])
    # nobody knows anything: shares of energy count alike
    mute = [dataclasses.replace(x, probe=Probe(9, 0.0)) for x in (one, two)]
    equal = [dataclasses.replace(x, singular_values=x.singular_values / x.retained()[-1].sqrt()) for x in (one, two)]
    assert ProbeBudget(0.6)(mute) == ParameterBudget(0.6)(equal)


def test_missing_and_senseless_probes():
    one = layer(0, 8, 8, 0)
    with pytest.raises(StatisticsError, match=r"Layer 'layer0' \(8x8\) has no probe"):
        ProbeBudget(0.5)([dataclasses.replace(one, probe=None)])
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(StatisticsError, match=f"the loss increase of the probe is {wrong}"):
            ProbeBudget(0.5)([dataclasses.replace(one, probe=Probe(2, wrong))])
    for wrong in (-1, 9):
        with pytest.raises(StatisticsError, match=f"the probe has rank {wrong}"):
            ProbeBudget(0.5)([dataclasses.replace(one, probe=Probe(wrong, 1.0))])
    for wrong in (0.0, 1.0, math.nan, 1, 2, True, "0.9"):
        with pytest.raises(ArgumentError, match=r"probe_keep must lie in \(0, 1\), got"):
            ProbeBudget(0.5, probe_keep=wrong)
