"""Steps are what the optimizer that holds the weights does, whoever makes it do it."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.callbacks._steps import StepWatch, check_seen
from lightning_prehab.errors import UnsupportedError

SURGERY, BATCHES = 3, 6


class SAM(torch.optim.Optimizer):
    """Two steps, neither of them ``step()``, around an optimizer that shares its groups."""

    def __init__(self, parameters, base=torch.optim.SGD):
        super().__init__(parameters, {"lr": 0.1})
        self.base = base(self.param_groups, lr=0.1)
        self.param_groups = self.base.param_groups

    def held(self):
        return [one for group in self.param_groups for one in group["params"] if one.grad is not None]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([one.grad.norm() for one in self.held()]).norm()
        for one in self.held():
            self.state[one]["old"] = one.detach().clone()
            one.add_(one.grad * (0.05 / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for one in self.held():
            one.copy_(self.state[one]["old"])
        self.update()
        self.zero_grad()

    def update(self):
        self.base.step()


class HookLess(SAM):
    """Makes its update by itself, in place."""

    def update(self):
        for one in self.held():
            one.add_(one.grad, alpha=-self.param_groups[0]["lr"])


class Unseen(SAM):
    """So that not even the version of a weight tells."""

    def first_step(self):
        self.zero_grad()

    def second_step(self):
        for one in self.held():
            one.data.add_(one.grad, alpha=-self.param_groups[0]["lr"])


class Lookahead(torch.optim.Optimizer):
    """Steps two optimizers within its own step."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, {"lr": 0.1})
        matrices = [one for one in parameters if one.dim() == 2]
        self.inside = [
            torch.optim.SGD(matrices, lr=0.1),
            torch.optim.Adam([one for one in parameters if one.dim() < 2], lr=0.01),
        ]

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for one in self.inside:
            one.step()
        return loss


class ByHand(pl.LightningModule):
    """Optimizes by hand, in one of several ways."""

    def __init__(self, net, way):
        super().__init__()
        self.net, self.way, self.automatic_optimization = net, way, False

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if isinstance(optimizer, SAM):
            for step in (optimizer.first_step, optimizer.second_step):
                self.manual_backward(self.loss(batch))
                step()
            return
        if self.way == "closure":

            def closure():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))

            optimizer.step(closure)
            return
        self.manual_backward(self.loss(batch))
        if self.way == "every fourth" and batch_idx % 4 != 3:
            return
        stepping = optimizer.optimizer if self.way == "raw" else optimizer
        stepping.step()
        optimizer.zero_grad()

    def configure_optimizers(self):
        make = {"sam": SAM, "without hooks": HookLess, "unseen": Unseen, "lookahead": Lookahead}.get(self.way)
        return torch.optim.SGD(self.parameters(), lr=0.1) if make is None else make(self.parameters())


class Watch(pl.Callback):
    def __init__(self):
        self.moved, self.errors, self.hooks = [], None, 0

    def on_surgery(self, trainer, pl_module, report):
        self.errors = report.weight_errors

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [one.detach().clone() for one in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pairs = zip(pl_module.parameters(), self.before, strict=True)
        if trainer.current_epoch == SURGERY:
            self.moved.append(max(float((one - old).abs().max()) for one, old in pairs))


def hooks_on(optimizers):
    found = [*optimizers, *(one.base for one in optimizers if isinstance(one, SAM))]
    return sum(len(one._optimizer_step_pre_hooks) + len(one._optimizer_step_post_hooks) for one in found)


@pytest.mark.parametrize("way", ["step", "closure", "raw", "every fourth", "lookahead", "sam"])
def test_the_cut_is_free_and_the_warmup_counts_however_steps_are_made(way, mlp, loader, make_trainer):
    prehab = lp.PrehabCallback(lp.TailShrinkage(every=3))
    rehab, watch = lp.RehabSchedule(4, start_factor=0.0), Watch()
    compression = lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD())
    trainer = make_trainer(max_epochs=SURGERY + 1, callbacks=[prehab, compression, rehab, watch])
    trainer.fit(ByHand(mlp, way), loader)
    steps = 1 if way == "every fourth" else BATCHES  # of an epoch
    assert prehab._way.steps == SURGERY * steps
    assert [one.done["steps"] for one in rehab._course.optimizers] == [steps]
    assert max(watch.errors.values()) < 1e-5
    moved = [step for step in watch.moved if step > 0]
    if steps > 1:
        assert len(moved) == BATCHES - 1  # the first at a rate of 0
        assert max(moved[:2]) < max(moved[3:])
    assert hooks_on(trainer.optimizers) == 0


