import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, PlanError


def test_defaults(mlp, data):
    x, _ = data.tensors
    report = lp.compress_(mlp, keep=0.4, batches=x.split(16))
    assert isinstance(report.plan.factorization, lp.KroneckerSVD)
    assert report.keep <= 0.4
    assert any(isinstance(module, lp.LowRankLinear) for module in mlp.modules())


def test_without_batches_only_svd_works(mlp):
    with pytest.raises(PlanError, match="KroneckerSVD.*needs calibration statistics; pass batches, or choose SVD"):
        lp.compress_(mlp, factorization=lp.KroneckerSVD())
    assert isinstance(lp.compress_(mlp, keep=0.5).plan.factorization, lp.SVD)


def test_loss_policy_and_names_are_used(mlp, data):
    calls = []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    report = lp.compress_(
        mlp, batches=[data.tensors], loss=loss, policy=lp.RankRatio(0.3), target_modules=["0", "2"], exclude_modules="2"
    )
    assert calls == [96] * 3  # calibration; then with the cut and without, to see what it does to the loss
    assert report.ranks == {"0": int(0.3 * 192 / 28)}


def test_kronecker_beats_the_others_on_the_loss_it_was_made_for():
    """The loss sees one output direction; the inputs live in a few directions that SVD does not see."""
    torch.manual_seed(1)
    x = torch.randn(512, 24) * torch.logspace(1, -2, 24)
    y = torch.randn(24, 1)
    weight = torch.randn(24, 24) * torch.logspace(-1, 1, 24)
    losses = {}
    for factorization in (lp.KroneckerSVD(), lp.WhitenedSVD(), lp.SVD()):
        model = nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight)
            model[1].weight.copy_(y.mT)
        target = model(x).detach() + 0.1 * torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
        lp.compress_(
            model,
            batches=[(x, target)],
            loss=lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]),
            factorization=factorization,
            policy=lp.RankRatio(0.1),
            target_modules="0",
        )
        losses[type(factorization).__name__] = nn.functional.mse_loss(model(x), target).item()
    assert losses["KroneckerSVD"] < losses["WhitenedSVD"] < losses["SVD"]


METHODS = [
    (lp.SVD(), None),
    (lp.FisherSVD("both"), None),
    (lp.ActivationSVD(), None),
    (lp.WhitenedSVD(), lp.EnergyThreshold(0.9)),
    (lp.WhitenedSVD(centered=True), lp.ZeroSum(0.5)),
    (lp.KroneckerSVD("auto", "auto"), None),
    (lp.KroneckerSVD(), lp.ProbeBudget(0.5)),
    (lp.KroneckerSVD(), lp.ParameterBudget(0.5, cost="flops")),
    (lp.KroneckerSVD(), lp.ParameterBudget(1.0, cost="latency", latency_tokens=4)),
    (lp.KroneckerSVD(), lp.ParameterBudget(0.7, scope="model")),
]


def name(method):
    return "-".join(repr(part).replace("lightning_prehab.", "") for part in method if part is not None)


