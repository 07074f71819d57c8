"""A callback object in a second fit, of another module, is like a new one: nothing of the first run is in its state."""

import re

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_prehab as lp
from lightning_prehab import callbacks as room
from tests.same_model import assert_same_weights

EPOCHS, SURGERY = 5, 2


class Stop(Exception):
    """Ends a run in the middle."""


class Stream(IterableDataset):
    """Does not tell its length."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[index] for index in range(len(self.data))])


#: All that can stand in a Trainer together; the surgery is added where there is none.
SETTINGS = {
    "default": lambda: [lp.PrehabCallback(), lp.CompressionCallback(SURGERY, 0.5), lp.RehabSchedule()],
    "auto": lambda: [
        lp.PrehabCallback(forecast_every_n_steps=2),
        lp.CompressionCallback("auto", 0.4, forecast_below=1e-3, calibration_batches=3),
        lp.RehabSchedule(warmup_epochs=0.5, peak_factor=2.0),
    ],
    "share": lambda: [
        lp.PrehabCallback(lp.StableRank(), strength_share=0.1, space="loss", forecast_every_n_steps=2),
        lp.CompressionCallback(SURGERY, 0.5, calibration_batches=3),
        lp.RehabSchedule(3, end_factor=0.0),
    ],
    "penalty": lambda: [
        lp.PrehabCallback(lp.TailEnergy(), ramp_steps=8, space="activation", update_steps=6),
        lp.CompressionCallback(SURGERY, lp.Recipe(0.5, factorization=lp.SVD()), reset_scores=True),
        lp.RehabSchedule(100, shape="cosine", end_factor=0.1, decay_steps=50, group_factors={0: 0.5}),
    ],
    "paper": lambda: [lp.PaperPrehab(), lp.CompressionCallback(SURGERY, 0.5), lp.RehabSchedule()],
    "taught": lambda: [
        lp.PrehabCallback(self_distillation=0.5),
        lp.CompressionCallback(SURGERY, 0.5),
        lp.RehabDistillation(fade_steps=20),
        lp.FactorTraining(0.01, alternate=2, rate_B=2.0),
    ],
    "without a surgery": lambda: [lp.PrehabCallback(strength_share=0.2, space="loss")],
}
#: What ends the first run, and where.
ENDS = {"finished": None, "at once": (0, 1), "before": (1, 2), "after": (SURGERY + 1, 3)}


def all_kinds():
    return {getattr(room, name) for name in room.__all__}


def test_every_callback_of_the_package_is_here():
    assert {type(callback) for make in SETTINGS.values() for callback in make()} == all_kinds()


def picture(value, where=""):
    """What can be seen of a value, at this moment, by its place: types and numbers, whoever holds them."""
    if isinstance(value, nn.Module):
        value = dict(value.state_dict())
    elif type(value).__module__.startswith("lightning_prehab") and hasattr(value, "__dict__"):
        value = vars(value)
    seen = {where: type(value).__name__}
    if isinstance(value, torch.Tensor):
        seen[where] = value.detach().clone()
    elif isinstance(value, int | float | str | bytes | None):
        seen[where] = value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            seen |= picture(part, f"{where}.{key}")
    return seen


def alike(one, other, where):
    assert list(one) == list(other), where
    for place, value in one.items():
        if re.search(r"report(s\.\d+)?\.created$", place):
            continue  # the time of day
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[place], rtol=0, atol=0, equal_nan=True, msg=f"{where}{place}")
        else:
            assert value == other[place], f"{where}{place}"


class Look(pl.Callback):
    """Keeps the state of the others at the start of fit, and may end the run."""

    def __init__(self, end=None):
        self.end, self.seen = end, {}

    def on_sanity_check_start(self, trainer, pl_module):
        for callback in trainer.callbacks:
            if type(callback) in all_kinds():
                self.seen[type(callback).__name__] = picture(vars(callback))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.end:
            raise Stop


@pytest.fixture
def fit(make_trainer, lit_class, data):
    def fit(callbacks, seed, end=None, ckpt_path=None, stream=False, **settings):
        """A run of a new module; what the callbacks were like when it began."""
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 6))
        lit = lit_class(net, lambda parameters: torch.optim.Adam(parameters, lr=2e-3))
        lit.validation_step = lambda batch, batch_idx: None
        look = Look(end)
        trainer = make_trainer(max_epochs=EPOCHS, callbacks=[*callbacks, look], **settings)
        batches = DataLoader(Stream(data) if stream else data, 16)
        try:
            trainer.fit(lit, batches, batches, ckpt_path=ckpt_path)
        except Stop:
            assert end is not None
        return look.seen, lit, trainer

    return fit


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_second_run_begins_like_the_first_of_a_new_object(name, end, fit):
    used, new = SETTINGS[name](), SETTINGS[name]()
    fit(used, 1, ENDS[end])
    found, ours, _ = fit(used, 2)
    expected, theirs, _ = fit(new, 2)
    assert found.keys() == expected.keys() == {type(callback).__name__ for callback in new}
    for kind, state in expected.items():
        alike(found[kind], state, kind)
    assert_same_weights(ours, theirs)
    for one, other in zip(used, new, strict=True):
        alike(picture(one.state_dict()), picture(other.state_dict()), f"{type(one).__name__} in the end")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", [SURGERY - 1, SURGERY])
@pytest.mark.parametrize("name", ["default", "share", "paper", "penalty"])
def test_so_does_a_run_that_resumes(name, where, fit, tmp_path):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    fit([*SETTINGS[name](), Save()], 1)
    used, new = SETTINGS[name](), SETTINGS[name]()
    fit(used, 2)
    runs = [fit(callbacks, 3, ckpt_path=tmp_path / f"{where}.ckpt") for callbacks in (used, new)]
    for kind, state in runs[1][0].items():
        alike(runs[0][0][kind], state, kind)
    assert_same_weights(runs[0][1], runs[1][1])
    fit(used, 2)  # and the run after it
    found, *_ = fit(used, 4)
    expected, *_ = fit(SETTINGS[name](), 4)
    for kind, state in expected.items():
        alike(found[kind], state, kind)


@pytest.mark.filterwarnings("ignore")
def test_a_regularizer_that_was_replaced_is_chosen_again(fit):
    """Where the length of an epoch is not known, the default takes a penalty; the next run knows it."""
    used = SETTINGS["default"]()
    fit(used[:2], 1, stream=True)
    assert isinstance(used[0].regularizer, lp.StableRank)
    found, *_ = fit(used, 2)
    expected, *_ = fit(SETTINGS["default"](), 2)
    for kind, state in expected.items():
        alike(found[kind], state, kind)
    auto = SETTINGS["auto"]()
    auto[0].regularizer = lp.StableRank()  # as such a run leaves it
    fit(auto, 1)  # nobody says that nobody forecasts


@pytest.mark.filterwarnings("ignore")
def test_the_same_module_made_dense_again_is_warmed_up_again(fit, make_trainer, loader):
    """And it is not trained at the last factor of the first run until then."""
    used = SETTINGS["auto"]()
    _, lit, _ = fit(used, 1)
    lp.to_dense_(lit)
    factors = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            factors.append((used[1].done, used[2].factor()))

    make_trainer(max_epochs=EPOCHS, callbacks=[*used, Watch()]).fit(lit, loader)
    assert {factor for done, factor in factors if not done} == {1.0}
    assert next(factor for done, factor in factors if done) == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore")
def test_the_same_module_goes_on(fit, make_trainer, loader):
    """A second fit of a module that is cut continues: no second surgery, and the warm-up where it was."""
    used = SETTINGS["penalty"]()
    _, lit, _ = fit(used, 1)
    report, done = used[1].report, used[2].state_dict()["course"]["optimizers"][0]["done"]["steps"]
    assert report is not None
    assert used[0].forecast is None
    make_trainer(max_epochs=EPOCHS, limit_train_batches=1, callbacks=used).fit(lit, loader)
    assert used[1].report is report
    assert used[2].state_dict()["course"]["optimizers"][0]["done"]["steps"] == done + EPOCHS
    assert used[2].factor() < 1.0
