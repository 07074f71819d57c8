from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, NumericalError, StatisticsError
from lightning_prehab.factorizations import Factors
from lightning_prehab.plan.probes import measure_probes, probe_rank
from lightning_prehab.rank_policies import Probe


def svd_factors(targets):
    def factors_of(name, rank):
        a, b, *_ = lp.SVD()(targets[name].weight, rank)
        return Factors(a, b)

    return factors_of


def cut_by_hand(model, name, rank):
    """The model with one layer really replaced."""
    copy = nn.Sequential(*model)
    copy[int(name)] = lp.LowRankLinear.from_linear(model[int(name)], rank)
    return copy


def divergence(dense, cut, x):
    p, q = dense(x).double().softmax(-1), cut(x).double().softmax(-1)
    return float((p * (p.log() - q.log())).sum() / len(x))


def snapshot(model):
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    return modes, hooks, [(id(p), p._version, p.clone(), p.grad) for p in model.parameters()]


def assert_as_before(model, before):
    modes, hooks, parameters = snapshot(model)
    assert (modes, hooks) == before[:2]
    for (one, version, value, gradient), (other, version_now, value_now, gradient_now) in zip(
        before[2], parameters, strict=True
    ):
        assert (one, version) == (other, version_now)
        assert torch.equal(value, value_now)
        assert gradient is gradient_now


