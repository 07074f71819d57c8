import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lightning_prehab as lp
from lightning_prehab.errors import StatisticsError
from lightning_prehab.statistics.backward import no_weight_gradients
from lightning_prehab.statistics.collector import Collector
from lightning_prehab.statistics.sums import Wanted

EVERYTHING = Wanted(inputs=True, gradients=True, weight_gradients=True, halves=True, magnitudes=True)


class Block(nn.Module):
    """A residual block; ``mode`` is how it is checkpointed."""

    def __init__(self, mode=None):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.mode = mode

    def inner(self, x):
        return self.down(torch.relu_(self.up(self.norm(x))))

    def forward(self, x):
        return x + (self.inner(x) if self.mode is None else checkpoint(self.inner, x, use_reentrant=self.mode))


class Text(nn.Module):
    """Tokens in, logits out; the embedding is the head, one block is used twice, and nothing but a sum is after it."""

    def __init__(self, mode=None, tied=True):
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(11, 6), Block(mode), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.block(self.block(self.embed(tokens))))


class Doubled(torch.autograd.Function):
    """A function that computes the gradient of its weight only if it is asked for."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight.mT

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        return 2 * g @ weight, 2 * g.flatten(0, -2).mT @ x.flatten(0, -2) if wanted else None


class Custom(Text):
    """With a matrix of its own kind between embedding and block, and a parameter that belongs to no layer."""

    def __init__(self):
        super().__init__(tied=False)
        self.matrix, self.shift = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(5, 6))

    def forward(self, tokens):
        return self.head(self.block(Doubled.apply(self.embed(tokens) + self.shift, self.matrix)))


class InPlace(nn.Sequential):
    """A first layer whose output is changed in place."""

    def __init__(self):
        super().__init__(nn.Embedding(11, 6), nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 11))
        self[0].requires_grad_(False)


class Attention(nn.Module):
    """torch's own encoder layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.layer = nn.TransformerEncoderLayer(6, 2, 9, batch_first=True)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens)))


def frozen():
    return Text(tied=False).requires_grad_(False)


MODELS = {
    "plain": lambda: Text(tied=False),
    "tied": Text,
    "checkpointed": lambda: Text(False),
    "checkpointed, reentrant": lambda: Text(True),
    "custom function": Custom,
    "frozen": frozen,
    "in place": InPlace,
    "attention": Attention,
}


def loss_of(model, tokens):
    """With a part that depends on the weights alone."""
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    return loss + 0.1 * sum(parameter.square().sum() for parameter in model.parameters())


def by_plain_backward(model, targets, batches):
    """The same with every gradient there is."""
    model.eval().requires_grad_(True)
    collector = Collector(targets, EVERYTHING)
    collector.attach()
    for index, batch in enumerate(batches):
        collector.begin_batch(batch, index)
        loss_of(model, batch).backward()
        collector.end_batch()
    collector.detach()
    return collector.statistics


@pytest.mark.parametrize("name", MODELS)
def test_the_statistics_are_those_of_a_whole_backward_pass(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    batches = [torch.randint(11, (4, 5)) for _ in range(3)]
    targets = lp.find_targets(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = lp.collect_statistics(model, targets, batches, forward=loss_of, wanted=EVERYTHING)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert len(found) >= 2
    for target, expected in by_plain_backward(model, targets, batches).items():
        assert float(expected.gradient_gram.trace()) > 0
        for (key, ours), (_, theirs) in zip(found[target].tensors(), expected.tensors(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind_whatever_happens(name):
    model, tokens = MODELS[name](), torch.randint(11, (4, 5))
    targets = lp.find_targets(model)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, index) if index % 3 == 0 else None
    model.train()
    before = [(p.requires_grad, p.grad) for p in model.parameters()]

    def broken(module, batch):
        loss_of(module, batch).backward()
        raise KeyboardInterrupt

    for forward in (loss_of, broken):
        try:
            lp.collect_statistics(model, targets, [tokens], forward=forward, gradients=True)
        except KeyboardInterrupt:
            assert forward is broken
        for parameter, (requires_grad, gradient) in zip(model.parameters(), before, strict=True):
            assert parameter.requires_grad == requires_grad
            assert parameter.grad is gradient
        assert all(module.training and not module._forward_hooks for module in model.modules())
    gc.collect()


def test_no_product_for_a_weight_is_computed():
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    x = torch.randn(10, 32)
    products = 2 * 10 * (32 * 64 + 64 * 32 + 32 * 8)
    targets = lp.find_targets(model)
    with FlopCounterMode(display=False) as counter, no_weight_gradients(model, targets):
        model(x).square().sum().backward()
    first = 2 * 10 * 32 * 64  # whose input needs no gradient
    assert counter.get_total_flops() == 2 * products - first
    assert all(layer.weight.grad is None for layer in targets.values())


def test_an_input_that_was_changed_is_an_error_as_in_training():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.first(x)
            y = self.second(h)
            h += 1.0
            return (y + h).square().mean()

    model = Changed()
    with pytest.raises(StatisticsError, match="input of a Linear was changed in place"):
        lp.collect_statistics(model, lp.find_targets(model), [torch.randn(3, 4)], gradients=True)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_optimizer_that_steps_inside_backward_does_not_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4))
    steps = []
    for parameter in (model[0].bias, model[1].weight, model[2].bias):
        parameter.register_post_accumulate_grad_hook(lambda parameter: steps.append(parameter.sub_(1.0)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = lp.collect_statistics(model, lp.find_targets(model), [torch.randn(8, 6)], gradients=True)
    assert not steps
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(float(layer.gradient_gram.trace()) > 0 for layer in statistics.values())


@pytest.mark.parametrize("excluded", [None, "2"])
def test_a_loss_that_asks_for_the_gradient_in_a_weight_itself(excluded):
    """As adaptive weights of several losses do: the statistics are those of a full backward pass.

    But for layers whose outputs such gradients pass: those count as gradients of the loss.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    batches = [torch.randn(8, 6) for _ in range(3)]

    def parts(net, x):
        h = net(x)
        return (h - x).square().mean(), h.abs().mean()

    def ratio(net, losses):
        slopes = [torch.autograd.grad(loss, net[-1].weight, retain_graph=True)[0].norm() for loss in losses]
        return (slopes[0] / slopes[1]).detach()

    def adaptive(net, x):
        losses = parts(net, x)
        return losses[0] + ratio(net, losses) * losses[1]

    ratios = [ratio(model, parts(model, x)) for x in batches]

    def plain(net, x):
        losses = parts(net, x)
        return losses[0] + ratios.pop(0) * losses[1]

    targets = lp.find_targets(model, exclude_modules=excluded)
    found = lp.collect_statistics(model, targets, batches, forward=adaptive, gradients=True)
    expected = lp.collect_statistics(model, targets, batches, forward=plain, gradients=True)
    for name, layer in expected.items():
        if excluded:
            torch.testing.assert_close(found[name].gradient_gram, layer.gradient_gram, rtol=1e-4, atol=1e-8)
        assert int(found[name].samples) == int(layer.samples) == 24
    report = lp.compress_(model, 0.5, batches, adaptive, exclude_modules=excluded)
    assert report.plan.loss_increase is not None
