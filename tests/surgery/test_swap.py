import copy
import itertools
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError, NumericalError, PlanError, UnsupportedError
from lightning_prehab.factorizations import Factorization, Factors
from lightning_prehab.surgery.structure import densify_, follow_state_dict_


def fingerprint(model, optimizer=None):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    groups = [] if optimizer is None else [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    moments = [] if optimizer is None else [copy.deepcopy(v) for v in optimizer.state.values()]
    return str(model), state, groups, moments


def assert_same(before, after):
    assert before[0] == after[0]
    torch.testing.assert_close(before[1], after[1], rtol=0, atol=0)
    assert before[2] == after[2]
    torch.testing.assert_close(before[3], after[3], rtol=0, atol=0)


def train(model, data, optimizer, steps=3):
    x, y = data.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def factors_of(model, plan, statistics):
    """Each layer for itself, without the road."""
    cuts = [layer for layer in plan.layers if layer.rank is not None]
    found = {}
    for cut in cuts:
        weight = model.get_submodule(cut.name).weight.detach()
        a, b, shift, sparse, _ = plan.factorization(weight, cut.rank, statistics[cut.name])
        sparse = None if sparse is None else sparse._replace(values=sparse.values.to(weight))
        found[cut.name] = Factors(a.to(weight), b.to(weight), shift, sparse)
    return found


@pytest.fixture
def planned(mlp, data):
    targets = lp.find_targets(mlp)
    statistics = lp.collect_statistics(mlp, targets, [data.tensors[0]], gradients=True)
    return lp.make_plan(targets, 0.5, statistics=statistics), statistics


def test_a_layer_twice_in_a_plan(mlp, planned):
    plan, statistics = planned
    before = fingerprint(mlp)
    with pytest.raises(PlanError, match="stands twice"):
        lp.apply_plan_(mlp, replace(plan, layers=(*plan.layers, plan.layers[0])), statistics)
    assert_same(before, fingerprint(mlp))


def test_surgery_does_what_the_plan_says(mlp, planned):
    plan, statistics = planned
    factors = factors_of(mlp, plan, statistics)
    report = lp.apply_plan_(mlp, plan, statistics)
    for layer in plan.layers:
        module = mlp.get_submodule(layer.name)
        assert isinstance(module, lp.LowRankLinear) == (layer.rank is not None)
        if layer.rank is not None:
            assert module.rank == layer.rank
            torch.testing.assert_close(module.A.weight.detach(), factors[layer.name].A)
            assert sum(p.numel() for p in (module.A.weight, module.B.weight)) == layer.parameters
    assert report.parameters_after == sum(p.numel() for p in mlp.parameters())
    assert report.parameters_before - report.parameters_after == plan.dense_parameters - plan.parameters
    assert report.keep == plan.keep
    assert report.model_keep == plan.model_keep


def test_report_prints_every_layer_and_is_json(mlp, planned):
    import json

    plan, statistics = planned
    mlp_before = copy.deepcopy(mlp)
    report = lp.apply_plan_(mlp, plan, statistics)
    as_json = json.loads(json.dumps(report.to_dict()))
    assert [layer["name"] for layer in as_json["layers"]] == [layer.name for layer in plan.layers]
    for layer in as_json["layers"]:
        assert layer["name"] in str(report)
        if layer["rank"] is not None:
            dense, low = mlp_before.get_submodule(layer["name"]).weight, mlp.get_submodule(layer["name"]).weight
            assert layer["weight_error"] == pytest.approx(((dense - low).norm() / dense.norm()).item(), rel=1e-5)


def test_optimizer_is_edited_in_place(mlp, data, planned):
    plan, statistics = planned
    decay = [mlp[0].weight, mlp[2].weight, mlp[4].weight]
    optimizer = torch.optim.AdamW(
        [{"params": [mlp[0].bias, mlp[2].bias, mlp[4].bias], "weight_decay": 0.0}, {"params": decay, "lr": 0.01}]
    )
    train(mlp, data, optimizer)
    group, biases = optimizer.param_groups[1], list(optimizer.param_groups[0]["params"])
    old = {name: copy.deepcopy(optimizer.state[mlp.get_submodule(name).weight]) for name in plan.ranks}
    kept = copy.deepcopy([optimizer.state[bias] for bias in biases])
    lp.apply_plan_(mlp, plan, statistics, [optimizer])

    assert optimizer.param_groups[1] is group
    expected = []
    for name, rank in plan.ranks.items():
        module = mlp.get_submodule(name)
        expected += [module.weight] if rank is None else [module.A.weight, module.B.weight]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(bias) for bias in biases]
    torch.testing.assert_close([optimizer.state[bias] for bias in biases], kept, rtol=0, atol=0)
    assert set(map(id, optimizer.state)) == set(map(id, [*expected, *biases]))
    for name, rank in plan.ranks.items():
        if rank is not None:
            module, before = mlp.get_submodule(name), old[name]["exp_avg"]
            a, b = module.A.weight.detach(), module.B.weight.detach()
            torch.testing.assert_close(optimizer.state[module.A.weight]["exp_avg"], b.mT @ before, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(optimizer.state[module.B.weight]["exp_avg"], before @ a.mT, rtol=1e-5, atol=1e-8)
    train(mlp, data, optimizer)


def test_order_equals_a_fresh_optimizer(mlp, planned):
    plan, statistics = planned
    optimizer = torch.optim.Adam(mlp.parameters())
    lp.apply_plan_(mlp, plan, statistics, [optimizer])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in mlp.parameters()]


