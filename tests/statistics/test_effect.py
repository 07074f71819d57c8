"""What a change of weights does to the loss: by brute force, and with nothing left behind."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import NumericalError, StatisticsError
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.statistics.divergence import divergence
from lightning_prehab.statistics.effect import (
    BATCHES_AT_ONCE,
    Change,
    effect_of_cuts,
    measure_increase,
    moved,
    odd_and_even,
)
from lightning_prehab.statistics.outputs import next_token_loss


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def parabola(slopes, curvature, asked=None):
    """Losses of batches that differ in their slopes."""

    def losses_at(number, step):
        if asked is not None:
            asked.append((number, step))
        return [1.0 + slopes[number] * step + curvature * step**2]

    return losses_at


def test_a_change_that_is_clear_of_its_noise_is_measured_on_few_batches():
    asked = []
    slopes = [0.01, 0.02, 0.03, 0.02] * 4
    assert measure_increase(parabola(slopes, 0.5, asked), 16) == pytest.approx(0.52)
    assert asked == [(number, step) for step in (0.0, 1.0) for number in range(BATCHES_AT_ONCE)]


def test_noise_that_is_odd_in_the_change_is_taken_out():
    """The curvature is 1e-3; the slopes are noise a hundred times as large, and what is sure of them is little."""
    noise = torch.Generator().manual_seed(0)
    ours, plain = [], []
    for _ in range(200):
        slopes = (0.1 * torch.randn(16, generator=noise)).tolist()
        ours.append(abs(measure_increase(parabola(slopes, 1e-3), 16) - 1e-3))
        plain.append(abs(sum(slopes) / 16))
    assert sum(ours) < 0.6 * sum(plain)
    assert sorted(ours)[100] < 0.4 * sorted(plain)[100]


def test_odd_and_even_are_parted():
    odd, even = odd_and_even([1.0, 1.0], [1.11, 0.91], [0.91, 1.11])
    assert even == pytest.approx(0.01)
    assert odd == pytest.approx(0.0, abs=1e-9)  # no slope at all in the mean
    odd, even = odd_and_even([1.0, 1.0], [1.11, 1.11], [0.91, 0.91])
    assert (odd, even) == (pytest.approx(0.1), pytest.approx(0.01))
    sure = 0.2**2 / (0.2**2 + 0.1**2)  # the slopes 0.1 and 0.3: mean 0.2, standard error 0.1
    assert odd_and_even([0.0, 0.0], [0.1, 0.3], [-0.1, -0.3]) == (pytest.approx(sure * 0.2), pytest.approx(0.0))


def test_batches_without_a_loss_are_left_out():
    def losses_at(number, step):
        return [math.nan if number % 2 else 1.0 + 0.5 * step**2]

    assert measure_increase(losses_at, 16) == pytest.approx(0.5)
    with pytest.raises(StatisticsError, match="No batch has a loss"):
        measure_increase(lambda number, step: [math.nan], 5)


def test_a_slope_that_all_batches_share_counts():
    """A model in training: what is cut off was being learned."""
    slopes = [0.010, 0.011, 0.009, 0.010] * 4
    assert measure_increase(parabola(slopes, 1e-3), 16) == pytest.approx(0.011, rel=1e-6)


def test_one_batch_and_a_loss_that_falls():
    assert measure_increase(parabola([0.3], 0.2), 1) == pytest.approx(0.5)
    falling = measure_increase(parabola([-0.5] * 8, 0.2), 8)
    assert falling == pytest.approx(0.2)  # the cut of a model that is not trained: what stays is the curvature
    assert measure_increase(parabola([-0.5] * 8, -0.2), 8) == 0.0


def grouped():
    return nn.Conv2d(6, 8, 3, groups=2)


@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 5), lambda: nn.Linear(7, 5, bias=False), grouped])
@pytest.mark.parametrize("broken", [False, True])
def test_weights_are_moved_and_put_back_bit_by_bit(make, broken):
    torch.manual_seed(0)
    layer = make()
    view, before = view_of(layer), state(layer)
    groups = view.group_count
    a, b = torch.randn(groups * 2, view.in_features), torch.randn(view.out_features, 2)
    shift = torch.randn(view.out_features) if layer.bias is not None else torch.ones(view.out_features)
    change = Change.by_cut(view, Factors(a, b, shift))
    product = torch.cat([y @ x for y, x in zip(b.chunk(groups), a.chunk(groups), strict=True)])
    for step in (1.0, -1.0, 0.25):
        try:
            with moved([change], step):
                old = view.matrix(before["weight"])
                torch.testing.assert_close(view.weight.detach(), old + step * (product - old))
                if layer.bias is not None:
                    torch.testing.assert_close(layer.bias.detach(), before["bias"] + step * shift)
                assert all(parameter.requires_grad for parameter in layer.parameters())
                if broken:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def cut_of(model, keep, batches, loss=None, **settings):
    """The report, and what the cut does to a loss, by brute force."""
    after = copy.deepcopy(model)
    report = lp.compress_(after, keep, batches, loss=loss, **settings)
    return report, after


def classifier():
    torch.manual_seed(0)
    x = torch.randn(256, 12)
    y = (x @ torch.randn(12, 5)).argmax(1)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_increase_of_a_given_loss_is_that_of_the_same_batches(scale):
    model, x, y = classifier()
    batches = list(zip(x.split(64), y.split(64), strict=True))

    def loss(module, batch):
        return scale * nn.functional.cross_entropy(module(batch[0]), batch[1])

    before = state(model)
    for keep in (0.9, 0.7, 0.5):
        report, after = cut_of(model, keep, batches, loss)
        with torch.no_grad():
            measured = sum(float(loss(after, batch) - loss(model, batch)) for batch in batches) / len(batches)
        if measured > 1e-3 * scale:
            assert 0.5 < report.plan.loss_increase / measured < 2.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_a_loss_it_is_the_divergence_of_the_predictions():
    model, x, _ = classifier()
    report, after = cut_of(model, 0.5, list(x.split(64)))
    with torch.no_grad():
        p, q = (module(x).double().log_softmax(-1) for module in (model, after))
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert report.plan.loss_increase == pytest.approx(exact, rel=1e-3)


class Speaker(nn.Module):
    """Knows the next token, or the token itself, as well as it was told to."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, tokens):
        return 3.0 * nn.functional.one_hot((tokens + self.shift) % 11, 11).float()


