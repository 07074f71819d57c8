import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, NumericalError, PlanError, StatisticsError, TargetError
from lightning_prehab.linalg.matrices import break_even_rank
from lightning_prehab.plan.spectra import spectrum
from lightning_prehab.rank_policies import RankPolicy


@pytest.fixture
def prepared(mlp, data):
    targets = lp.find_targets(mlp)
    return targets, lp.collect_statistics(mlp, targets, [data.tensors[0]], gradients=True)


def test_a_plan_changes_nothing_and_prints(mlp, prepared):
    targets, statistics = prepared
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    plan = lp.make_plan(targets, 0.5, statistics=statistics)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    text = str(plan)
    for layer in plan.layers:
        assert layer.name in text
        assert f"{layer.out_features}x{layer.in_features}" in text
    assert f"keep {plan.keep:.3f}" in text
    assert f"keep {plan.model_keep:.3f}" in text
    assert plan.keep <= 0.5


def test_default_policy_follows_the_factorization(prepared):
    targets, statistics = prepared
    for factorization, policy in (
        (lp.KroneckerSVD(), lp.ParameterBudget(0.4)),
        (lp.WhitenedSVD(), lp.RankRatio(0.4)),
        (lp.SVD(), lp.RankRatio(0.4)),
    ):
        assert (
            lp.make_plan(targets, 0.4, factorization, statistics).ranks
            == lp.make_plan(targets, policy, factorization, statistics).ranks
        )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=5),
    st.floats(0.3, 1.0),
    st.sampled_from([lp.RankRatio, lp.ParameterBudget]),
    st.sampled_from([1, 4]),
)
def test_never_more_than_asked_and_never_above_break_even(shapes, keep, policy, multiple):
    model = nn.ModuleList(nn.Linear(n, m) for m, n in shapes)
    try:
        plan = lp.make_plan(lp.find_targets(model), policy(keep), lp.SVD(), rank_multiple_of=multiple)
    except (PlanError, TargetError):
        return  # too small to be cut, or to be cut so far
    assert plan.keep <= keep + 1e-12
    for layer in plan.layers:
        limit = break_even_rank(layer.out_features, layer.in_features)
        assert layer.rank is None or 1 <= layer.rank <= limit
        assert layer.rank is None or layer.rank % multiple == 0 or limit < multiple
        assert layer.parameters <= layer.dense_parameters
        assert (layer.reason or "not a multiple").startswith("not a multiple") == (layer.rank is not None)


def test_predicted_error_is_the_error_in_the_metric(mlp, prepared):
    targets, statistics = prepared
    plan = lp.make_plan(targets, 0.4, lp.WhitenedSVD(), statistics)
    for layer in plan.layers:
        weight = mlp.get_submodule(layer.name).weight.detach().double()
        a, b, *_ = lp.WhitenedSVD()(weight, layer.rank, statistics[layer.name])
        moment = statistics[layer.name].input_second_moment().double()
        error, whole = weight - b @ a, weight
        expected = ((error @ moment * error).sum() / (whole @ moment * whole).sum()).sqrt()
        assert layer.relative_error == pytest.approx(expected.item(), rel=1e-5)


def test_overrides(prepared):
    targets, statistics = prepared
    plan = lp.make_plan(targets, 0.7, statistics=statistics, rank_overrides={"*": 2, "2": "dense", "4": 0.5})
    assert plan.ranks == {"0": 2, "2": None, "4": int(0.5 * 84 / 20)}
    assert "rank_overrides" in str(plan)
    for wrong in (0, 99, 1.5, "sparse", True):
        with pytest.raises(ArgumentError, match="does not suit layer '0' .16x12.; give a rank from 1 to 6"):
            lp.make_plan(targets, 0.5, lp.SVD(), rank_overrides={"0": wrong})
    with pytest.raises(TargetError, match="rank_overrides: 'zzz' matches no layer"):
        lp.make_plan(targets, 0.5, lp.SVD(), rank_overrides={"zzz": 3})
    with pytest.raises(PlanError, match="allows 250 parameters.*hold 500.*Raise keep"):
        lp.make_plan(targets, lp.RankRatio(0.5), lp.SVD(), rank_overrides={"*": "dense"})


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=4),
    st.floats(0.3, 1.0),
    st.floats(0.01, 0.6),
    st.sampled_from([lp.RankRatio, lp.ParameterBudget]),
    st.booleans(),
)
def test_entries_are_counted_exactly(shapes, keep, density, policy, centered):
    model = nn.ModuleList([nn.Linear(30, 20, bias=False), *(nn.Linear(n, m, bias=False) for m, n in shapes)])
    targets = lp.find_targets(model)
    statistics = {}
    for name, layer in targets.items():
        statistics[name] = lp.LayerStatistics(layer.in_features, layer.out_features)
        statistics[name].update_inputs(torch.randn(50, layer.in_features) + 1)
    method = lp.LowRankPlusSparse(density, lp.WhitenedSVD(centered), steps=1)
    try:
        plan = lp.make_plan(targets, policy(keep), method, statistics)
    except PlanError:
        return  # too small to be cut so far
    assert plan.keep <= keep + 1e-12
    before = sum(p.numel() for p in model.parameters())
    report = lp.apply_plan_(model, plan, statistics)
    assert report.parameters_after - before == plan.parameters - plan.dense_parameters
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        assert layer.parameters == sum(p.numel() for p in module.parameters()) <= layer.dense_parameters
        assert layer.nonzeros == method.nonzeros(layer.out_features, layer.in_features)
        assert layer.new_bias == centered * layer.out_features
        if layer.rank is not None:
            assert layer.rank <= layer.max_rank
            assert getattr(module, "nonzeros", 0) == layer.nonzeros
    assert lp.CompressionPlan.from_dict(plan.to_dict()) == plan