def test_parameter_names_follow(mlp, planned):
    plan, statistics = planned
    optimizer = torch.optim.Adam(mlp.named_parameters())
    lp.apply_plan_(mlp, plan, statistics, [optimizer])
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in mlp.named_parameters()]


@pytest.mark.parametrize(
    "kind", ["SGD", "Adagrad", "RMSprop", "Adadelta", "Rprop", "ASGD", "Adamax", "NAdam", "RAdam", "Adafactor", "Adam"]
)
def test_every_optimizer_goes_on(mlp, data, planned, kind):
    plan, statistics = planned
    optimizer = getattr(torch.optim, kind)(mlp.parameters(), lr=1e-3)
    train(mlp, data, optimizer)
    lp.apply_plan_(mlp, plan, statistics, [optimizer])
    train(mlp, data, optimizer)
    assert all(torch.isfinite(p).all() for p in mlp.parameters())
    assert kind == "SGD" or len(optimizer.state) == len(list(mlp.parameters()))


def test_shared_module_is_replaced_everywhere():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "inner": nn.Sequential(layer, nn.Linear(8, 8))})
    lp.compress_(model, 0.5, factorization=lp.SVD())
    assert isinstance(model["a"], lp.LowRankLinear)
    assert model["inner"][0] is model["a"]


def test_centered_whitening_moves_or_makes_the_bias(data):
    x = data.tensors[0] + 3
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(12, 10, bias=bias))
        dense = model[0]
        optimizer = torch.optim.Adam(model.named_parameters())
        targets = lp.find_targets(model)
        statistics = lp.collect_statistics(model, targets, [x])
        plan = lp.make_plan(targets, 0.4, lp.WhitenedSVD(centered=True), statistics)
        expected = dense(x).mean(0).detach()
        lp.apply_plan_(model, plan, statistics, [optimizer])
        torch.testing.assert_close(model(x).mean(0).detach(), expected, atol=1e-5, rtol=1e-4)
        assert optimizer.param_groups[0]["param_names"] == ["0.A.weight", "0.B.weight", "0.B.bias"]
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


