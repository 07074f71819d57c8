from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, StatisticsError
from lightning_prehab.kinds.conv import ChannelView, SpatialView
from lightning_prehab.statistics import collector
from lightning_prehab.statistics.batches import batch_size, padding_mask
from lightning_prehab.statistics.collector import Collector
from lightning_prehab.statistics.sums import Wanted


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
    with pytest.raises(ArgumentError, match="got str; pass loss="):
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
    collector = Collector({"layer": layer}, Wanted(inputs=True, gradients=True))
    collector.attach()
    x = torch.randn(6, 4, requires_grad=True)
    collector.begin_batch(x)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    collector.end_batch()
    assert int(collector.statistics["layer"].tokens) == 6


def test_only_counted_between_begin_and_end():
    layer = nn.Linear(4, 4)
    collector = Collector({"layer": layer}, Wanted(inputs=True))
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
        collector = Collector({"layer": layer}, Wanted(inputs=True, gradients=True), drop_overflow=drop)
        collector.attach()
        collector.begin_batch(torch.zeros(3))
        (layer(torch.randn(3, 4)) * torch.tensor([[1.0], [float("inf")], [1.0]])).sum().backward()
        assert int(collector.statistics["layer"].tokens) == tokens
        assert bool(torch.isfinite(collector.statistics["layer"].gradient_gram).all()) == drop


def test_frozen_layers_are_reported_as_such():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    collector = Collector({"0": model[0]}, Wanted(inputs=True, gradients=True))
    model.requires_grad_(False)
    collector.attach()
    collector.begin_batch(torch.zeros(3))
    model(torch.randn(3, 4))
    assert "no output gradient" in collector.statistics["0"].missing(Wanted(inputs=True, gradients=True))


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
    collector = Collector({"fc": model.fc}, Wanted(inputs=True, gradients=True))
    collector.attach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        collector.begin_batch(x)
        model(x).square().mean().backward()
    torch.testing.assert_close(collector.statistics["fc"].input_gram, x.mT @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(20,), (4, 5), (2, 2, 5)], ids=["rows", "sequences", "images"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_output_that_is_changed_in_place(shape, bias):
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(inplace=inplace), nn.Linear(8, 3))
        x = torch.randn(*shape, 6)
        statistics = lp.collect_statistics(
            model, lp.find_targets(model), [x], forward=lambda model, x: model(x).square().mean(), gradients=True
        )
        found.append(statistics["0"])
    ours, expected = found
    assert int(ours.tokens) == 20
    torch.testing.assert_close(ours.input_gram, expected.input_gram)
    torch.testing.assert_close(ours.gradient_gram, expected.gradient_gram)
    torch.testing.assert_close(ours.fisher_rows, expected.fisher_rows)


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
    with pytest.raises(ArgumentError, match="cannot be called on a batch of type Batch with 6x4, 6x3 .*loss="):
        lp.collect_statistics(model, targets, [batch])
    with pytest.raises(ArgumentError, match="batches is one tensor"):
        lp.collect_statistics(model, targets, batch.x)


class Attention(nn.Module):
    """Queries, keys and values read one tensor; the output projection another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, size) for size in (6, 5, 4, 3))
        self.first, self.other, self.odd = nn.Linear(6, 6), None, "k"

    def forward(self, x):
        x = self.first(x)
        odd = x if self.other is None else self.other
        q = self.q(odd if self.odd == "q" else x)
        k, v = self.k(odd if self.odd == "k" else x), self.v(x)
        return self.out(q) + k.sum(-1, keepdim=True) + v.sum(-1, keepdim=True)


@pytest.mark.parametrize("gradients", [False, True])
def test_layers_fed_by_the_same_tensor_share_their_input_sums(gradients):
    model = Attention()
    targets = {name: getattr(model, name) for name in ("first", "q", "k", "v", "out")}
    batches = [torch.randn(7, 6) for _ in range(3)]
    statistics = lp.collect_statistics(model, targets, batches, gradients=gradients)
    assert statistics["k"].input_gram is statistics["q"].input_gram is statistics["v"].input_gram
    assert statistics["out"].input_gram is not statistics["q"].input_gram
    for name in targets:
        alone = lp.collect_statistics(model, {name: targets[name]}, batches, gradients=gradients)[name]
        for (key, ours), (_, theirs) in zip(statistics[name].tensors(), alone.tensors(), strict=True):
            assert torch.equal(ours, theirs), (name, key)


class Program(nn.Module):
    """Feeds some tensors to some layers in any order; some outputs are used, some are not."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.layers = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)])

    def forward(self, *tensors):
        total = torch.zeros(())
        for layer, tensor, used in self.calls:
            y = self.layers[layer](tensors[tensor]).tanh()
            total = total + (y if used else y.detach()).square().sum()
        return total


