"""Every setting against the same training written by hand, in each way of making a step."""

import copy
import importlib

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.layers.pairs import factor_pairs
from tests.layers.test_pairs import dense_product

RATE, DECAY, STEPS = 0.05, 0.2, 6
OVERFLOWS = (3, 4)  # batches whose gradients overflow, with loss scaling


def net():
    """Two cut layers, one in the pivot layout, and one that is not cut; in float64, to tell rounding from mistakes."""
    torch.manual_seed(0)
    cut = lp.LowRankLinear(12, 16, 4), lp.PivotLinear(16, 14, 3)
    return nn.Sequential(cut[0], nn.Tanh(), cut[1], nn.LayerNorm(14), nn.Linear(14, 6)).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16 * STEPS, 12, generator=generator).double()
    return DataLoader(TensorDataset(x, torch.tanh(x @ torch.randn(12, 6, generator=generator).double())), 16)


MAKERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=DECAY),
    "Adam": lambda p: torch.optim.Adam(p, lr=RATE, weight_decay=DECAY),
    "fused": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=DECAY, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=DECAY),
}


class Lit(pl.LightningModule):
    """All parameters in one group; ``how`` a step is made."""

    def __init__(self, how="automatic", maker="AdamW", module=None):
        super().__init__()
        self.net, self.how, self.maker = net() if module is None else module, how, maker
        self.automatic_optimization = how not in ("manual", "by itself", "two", "closure")
        self.seen = []

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss(batch)
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        if self.how == "closure":

            def closure():
                self.manual_backward(self.loss(batch))

            optimizers[0].optimizer.step(closure)
            return None
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            (optimizer.optimizer if self.how == "by itself" else optimizer).step()
        return None

    def configure_optimizers(self):
        make = MAKERS[self.maker]
        if self.how == "two":
            return [make(self.net[:1].parameters()), make(self.net[1:].parameters())]
        return make(self.net.parameters())