class TestSparseParts:
    @pytest.fixture
    def cut(self, mlp, data):
        """A trained model, its plan and statistics."""
        targets = lp.find_targets(mlp)
        statistics = lp.collect_statistics(mlp, targets, [data.tensors[0]], gradients=True)
        return mlp, lp.make_plan(targets, 0.6, lp.LowRankPlusSparse(0.1), statistics), statistics

    def test_the_layer_computes_what_the_factors_say(self, cut, data):
        mlp, plan, statistics = cut
        dense = copy.deepcopy(mlp)
        factors = factors_of(mlp, plan, statistics)
        report = lp.apply_plan_(mlp, plan, statistics)
        for layer in plan.layers:
            module, weight = mlp.get_submodule(layer.name), dense.get_submodule(layer.name).weight
            assert type(module) is (nn.Linear if layer.rank is None else lp.LowRankPlusSparseLinear)
            if layer.rank is not None:
                torch.testing.assert_close(module.weight, factors[layer.name].product())
                assert report.weight_errors[layer.name] == pytest.approx(
                    ((weight - module.weight).norm() / weight.norm()).item(), rel=1e-5
                )
        assert report.parameters_after == sum(p.numel() for p in mlp.parameters())
        assert plan.keep <= 0.6

    def test_moments_of_the_values_are_exact_and_the_order_is_that_of_a_fresh_optimizer(self, cut, data):
        mlp, plan, statistics = cut
        optimizer = torch.optim.AdamW(mlp.named_parameters(), amsgrad=True)
        train(mlp, data, optimizer)
        old = {name: copy.deepcopy(optimizer.state[mlp.get_submodule(name).weight]) for name in plan.ranks}
        lp.apply_plan_(mlp, plan, statistics, [optimizer])
        for name, rank in plan.ranks.items():
            if rank is not None:
                module = mlp.get_submodule(name)
                moved = optimizer.state[module.values]
                assert float(moved["step"]) == 3
                for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                    assert torch.equal(moved[key], old[name][key].flatten()[module.indices])
        group = optimizer.param_groups[0]
        assert [id(p) for p in group["params"]] == [id(p) for p in mlp.parameters()]
        assert group["param_names"] == [name for name, _ in mlp.named_parameters()]
        before = {name: value.clone() for name, value in mlp.named_parameters()}
        train(mlp, data, optimizer)
        assert all(not torch.equal(value, before[name]) for name, value in mlp.named_parameters())

    @pytest.mark.parametrize("kind", ["SGD", "Adagrad", "RMSprop", "Adadelta", "Rprop", "ASGD", "Adafactor", "Adamax"])
    def test_every_optimizer_goes_on(self, cut, data, kind):
        mlp, plan, statistics = cut
        optimizer = getattr(torch.optim, kind)(mlp.parameters(), lr=1e-3)
        train(mlp, data, optimizer)
        lp.apply_plan_(mlp, plan, statistics, [optimizer])
        train(mlp, data, optimizer)
        assert all(torch.isfinite(p).all() for p in mlp.parameters())

    def test_muon_is_refused_since_values_are_no_matrix(self, cut):
        class Muon(torch.optim.SGD):
            pass

        mlp, plan, statistics = cut
        optimizer = Muon([layer.weight for layer in mlp if isinstance(layer, nn.Linear)])
        before = fingerprint(mlp, optimizer)
        with pytest.raises(UnsupportedError, match="Muon steps matrices alone"):
            lp.apply_plan_(mlp, plan, statistics, [optimizer])
        assert_same(before, fingerprint(mlp, optimizer))
        lp.apply_plan_(mlp, lp.make_plan(lp.find_targets(mlp), 0.5, lp.SVD()), optimizers=[optimizer])

    def test_structure_follows_state_dicts_in_all_directions(self, cut):
        mlp, plan, statistics = cut
        states = {"dense": (copy.deepcopy(mlp), copy.deepcopy(mlp.state_dict()))}
        for name, method in (
            ("factors", lp.KroneckerSVD()),
            ("sparse", lp.LowRankPlusSparse(0.1)),
            ("sparser", lp.LowRankPlusSparse(0.03)),
        ):
            model = copy.deepcopy(states["dense"][0])
            lp.apply_plan_(
                model,
                replace(
                    plan,
                    factorization=method,
                    layers=tuple(
                        replace(layer, nonzeros=method.nonzeros(layer.out_features, layer.in_features))
                        for layer in plan.layers
                    ),
                ),
                statistics,
            )
            states[name] = model, copy.deepcopy(model.state_dict())
        for source, target in itertools.product(states, states):
            model = copy.deepcopy(states[source][0])
            changed = follow_state_dict_(model, states[target][1])
            assert bool(changed) == (source != target)
            assert str(model) == str(states[target][0])
            model.load_state_dict(states[target][1])
            assert all(
                torch.equal(a, b) for a, b in zip(model.parameters(), states[target][0].parameters(), strict=True)
            )
        model = copy.deepcopy(states["sparse"][0])
        cuts = [name for name, rank in plan.ranks.items() if rank is not None]
        densify_(model, cuts)
        for name in cuts:
            assert type(model.get_submodule(name)) is nn.Linear
            torch.testing.assert_close(model.get_submodule(name).weight, states["sparse"][0].get_submodule(name).weight)

    @pytest.mark.parametrize("damage", ["beyond", "negative", "twice", "float", "shorter"])
    def test_damaged_places_are_named(self, cut, damage):
        mlp, plan, statistics = cut
        lp.apply_plan_(mlp, plan, statistics)
        name = next(name for name, rank in plan.ranks.items() if rank is not None)
        state = mlp.state_dict()
        places = state[f"{name}.indices"].clone()
        if damage == "beyond":
            places[-1] = 10**6
        elif damage == "negative":
            places[0] = -1
        elif damage == "twice":
            places[1] = places[0]
        places = {"float": places.float(), "shorter": places[1:]}.get(damage, places)
        before = str(mlp)
        with pytest.raises(CheckpointError, match=f"Layer '{name}': the checkpoint holds a sparse part .* no place"):
            follow_state_dict_(mlp, {**state, f"{name}.indices": places})
        assert str(mlp) == before

    @pytest.mark.parametrize("how", ["nan", "count", "order"])
    def test_what_a_method_returns_is_checked(self, cut, how):
        mlp, plan, _ = cut

        class Careless(lp.LowRankPlusSparse):
            def decompose(self, items):
                def broken(rank, right):
                    factors = right.factors(rank)
                    places, values = factors.sparse
                    wrong = {
                        "nan": (places, values * float("nan")),
                        "count": (places[1:], values[1:]),
                        "order": (places.flip(0), values),
                    }
                    return factors._replace(sparse=type(factors.sparse)(*wrong[how]))

                return [right._replace(factors=partial(broken, right=right)) for right in super().decompose(items)]

        before = fingerprint(mlp)
        plan = lp.make_plan(lp.find_targets(mlp), 0.6, Careless(0.1, lp.SVD()))
        with pytest.raises(
            NumericalError if how == "nan" else PlanError, match="NaN or Inf" if how == "nan" else "a sparse part of"
        ):
            lp.apply_plan_(mlp, plan)
        assert_same(before, fingerprint(mlp))