programs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=300, deadline=None)
@given(st.lists(programs, min_size=1, max_size=4), st.booleans())
def test_whatever_is_fed_to_whom_everybody_counts_its_own(programs, gradients):
    """Against one layer watched alone: shared work must not change what anybody has seen."""
    model = Program([])
    targets = {str(index): layer for index, layer in enumerate(model.layers)}
    batches = [[torch.randn(5, 4) for _ in range(3)] for _ in programs]

    def watch(names):
        collector = Collector({name: targets[name] for name in names}, Wanted(True, gradients, gradients, True))
        collector.attach()
        for index, (calls, batch) in enumerate(zip(programs, batches, strict=True)):
            model.calls = calls
            collector.begin_batch(batch, index)
            loss = model(*batch)
            if loss.requires_grad:
                loss.backward()
            collector.end_batch()
        collector.detach()
        return collector.statistics

    together = watch(targets)
    for name in targets:
        for (key, ours), (_, theirs) in zip(together[name].tensors(), watch([name])[name].tensors(), strict=True):
            assert torch.equal(ours, theirs), (name, key)


def test_inference_tensors_are_never_taken_for_the_same():
    model = Attention()
    with torch.inference_mode():
        x = torch.randn(7, 6)
        statistics = lp.collect_statistics(model, {"q": model.q, "k": model.k}, [x], wanted=Wanted(True))
    assert int(statistics["k"].tokens) == 7


def test_restored_sums_stay_with_their_layers():
    """Two layers with different pasts see the same from now on."""
    model = Attention()
    collector = Collector({"q": model.q, "k": model.k}, Wanted(True, magnitudes=True))
    past = lp.LayerStatistics(6, 5)
    past.update_inputs(torch.randn(3, 6))
    collector.statistics["k"].restore_(past.snapshot())
    collector.attach()
    collector.begin_batch(torch.zeros(7, 6))
    model(torch.randn(7, 6))
    collector.end_batch()
    collector.detach()
    q, k = collector.statistics["q"], collector.statistics["k"]
    assert (int(q.tokens), int(k.tokens)) == (7, 10)
    torch.testing.assert_close(k.input_gram, q.input_gram + past.input_gram)


def test_an_input_changed_in_place_between_two_layers_is_not_shared():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            x.mul_(2.0)
            return y + self.b(x)

    model = Model()
    statistics = lp.collect_statistics(model, {"a": model.a, "b": model.b}, [torch.ones(5, 4)])
    assert statistics["b"].input_gram[0, 0] == 4 * statistics["a"].input_gram[0, 0]


def test_weight_gradients_equal_autograd():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batches = [(torch.randn(6, 5), torch.randint(3, (6,))), (torch.randn(4, 5), torch.randint(3, (4,)))]

    def loss(module, batch):
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    found = lp.collect_statistics(model, {"0": model[0]}, batches, forward=loss, gradients=True)["0"]
    gradients = [torch.autograd.grad(loss(model, batch), model[0].weight)[0] for batch in batches]
    torch.testing.assert_close(found.fisher()[0], sum(g.square().sum(1) for g in gradients))
    torch.testing.assert_close(found.fisher()[1], sum(g.square().sum(0) for g in gradients))
    torch.testing.assert_close(found.mean_weight_gradient(), (6 * gradients[0] + 4 * gradients[1]) / 10)


def test_halves_are_the_odd_batches():
    model, batches = nn.Sequential(nn.Linear(5, 4)), [torch.randn(6, 5) for _ in range(4)]
    wanted = Wanted(inputs=True, gradients=True, halves=True)
    found = lp.collect_statistics(model, {"0": model[0]}, batches, wanted=wanted)["0"]
    odd = torch.cat([batches[1], batches[3]])
    torch.testing.assert_close(found.half.input_gram, odd.mT @ odd)
    assert (int(found.half.samples), int(found.samples)) == (12, 24)
    assert float(found.half.gradient_gram.trace()) < float(found.gradient_gram.trace())


def test_wanted_collects_no_more_than_asked():
    model = nn.Sequential(nn.Linear(5, 4))
    found = lp.collect_statistics(model, {"0": model[0]}, [torch.randn(6, 5)], wanted=Wanted(inputs=True))["0"]
    assert found.gradient_gram is found.weight_gradient is found.half is None
    everything = lp.collect_statistics(model, {"0": model[0]}, [torch.randn(6, 5)], gradients=True)["0"]
    assert everything.gradient_gram is not None
    assert everything.weight_gradient is not None


def test_a_known_number_of_batches_limits_the_tokens(monkeypatch):
    monkeypatch.setattr("lightning_prehab.statistics.collector.MIN_TOKENS", 16)
    layer, x = nn.Linear(10, 6), torch.randn(500, 10)
    used = []
    monkeypatch.setattr(
        "lightning_prehab.statistics.sums.sample_by_energy",
        lambda rows, at_most: used.append(at_most) or rows[:at_most],
    )
    for batches, expected in ((None, [None, None]), (2, [40, 24]), (20, [16, 16])):
        collector = Collector({"layer": layer}, Wanted(True, True), batches=batches)
        collector.attach()
        collector.begin_batch(x)
        layer(x).sum().backward()
        collector.end_batch()
        collector.detach()
        assert used == expected
        assert int(collector.statistics["layer"].tokens) == 500
        used.clear()


