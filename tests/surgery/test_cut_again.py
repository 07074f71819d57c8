"""Layers that have been cut before are cut again out of their factors: the same as a cut of the product."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_prehab as lp
from lightning_prehab.errors import PlanError, TargetError
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.linalg.products import Product, decompose_product
from lightning_prehab.road import plan_budgets
from lightning_prehab.sites import ProcessSite
from lightning_prehab.targets.find import count_dense_parameters


class _Attention(nn.Module):
    def __init__(self, batch_first: bool, kdim: int | None = None) -> None:
        super().__init__()
        self.inputs = nn.Linear(12, 24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=batch_first, kdim=kdim, vdim=kdim)
        self.keys = nn.Linear(12, kdim or 24)

    def forward(self, x):
        query, key = self.inputs(x), self.keys(x)
        return self.attention(query, key, key, need_weights=False)[0]


class _Fused(nn.Module):
    def __init__(self, linear=nn.Linear) -> None:
        super().__init__()
        self.qkv = linear(24, 60)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return q * torch.sigmoid(k) + v


def _conv1d(columns, rows):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(rows, columns)


def _images(*layers):
    return nn.Sequential(*layers, nn.Flatten())


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 9)), 24),
    "without bias": (
        lambda: nn.Sequential(nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 24, bias=False)),
        24,
    ),
    "fused": (_Fused, 24),
    "transposed": (lambda: _Fused(_conv1d), 24),
    "attention": (lambda: _Attention(batch_first=True), (5, 12)),
    "attention, positions first": (lambda: _Attention(batch_first=False, kdim=20), (5, 12)),
    "signals": (lambda: _images(nn.Conv1d(6, 16, 3, padding=1), nn.Tanh(), nn.Conv1d(16, 12, 3)), (6, 9)),
    "images": (lambda: _images(nn.Conv2d(6, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 12, 3, stride=2)), (6, 7, 7)),
    "groups": (lambda: _images(nn.Conv2d(8, 16, 3, groups=2), nn.Tanh(), nn.Conv2d(16, 12, 3)), (8, 6, 6)),
}
METHODS = {
    "kronecker": lp.KroneckerSVD(),
    "whitened": lp.WhitenedSVD(),
    "centered": lp.WhitenedSVD(centered=True),
    "svd": lp.SVD(),
    "fisher": lp.FisherSVD(),
    "activation": lp.ActivationSVD(),
}


def _made(name):
    torch.manual_seed(3)
    build, shape = MODELS[name]
    generator = torch.Generator().manual_seed(4)
    sizes = shape if isinstance(shape, tuple) else (shape,)
    batches = [torch.randn(16, *sizes, generator=generator) for _ in range(4)]
    return build(), batches


def _loss(model, batch):
    return model(batch).square().mean()


def _cut(model, keep, batches, **settings):
    return lp.compress_(model, keep, batches, _loss, progress=False, **settings)


@pytest.mark.filterwarnings("ignore:.*fewer tokens.*")
@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("name", MODELS)
def test_the_second_cut_is_that_of_the_product(name, layout):
    model, batches = _made(name)
    wishes = {"split_fused": True, "layout": layout}
    first = _cut(model, 0.7, batches, **wishes)
    product = copy.deepcopy(model)
    lp.to_dense_(product)
    second = _cut(model, 0.35, batches, **wishes)
    assert second.keep <= 0.35
    assert second.plan.dense_parameters == first.plan.dense_parameters
    assert second.parameters_before == first.parameters_before == count_dense_parameters(model)
    for layer, before in zip(second.plan.layers, first.plan.layers, strict=True):
        assert (layer.name, layer.was) == (before.name, before.rank)
        assert layer.parameters <= before.parameters
        assert before.rank is None or layer.form == before.form
    assert any(before.rank is not None for before in first.plan.layers)
    targets = lp.find_targets(product, split_fused=True)
    statistics = lp.collect_statistics(product, targets, batches, forward=_loss, wanted=lp.KroneckerSVD().wanted)
    lp.apply_plan_(product, _as_first_cut(second.plan), statistics)
    for batch in batches:
        assert_close(model(batch), product(batch), atol=2e-4, rtol=2e-3)


def _as_first_cut(plan):
    return replace(plan, layers=tuple(replace(layer, was=None) for layer in plan.layers))


@pytest.mark.filterwarnings("ignore:.*fewer tokens.*")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_cuts_again(method):
    model, batches = _made("linear")
    with torch.no_grad():
        model(batches[0])
    _cut(model, 0.7, batches, factorization=METHODS[method])
    product = copy.deepcopy(model)
    lp.to_dense_(product)
    report = _cut(model, 0.35, batches, factorization=METHODS[method])
    again = _cut(product, 0.99, batches, factorization=METHODS[method], rank_overrides=_overrides(report))
    assert again.ranks == report.ranks
    assert_close(model(batches[0]), product(batches[0]), atol=1e-4, rtol=1e-3)
    for name, error in report.weight_errors.items():
        assert error == pytest.approx(again.weight_errors[name], rel=1e-3, abs=1e-5)


def _overrides(report):
    return {name: "dense" if rank is None else rank for name, rank in report.ranks.items()}


def test_the_closed_form_is_the_svd_of_the_product_in_the_metric():
    generator = np.random.default_rng(1)
    m, n, r, k = 17, 12, 7, 3
    b, a = generator.normal(size=(m, r)) * np.logspace(0, -3, r), generator.normal(size=(r, n))
    left, right = (np.tril(generator.normal(size=(size, size))) + 3 * np.eye(size) for size in (m, n))
    seen = left.T @ b @ a @ right
    u, s, v = np.linalg.svd(seen)
    best = np.linalg.inv(left).T @ (u[:, :k] * s[:k]) @ v[:k] @ np.linalg.inv(right)
    found = decompose_product(
        Product(torch.tensor(b), torch.tensor(a)), torch.tensor(left @ left.T), torch.tensor(right @ right.T)
    )
    ours_a, ours_b = found.low_rank(k)
    assert_close((ours_b @ ours_a).numpy(), best, atol=1e-9, rtol=1e-7)
    assert_close(found.singular_values[:r].numpy(), s[:r], atol=1e-8 * s[0], rtol=1e-6)
    assert found.singular_values.shape == (12,)
    assert float(found.singular_values[r:].abs().max()) == 0.0
    assert_close(ours_a.norm(dim=1), ours_b.norm(dim=0))  # balanced
    wide_a, wide_b = found.low_rank(n)
    assert wide_a.shape == (n, n)
    assert_close((wide_b @ wide_a).numpy(), b @ a)


def test_nothing_is_multiplied_out(monkeypatch):
    model, batches = _made("linear")
    _cut(model, 0.7, batches)

    def refuse(self):
        raise AssertionError("the product was multiplied out")

    monkeypatch.setattr(Product, "dense", refuse)
    for kind in (lp.LowRankLinear, lp.PivotLinear):
        monkeypatch.setattr(kind, "_product", refuse)
    targets = lp.find_targets(model, cut_again=True)
    statistics = lp.collect_statistics(model, targets, batches, forward=_loss, wanted=lp.KroneckerSVD().wanted)
    report = lp.apply_plan_(model, lp.make_plan(targets, 0.35, statistics=statistics), statistics)
    assert report.keep <= 0.35


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop", "Adagrad", "NAdam"])
@pytest.mark.parametrize("layouts", [("factors", "factors"), ("factors", "pivot"), ("pivot", "pivot")], ids="-".join)
@pytest.mark.parametrize("name", ["linear", "images", "groups", "fused"])
def test_first_moments_are_those_of_the_new_factors(name, layouts, optimizer):
    """A first moment is linear in gradients: after steps on one batch at rate 0 it is a multiple of the gradient."""
    model, batches = _made(name)
    model, batches = model.double(), [batch.double() for batch in batches]
    _cut(model, 0.7, batches, layout=layouts[0], split_fused=True)
    settings = {"momentum": 0.9} if optimizer in ("SGD", "RMSprop") else {}
    if optimizer == "RMSprop":
        settings["centered"] = True
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.0, **settings)
    order = [id(parameter) for parameter in model.parameters()]
    for _ in range(3):
        made.zero_grad()
        _loss(model, batches[0]).backward()
        made.step()
    old = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLayer)}
    gradients = {
        name: _gradient_of_weight(model, name, batches[0])
        for name in old
        if "A" in dict(old[name].named_children()) or "D" in dict(old[name].named_children())
    }
    kept = {id(p) for p in model.parameters()}
    _cut(model, 0.4, batches, layout=layouts[1], split_fused=True, optimizers=[made])
    held = [id(parameter) for group in made.param_groups for parameter in group["params"]]
    assert held == [id(parameter) for parameter in model.parameters()]  # the order of a fresh optimizer
    assert kept & set(held) < set(order)
    key = {"SGD": "momentum_buffer", "Adam": "exp_avg", "RMSprop": "grad_avg", "Adagrad": None, "NAdam": "exp_avg"}[
        optimizer
    ]
    for layer_name, gradient in gradients.items():
        layer = dict(model.named_modules())[layer_name]
        for parameter, expected in _gradients_of_factors(layer, gradient).items():
            state = made.state[parameter]
            assert all(
                not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == parameter.shape
                for value in state.values()
            )
            if key is None:
                assert bool((state["sum"] >= 0).all())
                continue
            found = state[key]
            scale = float((found * expected).sum() / expected.square().sum())
            assert scale > 0.01
            assert_close(found, scale * expected, atol=1e-9, rtol=1e-6)
    made.zero_grad()
    _loss(model, batches[0]).backward()
    made.step()


def _gradient_of_weight(model, name, batch):
    """The gradient of the dense weight in the place of a low-rank layer."""
    dense = copy.deepcopy(model)
    lp.to_dense_(dense, [name]) if "." not in name else None
    if "." in name:  # inside of a layer of several matrices
        parent, _, key = name.rpartition(".")
        holder = dense.get_submodule(parent)
        holder._modules[key] = holder._modules[key].to_dense()
    _loss(dense, batch).backward()
    return dense.get_submodule(name).weight.grad


def _gradients_of_factors(layer, gradient):
    """By autograd through the product, for a given gradient of the weight."""
    parameters = [one for one in layer.parameters() if one.dim() > 1]
    found = torch.autograd.grad((layer.weight * gradient).sum(), parameters)
    return dict(zip(parameters, found, strict=True))


def test_a_layer_that_keeps_its_rank_is_not_touched():
    model, batches = _made("linear")
    _cut(model, 0.7, batches)
    before = {name: id(module) for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    rank = model[0].rank
    report = _cut(model, 0.5, batches, rank_overrides={"0": rank})
    assert id(model[0]) == before["0"]
    assert id(model[2]) != before["2"]
    assert report.weight_errors["0"] == 0.0
    assert "the rank stays as it was" in str(report)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items() if name[0] == "0")


@pytest.mark.parametrize("flags", list(itertools.product([True, False], repeat=2)), ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product(["factors", "pivot"], repeat=2)), ids="-".join)
@pytest.mark.parametrize("name", ["linear", "images", "transposed", "attention"])
def test_what_was_frozen_stays_frozen(name, layouts, flags):
    model, batches = _made(name)
    lp.compress_(model, 0.7, batches, factorization=lp.SVD(), layout=layouts[0], progress=False)
    for layer in _products(model):
        for matrix, trained in zip(_sides(layer), flags, strict=True):
            matrix.requires_grad_(trained)
    lp.compress_(model, 0.3, batches, factorization=lp.SVD(), layout=layouts[1], progress=False)
    for layer in _products(model):
        same = isinstance(layer, PivotLayer) == (layouts[0] == "pivot")
        wanted = list(flags) if same else [any(flags)] * 2
        assert [matrix.requires_grad for matrix in _sides(layer)] == wanted, layer


def _products(model):
    """The low-rank layers that hold two matrices and no layers of the kind."""
    layers = [layer for layer in model.modules() if isinstance(layer, LowRankLayer)]
    return [layer for layer in layers if not any(isinstance(one, LowRankLayer) for one in list(layer.modules())[1:])]


def _sides(layer):
    parts = ("D", "C") if isinstance(layer, PivotLayer) else ("A", "B")
    return [getattr(layer, part).weight for part in parts]


def test_keep_counts_against_the_dense_weights_and_must_be_less():
    model, batches = _made("linear")
    report = _cut(model, 0.5, batches)
    for keep in (0.5, 0.9, report.keep):
        with pytest.raises(TargetError, match=r"compressed already \(low-rank layers: .*smaller keep.*to_dense_"):
            _cut(model, keep, batches)
    again = _cut(model, 0.25, batches)
    assert again.keep <= 0.25
    whole = sum(p.numel() for p in _made("linear")[0].parameters())
    assert again.parameters_before == whole
    assert again.model_keep == pytest.approx(sum(p.numel() for p in model.parameters()) / whole)


@pytest.mark.parametrize("wish", [{"0": 40}, {"0": 12}])
def test_a_rank_above_the_present_one_is_refused(wish):
    model, batches = _made("linear")
    _cut(model, 0.5, batches)
    assert model[0].rank < 12
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(lp.PrehabError, match="rank_overrides: .* does not suit layer '0'.*that it has"):
        _cut(model, 0.3, batches, rank_overrides=wish)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_plans_know_what_they_were_made_for():
    model, batches = _made("linear")
    dense = lp.make_plan(lp.find_targets(model), lp.RankRatio(0.4), lp.SVD())
    _cut(model, 0.6, batches)
    with pytest.raises(PlanError, match="the model has a LowRankLinear"):
        lp.apply_plan_(model, dense)
    plan = lp.make_plan(lp.find_targets(model, cut_again=True), lp.RankRatio(0.3), lp.SVD())
    assert lp.CompressionPlan.from_yaml(plan.to_yaml()) == plan
    with pytest.raises(PlanError, match="which it has been cut to"):
        plan.with_ranks({"0": plan.layers[0].was + 1})
    with pytest.raises(PlanError, match="which it has been cut to"):
        plan.with_ranks({"0": "dense"})
    with pytest.raises(PlanError, match="cut to rank .* weight, the model has"):
        lp.apply_plan_(_made("linear")[0], plan)
    lp.apply_plan_(model, plan)


def test_what_is_on_the_factors_is_left_alone():
    model, batches = _made("linear")
    _cut(model, 0.7, batches, factorization=lp.LowRankPlusSparse(0.05), target_modules=["0"])
    _cut(model, 0.7, batches, target_modules=["2"])
    targets = lp.find_targets(model, cut_again=True)
    assert list(targets) == ["2", "4"]
    assert "sparse part" in targets.skipped["0"]
    torch.nn.utils.parametrizations.weight_norm(model[2].A)
    assert "something is on the factors" in lp.find_targets(model, cut_again=True).skipped["2"]


POLICIES = {
    "global budget": lp.ParameterBudget(0.35),
    "of the model": lp.ParameterBudget(0.5, scope="model"),
    "uniform": lp.RankRatio(0.35),
    "probes": lp.ProbeBudget(0.35),
    "trials": lp.CalibratedBudget(0.35, trials=3),
    "zero sum": lp.ZeroSum(0.35),
    "energy": lp.EnergyThreshold(0.8),
    "operations": lp.ParameterBudget(0.35, cost="flops"),
}


@pytest.mark.filterwarnings("ignore:.*fewer tokens.*")
@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_plans_again(policy, layout):
    model, batches = _made("attention")
    first = _cut(model, 0.7, batches, layout=layout)
    report = _cut(model, 0.35, batches, layout=layout, policy=POLICIES[policy])
    for before, after in zip(first.plan.layers, report.plan.layers, strict=True):
        assert after.parameters <= before.parameters
    assert report.plan.parameters < first.plan.parameters
    if policy == "of the model":
        assert report.model_keep <= 0.5


def test_a_second_cut_is_refined_and_scored():
    model, batches = _made("linear")
    batches = [(x, x[:, :9].sign()) for x in batches * 2]

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    lp.compress_(model, 0.7, batches, loss, progress=False)
    report = lp.compress_(model, 0.3, batches, loss, evaluate=0.25, progress=False)
    assert report.scores is not None
    assert report.scores.before.loss > 0.0


@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("name", ["linear", "images", "attention"])
def test_the_effect_on_the_loss_is_measured_without_a_trace(name, layout):
    model, batches = _made(name)
    _cut(model, 0.7, batches, layout=layout)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        batches = [
            (x, y + 0.1 * torch.randn(y.shape, generator=generator)) for x, y in [(x, model(x)) for x in batches]
        ]

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def mean_loss():
        with torch.no_grad():
            return float(torch.stack([loss(model, batch) for batch in batches]).mean())

    before, start = {name: value.clone() for name, value in model.state_dict().items()}, mean_loss()
    targets = lp.find_targets(model, cut_again=True)
    plan = plan_budgets([lp.Recipe(0.3, layout=layout)], ProcessSite(model, batches, loss))[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(plan.ranks) == set(targets)
    report = lp.compress_(model, 0.3, batches, loss, layout=layout, progress=False)
    assert plan.loss_increase == pytest.approx(mean_loss() - start, rel=1e-3)
    assert report.plan.loss_increase == pytest.approx(mean_loss() - start, rel=1e-3)


class _Padded(_Attention):
    def forward(self, x, attention_mask=None):
        x = x if self.attention.batch_first else x.transpose(0, 1)
        return super().forward(x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_is_left_out_of_layers_inside_of_attention(batch_first):
    """Its projections are given sequences with the positions first, whatever the layer is given."""
    torch.manual_seed(0)
    model = _Padded(batch_first)
    lp.compress_(model, 0.9, factorization=lp.SVD(), target_modules="attention", progress=False)
    dense = copy.deepcopy(model)
    lp.to_dense_(dense)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[:, 3:] = False
    batches = [{"x": torch.randn(6, 5, 12), "attention_mask": mask} for _ in range(3)]
    found = []
    for one, again in ((model, True), (dense, False)):
        targets = lp.find_targets(one, "attention", cut_again=again)
        wanted = lp.KroneckerSVD(gradient_trim=0.2).wanted
        forward = lambda net, batch: net(**batch).square().mean()  # noqa: E731
        found.append(lp.collect_statistics(one, targets, batches, forward=forward, wanted=wanted))
    assert list(found[0]) == list(found[1])
    for name, ours in found[0].items():
        assert int(ours.tokens) == int(found[1][name].tokens)
        assert_close(ours.input_second_moment(), found[1][name].input_second_moment(), atol=1e-5, rtol=1e-4)
        assert_close(ours.gradient_second_moment(), found[1][name].gradient_second_moment(), atol=1e-9, rtol=1e-3)


@pytest.mark.parametrize("layouts", list(itertools.product(["factors", "pivot"], repeat=2)), ids="-".join)
def test_a_layer_that_is_within_its_share_does_not_grow(layouts):
    model, batches = _made("linear")
    _cut(model, 0.3, batches, target_modules=["0"], layout=layouts[0])
    rank, size = model[0].rank, sum(one.numel() for one in model[0].parameters())
    report = _cut(model, 0.6, batches, policy=lp.RankRatio(0.6), layout=layouts[1])
    assert report.ranks["0"] == model[0].rank == rank
    assert sum(one.numel() for one in model[0].parameters()) <= size
    assert report.ranks["2"] > rank
