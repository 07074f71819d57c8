from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_prehab as lp
from lightning_prehab.calibration import Collector, batch_size, padding_mask
from lightning_prehab.errors import ArgumentError, StatisticsError


def by_hand(model, x, y):
    """Inputs and per-sample output gradients of every linear layer of a sequential model, one sample at a time."""
    inputs, gradients = {}, {}
    for sample, label in zip(x, y, strict=True):
        h, outputs = sample[None], {}
        for name, layer in model.named_children():
            if isinstance(layer, nn.Linear):
                inputs.setdefault(name, []).append(h.detach())
            h = layer(h)
            if isinstance(layer, nn.Linear):
                outputs[name] = h
        loss = nn.functional.mse_loss(h, label[None])
        for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            gradients.setdefault(name, []).append(gradient)
    return {n: torch.cat(v) for n, v in inputs.items()}, {n: torch.cat(v) for n, v in gradients.items()}


def test_sums_equal_those_of_single_samples(mlp, data):
    x, y = data.tensors
    targets = lp.find_targets(mlp)

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    batches = [(x[:30], y[:30]), (x[30:], y[30:])]  # of different size: gradients must not depend on it
    statistics = lp.collect_statistics(mlp, targets, batches, forward=loss, gradients=True)
    inputs, gradients = by_hand(mlp, x, y)
    for name, layer in statistics.items():
        torch.testing.assert_close(layer.input_gram, inputs[name].mT @ inputs[name])
        torch.testing.assert_close(layer.gradient_gram, gradients[name].mT @ gradients[name], rtol=1e-4, atol=1e-7)
        assert int(layer.samples) == int(layer.tokens) == len(x)


def test_true_fisher_needs_no_labels_and_no_global_randomness():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(20000, 6)
    state = torch.get_rng_state()
    statistics = lp.collect_statistics(model, lp.find_targets(model), [x], gradients=True)
    assert torch.equal(torch.get_rng_state(), state)
    p = model(x).softmax(-1).detach()
    expected = torch.diag(p.mean(0)) - p.mT @ p / len(x)  # E[(e_y - p)(e_y - p)^T] for y ~ p
    torch.testing.assert_close(statistics["2"].gradient_second_moment(), expected, atol=0.01, rtol=0)


def test_where_the_loss_comes_from():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"layer": layer})
    targets, x = lp.find_targets(model), torch.randn(8, 4)

    def gram(forward):
        statistics = lp.collect_statistics(model, targets, [x], forward=forward, gradients=True)
        return statistics["layer"].gradient_gram

    def loss(module, batch):
        return module["layer"](batch).square().mean()

    expected = gram(loss)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(gram(lambda m, b: SimpleNamespace(loss=loss(m, b))), expected)
    torch.testing.assert_close(gram(lambda m, b: {"loss": loss(m, b)}), expected)
    assert gram(lambda m, b: SimpleNamespace(logits=m["layer"](b), loss=None)).abs().sum() > 0
    for output in (lambda m, b: m["layer"](b)[:, :1], lambda m, b: "text"):
        with pytest.raises(StatisticsError, match="pass loss="):
            gram(output)


def test_kinds_of_batches():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, scale=1.0):
            return self.layer(x * scale)

    model, x = Two(), torch.randn(5, 3)
    targets = lp.find_targets(model)
    for batch, factor in ((x, 1), ((x, 2.0), 4), ([x], 1), ({"x": x, "scale": 3.0}, 9)):
        gram = lp.collect_statistics(model, targets, [batch])["layer"].input_gram
        torch.testing.assert_close(gram, factor * x.mT @ x)
    with pytest.raises(ArgumentError, match="got str; pass forward="):
        lp.collect_statistics(model, targets, ["text"])
    with pytest.raises(StatisticsError, match="batches is empty"):
        lp.collect_statistics(model, targets, [])


def test_padding_is_left_out():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, attention_mask):
            return (self.layer(x) * attention_mask[..., None]).sum(1)

    model, x = Tokens(), torch.randn(4, 6, 3)
    mask = torch.arange(6)[None] < torch.tensor([6, 2, 3, 1])[:, None]
    batch = {"x": x, "attention_mask": mask.long()}
    statistics = lp.collect_statistics(model, lp.find_targets(model), [batch], gradients=True)["layer"]
    assert int(statistics.tokens) == 12
    torch.testing.assert_close(statistics.input_gram, x[mask].mT @ x[mask])
    assert padding_mask((batch, torch.zeros(4))) is not None
    assert padding_mask(x) is None