def counting(rows=4, positions=9):
    return (torch.arange(positions) + torch.arange(rows)[:, None]) % 11


def test_next_tokens_are_the_labels_of_a_model_that_predicts_them():
    tokens = counting()
    loss, speaks = next_token_loss(Speaker(1)(tokens), {"input_ids": tokens})
    logits = Speaker(1)(tokens)[:, :-1].reshape(-1, 11)
    assert speaks
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1)).item(), rel=1e-5)
    mask = torch.ones_like(tokens)
    mask[:, 5:] = 0
    wrong = tokens.clone()
    wrong[:, 5:] = 3  # padding
    masked, _ = next_token_loss(Speaker(1)(wrong), {"input_ids": wrong, "attention_mask": mask})
    assert masked == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "batch"),
    [
        (torch.zeros(4, 9, 11), torch.randn(4, 9)),  # no tokens
        (torch.zeros(4, 9, 5), counting()),  # classes of tokens
        (torch.zeros(4, 11), counting()),  # one prediction for each text
        (torch.zeros(4, 1, 11), counting(positions=1)),
    ],
)
def test_where_there_are_no_next_tokens(logits, batch):
    assert next_token_loss(logits, batch) is None


def test_a_model_that_fills_gaps_or_tags_tokens_does_not_speak():
    _, speaks = next_token_loss(4.0 * Speaker(0)(counting()), counting())  # sure of the token that it sees
    assert not speaks


