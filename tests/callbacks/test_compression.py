import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.callbacks import OnExceptionCheckpoint, RichModelSummary, RichProgressBar
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchmetrics import MeanMetric

import lightning_prehab as lp
from lightning_prehab.callbacks._trainer import callbacks_of
from lightning_prehab.errors import ArgumentError, NumericalError, PlanError, TargetError, UnsupportedError


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


class AtSurgery(pl.Callback):
    """What the world looks like right after the cut."""

    def __init__(self):
        self.calls = []

    def on_surgery(self, trainer, pl_module, report):
        self.calls.append((trainer.current_epoch, trainer.global_step, report))


def low_rank(module):
    return {name: child for name, child in module.named_modules() if isinstance(child, lp.LowRankLinear)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"precision": "64-true"},
    ],
    ids=str,
)
@pytest.mark.parametrize("epoch", [0, 2])
def test_the_cut_in_the_middle_of_a_run(settings, epoch, mlp, loader, make_trainer, lit_class):
    lit, watch = lit_class(mlp, adam), AtSurgery()
    compression = lp.CompressionCallback(epoch=epoch, keep=0.5)
    if settings.get("precision") == "64-true":
        loader = DataLoader(TensorDataset(*(t.double() for t in loader.dataset.tensors)), 16)
    trainer = make_trainer(max_epochs=5, callbacks=[compression, watch], **settings)
    trainer.fit(lit, loader)
    assert len(watch.calls) == 1
    assert watch.calls[0][0] == epoch
    assert watch.calls[0][2] is compression.report
    assert set(low_rank(lit)) == {name for name, rank in compression.report.ranks.items() if rank is not None}
    assert sum(lit.losses[-6:]) < sum(lit.losses[6 * epoch : 6 * epoch + 6])
    assert compression.report.keep <= 0.5
    assert trainer.callback_metrics["compression/keep"] == pytest.approx(compression.report.keep)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_ride_collects_what_a_pass_over_the_data_would(
    accumulate, scale, mlp, loader, make_trainer, lit_class, data, scaled_precision
):
    """With a learning rate of 0 the last epoch can be repeated by hand, and the plan comes out the same."""
    lit = lit_class(mlp, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    targets = lp.find_targets(lit)
    dense = copy.deepcopy(mlp)

    def loss(model, batch):
        return nn.functional.mse_loss(mlp(batch[0]), batch[1])

    statistics = lp.collect_statistics(lit, targets, [data.tensors], forward=loss, gradients=True)
    plan = lp.make_plan(targets, 0.4, statistics=statistics)
    compression = lp.CompressionCallback(epoch=1, keep=0.4)
    settings = {"plugins": scaled_precision(scale)} if scale else {}
    make_trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[compression], **settings).fit(lit, loader)
    assert compression.report.ranks == plan.ranks
    for ours, theirs in zip(compression.report.plan.layers, plan.layers, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-3)
    x, y = data.tensors
    increase = nn.functional.mse_loss(lit.net(x), y) - nn.functional.mse_loss(dense(x), y)
    assert compression.report.plan.loss_increase == pytest.approx(increase.item(), rel=0.2)  # of some of the batches
    report = lp.apply_plan_(nn.ModuleDict({"net": dense}), plan, statistics)
    for name, spectrum in report.spectra.items():  # the scale of G
        torch.testing.assert_close(
            torch.tensor(compression.report.spectra[name].values), torch.tensor(spectrum.values), rtol=1e-3, atol=1e-6
        )
    for name, error in report.weight_errors.items():
        assert compression.report.weight_errors[name] == pytest.approx(error, rel=1e-3)


def test_only_the_last_batches_before_the_surgery_count(mlp, data, make_trainer, lit_class):
    class Spy(lp.KroneckerSVD):
        def metric(self, statistics):
            seen.append((int(statistics.tokens), int(statistics.samples)))
            return super().metric(statistics)

    seen = []
    fit = {"val_dataloaders": DataLoader(data, 16), "train_dataloaders": DataLoader(data, 16)}
    compression = lp.CompressionCallback(epoch=1, calibration_batches=4, factorization=Spy())
    make_trainer(max_epochs=2, callbacks=[compression], val_check_interval=0.5).fit(lit_class(mlp), **fit)
    assert set(seen) == {(64, 64)}


