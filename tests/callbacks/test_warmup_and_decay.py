"""The whole way of the factor: warm-up, decay to the end of the run or over a length, groups, a cut before the run."""

import copy
import math
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_prehab as lp
from lightning_prehab.callbacks._warmup_and_decay import Progress, WarmupAndDecay
from lightning_prehab.errors import ArgumentError, UnsupportedError
from tests.callbacks.test_rehab import SCHEDULERS, SteppingSGD
from tests.same_model import assert_same_weights

BATCHES, EPOCHS, SURGERY, RATE = 6, 5, 1, 0.05


def cut(epoch=SURGERY):
    return lp.CompressionCallback(epoch, factorization=lp.SVD())


def fit(lit, loader, make_trainer, *callbacks, epochs=EPOCHS, ckpt_path=None, **settings):
    """The rates of all steps, by optimizer, of the first group."""
    trainer = make_trainer(max_epochs=epochs, callbacks=list(callbacks), **settings)
    trainer.fit(lit, loader, ckpt_path=ckpt_path)
    return [[rates[0] / RATE for rates in optimizer.used] for optimizer in trainer.optimizers]


def make(lit_class, mlp):
    return lit_class(copy.deepcopy(mlp), lambda parameters: SteppingSGD(parameters, lr=RATE))


def course(step, warmup, decay, start=0.1, peak=1.0, end=0.2, cosine=False):
    """What the factor is, written down anew."""
    share = min(step / warmup, 1.0) if step < warmup or decay is None else min((step - warmup) / decay, 1.0)
    low, high = (start, peak) if step < warmup or decay is None else (peak, end)
    return low + (high - low) * ((1 - math.cos(math.pi * share)) / 2 if cosine else share)


def assert_course(rates, before, warmup, decay, **path):
    after = [course(step, warmup, decay, **path) for step in range(len(rates) - before)]
    assert rates == pytest.approx([1.0] * before + after, rel=1e-9, abs=1e-12)


LAST = (EPOCHS - SURGERY) * BATCHES  # steps after the cut
#: Settings of the Trainer, of the schedule; steps before the cut, of the warm-up, of the decay.
RUNS = {
    "to the last epoch": ({}, {}, BATCHES, 4, LAST - 4),
    "to the last step": ({"max_steps": 20}, {}, BATCHES, 4, 20 - BATCHES - 4),
    "steps alone": ({"max_steps": 20, "epochs": -1}, {}, BATCHES, 4, 20 - BATCHES - 4),
    "fewer epochs than steps": ({"max_steps": 999}, {}, BATCHES, 4, LAST - 4),
    "a window of two": ({"accumulate_grad_batches": 2}, {}, BATCHES // 2, 4, LAST // 2 - 4),
    "a window of four": ({"accumulate_grad_batches": 4}, {}, 2, 4, 2 * (EPOCHS - SURGERY) - 4),
    "half an epoch": ({"limit_train_batches": 3}, {}, 3, 4, 3 * (EPOCHS - SURGERY) - 4),
    "steps": ({}, {"decay_steps": 7}, BATCHES, 4, 7),
    "epochs": ({}, {"decay_epochs": 1.5}, BATCHES, 4, 9),
    "epochs of both": ({}, {"warmup_steps": None, "warmup_epochs": 0.5, "decay_epochs": 1.5}, BATCHES, 3, 9),
    "at once": ({}, {"decay_steps": 0}, BATCHES, 4, 0),
    "no warm-up": ({}, {"warmup_steps": 0}, BATCHES, 0, LAST),
    "no decay": ({}, {"end_factor": None}, BATCHES, 4, None),
    "longer than the run": ({}, {"warmup_steps": 99}, BATCHES, 99, 1),
    "cosine": ({}, {"shape": "cosine", "peak_factor": 2.0, "end_factor": 0.0}, BATCHES, 4, LAST - 4),
}


@pytest.mark.parametrize("name", RUNS)
def test_warmup_and_decay(name, mlp, loader, make_trainer, lit_class):
    settings, arguments, before, warmup, decay = RUNS[name]
    arguments = {"warmup_steps": 4, "end_factor": 0.2, **arguments}
    too_long = pytest.warns(UserWarning, match="takes 99 steps") if warmup == 99 else nullcontext()
    with too_long:
        (rates,) = fit(make(lit_class, mlp), loader, make_trainer, cut(), lp.RehabSchedule(**arguments), **settings)
    path = {"cosine": True, "peak": 2.0, "end": 0.0} if name == "cosine" else {}
    decay = math.inf if decay == 0 else decay
    if decay == math.inf:
        assert rates[before + warmup :] == pytest.approx([0.2] * (len(rates) - before - warmup))
    else:
        assert_course(rates, before, warmup, decay, **path)


@pytest.mark.parametrize("first", [True, False])
def test_the_end_follows_an_accumulation_that_changes(first, mlp, loader, make_trainer, lit_class):
    windows = GradientAccumulationScheduler({0: 1, 2: 3, 3: 2})
    callbacks = [cut(), lp.RehabSchedule(4, end_factor=0.2)]
    callbacks = [windows, *callbacks] if first else [*callbacks, windows]
    (rates,) = fit(make(lit_class, mlp), loader, make_trainer, *callbacks)
    assert_course(rates, BATCHES, 4, (6 + 2 + 3 + 3) - 4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_goes_on_below_it(name, mlp, loader, make_trainer, lit_class):
    def scheduled():
        lit = make(lit_class, mlp)
        of = lit.configure_optimizers

        def configure_optimizers():
            optimizer = of()
            scheduler = None if SCHEDULERS[name] is None else SCHEDULERS[name](optimizer)
            told = {"scheduler": scheduler, "interval": "step", "monitor": "constant", "strict": False}
            return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": told}

        lit.configure_optimizers = configure_optimizers
        return lit

    (plain,) = fit(scheduled(), loader, make_trainer)
    (ours,) = fit(scheduled(), loader, make_trainer, cut(), lp.RehabSchedule(4, end_factor=0.2))
    factors = [1.0] * BATCHES + [course(step, 4, LAST - 4) for step in range(LAST)]
    assert ours == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=True)], rel=1e-9)