@pytest.mark.parametrize("way", ["step", "raw", "sam"])
def test_a_penalty_acts_at_steps_that_nobody_announces(way, mlp, loader, make_trainer):
    strengths = []

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            strengths.append(float(trainer.callback_metrics.get("prehab/strength", torch.nan)))

    def end(strength):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
        prehab = lp.PrehabCallback(lp.StableRank(), strength, ramp_steps=2)
        make_trainer(callbacks=[prehab, Log()]).fit(ByHand(net, way), loader)
        return float(lp.StableRank()(net[0].weight.detach()))

    assert end(3.0) < end(0.0) - 0.1
    assert strengths[:BATCHES] == [1.5, *[3.0] * (BATCHES - 1)]


def test_an_unannounced_step_gets_the_same_gradient_as_an_announced_one(loader, make_trainer):
    ends = []
    for way in ("step", "raw"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
        make_trainer(callbacks=[lp.PrehabCallback(lp.StableRank(), 1.0)]).fit(ByHand(net, way), loader)
        ends.append(net.state_dict())
    torch.testing.assert_close(*map(dict, ends), rtol=1e-5, atol=1e-7)


def test_the_published_recipe_maps_back_at_steps_that_nobody_announces(loader, make_trainer):
    ends = []
    for way in ("step", "raw"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
        paper = lp.PaperPrehab("nuclear_norm")
        paper.strength = 0.01
        make_trainer(max_epochs=3, callbacks=[paper]).fit(ByHand(net, way), loader)
        assert paper._way.steps > BATCHES
        assert paper._inside == []
        ends.append(net.state_dict())
    torch.testing.assert_close(*map(dict, ends), rtol=1e-4, atol=1e-6)


def test_versions_tell_where_no_hook_does(mlp, loader, make_trainer):
    """Shrinkage goes along; a warm-up cannot, and says so after one epoch."""
    prehab, watch = lp.PrehabCallback(lp.TailShrinkage(every=3)), Watch()
    compression = lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD())
    make_trainer(max_epochs=SURGERY + 1, callbacks=[prehab, compression, watch]).fit(
        ByHand(mlp, "without hooks"), loader
    )
    assert prehab._way.steps == SURGERY * BATCHES
    assert max(watch.errors.values()) < 1e-5


@pytest.mark.parametrize(("way", "kind"), [("unseen", "prehab"), ("unseen", "rehab"), ("without hooks", "rehab")])
def test_steps_that_are_never_seen_are_an_error_in_the_first_epoch(way, kind, mlp, loader, make_trainer):
    compression = lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD())
    other = lp.PrehabCallback() if kind == "prehab" else lp.RehabSchedule(4)
    trainer = make_trainer(max_epochs=SURGERY + 1, callbacks=[compression, other])
    with pytest.raises(UnsupportedError, match=f"{type(other).__name__} acts at the steps of .* has seen none"):
        trainer.fit(ByHand(mlp, way), loader)
    assert trainer.current_epoch == 0
    assert hooks_on(trainer.optimizers) == 0


class TwoNets(pl.LightningModule):
    """Two networks; the one with the targets is stepped in every third batch alone."""

    def __init__(self, net):
        super().__init__()
        self.net, self.other, self.automatic_optimization = net, nn.Linear(12, 6), False

    def training_step(self, batch, batch_idx):
        for net, optimizer, every in zip((self.net, self.other), self.optimizers(), (3, 1), strict=True):
            if batch_idx % every == 0:
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=rate) for net, rate in ((self.net, 0.1), (self.other, 0.03))]