def test_overrides_leave_room_for_the_entries(prepared):
    targets, _ = prepared
    method = lp.LowRankPlusSparse(0.25, lp.SVD())
    plan = lp.make_plan(targets, 0.8, method, rank_overrides={"0": 0.5})
    assert plan.ranks["0"] == int((0.5 * 192 - 48) / 28)
    with pytest.raises(ArgumentError, match="give a rank from 1 to 5 .above, nothing is saved"):
        lp.make_plan(targets, 0.8, method, rank_overrides={"0": 6})
    assert lp.make_plan(targets, 1.0, method, rank_overrides={"0": 5}).layers[0].parameters == 5 * 28 + 48


def test_nothing_is_left_beside_the_entries(prepared):
    plan = lp.make_plan(prepared[0], 1.0, lp.LowRankPlusSparse(0.95, lp.SVD()))
    assert set(plan.ranks.values()) == {None}
    with pytest.raises(PlanError, match="their smallest ranks hold"):
        lp.make_plan(prepared[0], 0.3, lp.LowRankPlusSparse(0.4, lp.SVD()))


@pytest.mark.parametrize("cost", ["flops", "latency"])
def test_entries_save_no_time(prepared, cost):
    policy = lp.ParameterBudget(0.5, cost=cost)
    with pytest.raises(ArgumentError, match="counts operations or time, and the sparse part of .* saves neither"):
        lp.make_plan(prepared[0], policy, lp.LowRankPlusSparse(0.1, lp.SVD()), prepared[1])


def test_rank_multiple(prepared):
    targets, statistics = prepared
    plan = lp.make_plan(targets, 0.7, statistics=statistics, rank_multiple_of=2)
    assert all(rank is None or rank % 2 == 0 for rank in plan.ranks.values())
    with pytest.raises(ArgumentError, match="rank_multiple_of must be at least 1, got 0"):
        lp.make_plan(targets, 0.7, lp.SVD(), rank_multiple_of=0)


@pytest.mark.parametrize("keep", [0.0, -0.2, 1.01, float("nan"), True])
def test_keep_out_of_range(prepared, keep):
    with pytest.raises(ArgumentError, match=r"must lie in \(0, 1\], got"):
        lp.make_plan(prepared[0], keep, lp.SVD())


@pytest.mark.parametrize("policy", [lp.RankRatio, lp.ParameterBudget])
def test_impossible_keep(prepared, policy):
    with pytest.raises(PlanError):
        lp.make_plan(prepared[0], policy(0.001), lp.SVD())


def test_keep_one_leaves_everything_dense(prepared):
    targets, statistics = prepared
    for policy in (lp.RankRatio(1.0), lp.ParameterBudget(1.0)):
        plan = lp.make_plan(targets, policy, statistics=statistics)
        assert plan.keep == 1.0
        assert set(plan.ranks.values()) == {None}


def test_missing_statistics(mlp, prepared):
    targets, statistics = prepared
    with pytest.raises(PlanError, match="needs calibration statistics; pass batches, or choose SVD"):
        lp.make_plan(targets, 0.5)
    partial = {name: layer for name, layer in statistics.items() if name != "2"}
    plan = lp.make_plan(targets, 0.5, statistics=partial)
    assert plan.skipped["2"] == "no statistics were collected for it"
    assert "2" not in plan.ranks
    empty = {
        name: lp.LayerStatistics(layer.in_features, layer.out_features, gradients=True)
        for name, layer in targets.items()
    }
    with pytest.raises(PlanError, match="No target can be cut: 0: no input with a gradient reached it"):
        lp.make_plan(targets, 0.5, statistics=empty)
    wrong = {**statistics, "0": statistics["2"]}
    with pytest.raises(StatisticsError, match="Layer '0' .16x12.*does not belong"):
        lp.make_plan(targets, 0.5, statistics=wrong)