class Batches:
    """Can be run through again and again, but is no list."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_every_method_in_one_call_at_once_and_block_by_block(method, mlp):
    batches = [torch.randn(40, 12) for _ in range(3)]
    wish = {"factorization": method[0], "policy": method[1]}
    at_once, blockwise = copy.deepcopy(mlp), copy.deepcopy(mlp)
    report = lp.compress_(at_once, 0.5, batches, **wish)
    assert report.parameters_after == sum(p.numel() for p in at_once.parameters())
    if getattr(method[1], "cost", None) == "latency":
        return  # measured anew each time
    source = Batches(batches)
    again = lp.compress_(blockwise, 0.5, source, layers_at_once=2, **wish)
    assert again.ranks == report.ranks
    assert source.passes == (0 if isinstance(method[0], lp.SVD) else 2) + (
        method[1] is not None and method[1].needs_probes
    )
    for ours, theirs in zip(blockwise.parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_block_by_block_from_an_iterator(mlp):
    report = lp.compress_(mlp, 0.5, iter([torch.randn(40, 12) for _ in range(3)]), layers_at_once=1)
    assert 0.3 < report.keep <= 0.5
    with pytest.raises(ArgumentError, match="layers_at_once must be at least 1, got 0"):
        lp.compress_(nn.Sequential(nn.Linear(8, 8)), layers_at_once=0)


def test_block_by_block_keeps_few_gram_matrices(monkeypatch):
    """No more than one block's statistics are alive at a time."""
    alive = weakref.WeakSet()
    real = lp.LayerStatistics.__init__

    def watch(self, *args, **kwargs):
        real(self, *args, **kwargs)
        alive.add(self)
        gc.collect()
        most.append(len(alive))

    most = []
    monkeypatch.setattr(lp.LayerStatistics, "__init__", watch)
    model = nn.Sequential(*[nn.Linear(10, 10) for _ in range(8)])
    lp.compress_(model, 0.5, [torch.randn(40, 10)], layers_at_once=2)
    assert max(most) == 2


def test_flops_count_the_tokens_that_a_layer_sees():
    """Two equal layers, one sees 8 tokens per sample, the other 1: FLOPs are saved where the tokens are."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.head(self.tokens(x).tanh().mean(1))

    torch.manual_seed(0)
    model, batches = Pooled(), [torch.randn(64, 8, 16)]
    parameters = lp.compress_(copy.deepcopy(model), batches=batches, policy=lp.ParameterBudget(0.6)).ranks
    flops = lp.compress_(copy.deepcopy(model), batches=batches, policy=lp.ParameterBudget(0.6, cost="flops")).ranks

    def spent(ranks):
        return {n: 256 if r is None else 32 * r for n, r in ranks.items()}

    used = spent(flops)
    assert 8 * used["tokens"] + used["head"] <= 0.6 * 9 * 256
    assert used["head"] > spent(parameters)["head"]


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([lp.RankRatio, lp.ParameterBudget]),
    st.floats(0.05, 1.0),
    st.booleans(),
    st.integers(1, 4),
)
def test_the_plan_tells_the_exact_number_of_parameters(shapes, policy, keep, centered, multiple):
    """1,000 random models: never more parameters than dense, and the sum of the plan is that of p.numel()."""
    model = nn.ModuleList([nn.Linear(n, m, bias=bias) for m, n, bias in shapes])
    dense = sum(p.numel() for p in model.parameters())
    statistics = {}
    for index, layer in enumerate(model):
        one = lp.LayerStatistics(layer.in_features, layer.out_features)
        one.update_inputs(torch.randn(30, layer.in_features))
        statistics[str(index)] = one
    try:
        targets = lp.find_targets(model)
        method = lp.WhitenedSVD(centered=centered)
        plan = lp.make_plan(targets, policy(keep), method, statistics, rank_multiple_of=multiple)
    except lp.PrehabError:
        return
    biases = sum(layer.bias.numel() for layer in targets.values() if layer.bias is not None)
    rest = dense - biases - sum(layer.weight.numel() for layer in targets.values())
    report = lp.apply_plan_(model, plan, statistics)
    after = sum(p.numel() for p in model.parameters())
    assert after == report.parameters_after == plan.parameters + biases + rest <= dense
    assert plan.keep <= keep + 1e-9
    assert all(r is None or r % multiple == 0 or r < multiple for r in plan.ranks.values())


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        yield from (torch.randn(12, generator=generator) for _ in range(64))


@pytest.mark.parametrize("policy", [None, lp.ProbeBudget(0.5)])
@pytest.mark.parametrize("at_once", [None, 1])
def test_a_loader_that_does_not_know_its_length(mlp, policy, at_once):
    other = copy.deepcopy(mlp)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    report = lp.compress_(mlp, 0.5, loader, policy=policy, layers_at_once=at_once)
    assert report.ranks == lp.compress_(other, 0.5, list(loader), policy=policy).ranks