def test_equals_models_that_are_really_cut(mlp, data):
    mlp.insert(1, nn.Dropout(0.5))
    x = data.tensors[0]
    targets = lp.find_targets(mlp)
    mlp(x).sum().backward()
    before, state = snapshot(mlp), torch.get_rng_state()
    batches = (batch for batch in (x[:70], x[70:]))  # used once for each layer: a generator is enough
    probes = measure_probes(mlp, targets, svd_factors(targets), batches, probe_keep=0.8)
    assert_as_before(mlp, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(probes) == list(targets)
    mlp.eval()
    for name, layer in targets.items():
        rank, increase = probes[name]
        assert rank == probe_rank(layer.out_features, layer.in_features, 0.8)
        with torch.no_grad():
            expected = divergence(mlp, cut_by_hand(mlp, name, rank), x)
        assert increase == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert increase > 0


def test_sparse_parts_are_cut_too(mlp, data):
    x, method = data.tensors[0], lp.LowRankPlusSparse(0.1, lp.SVD())
    targets = lp.find_targets(mlp)
    factors = {name: method(layer.weight, 4) for name, layer in targets.items()}
    probes = measure_probes(mlp, targets, lambda name, rank: factors[name], [x])
    for name, layer in targets.items():
        cut = nn.Sequential(*mlp)
        cut[int(name)] = lp.LowRankPlusSparseLinear.from_factors(*factors[name][:2], layer, factors[name].sparse)
        with torch.no_grad():
            assert probes[name].loss_increase == pytest.approx(divergence(mlp, cut, x), rel=1e-3, abs=1e-7)


def test_a_loss_is_compared_where_there_are_no_logits(mlp, data):
    targets = lp.find_targets(mlp)
    x, y = data.tensors

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    batches = [[x[:30], y[:30]], [x[30:], y[30:]]]
    probes = measure_probes(mlp, targets, svd_factors(targets), batches, probe_keep=0.5, forward=loss)
    for name, (rank, increase) in probes.items():
        with torch.no_grad():
            expected = float(loss(cut_by_hand(mlp, name, rank), (x, y)) - loss(mlp, (x, y)))
        assert increase == pytest.approx(max(expected, 0.0), rel=1e-3, abs=1e-6)

    def falling(model, batch):  # the cut makes the loss smaller
        return -loss(model, (batch[0], model_output))

    with torch.no_grad():
        model_output = mlp(x)
    probes = measure_probes(mlp, targets, svd_factors(targets), [[x]], forward=falling)
    assert [probe.loss_increase for probe in probes.values()] == [0.0, 0.0, 0.0]


class Tagger(nn.Module):
    """Logits for each position, a loss beside them, and a layer that no pass reaches."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.idle = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 6)

    def forward(self, x, attention_mask=None):
        logits = self.head(torch.tanh(self.body(input=x)))
        return SimpleNamespace(loss=logits.sum(), logits=logits)


def test_logits_come_first_padding_is_left_out_and_unreached_layers_too():
    model, x = Tagger(), torch.randn(4, 7, 6)
    targets = lp.find_targets(model)
    mask = (torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]).long()
    probes = measure_probes(model, targets, svd_factors(targets), [{"x": x, "attention_mask": mask}])
    assert list(probes) == ["body", "head"]
    rank = probes["head"].rank
    with torch.no_grad():
        hidden = torch.tanh(model.body(x))[mask.bool()]
        cut = lp.LowRankLinear.from_linear(model.head, rank)
        p, q = model.head(hidden).double().softmax(-1), cut(hidden).double().softmax(-1)
    assert probes["head"].loss_increase == pytest.approx(float((p * (p / q).log()).sum()) / 4, rel=1e-3)


def whole(weight):
    """Factors of full rank, without rounding: the smaller side is the identity."""
    m, n = weight.shape
    return Factors(torch.eye(n).to(weight), weight) if n <= m else Factors(weight, torch.eye(m).to(weight))


def test_a_bias_shift_counts():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 5))
    targets, x = lp.find_targets(model), torch.randn(8, 6)

    def exact_but_shifted(name, rank):
        weight = targets[name].weight
        shift = torch.linspace(0, 1, weight.shape[0], dtype=torch.float64)
        return whole(weight.double().detach())._replace(bias_shift=shift)

    probes = measure_probes(model, targets, exact_but_shifted, [x])
    assert all(probe.loss_increase > 1e-3 for probe in probes.values())
    exact = measure_probes(model, targets, lambda *a: exact_but_shifted(*a)._replace(bias_shift=None), [x])
    assert all(probe.loss_increase == pytest.approx(0.0, abs=1e-9) for probe in exact.values())


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 1, 5])
def test_nothing_is_left_behind_when_a_pass_is_interrupted(mlp, data, kind, when):
    targets, x = lp.find_targets(mlp), data.tensors[0]
    mlp[2].eval()
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        if calls == when + 1:
            torch.rand(3)
            raise kind("stop")
        return model(batch)

    before, state = snapshot(mlp), torch.get_rng_state()
    with pytest.raises(kind, match="stop"):
        measure_probes(mlp, targets, svd_factors(targets), [x[:8], x[8:]], forward=forward)
    assert_as_before(mlp, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_noise_of_the_model_is_the_same_with_and_without_the_cut(mlp, data):
    targets, x = lp.find_targets(mlp), data.tensors[0]

    def exact(name, rank):
        return whole(targets[name].weight.detach())

    def noisy(model, batch):
        return model(batch) + torch.randn(len(batch), 6)

    state = torch.get_rng_state()
    probes = measure_probes(mlp, targets, exact, [x], forward=noisy)
    assert all(probe.loss_increase < 1e-6 for probe in probes.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_and_a_transformer():
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(block, nn.Linear(16, 4)).bfloat16()
    targets = lp.find_targets(model)
    before = snapshot(model)
    probes = measure_probes(model, targets, svd_factors(targets), [torch.randn(3, 5, 16).bfloat16()], 0.4)
    assert_as_before(model, before)
    assert {"0.linear1", "0.linear2"} <= set(probes)  # not hidden by the fast path
    assert all(probe.loss_increase > 0 for probe in probes.values())


def test_wrong_input(mlp):
    targets, x = lp.find_targets(mlp), torch.randn(4, 12)
    factors_of = svd_factors(targets)
    with pytest.raises(StatisticsError, match="batches is empty"):
        measure_probes(mlp, targets, factors_of, [])
    with pytest.raises(ArgumentError, match="batches is one tensor"):
        measure_probes(mlp, targets, factors_of, x)
    for wrong in (0.0, 1.0, -1.0, float("nan"), True):
        with pytest.raises(ArgumentError, match="probe_keep must lie in"):
            measure_probes(mlp, targets, factors_of, [x], probe_keep=wrong)
    with pytest.raises(StatisticsError, match=r"The output \(Tensor of shape \(4,\)\) has no logits"):
        measure_probes(mlp, targets, factors_of, [x], forward=lambda model, batch: model(batch)[:, 0])
    with pytest.raises(NumericalError, match="The output of the dense model holds NaN or Inf"):
        measure_probes(mlp, targets, factors_of, [x * torch.nan])

    def broken(name, rank):
        a, b, *_ = factors_of(name, rank)
        return Factors(a * torch.nan if name == "2" else a, b)

    with pytest.raises(NumericalError, match="Layer '2' cut to rank 6: the output of the model holds NaN"):
        measure_probes(mlp, targets, broken, [x])


@pytest.mark.parametrize(("shape", "keep", "rank"), [((10, 10), 0.9, 4), ((3, 2), 0.1, 1), ((2, 2), 0.99, 1)])
def test_probe_rank(shape, keep, rank):
    assert probe_rank(*shape, keep) == rank


def test_probes_are_plain_tuples(mlp):
    targets = lp.find_targets(mlp)
    probes = measure_probes(mlp, targets, svd_factors(targets), [torch.randn(4, 12)])
    assert all(type(probe) is Probe and type(probe.loss_increase) is float for probe in probes.values())
