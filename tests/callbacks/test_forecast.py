"""The cut is tried on a copy of the module, and nothing of it is seen by anybody."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_prehab as lp
from lightning_prehab.callbacks import _site, _trial
from lightning_prehab.callbacks._forecast import BATCHES, Forecast


def run(make_trainer, lit, data, epochs=4, kind=lp.KroneckerSVD, **settings):
    """Prehab and a cut; what calibration has seen for the cut, and the callbacks."""
    seen = []

    class Spy(kind):
        def decompose(self, items):
            seen.append([(int(layer.tokens), layer.input_gram.clone()) for _, layer in items])
            return super().decompose(items)

    prehab = lp.PrehabCallback(lp.TailShrinkage(), space="loss", forecast_every_n_steps=2)
    compression = lp.CompressionCallback(epochs - 1, 0.5, factorization=Spy(), calibration_batches=4)
    trainer = make_trainer(max_epochs=epochs, callbacks=[prehab, compression], **settings)
    trainer.fit(lit, DataLoader(data, 16))
    return seen[-1], prehab, compression


@pytest.mark.parametrize("factorization", [lp.KroneckerSVD, lp.WhitenedSVD])
@pytest.mark.parametrize("attention", [False, True])
def test_a_trial_is_not_counted_and_changes_no_weight(attention, factorization, lit, data, make_trainer, monkeypatch):
    """Also where forward passes alone are counted."""
    if attention:

        class Attending(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention, self.out = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 6)

            def forward(self, x):
                return self.out(self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])

        lit.net = Attending()
    results = []
    for tried in (True, False):
        if not tried:
            monkeypatch.setattr(Forecast, "follow", lambda *args, **kwargs: None)
            monkeypatch.setattr(_site, "where_possible", lambda work: 1.0)
        module = copy.deepcopy(lit)
        torch.manual_seed(1)
        seen, prehab, compression = run(make_trainer, module, data, kind=factorization)
        assert (prehab.forecast is not None) == tried
        results.append((seen, module.state_dict(), torch.get_rng_state(), compression.report.ranks))
    (seen, state, randomness, ranks), (others, other_state, other_randomness, other_ranks) = results
    assert ranks == other_ranks
    assert torch.equal(randomness, other_randomness)
    for (tokens, gram), (other_tokens, other_gram) in zip(seen, others, strict=True):
        assert tokens == other_tokens
        assert torch.equal(gram, other_gram)
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())


class Busy(pl.LightningModule):
    """Its training_step reaches for the optimizer, the logger and a counter."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.optimizers().param_groups[0]["lr"] *= 0.99
        self.logger.log_metrics({"calls": self.calls}, self.calls)
        return nn.functional.mse_loss(self.net(batch[0]), batch[1]) * min(1.0, self.calls / 200)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