def test_a_loader_of_unknown_length(mlp, data, make_trainer, lit_class):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*data.tensors, strict=True))

    class Spy(lp.KroneckerSVD):
        def metric(self, statistics):
            seen.add(int(statistics.tokens))
            return super().metric(statistics)

    seen = set()
    lit = lit_class(mlp)
    compression = lp.CompressionCallback(epoch=1, calibration_batches=4, factorization=Spy())
    make_trainer(max_epochs=2, callbacks=[compression]).fit(lit, DataLoader(Stream(), 16))
    assert seen == {96}  # batches 0-3 as the older window, 4-5 as the running one
    assert all(not module._forward_hooks for module in lit.modules())


def test_manual_optimization(mlp, loader, make_trainer, lit_class):
    class Manual(lit_class):
        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    lit = Manual(mlp, adam)
    compression = lp.CompressionCallback(epoch=1)
    make_trainer(max_epochs=3, callbacks=[lp.PrehabCallback(), compression, lp.RehabSchedule(4)]).fit(lit, loader)
    assert low_rank(lit)
    with pytest.raises(UnsupportedError, match="manual optimization.*epoch=1.*SVD"):
        make_trainer(callbacks=[lp.CompressionCallback(epoch=0)]).fit(
            Manual(nn.Sequential(nn.Linear(12, 6)), adam), loader
        )
    lit = Manual(nn.Sequential(nn.Linear(12, 6)), adam)
    make_trainer(callbacks=[lp.CompressionCallback(epoch=0, factorization=lp.SVD())]).fit(lit, loader)
    assert low_rank(lit)


def test_epoch_zero_disturbs_neither_data_nor_randomness_nor_metrics(data, make_trainer):
    class Noisy(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 6))
            self.mean = MeanMetric()
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch[0].clone())
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.mean(loss)
            self.log("loss", loss, on_step=True)
            return {"loss": loss}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    runs = []
    for callbacks in ([], [lp.CompressionCallback(epoch=0, keep=0.6)]):
        torch.manual_seed(3)
        lit = Noisy()
        generator = torch.Generator().manual_seed(5)
        loader = DataLoader(data, 16, sampler=RandomSampler(data, generator=generator))
        make_trainer(callbacks=callbacks, max_epochs=2).fit(lit, loader)
        runs.append(
            (torch.stack(lit.seen), torch.get_rng_state(), lit.mean.weight.item(), lit.net[1].num_batches_tracked)
        )
    for one, other in zip(*runs, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=24),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 24),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_go_on_as_without_surgery(name, interval, mlp, loader, make_trainer, lit_class):
    class Rates(pl.Callback):
        def __init__(self):
            self.rates = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.rates.append([group["lr"] for group in optimizer.param_groups])

    class Scheduled(lit_class):
        def configure_optimizers(self):
            groups = [{"params": [p for p in self.parameters() if p.dim() == d], "lr": 0.01 * d} for d in (1, 2)]
            optimizer = torch.optim.Adam(groups)
            schedule = {"scheduler": SCHEDULERS[name](optimizer), "interval": interval, "monitor": "train_loss"}
            if name == "ReduceLROnPlateau":
                schedule["strict"] = False
            return {"optimizer": optimizer, "lr_scheduler": schedule}

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", 1.0)  # the same plateau in both runs
            return loss

    rates = []
    for callbacks in ([], [lp.CompressionCallback(epoch=2)]):
        watch, lit = Rates(), Scheduled(copy.deepcopy(mlp))
        make_trainer(max_epochs=4, callbacks=[*callbacks, watch]).fit(lit, loader)
        rates.append(watch.rates)
        assert bool(low_rank(lit)) == bool(callbacks)
    assert rates[0] == rates[1]


def test_first_moments_are_carried_exactly(mlp, loader, make_trainer, lit_class):
    before = {}

    class Remember(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            for name, layer in lp.find_targets(pl_module).items() if trainer.current_epoch == 0 else ():
                before[name] = trainer.optimizers[0].state[layer.weight]["exp_avg"].clone()

        def on_surgery(self, trainer, pl_module, report):
            state = trainer.optimizers[0].state
            for name, layer in low_rank(pl_module).items():
                a, b = layer.A.weight.detach(), layer.B.weight.detach()
                torch.testing.assert_close(state[layer.A.weight]["exp_avg"], b.mT @ before[name], atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(state[layer.B.weight]["exp_avg"], before[name] @ a.mT, atol=1e-6, rtol=1e-6)
                before[name] = None

    make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(epoch=1), Remember()]).fit(
        lit_class(mlp, adam), loader
    )
    assert None in before.values()