@dataclass(frozen=True)
class Broken(Factorization):
    """Works for the first layer and fails at the second."""

    how: str

    def __call__(self, weight, rank, statistics=None):
        factors = lp.SVD()(weight, rank)
        if weight.shape[0] == 16:
            return factors
        if self.how == "nan":
            return Factors(factors.A * float("nan"), factors.B)
        if self.how == "shape":
            return Factors(factors.B, factors.A)
        raise KeyboardInterrupt if self.how == "interrupt" else RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ("nan", NumericalError, "Layer '2' .14x16.*NaN or Inf at rank"),
        ("shape", PlanError, "Layer '2' .14x16.*returned factors of shapes"),
        ("memory", RuntimeError, "out of memory"),
        ("interrupt", KeyboardInterrupt, None),
    ],
)
def test_whatever_fails_leaves_everything_as_it_was(mlp, data, how, error, match):
    optimizer = torch.optim.Adam(mlp.parameters())
    train(mlp, data, optimizer)
    plan = lp.make_plan(lp.find_targets(mlp), lp.RankRatio(0.5), Broken(how))
    before = fingerprint(mlp, optimizer)
    with pytest.raises(error, match=match):
        lp.apply_plan_(mlp, plan, optimizers=[optimizer])
    assert_same(before, fingerprint(mlp, optimizer))
    train(mlp, data, optimizer)


def test_lbfgs_is_refused_and_nothing_changes(mlp, planned):
    plan, statistics = planned
    adam, lbfgs = torch.optim.Adam(mlp.parameters()), torch.optim.LBFGS(mlp.parameters())
    before = fingerprint(mlp, adam)
    with pytest.raises(UnsupportedError, match="LBFGS"):
        lp.apply_plan_(mlp, plan, statistics, [adam, lbfgs])
    assert_same(before, fingerprint(mlp, adam))


def test_a_plan_for_another_model_is_refused(mlp, planned):
    plan, statistics = planned
    with pytest.raises(PlanError, match="Layer '0': the plan expects a 16x12 weight, the model has a Linear"):
        lp.apply_plan_(nn.Sequential(nn.Linear(3, 3)), plan, statistics)
    lp.apply_plan_(mlp, plan, statistics)
    with pytest.raises(PlanError, match="the model has a LowRankLinear"):
        lp.apply_plan_(mlp, plan, statistics)


def test_the_global_random_state_is_untouched(mlp, planned):
    plan, statistics = planned
    state = torch.get_rng_state()
    lp.apply_plan_(mlp, plan, statistics)
    assert torch.equal(torch.get_rng_state(), state)
