"""Whole cuts are tried: what is compared, and that nothing stays."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_prehab.errors import NumericalError, StatisticsError
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.statistics import trials as trials_module
from lightning_prehab.statistics.effect import Change
from lightning_prehab.statistics.predictions import Predictions
from lightning_prehab.statistics.trials import Trials


def kl(p_logits, q_logits):
    """Mean over rows, by hand."""
    p, q = (logits.detach().double().softmax(-1) for logits in (p_logits, q_logits))
    return float((p * (p / q).log()).sum(-1).mean())


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def change(layer, scale=0.3):
    return Change(view_of(layer), scale * torch.randn_like(layer.weight))


def with_change(model, index, one):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[index].weight += one.weight
    return other


def test_logits_are_compared_by_their_divergence_and_nothing_stays():
    model, batches = net(), [torch.randn(7, 6), torch.randn(3, 6)]
    before = copy.deepcopy(model.state_dict())
    trials = Trials(model, batches)
    x = torch.cat(batches)
    for index in (0, 2):
        one = change(model[index])
        tried = trials.of([one])
        assert tried.divergence == pytest.approx(kl(model(x), with_change(model, index, one)(x)), rel=1e-5)
        assert all(map(math.isnan, tried.losses))
        assert trials.increase([one], tried) == tried.divergence
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_the_dense_model_runs_once():
    model, calls = net(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    trials = Trials(model, [torch.randn(4, 6)])
    for _ in range(3):
        trials.of([change(model[0])])
    assert len(calls) == 4


def test_under_autocast_the_products_are_exact_all_the_same():
    """Autocast is for the forward passes."""
    layer, factors = nn.Linear(6, 8), Factors(torch.randn(3, 6), torch.randn(8, 3))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = Change.by_cut(view_of(layer), factors)
    assert torch.equal(rounded.weight, Change.by_cut(view_of(layer), factors).weight)


def test_padding_does_not_count():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x, attention_mask):
            return self.fc(x)

    model, x = Tagger(), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    one = change(model.fc)
    tried = Trials(model, [{"x": x, "attention_mask": mask}]).of([one])
    seen = x[mask.bool()]
    expected = kl(model.fc(seen), nn.functional.linear(seen, model.fc.weight + one.weight, model.fc.bias))
    assert tried.divergence == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("most", [1, 3, 19])
def test_of_many_classes_the_largest_are_kept_and_the_rest_is_one(most):
    p, q = torch.randn(6, 20) * 2, torch.randn(6, 20) * 2
    places = p.topk(most).indices
    rest = torch.ones_like(p).scatter(1, places, 0.0).bool()

    def lumped(logits):
        shares = logits.double().softmax(-1)
        return torch.cat([shares.gather(1, places), (shares * rest).sum(-1, keepdim=True)], -1)

    expected = float((lumped(p) * (lumped(p) / lumped(q)).log()).sum())
    found = Predictions(p, None, room=12 * 6 * most).distance(q)
    assert found == (pytest.approx(expected, rel=1e-4), 6)
    whole = Predictions(p, None, room=4 * p.numel()).distance(q)
    assert whole.total == pytest.approx(6 * kl(p, q), rel=1e-5)
    assert found.total <= whole.total + 1e-6


def test_large_logits_are_compared_in_parts(monkeypatch):
    from lightning_prehab.statistics import divergence

    p, q = torch.randn(10, 20), torch.randn(10, 20)
    monkeypatch.setattr(divergence, "AT_ONCE", 60)
    for room in (10**6, 12 * 10 * 19):
        assert Predictions(p, None, room).distance(q).total == pytest.approx(10 * kl(p, q), rel=1e-3)


def test_other_outputs_are_compared_by_their_squares():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return {"last_hidden_state": self.fc(x)}

    model, x, y = Encoder(), torch.randn(9, 6), torch.randn(4, 6)
    one = change(model.fc)
    trials = Trials(model, [x, y])
    tried = trials.of([one])
    seen = torch.cat([x, y])
    expected = (seen @ one.weight.T).square().sum() / model.fc(seen).square().sum()
    assert tried.divergence == pytest.approx(float(expected.detach()), rel=1e-4)
    assert trials.increase([one], tried) is None


@pytest.mark.parametrize("labels", [True, False])
def test_under_a_loss_function_a_plain_tensor_is_logits_where_there_are_labels(labels):
    model, x = net(), torch.randn(9, 6)
    y = torch.randint(5, (9,)) if labels else torch.randn(9, 5)

    def loss(module, batch):
        output = module(batch[0])
        compare = nn.functional.cross_entropy if labels else nn.functional.mse_loss
        return compare(output, batch[1])

    one = change(model[2])
    other = with_change(model, 2, one)
    trials = Trials(model, [(x, y)], loss)
    tried = trials.of([one])
    squares = (model(x) - other(x)).square().sum() / model(x).square().sum()
    assert tried.divergence == pytest.approx(kl(model(x), other(x)) if labels else float(squares.detach()), rel=1e-4)
    assert tried.losses == (pytest.approx(float(loss(other, (x, y))), rel=1e-5),)
    increase = trials.increase([one], tried)  # one batch: as sure as it can be, unless the loss falls
    if tried.losses[0] > float(loss(model, (x, y))):
        assert increase == pytest.approx(tried.losses[0] - float(loss(model, (x, y))), rel=1e-4)
    assert increase >= 0.0


def test_where_there_is_a_loss_alone_its_increase_is_compared():
    model, x = net(), torch.randn(9, 6)

    def loss(module, batch):
        return module[0](batch).square().mean()

    one = change(model[0])
    tried = Trials(model, [x], loss).of([one])
    expected = loss(with_change(model, 0, one), x) - loss(model, x)
    assert tried.divergence == pytest.approx(float(expected), rel=1e-5)


def test_what_cannot_be_compared():
    with pytest.raises(StatisticsError, match="no loss to try cuts by"):
        Trials(_Mute(), [torch.randn(4, 6)]).of([])
    model = net()
    with pytest.raises(NumericalError, match="output of the dense model holds NaN"):
        Trials(model, [torch.full((2, 6), torch.nan)]).of([])
    trials = Trials(model, [torch.randn(4, 6)])
    broken = Change(view_of(model[0]), torch.full_like(model[0].weight, torch.inf))
    tried = trials.of([broken])
    assert tried.divergence == math.inf
    assert trials.increase([broken], tried) is None


class _Mute(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        self.fc(x)


def test_room_for_outputs_that_are_no_logits(monkeypatch):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return (self.fc(x),)

    model, batches = Encoder(), [torch.randn(8, 6) for _ in range(3)]
    one = change(model.fc)
    monkeypatch.setattr(trials_module, "KEPT_BYTES", 8 * 5 * 4)  # the first one alone
    seen = batches[0]
    expected = (seen @ one.weight.T).square().sum() / model.fc(seen).square().sum()
    assert Trials(model, batches).of([one]).divergence == pytest.approx(float(expected.detach()), rel=1e-4)