@pytest.mark.parametrize(("how", "backend"), [("module", "aot_eager"), ("inner", "eager"), ("method", "aot_eager")])
def test_torch_compile(how, backend, mlp, loader, make_trainer, lit_class):
    """Compiled code does not see hooks that come later unless it is compiled anew; the plan is that of an eager run."""

    def run(compiled):
        net = copy.deepcopy(mlp)
        if compiled and how == "inner":
            net = torch.compile(net, backend=backend)
        elif compiled and how == "method":
            net.compile(backend=backend)
        lit = lit_class(net, adam)
        compression = lp.CompressionCallback(epoch=2, keep=0.5)
        callbacks = [lp.PrehabCallback(), compression, lp.RehabSchedule(4)]
        module = torch.compile(lit, backend=backend) if compiled and how == "module" else lit
        make_trainer(max_epochs=4, callbacks=callbacks).fit(module, loader)
        return compression.report, lit.losses

    torch._dynamo.reset()
    (report, losses), (expected, expected_losses) = run(True), run(False)
    assert report.ranks == expected.ranks
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for name, error in expected.weight_errors.items():
        assert report.weight_errors[name] == pytest.approx(error, rel=1e-3, abs=1e-6)  # prehab leaves rounding alone


def test_progress_bars_and_summaries_beside_us(mlp, loader, make_trainer, lit_class, capsys):
    callbacks = [RichProgressBar(), RichModelSummary(), lp.CompressionCallback(1)]
    settings = {"enable_progress_bar": True, "enable_model_summary": True}
    make_trainer(max_epochs=2, callbacks=callbacks, **settings).fit(lit_class(mlp), loader)
    assert "targets 500" in capsys.readouterr().out


@pytest.mark.parametrize("compiled", [False, True])
def test_the_surgery_comes_once_and_a_new_module_gets_its_own(compiled, mlp, loader, make_trainer, lit_class):
    lit, compression, watch = lit_class(copy.deepcopy(mlp)), lp.CompressionCallback(epoch=1), AtSurgery()
    if compiled:
        lit.net = torch.compile(lit.net, backend="eager")
    trainer = make_trainer(max_epochs=2, callbacks=[compression, watch])
    trainer.fit(lit, loader)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(lit, loader)  # goes on
    assert len(watch.calls) == 1
    make_trainer(max_epochs=2, callbacks=[compression, watch]).fit(lit_class(mlp), loader)
    assert len(watch.calls) == 2


def test_the_table_is_printed_once(mlp, loader, make_trainer, lit_class, capsys):
    compression = lp.CompressionCallback(epoch=1)
    make_trainer(max_epochs=3, callbacks=[compression]).fit(lit_class(mlp), loader)
    assert capsys.readouterr().out.count(str(compression.report)) == 1


def test_the_surgery_acts_before_other_callbacks_of_its_epoch(mlp, loader, make_trainer, lit_class):
    seen = []

    class Early(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(bool(low_rank(pl_module)))

    compression = lp.CompressionCallback(epoch=1)
    trainer = make_trainer(max_epochs=2, callbacks=[Early(), compression])
    trainer.fit(lit_class(mlp), loader)
    assert seen == [False, True]
    assert callbacks_of(trainer)[0] is compression


def snapshot(lit, trainer):
    return (
        str(lit),
        [p.clone() for p in lit.parameters()],
        [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]],
    )