class ByHand(pl.LightningModule):
    """Two optimizers; the second one steps at every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.nets = nn.ModuleList(nn.Linear(12, 6) for _ in range(2))

    def training_step(self, batch, batch_idx):
        for index, (optimizer, net) in enumerate(zip(self.optimizers(), self.nets, strict=True)):
            if index == 0 or batch_idx % 2 == 0:
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                optimizer.step()

    def configure_optimizers(self):
        return [SteppingSGD(net.parameters(), lr=RATE) for net in self.nets]


def test_by_hand_the_end_is_told_in_batches(loader, make_trainer):
    rates = fit(ByHand(), loader, make_trainer, cut(), lp.RehabSchedule(4, end_factor=0.2))
    assert_course(rates[0], BATCHES, 4, LAST - 4)
    # the second one is warm after 4 steps, the last of them in the seventh batch; then every second batch has one
    warm = [course(step, 4, None) for step in range(4)]
    cold = [course(batch - 7, 0, LAST - 7) for batch in range(8, LAST, 2)]
    assert rates[1] == pytest.approx([1.0] * (BATCHES // 2) + warm + cold, rel=1e-9)


def test_by_hand_the_end_is_told_in_steps_of_all_optimizers(loader, make_trainer):
    settings = {"max_steps": 45, "epochs": -1}  # nine of them in an epoch
    rates = fit(ByHand(), loader, make_trainer, cut(), lp.RehabSchedule(0, end_factor=0.2), **settings)
    done = [0, 2, 3, 5, 6, 8]  # of the run when a batch of an epoch begins
    expected = [course(9 * epoch + done[batch], 0, 36) for epoch in range(4) for batch in range(BATCHES)]
    assert rates[0] == pytest.approx([1.0] * BATCHES + expected, rel=1e-9)


def test_by_hand_epochs_are_batches(loader, make_trainer):
    schedule = lp.RehabSchedule(warmup_epochs=0.5, end_factor=0.2, decay_epochs=2)
    rates = fit(ByHand(), loader, make_trainer, cut(), schedule)
    assert_course(rates[0], BATCHES, 3, 12)
    assert rates[1] == pytest.approx(rates[0][::2])


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[index] for index in range(len(self.data))])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"warmup_steps": 4, "end_factor": 0.1}, {}, r"end of the run, .*RehabSchedule\(decay_steps="),
        ({"warmup_steps": 4, "end_factor": 0.1, "decay_epochs": 2}, {}, r"RehabSchedule\(decay_steps="),
        ({"warmup_steps": 4, "end_factor": 0.1, "decay_steps": 2}, {}, None),
        ({"warmup_steps": 2, "end_factor": 0.1}, {"max_steps": 9}, None),
        ({"warmup_steps": 4}, {}, None),
    ],
)
def test_an_end_that_is_not_known_is_said_in_time(arguments, settings, message, mlp, data, make_trainer, lit_class):
    lit, loader = make(lit_class, mlp), DataLoader(Stream(data), 16)
    callbacks = [cut(), lp.RehabSchedule(**arguments)]
    if message is None:
        fit(lit, loader, make_trainer, *callbacks, epochs=2, **settings)
        return
    with pytest.raises(UnsupportedError, match=message):
        fit(lit, loader, make_trainer, *callbacks, epochs=2)
    assert lit.losses == []


TOO_LONG = {
    "warm-up": (
        {"warmup_steps": 24},
        "the warm-up takes 24 steps, and 12 .* comes to 0.512 times yours .* peak_factor=1",
    ),
    "epochs": ({"warmup_epochs": 3}, "the warm-up takes 18 steps, and 12 are left .* shorter warm-up"),
    "cosine": (
        {"warmup_steps": 22, "shape": "cosine", "start_factor": 0.0, "peak_factor": 2},
        "comes to 1 times yours",
    ),
    "no decay": ({"warmup_steps": 24, "end_factor": 0.1}, "There is no decay to end_factor=0.1"),
    "decay": (
        {"warmup_steps": 4, "end_factor": 0.1, "decay_steps": 9},
        "warm-up and decay take 13 steps, and 12 are left",
    ),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_what_the_run_is_too_short_for_is_said_at_the_cut(name, mlp, loader, make_trainer, lit_class):
    """Once, with the factor that is really reached; and of several cuts at the last one."""
    arguments, message = TOO_LONG[name]
    surgery, rehab, seen = lp.CompressionCallback([1, 2], [0.7, 0.4], factorization=lp.SVD()), [], []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append((trainer.current_epoch, rehab[0].factor()))

    for cuts in (surgery, cut()):
        rehab[:], epochs = [lp.RehabSchedule(**arguments)], 4 if cuts is surgery else SURGERY + 2
        with pytest.warns(UserWarning, match=message) as found:
            fit(make(lit_class, mlp), loader, make_trainer, cuts, *rehab, Watch(), epochs=epochs)
        ours = [str(one.message) for one in found if "RehabSchedule" in str(one.message)]
        assert len(ours) == 1
        if "comes to" in ours[0]:
            assert f"comes to {seen[-1][1]:.3g} times" in ours[0]


@pytest.mark.parametrize(
    "arguments", [{"warmup_steps": 12}, {"warmup_epochs": 2}, {"warmup_steps": 3, "end_factor": 0.0}]
)
def test_nothing_is_said_of_what_fits(arguments, mlp, loader, make_trainer, lit_class):
    fit(make(lit_class, mlp), loader, make_trainer, cut(), lp.RehabSchedule(**arguments), epochs=SURGERY + 2)
    arguments = {**arguments, "warmup_steps": 99, "warmup_epochs": None}
    fit(make(lit_class, mlp), loader, make_trainer, cut(0), lp.RehabSchedule(**arguments), fast_dev_run=2)


def test_open_training_has_no_end(mlp, loader, make_trainer, lit_class):
    lit = make(lit_class, mlp)
    with pytest.raises(UnsupportedError, match="Give max_steps to the Trainer"):
        fit(lit, loader, make_trainer, cut(), lp.RehabSchedule(4, end_factor=0.1), epochs=-1, max_time="00:00:01:00")
    assert lit.losses == []


@pytest.fixture
def same(data):
    """Six batches that are the same: plain loaders do not go on in the middle of an epoch."""
    return DataLoader(torch.utils.data.Subset(data, 6 * list(range(16))), 16)


class Save(pl.Callback):
    """A checkpoint after every batch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx + 1}.ckpt")


