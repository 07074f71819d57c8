import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.linalg.matrices import polar_factor
from lightning_prehab.regularizers import GradientRatio, Shrinkage


class Recorder(pl.Callback):
    """Keeps what is logged, and the output for fixed inputs on both sides of the surgery."""

    def __init__(self, x):
        self.x, self.before, self.after, self.logged = x, None, None, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        if self.after is None:
            self.before = pl_module.net(self.x).detach()

    def on_surgery(self, trainer, pl_module, report):
        self.after = pl_module.net(self.x).detach()

    def series(self, key):
        return [entry[key] for entry in self.logged if key in entry]


@pytest.mark.parametrize("space", ["weight", "activation", "loss"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_cut_is_free_after_tail_shrinkage(space, accumulate, lit, data, make_trainer):
    """Without it, the same cut changes the output."""
    factorization = {"weight": lp.SVD(), "activation": lp.WhitenedSVD(), "loss": lp.KroneckerSVD()}[space]
    changes = []
    for regularized in (True, False):
        recorder = Recorder(data.tensors[0])
        compression = lp.CompressionCallback(4, 0.5, factorization=factorization, calibration_batches=4)
        prehab = lp.PrehabCallback(lp.TailShrinkage(refresh=3), space=space, forecast_every_n_steps=4)
        callbacks = [prehab, compression, recorder] if regularized else [compression, recorder]
        module = copy.deepcopy(lit)
        trainer = make_trainer(max_epochs=5, callbacks=callbacks, accumulate_grad_batches=accumulate)
        trainer.fit(module, DataLoader(data, 16))
        assert any(isinstance(part, lp.LowRankLinear) for part in module.modules())
        changes.append(float((recorder.after - recorder.before).norm() / recorder.before.norm()))
        if regularized:
            progress = recorder.series("prehab/progress")
            assert progress == sorted(progress)
            assert progress[-1] == 1.0
            assert 0.0 < progress[0] < 0.3
            assert recorder.series("prehab/tail_energy")[-1] < 1e-6 < recorder.series("prehab/tail_energy")[0]
            if space == "loss":
                assert recorder.series("prehab/forecast")[-1] == pytest.approx(0.0, abs=1e-5)
                assert prehab.forecast is not None
    assert changes[0] < 1e-3
    assert changes[1] > 0.05


def test_a_rank_of_its_own_and_an_end_of_its_own(lit, loader, make_trainer):
    prehab = lp.PrehabCallback(lp.TailShrinkage(rank=2), stop_epoch=2)
    ranks = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            ranks.append(int(torch.linalg.matrix_rank(pl_module.net[0].weight, rtol=1e-5)))

    make_trainer(max_epochs=3, callbacks=[prehab, Watch()]).fit(lit, loader)
    assert ranks[0] == 12
    assert ranks[1] == 2 < ranks[2]


def test_spectral_weight_decay_goes_with_the_learning_rate(lit, loader, make_trainer):
    reference = copy.deepcopy(lit.net)
    prehab = lp.PrehabCallback(lp.SpectralWeightDecay(decay=0.3, every=1, steps=12), target_modules="net.2")
    make_trainer(callbacks=[prehab]).fit(lit, loader)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(reference(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            reference[2].weight -= 0.05 * 0.3 * polar_factor(reference[2].weight, 12)
    for ours, theirs in zip(lit.net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_only_weights_that_are_trained_are_shrunk(lit, loader, make_trainer):
    class Zero(Shrinkage):
        def __call__(self, weight, rank=None, memory=None, progress=1.0, lr=0.0, metric=None):
            return torch.zeros_like(weight)

    lit.net[0].weight.requires_grad_(False)
    held = list(lit.net[2].parameters())
    lit.make_optimizer = lambda _: torch.optim.SGD(held, lr=0.01)
    make_trainer(callbacks=[lp.PrehabCallback(Zero())]).fit(lit, loader)
    assert float(lit.net[0].weight.norm()) > 0
    assert float(lit.net[4].weight.norm()) > 0
    assert float(lit.net[2].weight.norm()) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"strength": 0.1}, {"strength_share": 0.1}, {"ramp_steps": 3}, {"every_n_steps": 2}, {"injection": "loss"}],
)
def test_settings_of_penalties_are_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ArgumentError, match=f"TailShrinkage.*{name}={value!r} belongs to penalties"):
        lp.PrehabCallback(lp.TailShrinkage(), **wrong)


def test_other_wrong_settings():
    with pytest.raises(ArgumentError, match=r"Expected a Penalty or a Shrinkage, got.*write TailShrinkage\(\)"):
        lp.PrehabCallback(lp.TailShrinkage)
    with pytest.raises(ArgumentError, match="strength_share replaces strength"):
        lp.PrehabCallback(strength=0.1, strength_share=0.1)
    with pytest.raises(ArgumentError, match="share must be positive"):
        lp.PrehabCallback(strength_share=0.0)
    for name in ("update_steps", "forecast_every_n_steps"):
        with pytest.raises(ArgumentError, match=f"{name} must not be negative, got -1"):
            lp.PrehabCallback(**{name: -1})


def test_an_end_that_cannot_be_foreseen_is_refused(lit, data, make_trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*data.tensors, strict=True))

    with pytest.raises(UnsupportedError, match="TailShrinkage.*has to know when it must be done"):
        make_trainer(callbacks=[lp.PrehabCallback(lp.TailShrinkage(rank=2))]).fit(lit, DataLoader(Stream(), 16))