@pytest.mark.parametrize("failure", ["weight", "own"])
def test_a_failed_surgery_leaves_the_module_untouched(failure, mlp, loader, make_trainer, lit_class):
    class Own(lp.SVD):
        def __call__(self, weight, rank, statistics=None):
            raise MemoryError("no memory")

    lit, states = lit_class(mlp), []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if failure == "weight":
                with torch.no_grad():
                    pl_module.net[2].weight[0, 0] = float("nan")
            states.append(snapshot(pl_module, trainer))

        def on_exception(self, trainer, pl_module, exception):
            states.append(snapshot(pl_module, trainer))

    arguments, error, match = {
        "weight": ({}, NumericalError, r"Layer 'net.2' \(14x16\): The weight has 1 NaN"),
        "own": ({"factorization": Own()}, MemoryError, "no memory"),
    }[failure]
    with pytest.raises(error, match=match):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(epoch=1, **arguments), Watch()]).fit(lit, loader)
    (text, parameters, held), (text_after, parameters_after, held_after) = states
    assert text == text_after
    assert held == held_after
    torch.testing.assert_close(parameters, parameters_after, equal_nan=True, rtol=0, atol=0)
    assert all(not module._forward_hooks for module in lit.modules())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"keep": 0.001}, PlanError, "keep=0.001 allows 0 parameters for the 3 targets, their smallest ranks hold 78"),
        ({"rank_multiple_of": 6, "keep": 0.3}, PlanError, "rank_multiple_of"),
        ({"rank_overrides": {"net.9": 3}}, TargetError, "rank_overrides: 'net.9' matches no layer"),
        ({"factorization": lp.SVD(), "rank_overrides": {"*": "dense"}}, PlanError, "smallest ranks hold 500"),
    ],
    ids=["keep", "multiple", "pattern", "dense"],
)
def test_a_wish_that_cannot_be_met_is_refused_before_training(
    arguments, error, match, mlp, loader, make_trainer, lit_class
):
    lit = lit_class(mlp)
    with pytest.raises(error, match=match):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1, **arguments)]).fit(lit, loader)
    assert lit.losses == []


def test_no_target_lists_near_names_before_training(mlp, loader, make_trainer, lit_class):
    lit = lit_class(mlp)
    with pytest.raises(TargetError, match="'net.00' matches no layer. Near names: .*net.0"):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1, target_modules="net.00")]).fit(lit, loader)
    assert lit.losses == []


@pytest.mark.parametrize("epoch", [2, 9])
def test_an_epoch_that_is_never_reached(epoch, mlp, loader, make_trainer, lit_class):
    with pytest.raises(
        ArgumentError, match=rf"epoch={epoch}\) is never reached: .* max_epochs is 2. Choose an epoch from 0 to 1"
    ):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(epoch)]).fit(lit_class(mlp), loader)


def test_a_run_that_ends_early_says_so(mlp, loader, make_trainer, lit_class):
    lit = lit_class(mlp)
    with pytest.warns(
        UserWarning, match=r"ended after 2 epochs \(0 and 1\); the surgery waits .*epoch 3, .*still dense.*epoch=1"
    ):
        make_trainer(max_epochs=5, max_steps=8, callbacks=[lp.CompressionCallback(3)]).fit(lit, loader)
    assert not low_rank(lit)


def test_few_tokens_are_warned_about(mlp, loader, make_trainer, lit_class):
    with pytest.warns(UserWarning, match="3 of 3 layers saw fewer calibration tokens than four times"):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1, calibration_batches=2)]).fit(
            lit_class(mlp), loader
        )


@pytest.mark.parametrize(
    ("name", "settings"), [("StochasticWeightAveraging", {"swa_lrs": 1e-2}), ("WeightAveraging", {})]
)
def test_weight_averaging_is_refused(name, settings, mlp, loader, make_trainer, lit_class):
    if not hasattr(pl_callbacks, name):
        pytest.skip(f"this lightning has no {name}")
    averaging = getattr(pl_callbacks, name)(**settings)
    with pytest.raises(UnsupportedError, match="pairs a copy of the dense parameters.*Remove it"):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1), averaging]).fit(lit_class(mlp), loader)


@pytest.mark.parametrize("callback", [lp.CompressionCallback(1), lp.PrehabCallback()], ids=lambda c: type(c).__name__)
def test_strategies_with_flat_parameters_are_refused(callback, lit):
    class FakeTrainer:
        strategy = FSDPStrategy()
        callbacks = ()
        max_epochs = 5

    with pytest.raises(
        UnsupportedError, match="supports one device.* DDP.*, not FSDPStrategy: .*no matrices.*two phases"
    ):
        callback.setup(FakeTrainer(), lit, "fit")


def test_lbfgs_is_refused_before_training(mlp, loader, make_trainer, lit_class):
    lit = lit_class(mlp, torch.optim.LBFGS)
    with pytest.raises(UnsupportedError, match="LBFGS"):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1)]).fit(lit, loader)
    assert lit.losses == []


