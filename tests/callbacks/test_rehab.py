import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, UnsupportedError

EPOCH = 2  # of the surgery; six steps an epoch


class SteppingSGD(torch.optim.SGD):
    """Keeps the rates at the moment of the update."""

    def __init__(self, groups, lr=0.05, **settings):
        super().__init__(groups, lr=lr, **settings)
        self.used = []

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        self.used.append([float(group["lr"]) for group in self.param_groups])
        super().step()
        return loss


SCHEDULERS = {
    "none": None,
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=30),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 24),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


def module(lit_class, mlp, scheduler, interval, tensor_rate=False):
    class Scheduled(lit_class):
        def configure_optimizers(self):
            rates = [0.05, 0.02]
            if tensor_rate:
                rates = [torch.tensor(rate) for rate in rates]
            groups = [
                {"params": [p for p in self.parameters() if p.dim() == d], "lr": r}
                for d, r in zip((1, 2), rates, strict=True)
            ]
            optimizer = SteppingSGD(groups)
            if scheduler is None:
                return optimizer
            schedule = {"scheduler": scheduler(optimizer), "interval": interval, "monitor": "constant", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

        def training_step(self, batch, batch_idx):
            self.log("constant", 1.0)
            return super().training_step(batch, batch_idx)

    return Scheduled(copy.deepcopy(mlp))


def used_rates(lit, loader, make_trainer, callbacks, **settings):
    trainer = make_trainer(max_epochs=5, callbacks=callbacks, **settings)
    trainer.fit(lit, loader)
    return trainer.optimizers[0].used, [group["lr"] for group in trainer.optimizers[0].param_groups]


def warmed(rates, factor, start):
    return [
        [rate * (factor(step - start) if step >= start else 1.0) for rate in group] for step, group in enumerate(rates)
    ]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_effective_rate_is_the_users_rate_times_the_factor(name, interval, mlp, loader, make_trainer, lit_class):
    compression = lp.CompressionCallback(EPOCH, factorization=lp.SVD())
    args = (lit_class, mlp, SCHEDULERS[name], interval)
    plain, final = used_rates(module(*args), loader, make_trainer, [])
    rehab = lp.RehabSchedule(warmup_steps=9, start_factor=0.2)
    ours, ours_final = used_rates(module(*args), loader, make_trainer, [compression, rehab])
    expected = warmed(plain, lambda step: 0.2 + 0.8 * min(step / 9, 1), start=EPOCH * 6)
    for one, other in zip(ours, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    assert ours_final == final  # the user's own rates are back


@pytest.mark.parametrize("first", [True, False])
def test_accumulation_epochs_peak_shape_and_order(first, mlp, loader, make_trainer, lit_class):
    rehab = lp.RehabSchedule(warmup_epochs=1.5, start_factor=0.0, peak_factor=2.0, shape="cosine")
    callbacks = [lp.CompressionCallback(EPOCH, factorization=lp.SVD()), rehab]
    args = (lit_class, mlp, SCHEDULERS["ExponentialLR"], "step")
    settings = {"accumulate_grad_batches": 2}
    plain, _ = used_rates(module(*args), loader, make_trainer, [], **settings)
    ours, _ = used_rates(module(*args), loader, make_trainer, callbacks[:: -1 if first else 1], **settings)
    length = round(1.5 * 3)
    expected = warmed(plain, lambda s: 1 - math.cos(math.pi * min(s / length, 1)), start=EPOCH * 3)
    for one, other in zip(ours, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("schedule", "epochs", "length"),
    [({0: 1, EPOCH: 3}, 1, 2), ({0: 3, EPOCH: 1}, 1, 6), ({EPOCH + 1: 3}, 2.5, 6 + 2 + 1), ({0: 3, EPOCH: 1}, 0.5, 3)],
)
def test_epochs_are_those_of_an_accumulation_that_changes(
    schedule, epochs, length, order, mlp, loader, make_trainer, lit_class
):
    rehab = lp.RehabSchedule(warmup_epochs=epochs, start_factor=0.0)
    callbacks = [GradientAccumulationScheduler(schedule), lp.CompressionCallback(EPOCH, factorization=lp.SVD()), rehab]
    rates, _ = used_rates(
        module(lit_class, mlp, None, "step"), loader, make_trainer, callbacks[order:] + callbacks[:order]
    )
    before = EPOCH * 6 // callbacks[0].get_accumulate_grad_batches(0)
    after = [rate / 0.05 for rate, _ in rates[before:]]
    assert after == pytest.approx([min(step / length, 1.0) for step in range(len(after))], rel=1e-9, abs=1e-12)


def test_tensor_rates_are_changed_in_place(mlp, loader, make_trainer, lit_class):
    rehab = lp.RehabSchedule(4, start_factor=0.5)
    lit = module(lit_class, mlp, None, "step", tensor_rate=True)
    ours, final = used_rates(lit, loader, make_trainer, [lp.CompressionCallback(0, factorization=lp.SVD()), rehab])
    assert ours[0] == pytest.approx([0.025, 0.01])
    assert all(isinstance(rate, torch.Tensor) for rate in final)
    assert [float(rate) for rate in final] == pytest.approx([0.05, 0.02])


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rate_monitor_tells_the_rate_that_is_used(
    interval, position, mlp, loader, make_trainer, lit_class, tmp_path
):
    class Monitor(LearningRateMonitor):
        def __init__(self):
            super().__init__(logging_interval=interval)
            self.told = []

        def _extract_stats(self, trainer, interval):
            stats = super()._extract_stats(trainer, interval)
            self.told += [stats["lr-SteppingSGD/pg1"]] if stats else []
            return stats

    monitor = Monitor()
    callbacks = [lp.CompressionCallback(EPOCH, factorization=lp.SVD()), lp.RehabSchedule(9)]
    callbacks.insert(position, monitor)
    settings = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    lit = module(lit_class, mlp, SCHEDULERS["ExponentialLR"], "step")
    used, _ = used_rates(lit, loader, make_trainer, callbacks, **settings)
    truth = [rates[0] for rates in used][:: 6 if interval == "epoch" else 1]
    assert monitor.told == pytest.approx(truth, rel=1e-12)


def test_a_step_that_loss_scaling_skips_leaves_the_scheduler_exact(
    mlp, loader, make_trainer, lit_class, scaled_precision
):
    class Overflow(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.total_batch_idx in (13, 15):
                next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(float("inf"))

    args = (lit_class, mlp, SCHEDULERS["ExponentialLR"], "step")
    finals, rates = [], []
    for callbacks in (
        [],
        [lp.CompressionCallback(EPOCH, factorization=lp.SVD()), lp.RehabSchedule(9, start_factor=0.2)],
    ):
        settings = {"plugins": scaled_precision(1024.0)}
        used, final = used_rates(module(*args), loader, make_trainer, [*callbacks, Overflow()], **settings)
        finals.append(final)
        rates.append(used)
    assert len(rates[0]) == len(rates[1]) == 28
    assert finals[0] == finals[1]
    assert rates[1] == [
        pytest.approx(r) for r in warmed(rates[0], lambda s: 0.2 + 0.8 * min(s / 9, 1), start=EPOCH * 6)
    ]


def test_checkpoints_hold_the_users_own_rate(mlp, loader, make_trainer, lit_class, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    callbacks = [lp.CompressionCallback(EPOCH, factorization=lp.SVD()), lp.RehabSchedule(9), checkpoint]
    used_rates(module(lit_class, mlp, None, "step"), loader, make_trainer, callbacks, enable_checkpointing=True)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 30
    for file in files:
        groups = torch.load(file, weights_only=True)["optimizer_states"][0]["param_groups"]
        assert [group["lr"] for group in groups] == [0.05, 0.02]


def test_several_optimizers_each_count_their_own_steps(loader, make_trainer):
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.nets = nn.ModuleList(nn.Linear(12, 6) for _ in range(2))

        def training_step(self, batch, batch_idx):
            for index, (optimizer, net) in enumerate(zip(self.optimizers(), self.nets, strict=True)):
                if index == 0 or batch_idx % 2 == 0:
                    optimizer.zero_grad()
                    self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                    optimizer.step()

        def configure_optimizers(self):
            return [SteppingSGD(net.parameters(), lr=1e-3) for net in self.nets]

    callbacks = [lp.CompressionCallback(1, factorization=lp.SVD()), lp.RehabSchedule(4, start_factor=0.0)]
    trainer = make_trainer(max_epochs=3, callbacks=callbacks)
    trainer.fit(Two(), loader)
    factors = [[rate / 1e-3 for (rate,) in optimizer.used] for optimizer in trainer.optimizers]
    ramp = [0.0, 0.25, 0.5, 0.75]
    assert factors[0] == pytest.approx([1.0] * 6 + ramp + [1.0] * 8)
    assert factors[1] == pytest.approx([1.0] * 3 + ramp[:3] + ramp[3:] + [1.0] * 2)


@pytest.mark.parametrize("crash", [False, True])
def test_no_hooks_stay_on_the_optimizer(crash, mlp, loader, make_trainer, lit_class):
    class Crash(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if crash and trainer.current_epoch == 3:
                raise ZeroDivisionError

    trainer = make_trainer(
        max_epochs=5, callbacks=[lp.CompressionCallback(EPOCH, factorization=lp.SVD()), lp.RehabSchedule(18), Crash()]
    )
    lit = module(lit_class, mlp, None, "step")
    if crash:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(lit, loader)
    else:
        trainer.fit(lit, loader)
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.02]


def test_needs_a_surgery_and_a_known_length(mlp, data, loader, make_trainer, lit_class):
    with pytest.raises(UnsupportedError, match="add a CompressionCallback"):
        make_trainer(callbacks=[lp.RehabSchedule(3)]).fit(lit_class(mlp), loader)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*data.tensors, strict=True))

    lit = lit_class(mlp)
    with pytest.raises(UnsupportedError, match=r"RehabSchedule\(warmup_steps="):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1), lp.RehabSchedule()]).fit(
            lit, torch.utils.data.DataLoader(Stream(), 8)
        )
    assert lit.losses == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_steps": 3, "warmup_epochs": 1},
        {"warmup_steps": -1},
        {"warmup_epochs": -0.5},
        {"warmup_epochs": float("inf")},
        {"start_factor": -0.1},
        {"peak_factor": 0.0},
        {"peak_factor": float("nan")},
        {"shape": "square"},
        {"end_factor": 0.1, "decay_steps": 3, "decay_epochs": 1},
        {"decay_steps": 3},
        {"decay_epochs": 3.0},
        {"group_factors": ["head"]},
        {"group_factors": {"head": -1}},
        {"group_factors": {-1: 1.0}},
        {"group_factors": {0.5: 1.0}},
    ],
    ids=str,
)
def test_wrong_settings(wrong):
    with pytest.raises(ArgumentError, match="got|not both|give a number"):
        lp.RehabSchedule(**wrong)