def test_divergence_is_summed_over_predictions_without_padding():
    before, after = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1)
    total, count = divergence(before, after, torch.zeros(2, 5))
    assert (total, count) == (pytest.approx(float(each.sum())), 10)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    total, count = divergence(before, after, {"attention_mask": mask})
    assert (total, count) == (pytest.approx(float(each[mask.bool()].sum())), 8)


def test_what_is_not_finite_is_said_and_put_back():
    model, x, _ = classifier()
    before = state(model)
    views = {"0": view_of(model[0])}
    huge = {"0": Factors(torch.full((1, 12), 1e30), torch.full((32, 1), 1e30))}

    def loss(module, batch):
        return module(batch).square().mean() + module[0].weight.sum()

    with pytest.raises(NumericalError, match="The loss holds NaN or Inf"):
        effect_of_cuts(model, views, huge, [x], loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_randomness_is_paired():
    """Each pass over a batch sees the same noise, whoever makes it: a cut that changes nothing costs nothing."""
    model, x, _ = classifier()
    calls, seen = [], (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    view = view_of(model[2])
    u, s, v = torch.linalg.svd(view.weight.detach().double())
    whole = {"2": Factors((s.sqrt()[:, None] * v).float(), (u * s.sqrt()).float())}

    def loss(module, batch):
        calls.append(1)
        noise = torch.randn(len(batch), 5) + random.random() + np.random.rand()
        return (module(batch) + noise).square().mean()

    assert effect_of_cuts(model, {"2": view}, whole, [x] * 6, loss) < 1e-5
    assert calls
    assert torch.equal(torch.get_rng_state(), seen[0])
    assert random.getstate() == seen[1]
    assert (np.random.get_state()[1] == seen[2]).all()


def popping(model, batch):
    return nn.functional.cross_entropy(model(batch.pop("x")), batch.pop("y"))


def with_slopes(model, batch):
    x = batch["x"].clone().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return nn.functional.cross_entropy(output, batch["y"]) + slope.square().mean()


class Once:
    """Gone through once, without being an iterator."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        while self.batches:
            yield self.batches.pop(0)


@pytest.mark.parametrize("loss", [popping, with_slopes])
@pytest.mark.parametrize("source", [list, iter, Once])
def test_any_loss_of_any_batches(loss, source):
    model, x, y = classifier()
    report = lp.compress_(model, 0.5, source([{"x": x, "y": y}]), loss=loss)
    assert report.plan.loss_increase > 1e-3


def test_a_loader_is_gone_through_once_and_randomness_is_as_it_was():
    model, x, y = classifier()
    loads = []

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            loads.append(index)
            return x[index], y[index]

    loader, before = torch.utils.data.DataLoader(Data(), 64, shuffle=True), torch.get_rng_state()
    lp.compress_(model, 0.5, loader, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(loads) == len(x)


def test_a_loss_that_overflows_does_not_stop_the_cut():
    model, x, y = classifier()

    def loss(module, batch):
        found = nn.functional.cross_entropy(module(batch[0]), batch[1])
        return found if found < dense + 0.01 else found * math.inf

    with torch.no_grad():
        dense = nn.functional.cross_entropy(model(x), y)
    with pytest.warns(UserWarning, match="could not be measured .NumericalError"):
        report = lp.compress_(model, 0.2, [(x, y)], loss=loss)
    assert report.plan.loss_increase is None
    assert report.keep <= 0.2


def test_a_graph_of_the_user_stays_valid():
    model, x, y = classifier()
    before = nn.functional.cross_entropy(model(x), y)
    view = view_of(model[2])
    cut = {"2": Factors(torch.randn(1, 32), torch.randn(32, 1))}
    effect_of_cuts(model, {"2": view}, cut, [(x, y)], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    before.backward()
    assert model[2].weight.grad is not None


def test_a_loss_with_one_entry():
    model, x, y = classifier()

    def loss(module, batch):
        return {"loss": nn.functional.cross_entropy(module(batch[0]), batch[1])[None]}

    report = lp.compress_(model, 0.5, [(x, y)], loss=loss)
    assert report.plan.loss_increase > 1e-3