def test_muon_is_refused_before_training_if_there_will_be_values(mlp, loader, make_trainer, lit_class):
    class Muon(torch.optim.SGD):
        pass

    lit = lit_class(mlp, lambda parameters: Muon(parameters, lr=0.01))
    sparse = lp.CompressionCallback(1, factorization=lp.LowRankPlusSparse(0.1))
    with pytest.raises(UnsupportedError, match="Muon steps matrices alone"):
        make_trainer(max_epochs=2, callbacks=[sparse]).fit(lit, loader)
    assert lit.losses == []
    make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1)]).fit(lit, loader)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": -1},
        {"epoch": 1, "keep": 0.0},
        {"epoch": 1, "keep": 1.2},
        {"epoch": 1, "calibration_batches": 0},
        {"epoch": 1, "rank_multiple_of": 0},
    ],
    ids=str,
)
def test_wrong_settings(wrong):
    with pytest.raises(ArgumentError, match="got"):
        lp.CompressionCallback(**wrong)


def test_validation_and_prediction_are_not_touched(mlp, loader, make_trainer, lit_class):
    lit = lit_class(mlp)
    lit.predict_step = lambda batch, batch_idx: lit.net(batch[0])
    make_trainer(callbacks=[lp.CompressionCallback(7), lp.PrehabCallback(), lp.RehabSchedule(3)]).predict(lit, loader)
    assert not low_rank(lit)


def test_evaluation_after_the_surgery(mlp, loader, make_trainer, lit_class):
    lit = lit_class(mlp, adam)
    lit.validation_step = lambda batch, batch_idx: lit.log("val", nn.functional.mse_loss(lit.net(batch[0]), batch[1]))
    trainer = make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1)])
    trainer.fit(lit, loader, loader)
    assert trainer.validate(lit, loader, verbose=False)[0]["val"] == pytest.approx(
        trainer.callback_metrics["val"].item()
    )


def test_validation_batches_are_not_counted(mlp, data, make_trainer, lit_class):
    class Spy(lp.WhitenedSVD):
        def metric(self, statistics):
            seen.add(int(statistics.tokens))
            return super().metric(statistics)

    seen, lit = set(), lit_class(mlp)
    lit.validation_step = lambda batch, batch_idx: lit.net(batch[0])
    loaders = {"train_dataloaders": DataLoader(data, 16), "val_dataloaders": DataLoader(data, 16)}
    compression = lp.CompressionCallback(1, calibration_batches=5, factorization=Spy())
    make_trainer(max_epochs=2, callbacks=[compression], val_check_interval=1 / 3).fit(lit, **loaders)
    assert seen == {80}


@pytest.mark.parametrize("settings", [{"limit_train_batches": 2}, {"overfit_batches": 2}], ids=str)
def test_the_own_pass_reads_no_more_than_an_epoch(settings, mlp, data, make_trainer, lit_class):
    class Spy(lp.KroneckerSVD):
        def metric(self, statistics):
            seen.add(int(statistics.tokens))
            return super().metric(statistics)

    seen, lit = set(), lit_class(mlp)
    trainer = make_trainer(callbacks=[lp.CompressionCallback(0, factorization=Spy())], **settings)
    with pytest.warns(UserWarning, match="fewer calibration tokens"):
        trainer.fit(lit, DataLoader(data, 16))
    assert seen == {32}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_own_pass_leaves_the_data_order_alone(workers, mlp, data, make_trainer, lit_class):
    class Batches(torch.utils.data.Sampler):
        """A batch sampler with a generator of its own."""

        def __init__(self):
            self.generator = torch.Generator().manual_seed(5)

        def __iter__(self):
            return iter(torch.randperm(96, generator=self.generator).view(6, 16).tolist())

        def __len__(self):
            return 6

    class Keep(lit_class):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch[0].clone()]
            return super().training_step(batch, batch_idx)

    orders = []
    for factorization in (lp.SVD(), lp.KroneckerSVD()):
        lit = Keep(copy.deepcopy(mlp))
        loader = DataLoader(data, batch_sampler=Batches(), num_workers=workers, persistent_workers=bool(workers))
        compression = lp.CompressionCallback(0, factorization=factorization)
        make_trainer(max_epochs=2, callbacks=[compression]).fit(lit, loader)
        orders.append(torch.stack(lit.seen))
    assert torch.equal(*orders)