def test_a_rate_tensor_that_groups_share_is_scaled_once(mlp, loader, make_trainer, lit_class):
    class Shared(lit_class):
        def configure_optimizers(self):
            rate, parameters = torch.tensor(0.01), list(self.parameters())
            return SteppingSGD([{"params": parameters[:2], "lr": rate}, {"params": parameters[2:], "lr": rate}])

    callbacks = [lp.CompressionCallback(0, factorization=lp.SVD()), lp.RehabSchedule(4, start_factor=0.5)]
    used, final = used_rates(Shared(mlp), loader, make_trainer, callbacks)
    assert used[0] == pytest.approx([0.005, 0.005])
    assert [float(rate) for rate in final] == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("where", ["epoch", "batch", "step"])
def test_rates_that_the_module_sets_itself_are_kept_and_warmed_up(where, mlp, loader, make_trainer, lit_class):
    class Own(lit_class):
        def decay(self):
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = 0.1 / (1 + self.global_step)

        def on_train_epoch_start(self):
            if where == "epoch":
                self.decay()

        def on_train_batch_start(self, batch, batch_idx):
            if where == "batch":
                self.decay()

        def training_step(self, batch, batch_idx):
            if where == "step":
                self.decay()
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return SteppingSGD(self.parameters())

    plain, final = used_rates(Own(copy.deepcopy(mlp)), loader, make_trainer, [])
    callbacks = [lp.CompressionCallback(EPOCH, factorization=lp.SVD()), lp.RehabSchedule(9, start_factor=0.2)]
    ours, ours_final = used_rates(Own(mlp), loader, make_trainer, callbacks)
    expected = warmed(plain, lambda step: 0.2 + 0.8 * min(step / 9, 1), start=EPOCH * 6)
    assert [rate for (rate,) in ours] == pytest.approx([rate for (rate,) in expected], rel=1e-9)
    assert ours_final == final