#: Batches after which a run is resumed: before the cut, at it, in the warm-up, at its end, in the decay, in the end.
MOMENTS = [4, 6, 8, 10, 11, 17, 18, 28]


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "by hand"])
def test_a_resumed_run_is_bitwise_the_same(manual, mlp, same, make_trainer, lit_class, tmp_path):
    def module():
        return ByHand() if manual else make(lit_class, mlp)

    def callbacks():
        groups = {0: 0.5}
        return cut(), lp.RehabSchedule(4, end_factor=0.2, shape="cosine", group_factors=groups)

    whole = module()
    expected = fit(whole, same, make_trainer, *callbacks(), Save(tmp_path))
    for moment in MOMENTS:
        lit = module()
        found = fit(lit, same, make_trainer, *callbacks(), ckpt_path=tmp_path / f"{moment}.ckpt")
        for ours, theirs in zip(found, expected, strict=True):
            assert ours, moment
            assert ours == theirs[-len(ours) :], moment
        assert_same_weights(lit, whole)


def test_a_run_that_is_made_longer_ends_later(mlp, loader, make_trainer, lit_class, tmp_path):
    def callbacks():
        return cut(), lp.RehabSchedule(4, end_factor=0.2)

    fit(make(lit_class, mlp), loader, make_trainer, *callbacks(), Save(tmp_path))
    (rates,) = fit(
        make(lit_class, mlp), loader, make_trainer, *callbacks(), ckpt_path=tmp_path / "20.ckpt", epochs=EPOCHS + 2
    )
    expected = [course(step, 4, LAST + 2 * BATCHES - 4) for step in range(20 - BATCHES, LAST + 2 * BATCHES)]
    assert rates == pytest.approx(expected, rel=1e-9)