def test_not_finite_names_the_layer(mlp, prepared):
    targets, statistics = prepared
    statistics["2"].input_gram[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="Layer '2' .14x16.*NaN or Inf"):
        lp.make_plan(targets, 0.5, statistics=statistics)
    with torch.no_grad():
        mlp[4].weight[0, 0] = float("inf")
    with pytest.raises(NumericalError, match="Layer '4' .6x14.: The weight has 1 NaN or Inf"):
        lp.make_plan(targets, 0.5, lp.SVD())


def test_plans_are_values(prepared):
    targets, statistics = prepared
    assert lp.make_plan(targets, 0.5, statistics=statistics) == lp.make_plan(targets, 0.5, statistics=statistics)
    with pytest.raises(dataclasses.FrozenInstanceError):
        lp.make_plan(targets, 0.5, lp.SVD()).layers = ()


def quadratic():
    """A linear model whose curvature is exactly G (x) C: targets with unit noise, squared error."""
    torch.manual_seed(5)
    x = torch.randn(20000, 6) @ torch.randn(6, 6)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    batch = x, model(x).detach() + torch.randn(20000, 5)

    def loss(module, data):
        return 0.5 * (module(data[0]) - data[1]).square().sum(-1).mean()

    return model, batch, loss


def test_the_predicted_loss_increase_is_the_measured_one():
    model, batch, loss = quadratic()
    targets = lp.find_targets(model)
    statistics = lp.collect_statistics(model, targets, [batch], forward=loss, gradients=True)
    plan = lp.make_plan(targets, 0.5, statistics=statistics)
    before = loss(model, batch).item()
    lp.apply_plan_(model, plan, statistics)
    assert loss(model, batch).item() - before == pytest.approx(plan.loss_increase, rel=0.1)


def test_the_first_order_effect_of_a_component_has_the_right_sign():
    """Against finite differences, at a weight that is not the optimum."""
    model, batch, loss = quadratic()
    with torch.no_grad():
        model[0].weight += 0.1 * torch.randn(5, 6)
    targets = lp.find_targets(model)
    statistics = lp.collect_statistics(model, targets, [batch], forward=loss, gradients=True)
    decomposition = lp.WhitenedSVD().decompose([(model[0].weight.detach(), statistics["0"])])[0]
    found = spectrum("0", targets["0"], decomposition, statistics, components=True).components
    a, b, *_ = decomposition.factors(5)
    weight, before = model[0].weight.detach().clone(), loss(model, batch).item()
    for i in range(5):
        with torch.no_grad():
            model[0].weight.copy_(weight - 1e-3 * torch.outer(b[:, i], a[i]).float())
        assert 1e3 * (loss(model, batch).item() - before) == pytest.approx(float(found[i]), rel=0.2, abs=0.02)


def test_nothing_to_cut():
    with pytest.raises(PlanError, match="No target can be cut"):
        lp.make_plan({}, 0.5, lp.SVD())


@dataclasses.dataclass(frozen=True)
class Answers(RankPolicy):
    """Says the same whatever it is asked."""

    answer: object

    def __call__(self, layers):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, r"must answer with a rank for each of \['0', '2', '4'\], got \[\]"),
        ({"0": 2, "2": 2}, "for each of"),
        ({"0": 2, "2": 2, "4": 2, "5": 2}, r"got \['0', '2', '4', '5'\]"),
        (None, "got None"),
        ([2, 2, 2], r"got \[2, 2, 2\]"),
        (
            {"0": 7, "2": 2, "4": 2},
            r"Layer '0' \(16x12\): Answers.* must answer with one of \[1, 2, .*\], or None for dense, got 7",
        ),
        ({"0": 10**6, "2": 2, "4": 2}, "got 1000000"),
        ({"0": 0, "2": 2, "4": 2}, "got 0"),
        ({"0": 2, "2": 3.0, "4": 2}, r"Layer '2' .* got 3.0"),
        ({"0": 2, "2": 2, "4": torch.tensor(2)}, r"Layer '4' .* got tensor\(2\)"),
        ({"0": True, "2": 2, "4": 2}, "got True"),
    ],
)
def test_what_a_policy_answers_is_checked(mlp, answer, message):
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    for door in (
        lambda policy: lp.make_plan(lp.find_targets(mlp), policy, lp.SVD()),
        lambda policy: lp.compress_(mlp, policy=policy, factorization=lp.SVD()),
    ):
        with pytest.raises(PlanError, match=message):
            door(Answers(answer))
    assert mlp.state_dict().keys() == before.keys()


def test_a_policy_cannot_overrule_what_was_said_by_hand(mlp):
    targets = lp.find_targets(mlp)
    with pytest.raises(PlanError, match=r"Layer '0' .* must answer with one of \[3\], got None"):
        lp.make_plan(targets, Answers({"0": None, "2": 2, "4": 2}), lp.SVD(), rank_overrides={"0": 3})
    with pytest.raises(PlanError, match=r"Layer '0' .* must answer with None, for dense, got 2"):
        lp.make_plan(targets, Answers({"0": 2, "2": 2, "4": 2}), lp.SVD(), rank_overrides={"0": "dense"})
