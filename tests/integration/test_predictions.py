"""Predictions of the loss are in the unit of the loss that the user knows, whatever that is: a search over losses."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.callbacks._figures import tails_of

SYMBOLS, WIDTH = 12, 32
#: A cut that costs less or more is not a small one; in the unit of a mean over predictions.
SMALL = (1e-3, 0.1)

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, length, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.tokens, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def texts(count, length, seed):
    """Each symbol depends on the two before it."""
    law = torch.distributions.Dirichlet(torch.full((SYMBOLS,), 0.1))
    torch.manual_seed(0)
    chances = law.sample((SYMBOLS, SYMBOLS))
    torch.manual_seed(seed)
    symbols = [torch.randint(SYMBOLS, (count,)), torch.randint(SYMBOLS, (count,))]
    while len(symbols) < length + 1:
        symbols.append(torch.multinomial(chances[symbols[-2], symbols[-1]], 1)[:, 0])
    return torch.stack(symbols, 1)


def mean(model, text):
    return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def total(model, text):
    return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten(), reduction="sum")


def half_ignored(model, text):
    labels = text[:, 1:].clone()
    labels[:, ::2] = -100
    return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), labels.flatten())


def trained(model, data, loss, steps, rate=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, data[step % len(data)]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def on_average(model, data, loss):
    return sum(float(loss(model, batch)) for batch in data) / len(data)


def assert_predicted(model, batches, data, loss, given, unit, keeps=(0.95, 0.85, 0.7, 0.5), **settings):
    """The increase by each cut that is a small one, within a factor of 2 of what it is on other data."""
    before, looked_at = on_average(model, data, loss), 0
    for keep in keeps:
        after = copy.deepcopy(model)
        report = lp.compress_(after, keep, batches, loss=given, **settings)
        measured = on_average(after, data, loss) - before
        if SMALL[0] * unit < measured < SMALL[1] * unit:
            looked_at += 1
            assert 0.5 < report.plan.loss_increase / measured < 2.0, (keep, report.plan.loss_increase, measured)
    assert looked_at > 0


LOSSES = {"mean": mean, "sum": total, "ignored": half_ignored, "sampled": None}


@pytest.mark.parametrize("length", [8, 64, 256])
def test_language_models(length):
    rows = max(2048 // length, 4)
    text = texts(64 * rows, length, seed=1).split(rows)
    torch.manual_seed(2)
    model = trained(GPT(length), text[:40], mean, 400)
    for name, loss in LOSSES.items():
        batches = text[40:48] if loss else [batch[:, :-1] for batch in text[40:48]]
        unit = rows * length if name == "sum" else 1.0
        assert_predicted(model, batches, text[48:], loss or mean, loss, unit, exclude_modules="head")


def points(seed, count=2048):
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=noise)
    mixing = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    return x, torch.tanh(x @ mixing) + 0.5 * torch.randn(count, 6, generator=noise)


def mlp():
    return nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 6))


def classified(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1].argmax(1))


def regressed(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def weighed(model, batch):
    return 1e3 * regressed(model, batch)


@pytest.mark.parametrize(("loss", "unit"), [(classified, 1.0), (regressed, 1.0), (weighed, 1e3)])
def test_classifiers_and_regression(loss, unit):
    data = [list(zip(*(part.split(64) for part in points(seed)), strict=True)) for seed in (1, 2)]
    torch.manual_seed(0)
    model = trained(mlp(), data[0], loss, 600)
    assert_predicted(model, data[0], data[0], loss, loss, unit, exclude_modules="4")


def test_vision_transformers():
    timm = pytest.importorskip("timm")
    noise = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 3, 32, 32, generator=noise)
    labels = torch.randint(6, (512,), generator=noise)
    images = 0.15 * centres[labels] + torch.randn(512, 3, 32, 32, generator=noise)
    data = list(zip(images.split(32), labels.split(32), strict=True))
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 6}
    model = timm.models.VisionTransformer(**shape)

    def loss(module, batch):
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    trained(model, data, loss, 60, rate=1e-3)
    assert_predicted(model, data, data, loss, loss, 1.0, keeps=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3))


class Lit(pl.LightningModule):
    def __init__(self, length, loss):
        super().__init__()
        self.net, self.loss = GPT(length), loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Watch(pl.Callback):
    """What the loss was before the surgery and after, and the forecasts beside what a cut would have done."""

    def __init__(self, data, prehab=None):
        self.data, self.prehab = data, prehab
        self.before = self.after = self.report = None
        self.forecasts = []

    def loss(self, module):
        modes = module.training
        found = on_average(module.net.eval(), self.data, module.loss)
        module.net.train(modes)
        return found

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.prehab is None or self.prehab.forecast is None or (batch_idx + 1) % 10:
            return
        layers = [layer for layer in self.prehab._layers if layer.rank is not None]
        tails_of(trainer, layers)
        before, kept = self.loss(pl_module), copy.deepcopy(pl_module.state_dict())
        with torch.no_grad():
            for layer in layers:
                layer.view.write_(layer.view.weight + layer.cut())
        after = self.loss(pl_module)
        pl_module.load_state_dict(kept)
        self.forecasts.append((self.prehab.forecast, after - before))

    def on_train_epoch_end(self, trainer, pl_module):
        if self.report is None:
            self.before = self.loss(pl_module)

    def on_surgery(self, trainer, pl_module, report):
        self.report, self.after = report, self.loss(pl_module)


@pytest.mark.parametrize(("length", "loss", "accumulate"), [(64, mean, 1), (64, total, 2), (8, half_ignored, 1)])
def test_in_training(length, loss, accumulate, make_trainer):
    rows = max(1024 // length, 4)
    text = texts(60 * rows, length, seed=3)
    loader = DataLoader(TensorDataset(text), rows)
    torch.manual_seed(4)
    watch = Watch(text.split(rows)[:30])
    compression = lp.CompressionCallback(6, 0.8, calibration_batches=16, exclude_modules="*head")
    settings = {"accumulate_grad_batches": accumulate, "callbacks": [compression, watch]}
    make_trainer(max_epochs=7, **settings).fit(Lit(length, loss), loader)
    measured = watch.after - watch.before
    unit = rows * length if loss is total else 1.0
    assert measured > 1e-3 * unit
    assert 0.5 < watch.report.plan.loss_increase / measured < 2.0


@pytest.mark.parametrize(("length", "loss"), [(64, mean), (8, total)])
def test_forecasts(length, loss, make_trainer):
    rows = max(1024 // length, 4)
    text = texts(60 * rows, length, seed=5)
    torch.manual_seed(6)
    lit = Lit(length, loss)
    trained(lit.net, text.split(rows), mean, 300)
    prehab = lp.PrehabCallback(forecast_every_n_steps=10)
    watch = Watch(text.split(rows)[:30], prehab)
    compression = lp.CompressionCallback(4, 0.8, calibration_batches=16, exclude_modules="*head")
    make_trainer(max_epochs=5, callbacks=[prehab, compression, watch]).fit(lit, DataLoader(TensorDataset(text), rows))
    unit = rows * length if loss is total else 1.0
    small = [(ours, exact) for ours, exact in watch.forecasts if SMALL[0] * unit < exact < SMALL[1] * unit]
    assert len(small) >= 3
    ratios = sorted(ours / exact for ours, exact in small)
    assert 0.5 < ratios[len(ratios) // 2] < 2.0, small
    assert all(0.33 < ratio < 3.0 for ratio in ratios), small
