"""Plans for the pivot layout: what a rank costs there, in every place that counts it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.linalg.matrices import break_even_rank
from lightning_prehab.linalg.storage import largest_saving_rank, rank_within, stored_parameters
from lightning_prehab.plan.probes import measure_probes, probe_rank
from lightning_prehab.plan.timing import measure_latencies
from lightning_prehab.targets.layouts import AS_FACTORS, why_factors


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(-2, 1000), st.sampled_from(["factors", "pivot"]))
def test_the_rank_within_a_number_of_parameters_is_the_last_that_fits(m, n, parameters, layout):
    fitting = [r for r in range(min(m, n) + 1) if stored_parameters(m, n, r, layout) <= max(parameters, 0) + 1e-6]
    assert rank_within(parameters, m, n, layout) == fitting[-1]
    saving = [r for r in range(min(m, n) + 1) if stored_parameters(m, n, r, layout) < m * n]
    assert largest_saving_rank(m, n, layout) == saving[-1]
    assert largest_saving_rank(m, n) == break_even_rank(m, n)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 6))


@pytest.fixture
def prepared():
    model, batches = net(), [torch.randn(64, 12) for _ in range(2)]
    targets = lp.find_targets(model)
    return model, targets, lp.collect_statistics(model, targets, batches, gradients=True), batches


POLICIES = [
    lp.ParameterBudget(0.5),
    lp.ParameterBudget(0.6, scope="model"),
    lp.ParameterBudget(0.5, cost="flops"),
    lp.RankRatio(0.5),
    lp.EnergyThreshold(0.9),
    lp.ZeroSum(0.5),
    lp.ProbeBudget(0.5),
]


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_report_counts_what_is_stored(policy, multiple):
    model, batches = net(), [torch.randn(64, 12) for _ in range(2)]
    before = sum(p.numel() for p in model.parameters())
    report = lp.compress_(model, 0.5, batches, policy=policy, layout="pivot", rank_multiple_of=multiple)
    assert report.parameters_before == before
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert before - report.parameters_after == report.plan.dense_parameters - report.plan.parameters
    assert any(layer.rank is not None for layer in report.plan.layers)
    for layer in report.plan.layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, PivotLayer) == (layer.rank is not None)
        assert layer.parameters == sum(p.numel() for p in module.parameters() if p.dim() > 1)
        if layer.rank is not None:
            assert 1 <= layer.rank < min(layer.out_features, layer.in_features)
            assert layer.parameters == layer.rank * (layer.out_features + layer.in_features - layer.rank)
            assert layer.rank % multiple == 0
    assert "in the pivot layout" in str(report)
    assert lp.CompressionReport.from_dict(report.to_dict(), report.plan.factorization).to_dict() == report.to_dict()


def test_a_higher_rank_for_the_same_budget(prepared):
    _, targets, statistics, _ = prepared
    two, one = (lp.make_plan(targets, 0.5, statistics=statistics, layout=layout) for layout in ("factors", "pivot"))
    assert one.keep <= 0.5
    assert one.loss_increase < two.loss_increase
    ratio = lp.make_plan(targets, lp.RankRatio(0.5), statistics=statistics, layout="pivot")
    for layer in ratio.layers:
        m, n = layer.out_features, layer.in_features
        assert layer.rank == math.floor(((m + n) - math.sqrt((m + n) ** 2 - 2 * m * n)) / 2)


def test_a_new_bias_is_counted(prepared):
    model, targets, statistics, _ = prepared
    method = lp.WhitenedSVD(centered=True)
    plan = lp.make_plan(targets, 0.5, method, statistics, layout="pivot")
    first = plan.layers[0]
    assert first.new_bias == 16
    assert first.parameters == first.rank * (16 + 12 - first.rank) + 16
    assert first.max_rank == rank_within(16 * 12 - 16 - 1, 16, 12, "pivot") < 11
    report = lp.apply_plan_(model, plan, statistics)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


def test_overrides(prepared):
    _, targets, statistics, _ = prepared
    wishes = {"0": 0.5, "2": 15, "4": "dense"}
    plan = lp.make_plan(targets, 1.0, statistics=statistics, rank_overrides=wishes, layout="pivot")
    assert plan.ranks == {"0": rank_within(96, 16, 12, "pivot"), "2": 15, "4": None}
    assert plan.layers[0].parameters <= 96
    for wrong in (0, 12, 1.5):
        with pytest.raises(
            ArgumentError, match="does not suit layer '0' .16x12.; give a rank from 1 to 11 .above, noth"
        ):
            lp.make_plan(targets, 0.5, lp.SVD(), rank_overrides={"0": wrong}, layout="pivot")


def test_files_and_edits_by_hand(prepared, tmp_path):
    model, targets, statistics, _ = prepared
    plan = lp.make_plan(targets, 0.5, statistics=statistics, layout="pivot")
    plan.to_yaml(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert text.count("layout: pivot") == 3
    assert "# at most 11" in text
    assert lp.CompressionPlan.from_yaml(tmp_path / "plan.yaml") == plan
    edited = plan.with_ranks({"2": 15})
    assert edited.layers[1].parameters == 15 * 17
    with pytest.raises(
        PlanError, match="the rank 16 cannot be used; give a rank from 1 to 15 .above, nothing is saved"
    ):
        plan.with_ranks({"2": 16})
    report = lp.apply_plan_(copy.deepcopy(model), edited, statistics)
    assert report.ranks["2"] == 15
    small = plan.with_ranks({"*": 2}).to_yaml().replace("layout: pivot", "layout: factors")  # a person may take it back
    assert [layer.parameters for layer in lp.CompressionPlan.from_yaml(small).layers] == [2 * 28, 2 * 32, 2 * 22]
    with pytest.raises(PlanError, match="layout must be one of 'factors', 'pivot', got 'rows'"):
        lp.CompressionPlan.from_yaml(text.replace("layout: pivot", "layout: rows", 1))
    with pytest.raises(PlanError, match="a grouped convolution goes with two factors alone"):
        lp.CompressionPlan.from_yaml(text.replace("layout: pivot", "groups: 2\n  layout: pivot", 1))


def test_a_sparse_part_is_refused(prepared):
    _, targets, _, _ = prepared
    with pytest.raises(ArgumentError, match="keeps a sparse part beside two factors; the pivot layout has no place"):
        lp.make_plan(targets, 0.5, lp.LowRankPlusSparse(0.1, lp.SVD()), layout="pivot")


def test_what_has_no_pivot_layout_keeps_factors_and_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.Flatten(), nn.Linear(32, 16)
    )
    report = lp.compress_(model, 0.5, layout="pivot", factorization=lp.SVD(), rank_overrides={"2": 5})
    layers = {layer.name: layer for layer in report.plan.layers}
    assert layers["2"].layout == "factors"
    assert layers["2"].reason == f"{AS_FACTORS}: a grouped convolution has no pivot layout"
    assert layers["2"].parameters == 5 * (32 + 2 * 144)
    assert layers["4"].layout == "pivot"
    assert layers["4"].reason is None
    assert "stored as two factors: a grouped convolution has no pivot layout: 2" in str(report)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert layers["2"].with_rank(4).reason == layers["2"].reason
    assert layers["2"].with_rank("dense").reason == "chosen by hand"
    assert why_factors(model[0], "factors") is None


def test_layers_at_once_keep_every_rank(prepared):
    """Of each decomposition what ranks above break-even need is kept."""
    model, _, _, batches = prepared
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"batches": batches, "policy": lp.EnergyThreshold(0.995), "layout": "pivot"}
    one = lp.compress_(whole, **settings, factorization=lp.WhitenedSVD())
    two = lp.compress_(parts, **settings, factorization=lp.WhitenedSVD(), layers_at_once=1)
    assert any(
        layer.rank and layer.rank > break_even_rank(layer.out_features, layer.in_features) for layer in one.plan.layers
    )
    assert one.ranks == two.ranks
    x = batches[0]
    torch.testing.assert_close(whole(x), parts(x), rtol=1e-4, atol=1e-5)


def test_probes_and_latencies_are_of_the_layout(prepared):
    model, targets, _, batches = prepared
    solved = {name: lp.SVD().decompose([(layer.weight, None)])[0] for name, layer in targets.items()}
    probes = measure_probes(model, targets, lambda name, r: solved[name].factors(r), batches, 0.8, layout="pivot")
    assert {name: probe.rank for name, probe in probes.items()} == {
        name: probe_rank(*layer.weight.shape, 0.8, layout="pivot") for name, layer in targets.items()
    }
    assert probe_rank(16, 16, 0.8, layout="pivot") == rank_within(0.8 * 256, 16, 16, "pivot") == 8
    assert probe_rank(16, 16, 0.8) == 6
    latencies = measure_latencies(targets, 4, layouts=dict.fromkeys(targets, "pivot"))
    assert max(rank for rank in latencies["2"] if rank) == 15
    assert all(seconds > 0 for curve in latencies.values() for seconds in curve.values())


def test_recipes(tmp_path):
    recipe = lp.Recipe(0.5, layout="pivot")
    assert "layout: pivot" in recipe.to_yaml()
    assert lp.Recipe.from_yaml(recipe.to_yaml()) == recipe
    one, two = net(), net()
    by_recipe, flat = lp.compress_(one, recipe), lp.compress_(two, 0.5, layout="pivot")
    assert by_recipe.ranks == flat.ranks
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