def test_a_module_that_cannot_be_copied_is_told_the_way_out(mlp, loader, make_trainer, lit_class):
    import threading

    lit = lit_class(mlp)
    lit.lock = threading.Lock()
    with pytest.raises(UnsupportedError, match="cannot be copied.*epoch=1"):
        make_trainer(callbacks=[lp.CompressionCallback(0)]).fit(lit, loader)
    make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1)]).fit(lit, loader)
    assert low_rank(lit)


def test_reentrant_checkpointing_in_the_own_pass(loader, make_trainer, lit_class):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 6)

        def forward(self, x):
            return self.two(torch.utils.checkpoint.checkpoint(self.one, x.requires_grad_(), use_reentrant=True))

    lit = lit_class(Checkpointed())
    make_trainer(callbacks=[lp.CompressionCallback(0)]).fit(lit, loader)
    assert low_rank(lit)


def test_a_stream_shorter_than_its_limit_is_still_ridden_on(mlp, data, make_trainer, lit_class):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*data.tensors, strict=True))

    class Manual(lit_class):
        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    lit = Manual(mlp)
    trainer = make_trainer(max_epochs=2, limit_train_batches=500, callbacks=[lp.CompressionCallback(1)])
    trainer.fit(lit, DataLoader(Stream(), 16))
    assert low_rank(lit)


def test_nothing_of_an_aborted_run_reaches_the_next(mlp, data, make_trainer, lit_class):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*data.tensors, strict=True))

    class Abort(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise ZeroDivisionError

    class Spy(lp.KroneckerSVD):
        def metric(self, statistics):
            seen.add(int(statistics.tokens))
            return super().metric(statistics)

    seen, compression = set(), lp.CompressionCallback(1, calibration_batches=4, factorization=Spy())
    with pytest.raises(ZeroDivisionError):
        make_trainer(max_epochs=2, callbacks=[compression, Abort()]).fit(lit_class(mlp), DataLoader(Stream(), 16))
    make_trainer(max_epochs=2, callbacks=[compression]).fit(lit_class(copy.deepcopy(mlp)), DataLoader(data, 16))
    assert seen == {64}


def test_a_new_bias_is_counted(make_trainer, lit_class, loader):
    lit = lit_class(nn.Sequential(nn.Linear(12, 100, bias=False), nn.Linear(100, 6)))
    compression = lp.CompressionCallback(1, 0.9, factorization=lp.WhitenedSVD(centered=True))
    with pytest.warns(UserWarning, match="fewer calibration tokens"):
        make_trainer(max_epochs=2, callbacks=[compression]).fit(lit, loader)
    report = compression.report
    assert report.parameters_after <= report.parameters_before
    assert report.model_keep == pytest.approx(report.plan.model_keep)
    assert report.keep <= 0.9
    assert lp.CompressionReport.from_dict(report.to_dict(), report.plan.factorization).keep == report.keep


def test_optimizers_and_launchers_that_would_lose_the_factors(mlp, loader, make_trainer, lit_class):
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """Stands in for torch's, which needs a process group."""

    lit = lit_class(mlp, ZeroRedundancyOptimizer)
    with pytest.raises(UnsupportedError, match="ZeroRedundancyOptimizer.*never step the factors"):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1)]).fit(lit, loader)
    trainer = make_trainer(strategy="ddp_fork", devices=2, max_epochs=2)
    trainer.strategy._configure_launcher()
    with pytest.raises(UnsupportedError, match="ddp_fork.*Use strategy='ddp'"):
        lp.CompressionCallback(1).setup(trainer, lit, "fit")


def test_a_class_in_place_of_an_instance_is_named():
    with pytest.raises(ArgumentError, match=r"Expected a Factorization, got .*write SVD\(...\)"):
        lp.CompressionCallback(1, factorization=lp.SVD)
    with pytest.raises(ArgumentError, match=r"Expected a RankPolicy, got 0.4"):
        lp.CompressionCallback(1, policy=0.4)


def test_fast_dev_run_is_not_refused(mlp, loader, make_trainer, lit_class):
    with pytest.warns(UserWarning, match="still dense"):
        make_trainer(max_epochs=None, fast_dev_run=True, callbacks=[lp.CompressionCallback(4)]).fit(
            lit_class(mlp), loader
        )