def test_a_decay_begins_anew_in_another_run_of_the_same_module(mlp, loader, make_trainer, lit_class):
    lit, callbacks = make(lit_class, mlp), (cut(), lp.RehabSchedule(4, end_factor=0.0))
    fit(lit, loader, make_trainer, *callbacks)
    (rates,) = fit(lit, loader, make_trainer, *callbacks)
    assert_course(rates, 0, 0, EPOCHS * BATCHES, end=0.0)


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({0: 0.5}, [0.5, 1.0, 1.0]),
        ({"head": 0.0, 0: 2.0}, [2.0, 1.0, 0.0]),
        ({"h*": 3.0, "head": 0.25}, [1.0, 1.0, 0.25]),
        ({"head": 0.25, "h*": 3.0}, [1.0, 1.0, 3.0]),
        ({2: 0.5, 1: 0.1}, [1.0, 0.1, 0.5]),
    ],
    ids=str,
)
def test_groups_have_factors_of_their_own(factors, expected, tensors, loader, make_trainer):
    class Grouped(ByHand):
        def configure_optimizers(self):
            def rate():
                return torch.tensor(RATE) if tensors else RATE

            first, second = self.nets
            return [
                SteppingSGD([{"params": [first.weight], "lr": rate()}, {"params": [first.bias], "lr": rate()}]),
                SteppingSGD([{"params": list(second.parameters()), "lr": rate(), "name": "head"}]),
            ]

    trainer = make_trainer(max_epochs=2, callbacks=[cut(), lp.RehabSchedule(4, group_factors=factors)])
    trainer.fit(Grouped(), loader)
    for optimizer, own in zip(trainer.optimizers, (expected[:2], expected[2:]), strict=True):
        before = BATCHES if len(own) == 2 else BATCHES // 2
        for step, rates in enumerate(optimizer.used):
            factor = 1.0 if step < before else course(step - before, 4, None)
            parts = [1.0] * len(own) if step < before else own
            assert rates == pytest.approx([RATE * factor * part for part in parts], rel=1e-6, abs=1e-12)
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([RATE] * len(own))


@pytest.mark.parametrize(
    ("key", "message"),
    [("head", r"no parameter group is 'head'; the groups are 0 \('rest'\), 1\. They"), (2, "no parameter group is 2")],
)
def test_a_group_that_is_not_there_is_named_before_training(key, message, mlp, loader, make_trainer, lit_class):
    def groups(parameters):
        first, *others = parameters
        return SteppingSGD([{"params": [first], "name": "rest"}, {"params": others, "name": ""}][:2])

    def configure(parameters):
        optimizer = groups(parameters)
        del optimizer.param_groups[1]["name"]
        return optimizer

    lit = lit_class(mlp, configure)
    with pytest.raises(ArgumentError, match=message):
        fit(lit, loader, make_trainer, cut(), lp.RehabSchedule(4, group_factors={key: 0.5}))
    assert lit.losses == []