def test_the_default_takes_a_penalty_where_the_end_cannot_be_foreseen(lit, data, make_trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*data.tensors, strict=True))

    prehab = lp.PrehabCallback()
    compression = lp.CompressionCallback(1, 0.5, calibration_batches=4)
    with pytest.warns(UserWarning, match="takes StableRank.. instead of TailShrinkage"):
        make_trainer(max_epochs=2, callbacks=[prehab, compression]).fit(lit, DataLoader(Stream(), 16))
    assert (prehab.regularizer, prehab.space, prehab._way.steps) == (lp.StableRank(), "weight", 6)
    assert compression.done


class Gradients(pl.Callback):
    """Gradients of the weights, before the callbacks behind it and right before the step."""

    def __init__(self, seen):
        self.seen = seen

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(
            [layer.weight.grad.clone() for layer in (pl_module.net[0], pl_module.net[2], pl_module.net[4])]
        )


@pytest.mark.parametrize("scaled", [False, True])
def test_a_share_of_the_task_gradient(scaled, lit, loader, make_trainer, scaled_precision):
    before, after, logged = [], [], []

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append(float(trainer.callback_metrics["prehab/strength"]))

    prehab = lp.PrehabCallback(lp.NuclearNorm(), strength_share=0.2)
    plugins = [scaled_precision(512.0)] if scaled else None
    callbacks = [Gradients(before), prehab, Gradients(after), Log()]
    make_trainer(callbacks=callbacks, plugins=plugins).fit(lit, loader)

    ratio = GradientRatio(0.2)
    for task, total, strength in zip(before, after, logged, strict=True):
        added = torch.stack([(t - s).norm() for s, t in zip(task, total, strict=True)]).norm()
        norm = torch.stack([s.norm() for s in task]).norm()
        expected = ratio.update(norm, added / strength)  # the smoothed strength
        assert strength == pytest.approx(float(expected), rel=1e-3)
    first = torch.stack([(t - s).norm() for s, t in zip(before[0], after[0], strict=True)]).norm()
    assert float(first / torch.stack([s.norm() for s in before[0]]).norm()) == pytest.approx(0.2, rel=1e-3)


def test_metric_and_ranks_are_taken_anew(lit, data, make_trainer):
    plans, counts = [], []

    class Watched(lp.CompressionCallback):
        def make_plan(self, targets, statistics):
            plans.append({name: int(layer.tokens) for name, layer in statistics.items()})
            return super().make_plan(targets, statistics)

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts.append(sum(len(module._forward_hooks) for module in pl_module.modules()))

    compression = Watched(8, 0.5, calibration_batches=4)
    prehab = lp.PrehabCallback(lp.TailEnergy(), space="loss", update_steps=12)
    make_trainer(max_epochs=9, callbacks=[prehab, compression, Count()]).fit(lit, DataLoader(data, 16))
    # 48 batches before the surgery: 4 to begin with, then 3 each time that 12 steps have passed, and none at the end
    assert [next(iter(tokens.values())) for tokens in plans] == [64, 48, 48]
    assert counts[-1] == 0


@pytest.mark.parametrize("update_steps", [0, 1000])
def test_no_update_where_none_is_wanted(update_steps, lit, data, make_trainer):
    plans = []

    class Watched(lp.CompressionCallback):
        def make_plan(self, targets, statistics):
            plans.append(1)
            return super().make_plan(targets, statistics)

    callbacks = [lp.PrehabCallback(lp.TailEnergy(), update_steps=update_steps), Watched(4, 0.5, calibration_batches=4)]
    make_trainer(max_epochs=5, callbacks=callbacks).fit(lit, DataLoader(data, 16))
    assert len(plans) == 1