@pytest.mark.parametrize(
    ("factorization", "policy"),
    [
        (lp.FisherSVD(), None),
        (lp.ActivationSVD(), lp.EnergyThreshold(0.5)),
        (lp.KroneckerSVD("auto", "auto"), None),
        (lp.KroneckerSVD(), lp.ZeroSum(0.5)),
        (lp.KroneckerSVD(), lp.ProbeBudget(0.5)),
        (lp.SVD(), lp.ParameterBudget(0.5, cost="flops")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_method_and_policy(factorization, policy, epoch, lit, loader, make_trainer):
    compression = lp.CompressionCallback(epoch, 0.5, factorization=factorization, policy=policy)
    prehab = lp.PrehabCallback(lp.TailEnergy(), 0.1) if epoch else lp.RehabSchedule(warmup_steps=2)
    make_trainer(max_epochs=2, callbacks=[prehab, compression]).fit(lit, loader)
    assert compression.report.keep < 1.0
    assert torch.isfinite(torch.tensor(lit.losses)).all()
    assert not any(module._forward_hooks for module in lit.modules())


def test_probes_leave_the_run_as_it_was(mlp, data, make_trainer, lit_class):
    """With a policy that measures, data order, random state and logs are those of a policy that does not."""
    losses = []
    for policy in (lp.ProbeBudget(0.999), lp.ParameterBudget(0.999)):
        torch.manual_seed(3)
        lit = lit_class(copy.deepcopy(mlp))
        compression = lp.CompressionCallback(1, policy=policy, factorization=lp.KroneckerSVD())
        make_trainer(max_epochs=2, callbacks=[compression]).fit(lit, DataLoader(data, 16, shuffle=True))
        losses.append((lit.losses[:6], torch.get_rng_state()))
        assert len(lit.losses) == 12
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert torch.equal(losses[0][1], losses[1][1])


def test_probes_with_manual_optimization_are_refused(mlp, loader, make_trainer, lit_class):
    class Manual(lit_class):
        def __init__(self, net):
            super().__init__(net)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))
            self.optimizers().step()

    compression = lp.CompressionCallback(1, policy=lp.ProbeBudget(0.5))
    with pytest.raises(UnsupportedError, match="Use another rank policy"):
        make_trainer(max_epochs=2, callbacks=[compression]).fit(Manual(mlp), loader)


def test_a_checkpoint_that_is_written_at_an_exception_has_the_sums(lit, loader, make_trainer, tmp_path):
    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                raise KeyError("somebody else's")

    saver = OnExceptionCheckpoint(tmp_path, filename="failed")
    callbacks = [lp.PrehabCallback(lp.StableRank(), space="loss"), lp.CompressionCallback(1), Fail(), saver]
    with pytest.raises(KeyError):
        make_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True).fit(lit, loader)
    states = torch.load(tmp_path / "failed.ckpt", weights_only=True)["callbacks"]
    assert int(states["CompressionCallback"]["statistics"]["net.0"]["tokens"]) == 80
    assert len(states["PrehabCallback"]["layers"]) == 3
    assert not any(module._forward_hooks for module in lit.modules())


@pytest.mark.parametrize("count", [2, 3, 9])
def test_few_batches_of_unknown_length_are_all_counted_once(count, make_trainer, lit_class):
    """None stands for others, since nobody knows whether those are going to come."""
    seen = []

    class Spy(lp.KroneckerSVD):
        def decompose(self, items):
            seen.extend((int(layer.tokens), float(layer.input_gram.trace())) for _, layer in items)
            return super().decompose(items)

    class Long(torch.utils.data.IterableDataset):
        def __iter__(self):
            source = torch.Generator().manual_seed(0)
            for _ in range(2 * count):
                yield torch.randn(300, 12, generator=source), torch.randn(300, 6, generator=source)

    lit = lit_class(nn.Sequential(nn.Linear(12, 6)))
    compression = lp.CompressionCallback(1, 0.5, factorization=Spy())
    make_trainer(max_epochs=2, callbacks=[compression]).fit(lit, DataLoader(Long(), 2))
    ((tokens, trace),) = seen
    assert tokens == count * 600
    assert trace == pytest.approx(sum(float(x.square().sum()) for x, _ in Long()), rel=1e-3)