def test_one_tensor_cannot_be_two_rates(mlp, loader, make_trainer, lit_class):
    def shared(parameters):
        first, *others = parameters
        rate = torch.tensor(RATE)
        return SteppingSGD([{"params": [first], "lr": rate}, {"params": others, "lr": rate}])

    with pytest.raises(ArgumentError, match="group 1 shares the tensor"):
        fit(lit_class(mlp, shared), loader, make_trainer, cut(), lp.RehabSchedule(4, group_factors={0: 0.5}))


def test_learning_rate_monitor_tells_the_whole_way(mlp, loader, make_trainer, lit_class, tmp_path):
    class Monitor(LearningRateMonitor):
        def __init__(self):
            super().__init__(logging_interval="step")
            self.told = []

        def _extract_stats(self, trainer, interval):
            stats = super()._extract_stats(trainer, interval)
            self.told += stats.values()
            return stats

    monitor = Monitor()
    schedule = lp.RehabSchedule(4, end_factor=0.2, group_factors={0: 0.5})
    settings = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    (used,) = fit(make(lit_class, mlp), loader, make_trainer, monitor, cut(), schedule, **settings)
    assert [rate / RATE for rate in monitor.told] == pytest.approx(used, rel=1e-12)


@pytest.mark.parametrize("way", ["module", "checkpoint", "weights"])
def test_a_model_that_is_cut_already_is_warmed_up_from_the_first_step(
    way, mlp, same, make_trainer, lit_class, tmp_path
):
    def callbacks():
        return (lp.RehabSchedule(4, end_factor=0.2),)

    small, path = make(lit_class, mlp), None
    fit(small, same, make_trainer, cut(0), Save(tmp_path), epochs=1)
    if way == "module":
        lit, epochs, left = small, EPOCHS, EPOCHS * BATCHES
    else:
        lit, path, epochs, left = make(lit_class, mlp), tmp_path / "6.ckpt", EPOCHS, (EPOCHS - 1) * BATCHES
        if way == "weights":
            stored = torch.load(path, weights_only=True)
            stored["callbacks"] = {}
            torch.save(stored, path)
    whole = copy.deepcopy(lit)
    (rates,) = fit(lit, same, make_trainer, *callbacks(), Save(tmp_path), epochs=epochs, ckpt_path=path)
    assert_course(rates, 0, 4, left - 4)
    if way == "module":  # and that resumes
        (again,) = fit(whole, same, make_trainer, *callbacks(), ckpt_path=tmp_path / "13.ckpt")
        assert again == rates[13:]
        assert_same_weights(whole, lit)


def test_a_checkpoint_of_before_there_was_a_decay_is_read(mlp, loader, make_trainer, lit_class, tmp_path):
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}")
    fit(make(lit_class, mlp), loader, make_trainer, cut(), lp.RehabSchedule(4), keeper, enable_checkpointing=True)
    path = tmp_path / "step=8.ckpt"
    stored = torch.load(path, weights_only=True)
    stored["callbacks"]["RehabSchedule"] = {"version": 1, "length": 4, "done": [2]}
    torch.save(stored, path)
    for end, decay in ((None, None), (0.2, LAST - 4)):
        schedule = lp.RehabSchedule(4, end_factor=end)
        (rates,) = fit(make(lit_class, mlp), loader, make_trainer, cut(), schedule, ckpt_path=path)
        assert rates == pytest.approx([course(step, 4, decay) for step in range(2, LAST)], rel=1e-9)


def test_the_decay_waits_for_the_last_cut():
    path = {"start": 0.0, "peak": 1.0, "end": 0.0, "shape": "linear"}
    early = WarmupAndDecay({"steps": 2}, [Progress()], decay={"steps": 2}, last=False)
    late = WarmupAndDecay({"steps": 2}, [Progress()], decay={"steps": 2})
    seen = {early.last: [], late.last: []}
    for one in (early, late):
        for _ in range(6):
            seen[one.last].append(one.factor(0, **path))
            one.count_step(0)
        assert WarmupAndDecay.from_dict(one.to_dict()) == one
    assert seen == {False: [0.0, 0.5, 1.0, 1.0, 1.0, 1.0], True: [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]}