def by_hand(maker, *, accumulate=1, clip=None, skip=(), epochs=2, **settings):
    """The same training, with the product formed and an optimizer that has groups for the factors."""
    settings = {"product_decay": None, "decay_form": "decoupled", "alternate": None, "train": "all", **settings}
    model = net()
    pairs = factor_pairs(model)
    factors = [parameter for pair in pairs for parameter in pair.both]
    if settings["train"] != "all":
        for parameter in model.parameters():
            small = parameter.dim() < 2 and settings["train"] != "factors"
            parameter.requires_grad_(small or any(parameter is one for one in factors))
    own = {} if settings["product_decay"] is None else {"weight_decay": 0.0}
    groups = [
        {"params": [pair.both[place] for pair in pairs], "lr": RATE * settings.get(name, 1.0), **own}
        for place, name in enumerate(("rate_A", "rate_B"))
    ]
    rest = [parameter for parameter in model.parameters() if not any(parameter is one for one in factors)]
    optimizer = MAKERS[maker]([*groups, {"params": rest}])
    steps = 0
    for number, batch in enumerate(list(batches()) * epochs):
        (nn.functional.mse_loss(model(batch[0]), batch[1]) / accumulate).backward()
        if (number + 1) % accumulate:
            continue
        if number in skip:
            optimizer.zero_grad()
            continue
        every = settings["alternate"]
        if every is not None:
            for parameter in groups[steps // every % 2]["params"]:
                parameter.grad = None
        trained = [parameter for parameter in factors if parameter.grad is not None]
        size = 0.5 * (settings["product_decay"] or 0.0) * sum(dense_product(pair).square().sum() for pair in pairs)
        decay = torch.autograd.grad(size, trained)
        if settings["decay_form"] == "gradient":
            for parameter, gradient in zip(trained, decay, strict=True):
                parameter.grad += gradient
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if settings["decay_form"] == "decoupled":
            with torch.no_grad():
                for parameter, gradient in zip(trained, decay, strict=True):
                    second = any(parameter is one for one in groups[1]["params"])
                    parameter.sub_(optimizer.param_groups[int(second)]["lr"] * gradient)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return model


def trained(make_trainer, lit, *callbacks, epochs=2, **settings):
    trainer = make_trainer(max_epochs=epochs, callbacks=list(callbacks), **settings)
    trainer.fit(lit, batches())
    return trainer


class Overflow(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.total_batch_idx in OVERFLOWS:
            next(parameter for parameter in pl_module.parameters() if parameter.grad is not None).grad.fill_(torch.inf)


SETTINGS = {
    "decoupled": {"product_decay": 0.3},
    "gradient": {"product_decay": 0.3, "decay_form": "gradient"},
    "no decay": {"product_decay": 0.0},
    "rates": {"rate_A": 0.5, "rate_B": 3.0},
    "alternate": {"alternate": 2},
    "factors": {"train": "factors"},
    "norms": {"train": "factors_norms_biases"},
    "all of them": {
        "product_decay": 0.1,
        "rate_B": 2.0,
        "alternate": 1,
        "train": "factors_norms_biases",
    },
}
WAYS = ["automatic", "accumulate", "clip", "scaled", "manual", "by itself", "two"]
#: Each setting by itself with clipping and loss scaling, and all of them in each way.
CASES = [(name, how) for name in SETTINGS for how in (WAYS if name in ("all of them", "gradient") else ["scaled"])]


def check(make_trainer, scaled_precision, name, how, maker):
    settings = SETTINGS[name]
    trainer_settings, hand = {}, {}
    if how == "accumulate":
        trainer_settings, hand = {"accumulate_grad_batches": 2}, {"accumulate": 2}
    elif how == "clip":
        trainer_settings, hand = {"gradient_clip_val": 0.01}, {"clip": 0.01}
    elif how == "scaled":
        trainer_settings, hand = {"plugins": scaled_precision(1024.0), "gradient_clip_val": 0.1}, {"clip": 0.1}
        hand["skip"] = OVERFLOWS
    if maker == "fused":  # which Lightning does not clip under loss scaling, since it unscales the gradients itself
        del trainer_settings["gradient_clip_val"], hand["clip"]
    lit = Lit(how, maker)
    others = [Overflow()] if how == "scaled" else []
    trainer = trained(make_trainer, lit, *others, lp.FactorTraining(**settings), **trainer_settings)
    expected = by_hand(maker, **hand, **settings)
    for (key, ours), theirs in zip(lit.net.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
    for optimizer in trainer.optimizers:
        assert len(optimizer.param_groups) == 1
        assert optimizer.param_groups[0]["weight_decay"] == DECAY
        assert optimizer.param_groups[0]["lr"] == RATE
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert all(parameter.requires_grad for parameter in lit.parameters())


@pytest.mark.parametrize(("name", "how"), CASES)
def test_it_is_the_training_that_one_would_write_by_hand(name, how, make_trainer, scaled_precision):
    check(make_trainer, scaled_precision, name, how, "AdamW")


@pytest.mark.parametrize("maker", ["SGD", "Adam"])
@pytest.mark.parametrize("name", ["decoupled", "gradient", "all of them"])
def test_coupled_decay_is_set_aside_as_well(name, maker, make_trainer, scaled_precision):
    check(make_trainer, scaled_precision, name, "clip", maker)


@pytest.mark.parametrize("name", ["gradient", "all of them"])
def test_a_fused_optimizer_unscales_the_gradients_itself(name, make_trainer, scaled_precision):
    check(make_trainer, scaled_precision, name, "scaled", "fused")


def test_plain_sgd_makes_no_difference_between_the_forms(make_trainer, monkeypatch):
    monkeypatch.setitem(MAKERS, "AdamW", lambda p: torch.optim.SGD(p, lr=RATE))
    ends = []
    for form in ("decoupled", "gradient"):
        lit = Lit()
        trained(make_trainer, lit, lp.FactorTraining(product_decay=0.3, decay_form=form))
        ends.append(lit.net.state_dict())
    torch.testing.assert_close(*ends)


def test_what_waits_is_not_touched_at_all(make_trainer):
    class Look(pl.Callback):
        def __init__(self):
            self.moved = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = self.look(trainer, pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            after = self.look(trainer, pl_module)
            self.moved.append([before != now for before, now in zip(self.before, after, strict=True)])

        def look(self, trainer, pl_module):
            state = trainer.optimizers[0].state
            pairs = factor_pairs(pl_module)
            both = ([pair.both[place] for pair in pairs] for place in (0, 1))
            return [str([(one.tolist(), str(state.get(one))) for one in each]) for each in both]

    look = Look()
    trained(make_trainer, Lit(), lp.FactorTraining(alternate=3), look)
    assert look.moved == ([[False, True]] * 3 + [[True, False]] * 3) * 2  # B first


def test_rebalancing_keeps_the_product_and_acts_after_every_so_many_steps(make_trainer):
    class Look(pl.Callback):
        def __init__(self):
            self.ratios, self.other, self.steps = [], 0, 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            a, b = factor_pairs(pl_module)[0]._matrices()
            ratio = a.norm(dim=-1) / b.norm(dim=-2)
            self.ratios.append(max(float(ratio.max()), 1 / float(ratio.min())))

    def run(every):
        lit, look = Lit(maker="SGD"), Look()
        with torch.no_grad():
            lit.net[0].A.weight.mul_(64.0)
            lit.net[0].B.weight.div_(64.0)
        callback = lp.FactorTraining(rebalance_every=every)
        trained(make_trainer, lit, callback, look)
        return look.ratios

    ratios = run(4)
    assert min(ratios[:3]) > 2
    assert max(ratios[3::4]) <= 2
    assert max(run(1)) <= 2


def test_rebalancing_says_once_what_it_leaves_as_it_is(make_trainer, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_prehab.callbacks._factor_steps.rank_zero_info", said.append)
    monkeypatch.setitem(MAKERS, "AdamW", lambda p: torch.optim.Adafactor(p, lr=RATE))
    lit = Lit()
    with torch.no_grad():
        lit.net[0].A.weight.mul_(64.0)
    trained(make_trainer, lit, lp.FactorTraining(rebalance_every=2))
    assert len(said) == 1
    assert "1 layers as they are (first: 'net.0'): what Adafactor knows" in said[0]


def dense_lit():
    torch.manual_seed(0)
    widths = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.LayerNorm(14), nn.Linear(14, 6)]
    return Lit(module=nn.Sequential(*widths).double())


def test_it_acts_from_the_surgery_on(make_trainer):
    class AtTheCut(pl.Callback):
        def on_surgery(self, trainer, pl_module, report):
            self.state = copy.deepcopy(pl_module.net.state_dict())

    def run(*callbacks):
        lit, look = dense_lit(), AtTheCut()
        cut = lp.CompressionCallback(1, factorization=lp.SVD())
        trained(make_trainer, lit, cut, *callbacks, look)
        return look.state, lit.net.state_dict()

    plain, _ = run()
    ours, end = run(lp.FactorTraining(product_decay=0.1, train="factors", rate_B=2.0))
    assert all(torch.equal(value, ours[key]) for key, value in plain.items())
    assert {key for key, value in end.items() if torch.equal(value, ours[key])} == {
        *("0.B.bias", "2.B.bias", "3.weight", "3.bias", "4.B.bias")
    }


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_the_warmup_of_rehab_and_the_rate_of_a_factor_multiply(nested, order, make_trainer, monkeypatch):
    class Nested(torch.optim.SGD):  # the hooks of a step run twice
        def step(self, closure=None):
            loss = closure() if closure is not None else None
            super().step()
            return loss

    sgd = importlib.import_module("torch.optim.sgd")
    used, update = [], sgd.sgd

    def watched(parameters, *args, lr, **settings):
        used.append(lr)
        return update(parameters, *args, lr=lr, **settings)

    monkeypatch.setattr(sgd, "sgd", watched)
    lit = dense_lit()
    lit.configure_optimizers = lambda: (Nested if nested else torch.optim.SGD)(lit.parameters(), lr=0.1)
    callbacks = [lp.RehabSchedule(4, start_factor=0.5), lp.FactorTraining(rate_B=3.0)][::order]
    trainer = trained(make_trainer, lit, lp.CompressionCallback(1, factorization=lp.SVD()), *callbacks)
    assert used[:6] == [0.1] * 6
    ramp = [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    assert used[6::2] == pytest.approx([0.1 * factor for factor in ramp])
    assert used[7::2] == pytest.approx([0.3 * factor for factor in ramp])
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1]


class Resumable:
    """A loader that goes on within an epoch."""

    def __init__(self):
        self.batches, self.at = list(batches()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.at %= len(self)
        while self.at < len(self):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


#: Before the cut, within an epoch after it, at the end of one.
STOPS = [("all of them", 4), ("all of them", 13), ("rebalance", 13)]
STOPS += [(name, 11) for name in ("decoupled", "gradient", "rates", "alternate", "all of them", "rebalance")]


@pytest.mark.parametrize(("name", "stopped"), STOPS)
def test_kill_and_resume_is_bitwise(name, stopped, make_trainer, tmp_path):
    settings = {"rebalance_every": 4, "rate_A": 5.0} if name == "rebalance" else SETTINGS[name]

    def run(*callbacks, **arguments):
        lit = dense_lit()
        acts = [lp.CompressionCallback(1, factorization=lp.SVD()), lp.FactorTraining(**settings)]
        trainer = make_trainer(max_epochs=3, callbacks=[*acts, *callbacks], enable_checkpointing=bool(callbacks))
        trainer.fit(lit, Resumable(), **arguments)
        return lit, trainer

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == stopped:
                raise KeyboardInterrupt

    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, trainer = run()
    with pytest.raises(SystemExit):
        run(saved, Kill())
    file = tmp_path / f"step={stopped - 1}.ckpt"
    groups = torch.load(file, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(RATE, DECAY)]
    resumed, other = run(ckpt_path=file)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())
    states = (one.optimizers[0].state_dict() for one in (trainer, other))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in resumed.parameters())


@pytest.mark.parametrize("moment", ["on_train_batch_start", "on_before_optimizer_step", "on_after_backward"])
def test_nothing_stays_behind_after_an_exception(moment, make_trainer):
    class Crash(pl.Callback):
        pass

    def crash(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == 4:
            raise ZeroDivisionError

    setattr(Crash, moment, crash)
    lit = Lit()
    lit.net[4].bias.requires_grad_(False)
    callback = lp.FactorTraining(rate_B=2.0, product_decay=0.1, train="factors")
    trainer = make_trainer(callbacks=[callback, Crash()])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(lit, batches())
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(lit.parameters()))]
    assert [n for n, p in lit.net.named_parameters() if not p.requires_grad] == ["4.bias"]


def test_a_second_fit_is_like_the_first(make_trainer):
    callback, ends = lp.FactorTraining(alternate=5), []
    for _ in range(2):
        lit = Lit()
        trained(make_trainer, lit, callback)
        ends.append(lit.net.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize(
    ("callbacks", "error"),
    [
        ([lp.FactorTraining(rate_B=2.0)], "found no low-rank layer"),
        ([lp.FactorTraining(rate_B=2.0), lp.FactorTraining(alternate=1)], "FactorTraining and FactorTraining"),
        ([lp.FactorTraining(train="factors"), BackboneFinetuning()], "both decide what is frozen"),
    ],
    ids=["nothing to do", "two", "finetuning"],
)
def test_what_cannot_work_is_refused_when_fit_starts(callbacks, error, make_trainer):
    with pytest.raises(UnsupportedError, match=error):
        trained(make_trainer, dense_lit(), *callbacks)


def test_frozen_factors_and_unknown_steps_are_refused(make_trainer):
    lit = Lit()
    for pair in factor_pairs(lit):
        for parameter in pair.both:
            parameter.requires_grad_(False)
    with pytest.raises(UnsupportedError, match="no factor of the model is trainable"):
        trained(make_trainer, lit, lp.FactorTraining(train="factors"))
    assert lit.net[4].weight.requires_grad
    with pytest.raises(UnsupportedError, match="makes its gradients within a step"):
        trained(make_trainer, Lit("closure"), lp.FactorTraining(rate_B=2.0))


def test_a_decoupled_decay_needs_an_optimizer_without_hidden_values(make_trainer, monkeypatch):
    schedulefree = pytest.importorskip("schedulefree")
    monkeypatch.setitem(MAKERS, "AdamW", lambda p: schedulefree.AdamWScheduleFree(p, lr=RATE, weight_decay=DECAY))

    def fit(**settings):
        lit = Lit()
        lit.on_fit_start = lambda: lit.optimizers().train()
        trained(make_trainer, lit, lp.FactorTraining(**settings))

    with pytest.raises(UnsupportedError, match=r"AdamWScheduleFree keeps other values .*decay_form='gradient'"):
        fit(product_decay=0.1)
    fit(product_decay=0.1, decay_form="gradient", alternate=2, rebalance_every=2)
    with pytest.raises(UnsupportedError, match="AdamWScheduleFree keeps .* in its parameter groups"):
        fit(rate_B=2.0)


def test_settings_that_do_nothing_or_are_wrong():
    with pytest.raises(ArgumentError, match="does nothing"):
        lp.FactorTraining()
    with pytest.raises(ArgumentError, match="got 'sideways'"):
        lp.FactorTraining(0.1, decay_form="sideways")
    with pytest.raises(ArgumentError, match="got 'norms'"):
        lp.FactorTraining(train="norms")


def test_user_frozen_parameters_stay_frozen(make_trainer):
    lit = Lit()
    lit.net[3].weight.requires_grad_(False)
    start = copy.deepcopy(lit.net.state_dict())
    trained(make_trainer, lit, lp.FactorTraining(train="factors_norms_biases"))
    moved = {key for key, value in lit.net.state_dict().items() if not torch.equal(value, start[key])}
    assert moved == {"0.A.weight", "0.B.weight", "0.B.bias", "2.D.weight", "2.C.weight", "2.bias", "3.bias", "4.bias"}
    assert [n for n, p in lit.net.named_parameters() if not p.requires_grad] == ["3.weight"]


def test_before_another_cut_everything_is_let_go_and_after_it_counts_begin_anew(make_trainer):
    class CutsAgain(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch != 1:
                return
            self.frozen = [not parameter.requires_grad for parameter in pl_module.parameters()]
            factors.on_before_surgery(trainer, pl_module)
            self.free = all(parameter.requires_grad for parameter in pl_module.parameters())
            self.hooks = len(trainer.optimizers[0]._optimizer_step_pre_hooks)
            layer = pl_module.net[0]
            pl_module.net[0] = lp.LowRankLinear.from_linear(layer.to_linear(), 2)
            places = {layer.A.weight: pl_module.net[0].A.weight, layer.B.weight: pl_module.net[0].B.weight}
            held = trainer.optimizers[0].param_groups[0]["params"]
            held[:] = [places.get(parameter, parameter) for parameter in held]
            factors.on_surgery(trainer, pl_module, None)
            self.steps = factors.state_dict()["steps"]

        def on_train_end(self, trainer, pl_module):
            self.end = factors.state_dict()["steps"]

    factors, again, lit = lp.FactorTraining(train="factors", alternate=2), CutsAgain(), Lit()
    trained(make_trainer, lit, again, factors, epochs=2)
    assert any(again.frozen)
    assert again.free
    assert again.hooks == 0
    assert (again.steps, again.end) == ([0], [STEPS])
    assert all(parameter.requires_grad for parameter in lit.parameters())