def test_the_forecast_is_what_a_cut_would_do_now(lit, data, make_trainer):
    """Against the loss of all data with the tails taken off, without a regularizer that holds against it."""
    found = []
    x, y = data.tensors

    def loss():
        with torch.no_grad():
            return nn.functional.mse_loss(lit.net(x), y).item()

    class Check(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if prehab._way.ready and prehab._way.steps > 0:
                before, kept = loss(), copy.deepcopy(pl_module.state_dict())
                for layer in prehab._layers:
                    metric, weight = layer.metric, layer.view.weight.detach().double()
                    left, right = metric.left.double(), metric.right.double()
                    u, s, v = torch.linalg.svd(left @ weight @ right, full_matrices=False)
                    cut = (u[:, : layer.rank] * s[: layer.rank]) @ v[: layer.rank]
                    layer.view.write_((torch.linalg.inv(left) @ cut @ torch.linalg.inv(right)).float())
                found.append((prehab.forecast, loss() - before))
                pl_module.load_state_dict(kept)

    prehab = lp.PrehabCallback(lp.TailEnergy(), 1e-6, space="loss", forecast_every_n_steps=1)
    callbacks = [prehab, lp.CompressionCallback(3, 0.5, calibration_batches=4), Check()]
    make_trainer(max_epochs=4, callbacks=callbacks).fit(lit, DataLoader(data, 16))
    assert len(found) == 14
    assert all(0.5 < ours / exact < 2.0 for ours, exact in found), found


def surgery_epoch(make_trainer, lit, data, below, regularizer=None, **settings):
    epochs = []

    class Watch(pl.Callback):
        def on_surgery(self, trainer, pl_module, report):
            epochs.append(trainer.current_epoch)

    prehab = lp.PrehabCallback(regularizer or lp.TailShrinkage(), space="loss", forecast_every_n_steps=2)
    compression = lp.CompressionCallback("auto", 0.5, calibration_batches=4, forecast_below=below)
    trainer = make_trainer(max_epochs=16, callbacks=[prehab, compression, Watch()], **settings)
    trainer.fit(lit, DataLoader(data, 16))
    return epochs


def test_the_surgery_comes_when_the_cut_is_free(lit, data, make_trainer):
    assert surgery_epoch(make_trainer, copy.deepcopy(lit), data, below=1e-9) == [15]  # the last possible one
    (early,) = surgery_epoch(make_trainer, copy.deepcopy(lit), data, below=1e9)
    (middle,) = surgery_epoch(make_trainer, copy.deepcopy(lit), data, below=1e-3)
    assert early <= 2
    assert early < middle < 15


def test_penalties_without_a_target_rank_forecast_too(lit, data, make_trainer):
    (epoch,) = surgery_epoch(make_trainer, lit, data, below=1e9, regularizer=lp.StableRank())
    assert epoch <= 2


def test_auto_needs_a_forecast_and_an_end(lit, data, make_trainer):
    loader = DataLoader(data, 16)
    with pytest.raises(ArgumentError, match="waits for a forecast"):
        make_trainer(callbacks=[lp.CompressionCallback("auto")]).fit(lit, loader)
    callbacks = [lp.PrehabCallback(space="loss"), lp.CompressionCallback("auto")]
    with pytest.raises(ArgumentError, match="needs max_epochs"):
        make_trainer(max_epochs=-1, callbacks=callbacks).fit(lit, loader)
    lit.automatic_optimization = False
    with pytest.raises(ArgumentError, match="with manual optimization none can be made"):
        make_trainer(max_epochs=4, callbacks=callbacks).fit(lit, loader)
    with pytest.raises(ArgumentError, match="epoch is a whole number that counts from 0, or 'auto', got 'soon'"):
        lp.CompressionCallback("soon")
    with pytest.raises(ArgumentError, match="forecast_below must be positive"):
        lp.CompressionCallback("auto", forecast_below=0)


@pytest.mark.parametrize(
    ("factorization", "space"),
    [
        (lp.KroneckerSVD(), "loss"),
        (lp.WhitenedSVD(), "activation"),
        (lp.ActivationSVD(), "activation"),
        (lp.SVD(), "weight"),
    ],
)
def test_the_default_aims_at_the_planned_cut_in_its_metric(factorization, space, lit, loader, make_trainer):
    prehab = lp.PrehabCallback()
    compression = lp.CompressionCallback(2, 0.5, factorization=factorization, calibration_batches=4)
    make_trainer(max_epochs=3, callbacks=[prehab, compression]).fit(lit, loader)
    assert (prehab.regularizer, prehab.space) == (lp.TailShrinkage(), space)
    cut = [layer for layer in compression.report.plan.layers if layer.rank is not None]
    assert cut
    if space != "activation" or isinstance(
        factorization, lp.WhitenedSVD
    ):  # ASVD's metric is diagonal, an approximation
        assert max(layer.relative_error for layer in cut) < 0.05


def test_the_default_without_a_plan_or_with_settings_of_penalties(lit, loader, make_trainer):
    alone = lp.PrehabCallback()
    make_trainer(callbacks=[alone]).fit(lit, loader)
    assert (alone.regularizer, alone.space, alone.strength) == (lp.StableRank(), "weight", 0.01)
    given = lp.PrehabCallback(strength=0.5)
    with pytest.warns(UserWarning, match=r"strength=0.5\) acts with StableRank\(\), not .*TailShrinkage"):
        make_trainer(max_epochs=2, callbacks=[given, lp.CompressionCallback(1)]).fit(copy.deepcopy(lit), loader)
    assert (given.regularizer, given.space, given.strength) == (lp.StableRank(), "weight", 0.5)
    aimed = lp.PrehabCallback(lp.TailEnergy(), space="weight")
    make_trainer(max_epochs=2, callbacks=[aimed, lp.CompressionCallback(1)]).fit(lit, loader)
    assert aimed.space == "weight"