def test_memory_is_announced(caplog):
    caplog.set_level("INFO", logger="lightning_prehab.calibration")
    model = nn.Sequential(nn.Linear(1000, 500))
    statistics = lp.collect_statistics(model, {"0": model[0]}, [torch.randn(4, 1000)])
    held = sum(t.numel() * 4 for name, t in statistics["0"].tensors() if t.dim() > 0)
    assert f"at most {held / 1e6:.1f} MB" in caplog.text


@pytest.mark.parametrize("batches", [None, 2], ids=["all tokens", "a sample of them"])
@pytest.mark.parametrize("drop_overflow", [False, True])
def test_patches_of_large_batches_are_made_a_few_samples_at_a_time(batches, drop_overflow, monkeypatch):
    """The same sums, exactly where every token is used; a padding mask of a signal goes along."""
    model = nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.Unflatten(2, (4, 2)), nn.Conv2d(6, 5, 3, 2, 1))
    other = nn.Conv2d(6, 5, 3, 2, 1)
    x, mask = torch.randn(10, 3, 8), torch.ones(10, 8, dtype=torch.bool)
    mask[:, 6:] = False
    targets = {"signal": model[0], "image": model[2], "beside": other}
    wanted = Wanted(inputs=True, gradients=True, weight_gradients=True, halves=True, magnitudes=True)
    found, sizes = {}, []
    inputs = ChannelView.inputs

    def spy(view, given):
        sizes.append(inputs(view, given).numel())
        return inputs(view, given)

    spatial_inputs = SpatialView.inputs

    def spatial_spy(view, given):
        sizes.append(spatial_inputs(view, given).numel())
        return spatial_inputs(view, given)

    monkeypatch.setattr(ChannelView, "inputs", spy)
    monkeypatch.setattr(SpatialView, "inputs", spatial_spy)
    for limit in (2**26, 300):
        monkeypatch.setattr(collector, "MAX_ENTRIES", limit)
        counting = Collector(targets, wanted, drop_overflow=drop_overflow, batches=batches)
        counting.attach()
        for index in range(2):
            sizes.clear()
            counting.begin_batch({"x": x, "attention_mask": mask}, index)
            y = model[1](model[0](x))
            (model[2](y).square().sum() + other(y).sin().sum()).backward()
            counting.end_batch()
            assert max(sizes) <= limit
        counting.detach()
        found[limit] = counting.statistics
    assert list(found[300]) == ["signal", "image", "image:spatial", "beside", "beside:spatial"]
    assert int(found[300]["signal"].tokens) == 2 * 10 * 6
    for name, whole in found[2**26].items():
        for (key, one), (_, other_one) in zip(whole.tensors(), found[300][name].tensors(), strict=True):
            if batches is not None and key.endswith("gram"):
                pair = one.diagonal().sum(), other_one.diagonal().sum()  # exact whatever is sampled
            else:
                pair = one, other_one
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


class Counting(nn.Module):
    """Counts its forward passes in a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


@pytest.mark.parametrize("policy", [None, lp.ProbeBudget(0.5)])
@pytest.mark.parametrize("layers_at_once", [None, 1])
@pytest.mark.parametrize("evaluate", [None, 0.5])
def test_no_pass_of_a_cut_leaves_a_trace_in_the_buffers(policy, layers_at_once, evaluate):
    model = Counting()
    calls = model.calls
    lp.compress_(
        model,
        0.5,
        [torch.randn(64, 8) for _ in range(2)],
        policy=policy,
        layers_at_once=layers_at_once,
        evaluate=evaluate,
    )
    assert model.calls is calls
    assert calls == 0


class AsksForGradients(nn.Module):
    """Forces of an energy, say: a gradient inside of forward, in a weight that calibration would leave out."""

    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(6, 6), wrap

    def forward(self, x):
        out = self.layer(x)
        try:
            (slope,) = torch.autograd.grad(out.square().sum(), self.layer.weight, create_graph=True)
        except RuntimeError as error:
            if self.wrap:
                raise RuntimeError("in block 3:\n" + str(error)) from error
            raise
        return out @ slope


@pytest.mark.parametrize("wrap", [False, True])
def test_a_model_may_ask_for_a_gradient_in_a_weight(wrap):
    torch.manual_seed(0)
    model, data = AsksForGradients(wrap), [torch.randn(8, 6) for _ in range(2)]
    found = lp.collect_statistics(model, lp.find_targets(model), data, gradients=True)["layer"]
    assert found.samples == 16
    assert found.gradient_gram is not None
