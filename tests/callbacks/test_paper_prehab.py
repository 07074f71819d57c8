import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError

STEPS = 12


class Watch(pl.Callback):
    """Weights after each batch, and what is left on the optimizer."""

    def __init__(self):
        self.weights, self.logged, self.hooks = [], [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(pl_module.net[0].weight.detach().clone())
        self.logged.append(float(trainer.callback_metrics.get("prehab/strength", -1.0)))

    def teardown(self, trainer, pl_module, stage):
        self.hooks = [len(optimizer._optimizer_step_post_hooks) for optimizer in trainer.optimizers]


def root_of(inputs):
    """Symmetric root of E[x x^T], by numpy in float64."""
    x = inputs.double().numpy()
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    return torch.from_numpy((vectors * np.sqrt(values)) @ vectors.T)


def transcription(net, data, batch_size, watched, objective, clip=None):
    """The published recipe on the first layer, written out: train W for the watched batches, then M with M = W S."""
    net = copy.deepcopy(net).double()
    first, others = net[0], [p for i, layer in enumerate(net) if i for p in layer.parameters()]
    others = [first.bias, *others]
    rest = torch.optim.Adam(others, lr=1e-3)
    own = torch.optim.Adam([first.weight], lr=1e-3)
    x, y = (part.double() for part in data.tensors)
    batches = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
    root = m = None
    weights = []
    for step in range(STEPS):
        part = batches[step % len(batches)]
        if step == watched:
            root = root_of(torch.cat([x[batches[i % len(batches)]] for i in range(watched)]).float())
            m = (first.weight.detach() @ root).requires_grad_()
            own = torch.optim.Adam([m], lr=1e-3)
        weight = first.weight if m is None else m @ torch.linalg.inv(root)
        loss = nn.functional.mse_loss(net[1:](nn.functional.linear(x[part], weight, first.bias)), y[part])
        if m is not None:
            s = torch.linalg.svdvals(m)
            t = step - watched
            strength = 5.0 if objective == "nuclear_norm" else min(1e-4 * 10 ** (t / 2), 10.0)
            loss = loss + strength * (s.sum() if objective == "nuclear_norm" else s.square().sum() / s[0] ** 2)
        rest.zero_grad()
        own.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([*others, first.weight if m is None else m], clip)
        rest.step()
        own.step()
        weights.append((first.weight if m is None else m @ torch.linalg.inv(root)).detach().clone())
    return weights


@pytest.mark.parametrize(("objective", "clip"), [("stable_rank", None), ("stable_rank", 0.5), ("nuclear_norm", None)])
def test_it_is_the_published_recipe(objective, clip, lit, loader, data, make_trainer):
    expected = transcription(lit.net, data, loader.batch_size, 4, objective, clip)
    lit.make_optimizer = lambda parameters: torch.optim.Adam(parameters, lr=1e-3)
    watch = Watch()
    compression = lp.CompressionCallback(2, 0.5, calibration_batches=4, factorization=lp.SVD())
    prehab = lp.PaperPrehab(objective, target_modules="net.0")
    trainer = make_trainer(max_epochs=3, gradient_clip_val=clip, callbacks=[prehab, compression, watch])
    trainer.fit(lit, loader)
    for step, (ours, theirs) in enumerate(zip(watch.weights[:STEPS], expected, strict=True)):
        # Adam moves each entry by up to 1e-3 a step; one warm power iteration in float32 is not an exact SVD.
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0, msg=lambda m, s=step: f"{s}: {m}")
    assert watch.hooks == [0]
    if objective == "stable_rank":
        assert watch.logged[4:7] == pytest.approx([1e-4, 10**-3.5, 1e-3], rel=1e-5)


def test_the_optimizer_starts_anew_at_both_ends(lit, loader, make_trainer):
    steps = []

    class State(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state.get(getattr(pl_module.net[0], "weight", None), {})
            steps.append(int(state.get("step", 0)))

    lit.make_optimizer = lambda parameters: torch.optim.Adam(parameters, lr=1e-3)
    prehab = lp.PaperPrehab(target_modules="net.0", stop_epoch=1)
    compression = lp.CompressionCallback(2, 0.5, calibration_batches=2, factorization=lp.SVD())
    make_trainer(max_epochs=3, callbacks=[prehab, compression, State()]).fit(lit, loader)
    n = len(loader)
    assert steps[:n] == [1, 0, *range(1, n - 2), 0]
    assert steps[n : 2 * n] == list(range(1, n + 1))


def test_a_failing_step_leaves_the_weight(lit, loader, make_trainer):
    before = []

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            before.append(lit.net[0].weight.detach().clone())
            closure()
            if len(before) == 5:
                raise KeyboardInterrupt
            return super().step()

    lit.make_optimizer = lambda parameters: Failing(parameters, lr=0.1)
    prehab = lp.PaperPrehab(target_modules="net.0")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(callbacks=[prehab]).fit(lit, loader)
    assert len(before) == 5
    torch.testing.assert_close(lit.net[0].weight.detach(), before[-1], atol=0, rtol=0)


def test_wrong_words():
    with pytest.raises(ArgumentError, match="objective must be 'stable_rank' or 'nuclear_norm', got 'rank'"):
        lp.PaperPrehab("rank")
