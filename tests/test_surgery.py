import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import NumericalError, PlanError, UnsupportedError
from lightning_prehab.factorizations import Factorization, Factors
from lightning_prehab.surgery import compute_factors


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


@pytest.fixture
def planned(mlp, data):
    targets = lp.find_targets(mlp)
    statistics = lp.collect_statistics(mlp, targets, [data.tensors[0]], gradients=True)
    return lp.make_plan(targets, 0.5, statistics=statistics), statistics


def test_surgery_does_what_the_plan_says(mlp, planned):
    plan, statistics = planned
    factors = compute_factors(mlp, plan, statistics)
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
    with pytest.raises(PlanError, match="Layer '0': the plan expects a 16x12 nn.Linear, the model has Linear"):
        lp.apply_plan_(nn.Sequential(nn.Linear(3, 3)), plan, statistics)
    lp.apply_plan_(mlp, plan, statistics)
    with pytest.raises(PlanError, match="the model has LowRankLinear"):
        lp.apply_plan_(mlp, plan, statistics)


def test_the_global_random_state_is_untouched(mlp, planned):
    plan, statistics = planned
    state = torch.get_rng_state()
    lp.apply_plan_(mlp, plan, statistics)
    assert torch.equal(torch.get_rng_state(), state)