def test_a_scheduler_that_steps_between_optimizer_steps(loader, make_trainer):
    class Manual(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.Linear(12, 6)

        def training_step(self, batch, batch_idx):
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))
            scheduler.step()
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            optimizer = SteppingSGD(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    plain, final = used_rates(Manual(), loader, make_trainer, [])
    callbacks = [lp.CompressionCallback(EPOCH, factorization=lp.SVD()), lp.RehabSchedule(4, start_factor=0.2)]
    ours, ours_final = used_rates(Manual(), loader, make_trainer, callbacks)
    expected = warmed(plain, lambda step: 0.2 + 0.8 * min(step / 4, 1), start=EPOCH * 3)
    assert [rate for (rate,) in ours] == pytest.approx([rate for (rate,) in expected], rel=1e-9)
    assert ours_final == final


def test_a_step_that_fails_and_is_caught_does_not_stop_the_warmup(loader, make_trainer):
    class Retry(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.Linear(12, 6)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure(fail=False):
                if fail:
                    raise MemoryError
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))

            with pytest.raises(MemoryError):
                optimizer.step(closure=lambda: closure(fail=True))
            optimizer.step(closure=closure)

        def configure_optimizers(self):
            return SteppingSGD(self.parameters(), lr=1e-3)

    callbacks = [lp.CompressionCallback(0, factorization=lp.SVD()), lp.RehabSchedule(4, start_factor=0.0)]
    used, final = used_rates(Retry(), loader, make_trainer, callbacks)
    assert final == [1e-3]
    assert used[-1] == [1e-3]


def test_the_trainer_gets_its_callbacks_back(mlp, loader, make_trainer, lit_class):
    callbacks = [lp.CompressionCallback(1, factorization=lp.SVD()), lp.RehabSchedule(4)]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks)
    before = set(map(type, trainer.callbacks))
    trainer.fit(lit_class(mlp), loader)
    assert set(map(type, trainer.callbacks)) == before