def test_the_model_is_left_as_it_was(mlp, data):
    mlp[0].weight.requires_grad_(False)
    mlp[1].eval()
    modes = [module.training for module in mlp.modules()]
    before = {name: value.clone() for name, value in mlp.state_dict().items()}

    def broken(model, batch):
        model(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lp.collect_statistics(mlp, lp.find_targets(mlp), [data.tensors[0]], forward=broken, gradients=True)
    assert [module.training for module in mlp.modules()] == modes
    assert not mlp[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in mlp.parameters())
    assert all(not module._forward_hooks for module in mlp.modules())
    for name, value in mlp.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_each_token_once(reentrant):
    layer = nn.Linear(4, 4)
    collector = Collector({"layer": layer}, gradients=True)
    collector.attach()
    x = torch.randn(6, 4, requires_grad=True)
    collector.begin_batch(x)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    collector.end_batch()
    assert int(collector.statistics["layer"].tokens) == 6


def test_only_counted_between_begin_and_end():
    layer = nn.Linear(4, 4)
    collector = Collector({"layer": layer}, gradients=False)
    collector.attach()
    layer(torch.randn(2, 4))
    collector.begin_batch(torch.zeros(3))
    layer(torch.randn(3, 4))
    collector.end_batch()
    layer(torch.randn(5, 4))  # validation
    collector.detach()
    assert int(collector.statistics["layer"].tokens) == 3
    assert not layer._forward_hooks


def test_overflow_is_left_out_only_when_asked():
    for drop, tokens in ((True, 2), (False, 3)):
        layer = nn.Linear(4, 4)
        collector = Collector({"layer": layer}, gradients=True, drop_overflow=drop)
        collector.attach()
        collector.begin_batch(torch.zeros(3))
        (layer(torch.randn(3, 4)) * torch.tensor([[1.0], [float("inf")], [1.0]])).sum().backward()
        assert int(collector.statistics["layer"].tokens) == tokens
        assert bool(torch.isfinite(collector.statistics["layer"].gradient_gram).all()) == drop


def test_frozen_layers_are_reported_as_such():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    collector = Collector({"0": model[0]}, gradients=True)
    model.requires_grad_(False)
    collector.attach()
    collector.begin_batch(torch.zeros(3))
    model(torch.randn(3, 4))
    assert "no output gradient" in collector.statistics["0"].missing(gradients=True)


def test_batch_size():
    assert batch_size([torch.tensor(1.0), {"x": torch.zeros(7, 2)}]) == 7
    assert batch_size("text") == 1


def test_an_input_that_is_changed_in_place_later(mlp):
    """Under autocast autograd guards the cast copy only, so nothing would notice."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            h = x * 1.0
            u = self.fc(h)
            h += 100 * u
            return h

    model, x = Residual(), torch.randn(32, 8)
    collector = Collector({"fc": model.fc}, gradients=True)
    collector.attach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        collector.begin_batch(x)
        model(x).square().mean().backward()
    torch.testing.assert_close(collector.statistics["fc"].input_gram, x.mT @ x, rtol=1e-4, atol=1e-4)


def test_keyword_inputs_and_gradients_of_the_user():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(input=x)

    model, x = Keyword(), torch.randn(6, 4)
    model.layer.weight.grad = torch.full((3, 4), 7.0)
    statistics = lp.collect_statistics(model, lp.find_targets(model), [x], gradients=True)
    torch.testing.assert_close(statistics["layer"].input_gram, x.mT @ x)
    assert (model.layer.weight.grad == 7).all()
    assert model.layer.bias.grad is None


def test_reentrant_checkpointing_in_the_free_function():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return checkpoint(self.layer, x.requires_grad_(), use_reentrant=True)

    model, x = Checkpointed(), torch.randn(6, 4)
    assert int(lp.collect_statistics(model, lp.find_targets(model), [x], gradients=True)["layer"].tokens) == 6


def test_batches_keep_their_type():
    from typing import NamedTuple

    class Batch(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor

    model = nn.Sequential(nn.Linear(4, 3))
    batch = Batch(torch.randn(6, 4), torch.randn(6, 3))
    targets = lp.find_targets(model)
    lp.collect_statistics(model, targets, [batch], forward=lambda m, b: (m(b.x) - b.y).square().mean(), gradients=True)
    with pytest.raises(ArgumentError, match="cannot be called on a batch of type Batch.*pass forward= or loss="):
        lp.collect_statistics(model, targets, [batch])
    with pytest.raises(ArgumentError, match="batches is one tensor"):
        lp.collect_statistics(model, targets, batch.x)