class Fussy(pl.LightningModule):
    """Takes its batch to pieces, skips some, and needs gradients for its loss."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        x, y = batch.pop(0), batch.pop(0)
        if batch_idx % 3 == 2:
            return None
        x = x.clone().requires_grad_()
        loss = nn.functional.mse_loss(self.net(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        self.log("loss", loss)
        return loss + slope.square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
def test_any_training_step_can_be_tried(data, make_trainer):
    lit = Fussy()
    _, prehab, compression = run(make_trainer, lit, data)
    assert prehab.forecast is not None
    assert lit.steps == 4 * 6  # as many as without
    assert compression.report.plan.loss_increase < 1e-2


def test_every_run_of_a_trial_starts_from_the_same(data, make_trainer):
    """A loss that is weighed by what the module counts, in a number and in a buffer."""

    class Counting(Busy):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.calls += 1
            self.seen += 1
            return nn.functional.mse_loss(self.net(batch[0]), batch[1]) + 0.1 * self.calls + 0.1 * self.seen

    losses = []

    class Try(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trial = _trial.Trial(trainer, pl_module)
            losses.append([trial.loss(batch, batch_idx, [], 0.0) for _ in range(3)])

    make_trainer(callbacks=[Try()]).fit(Counting(), DataLoader(data, 16))
    assert len(losses) == 6
    assert all(len(set(found)) == 1 for found in losses)


def test_a_module_that_cannot_be_copied_trains_without_a_forecast(lit, data, make_trainer):
    class Single(type(lit)):
        def __deepcopy__(self, memo):
            raise TypeError("there can be only one")

    lit.__class__ = Single
    _, prehab, compression = run(make_trainer, lit, data)
    assert prehab.forecast is None
    assert compression.done
    compression = lp.CompressionCallback(1, 0.5)
    fresh = Single(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)))
    make_trainer(max_epochs=2, callbacks=[compression]).fit(fresh, DataLoader(data, 16))
    assert compression.report.plan.loss_increase is None  # rather than a number in another unit
    assert "predicted loss increase" not in str(compression.report)


def test_a_loss_that_cannot_be_computed_warns_and_goes_on(lit, data, make_trainer):
    class Picky(type(lit)):
        def training_step(self, batch, batch_idx):
            if not self.training:
                raise RuntimeError("only in training")
            return super().training_step(batch, batch_idx)

    lit.__class__ = Picky
    with pytest.warns(UserWarning, match="could not be measured .RuntimeError: only in training"):
        _, prehab, compression = run(make_trainer, lit, data)
    assert prehab.forecast is None
    assert compression.done


def test_what_a_training_step_reaches_is_as_it_was(data, make_trainer, tmp_path):
    logger, lit = CSVLogger(tmp_path), Busy()
    logged = []
    logger.log_metrics = lambda metrics, step=None: logged.extend(key for key in metrics if key == "calls")
    _, prehab, _ = run(make_trainer, lit, data, logger=logger)
    assert prehab.forecast is not None
    assert lit.calls == len(logged) == 4 * 6
    assert lit.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.99 ** (4 * 6))
    assert lit.logger is logger


def test_what_was_tried_is_followed_by_the_energy_and_stored():
    forecast = Forecast()
    assert forecast.predict(1.0) is None
    forecast.begin()
    forecast._tried = [(0.5, 2.0), (0.5, 4.0), (0.5, 3.0)]
    assert forecast.predict(0.04) == pytest.approx(0.5 * 0.2 + 3.0 * 0.04)
    again = Forecast()
    again.load_state_dict(forecast.state_dict())
    assert vars(again) == vars(forecast)
    assert forecast._left == BATCHES


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_auto_decides_by_the_weights_of_now(seed, make_trainer, monkeypatch):
    """While a model learns fast an older trial is far too low: what seems free is tried again before it counts."""
    noise = torch.Generator().manual_seed(4)
    x, mixing = torch.randn(512, 20, generator=noise), torch.randn(20, 10, generator=noise)
    y = (x @ mixing + torch.randn(512, 10, generator=noise)).argmax(1)
    real, found = lp.PrehabCallback.renew_forecast, []

    def renew(self, trainer, pl_module, batch, batch_idx):
        seemed = self.forecast
        real(self, trainer, pl_module, batch, batch_idx)
        net, kept = pl_module.net, copy.deepcopy(pl_module.state_dict())
        with torch.no_grad():
            before = nn.functional.cross_entropy(net(x), y)
            for layer in self._layers:
                if layer.rank is not None:
                    layer.view.write_(layer.view.weight + layer.cut())
            after = nn.functional.cross_entropy(net(x), y)
        pl_module.load_state_dict(kept)
        found.append((seemed, self.forecast, float(after - before)))

    monkeypatch.setattr(lp.PrehabCallback, "renew_forecast", renew)
    limit, shuffling = 0.01, torch.manual_seed(seed)
    compression = lp.CompressionCallback("auto", 0.4, calibration_batches=4, forecast_below=limit)
    callbacks = [lp.PrehabCallback(forecast_every_n_steps=4), compression]
    loader = DataLoader(torch.utils.data.TensorDataset(x, y), 64, shuffle=True, generator=shuffling)
    make_trainer(max_epochs=14, callbacks=callbacks).fit(Classifier(), loader)
    assert compression.done
    assert found
    assert all(seemed < limit for seemed, _, _ in found)
    assert [ours < limit for _, ours, _ in found][:-1] == [False] * (len(found) - 1)  # until it is free indeed
    assert all(0.5 < ours / exact < 2.0 for _, ours, exact in found if exact > 1e-3)
    assert found[-1][2] < 2 * limit