def test_steps_of_another_optimizer_do_not_count(mlp, loader, make_trainer):
    prehab, watch = lp.PrehabCallback(target_modules="net.*"), Watch()
    rehab = lp.RehabSchedule(warmup_epochs=1, start_factor=0.0)
    compression = lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD(), target_modules="net.*")
    trainer = make_trainer(max_epochs=SURGERY + 1, callbacks=[prehab, compression, rehab, watch])
    trainer.fit(TwoNets(mlp), loader)
    assert prehab._way.steps == SURGERY * BATCHES // 3
    assert max(watch.errors.values()) < 1e-5
    assert rehab.factor(0) == rehab.factor(1) == 1.0  # an epoch by hand is counted in batches


def test_a_warmup_of_epochs_lasts_epochs_however_often_the_module_steps(mlp, loader, make_trainer):
    factors = []

    class Factors(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.current_epoch >= 1:
                factors.append(rehab.factor())

    rehab = lp.RehabSchedule(warmup_epochs=2, start_factor=0.0)
    compression = lp.CompressionCallback(1, 0.5, factorization=lp.SVD())
    make_trainer(max_epochs=4, callbacks=[compression, rehab, Factors()]).fit(ByHand(mlp, "every fourth"), loader)
    assert factors == pytest.approx([3 / 12, 9 / 12, 1.0])


def test_a_step_that_loss_scaling_skips_is_none(lit, loader, make_trainer, scaled_precision):
    class Overflow(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.fit_loop.epoch_loop.batch_idx % 2:
                pl_module.net[0].weight.grad[0, 0] = float("inf")

    prehab = lp.PrehabCallback(lp.TailShrinkage(rank=4))
    plugin = scaled_precision(16.0)
    step = plugin.scaler.step

    def skipping(optimizer, *args, **kwargs):
        bad = any(not torch.isfinite(one.grad).all() for group in optimizer.param_groups for one in group["params"])
        return None if bad else step(optimizer, *args, **kwargs)

    plugin.scaler.step = skipping  # what it does by itself on a GPU
    make_trainer(max_epochs=2, callbacks=[prehab, Overflow()], plugins=[plugin]).fit(lit, loader)
    assert prehab._way.steps == BATCHES
    assert int(torch.linalg.matrix_rank(lit.net[2].weight, rtol=1e-5)) == 4  # the last batch makes it whole


class TestWatch:
    def watch(self, optimizer):
        seen = []
        watch = StepWatch(optimizer, lambda watch, one: seen.append(("before", type(one).__name__)), seen.append)
        return watch, seen

    def parameters(self):
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        return [parameter]

    def test_nested_steps_are_one(self):
        class Outer(torch.optim.SGD):
            def step(self, closure=None):
                return super().step(closure)

        optimizer = Outer(self.parameters(), lr=0.1)
        torch.optim.SGD(self.parameters(), lr=0.1).step()  # so that the parent's step has hooks, too
        watch, _ = self.watch(optimizer)
        optimizer.step()
        optimizer.step()
        assert watch.steps == 2
        assert not watch.in_step
        inside = Lookahead([*self.parameters(), nn.Parameter(torch.ones(2, 2))])
        watch, _ = self.watch(inside)
        inside.step()
        assert watch.steps == 1
        inside.inside[0].step()
        assert watch.steps == 2

    def test_a_step_that_fails_is_none(self):
        class Failing(torch.optim.SGD):
            fails = True

            def step(self, closure=None):
                if self.fails:
                    raise RuntimeError
                return super().step(closure)

        optimizer = Failing(self.parameters(), lr=0.1)
        watch, _ = self.watch(optimizer)
        with pytest.raises(RuntimeError):
            optimizer.step()
        assert (watch.steps, watch.in_step) == (0, True)
        optimizer.fails = False
        optimizer.step()
        assert (watch.steps, watch.in_step) == (1, False)

    def test_what_is_no_torch_optimizer_is_told_by_its_announcement(self):
        class Foreign:
            def __init__(self):
                self.param_groups = [{"params": [torch.ones(2)], "lr": 0.1}]

        watch, seen = self.watch(Foreign())
        watch.announce()
        assert watch.steps == len(seen) == 1

    def test_movement(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        watch, _ = self.watch(optimizer)
        parameter = optimizer.param_groups[0]["params"][0]
        assert watch.moved_unseen() == []
        parameter.data.add_(1)
        assert watch.moved_unseen() == [parameter]
        other, _ = self.watch(torch.optim.SGD([parameter], lr=0.1))
        with pytest.raises(UnsupportedError):
            check_seen([watch, other], pl.Callback())
        other.optimizer.step()
        check_seen([watch, other], pl.Callback())  # that one has moved it
        optimizer.step()
        assert watch.moved_unseen() == []
        watch.remove()
        optimizer.step()
        assert watch.steps == 1


@pytest.mark.parametrize("epoch", [0, 1])
def test_optimizers_that_are_made_anew_are_watched(epoch, lit, loader, make_trainer):
    prehab, errors = lp.PrehabCallback(), []

    class Anew(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                trainer.strategy.setup_optimizers(trainer)

        def on_surgery(self, trainer, pl_module, report):
            errors.append((prehab._way.steps, max(report.weight_errors.values())))

    callbacks = [prehab, lp.CompressionCallback(SURGERY, 0.4, calibration_batches=4), Anew()]
    make_trainer(max_epochs=SURGERY + 1, callbacks=callbacks).fit(lit, loader)
    ((steps, error),) = errors
    assert steps >= (SURGERY - 1) * BATCHES - 4
    assert error < 1e-5


def test_an_optimizer_that_begins_later_is_no_error(loader, make_trainer):
    """A critic whose weights are clipped from the start, and trained from epoch 1 on."""

    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.G, self.D = nn.Sequential(nn.Linear(12, 6)), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))

        def training_step(self, batch, batch_idx):
            g, d = self.optimizers()
            with torch.no_grad():
                for weight in self.D.parameters():
                    weight.clamp_(-0.05, 0.05)
            for optimizer in (g, d)[: 1 + (self.current_epoch > 0)]:
                optimizer.zero_grad()
                self.manual_backward(self.D(self.G(batch[0])).mean())
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.G.parameters(), 0.1), torch.optim.RMSprop(self.D.parameters(), 1e-3)

    compression = lp.CompressionCallback(2, 0.5, exclude_modules="D.*")
    make_trainer(max_epochs=3, callbacks=[compression, lp.RehabSchedule(3)]).fit(Two(), loader)
    assert compression.done


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end", "on_surgery"])
def test_the_rates_of_optimizers_that_are_made_anew_are_warmed_up(hook, lit, loader, make_trainer):
    """Whenever that happens around the surgery."""
    rates, rehab = [], lp.RehabSchedule(BATCHES, start_factor=0.0)

    class Anew(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            optimizer.register_step_pre_hook(lambda *args: None)  # one of somebody else's

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == SURGERY:
                rates.append(rehab.factor())

    def again(self, trainer, *args):
        if trainer.current_epoch == SURGERY - (hook == "on_train_epoch_end"):
            trainer.strategy.optimizers = [torch.optim.SGD(trainer.lightning_module.parameters(), lr=0.05)]

    setattr(Anew, hook, again)
    moved = []

    class Moved(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == SURGERY:
                pairs = zip(pl_module.parameters(), self.before, strict=True)
                moved.append(max(float((new - old).abs().max()) for new, old in pairs))

    callbacks = [lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD()), rehab, Anew(), Moved()]
    make_trainer(max_epochs=SURGERY + 1, callbacks=callbacks).fit(lit, loader)
    assert rates == pytest.approx([(step + 1) / BATCHES for step in range(BATCHES)])
    assert moved[0] == 0.0  # at a factor of 0
    assert moved[-1] > moved[1] > 0.0
