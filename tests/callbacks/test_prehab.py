import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_prehab as lp
from lightning_prehab.callbacks._schedules import ramp
from lightning_prehab.errors import ArgumentError, TargetError, UnsupportedError

STRENGTH = 0.3
#: Exact to rounding: the callback is tested here, not the power iteration.
EXACT = lp.StableRank(first_steps=3000, steps=100)


class RecordingSGD(torch.optim.SGD):
    """Keeps the gradients that it is asked to apply; a fused one divides by the loss scale itself."""

    def __init__(self, parameters, lr=0.05, fused=False):
        super().__init__(parameters, lr=lr, fused=fused)
        self.seen = []

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        scale = getattr(self, "grad_scale", None)
        self.seen.append([p.grad / (1 if scale is None else scale) for g in self.param_groups for p in g["params"]])
        super().step()
        return loss


def exact_penalty(layers, strength=STRENGTH):
    values = [torch.linalg.svdvals(layer.weight) for layer in layers]
    return strength * torch.stack([s.square().sum() / s[0].square() for s in values]).mean()


def targets_of(net):
    return [module for module in net.modules() if type(module) is nn.Linear]


def by_hand(net, batches, penalty=exact_penalty):
    """Gradient of the mean task loss over the batches, plus the penalty once."""
    loss = sum(nn.functional.mse_loss(net(x), y) for x, y in batches) / len(batches)
    return torch.autograd.grad(loss + penalty(targets_of(net)), list(net.parameters()))


@pytest.mark.parametrize("injection", ["loss", "gradient"])
@pytest.mark.parametrize("case", ["plain", "accumulate", "clip", "scaled", "scaled-accumulate", "scaled-fused"])
def test_the_optimizer_sees_the_gradient_of_task_plus_penalty(
    case, injection, mlp, loader, make_trainer, lit_class, scaled_precision
):
    settings, window, clip = {}, 1, None
    if "accumulate" in case:
        settings["accumulate_grad_batches"] = window = 3
    if case == "clip":
        settings["gradient_clip_val"] = clip = 0.01
    if "scaled" in case:
        settings["plugins"] = scaled_precision(1024.0)
    lit = lit_class(mlp, lambda parameters: RecordingSGD(parameters, fused=case == "scaled-fused"))
    expected, batches = [], []

    class Reference(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch)
            if len(batches) == window:  # the weights have not moved within the window
                expected.append(by_hand(pl_module.net, batches))
                batches.clear()

    prehab = lp.PrehabCallback(EXACT, STRENGTH, injection=injection)
    trainer = make_trainer(callbacks=[prehab, Reference()], **settings)
    trainer.fit(lit, loader)
    seen = trainer.optimizers[0].seen
    assert len(seen) == len(expected) == 6 // window
    for ours, theirs in zip(seen, expected, strict=True):
        norm = torch.stack([g.norm() for g in theirs]).norm()
        factor = 1.0 if clip is None else clip / norm
        assert factor < 1 or clip is None
        torch.testing.assert_close(ours, [g * factor for g in theirs], atol=1e-6, rtol=1e-5)


class TwoOptimizers(pl.LightningModule):
    """Manual optimization: two nets, two losses, two backward passes per step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(12, 8), nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 6))
        self.expected = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer, net, label in zip(
            self.optimizers(), (self.one, self.two), (y[:, :1].expand(-1, 8), y), strict=True
        ):
            optimizer.zero_grad()
            every = [self.one, *self.two]
            task = sum(
                nn.functional.mse_loss(net(part), want) / 2
                for part, want in zip(x.chunk(2), label.chunk(2), strict=True)
            )
            self.expected.append(torch.autograd.grad(task + exact_penalty(every), list(net.parameters())))
            for part, want in zip(x.chunk(2), label.chunk(2), strict=True):  # two backward passes make one step
                self.manual_backward(nn.functional.mse_loss(net(part), want) / 2)
            optimizer.step()

    def configure_optimizers(self):
        return RecordingSGD(self.one.parameters()), RecordingSGD(self.two.parameters())


@pytest.mark.parametrize("scaled", [False, True])
def test_manual_optimization_with_two_optimizers(scaled, loader, make_trainer, scaled_precision):
    lit = TwoOptimizers()
    settings = {"plugins": scaled_precision(1024.0)} if scaled else {}
    trainer = make_trainer(callbacks=[lp.PrehabCallback(EXACT, STRENGTH)], **settings)
    trainer.fit(lit, loader)
    for index, optimizer in enumerate(trainer.optimizers):
        for ours, theirs in zip(optimizer.seen, lit.expected[index::2], strict=True):
            torch.testing.assert_close(ours, list(theirs), atol=1e-6, rtol=1e-5)


class ManualLoss(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[0]
        optimizer.zero_grad()
        loss = self.one(batch[0]).square().mean()
        if self.leaf:
            loss = loss.detach().requires_grad_()
        self.manual_backward(loss)
        optimizer.step()


def test_manual_loss_that_rejects_in_place_changes_is_named(loader, make_trainer):
    lit = ManualLoss()
    lit.leaf = True
    trainer = make_trainer(callbacks=[lp.PrehabCallback(injection="loss")])
    with pytest.raises(UnsupportedError, match="cannot be changed in place .*injection='gradient'"):
        trainer.fit(lit, loader)


def test_the_logged_loss_of_the_user_is_unchanged(mlp, loader, make_trainer, logging_class):
    class Log(pl.Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            self.rows.append((float(outputs["loss"]), metrics))

    lit, log = logging_class(mlp), Log()
    prehab = lp.PrehabCallback(lp.StableRank(), 5.0, ramp_steps=4)
    make_trainer(callbacks=[prehab, log]).fit(lit, loader)
    for step, ((output, metrics), computed) in enumerate(zip(log.rows, lit.losses, strict=True)):
        assert output == computed == metrics["train_loss"]
        assert metrics["prehab/strength"] == pytest.approx(5.0 * min((step + 1) / 4, 1))
        assert 1 < metrics["prehab/penalty"] < 16


def test_spectra_are_logged_at_the_end_of_the_epoch(mlp, loader, make_trainer, lit_class):
    from lightning_prehab.linalg.matrices import effective_rank, stable_rank

    lit = lit_class(mlp)
    trainer = make_trainer(callbacks=[lp.PrehabCallback()])
    trainer.fit(lit, loader)
    weights = [layer.weight for layer in targets_of(mlp)]
    for name, function in (("stable_rank", stable_rank), ("effective_rank", effective_rank)):
        expected = sum(function(weight).item() for weight in weights) / 3
        assert trainer.callback_metrics[f"prehab/{name}"].item() == pytest.approx(expected, rel=1e-5)


def test_bf16_autocast_leaves_the_penalty_in_float32(mlp, loader, make_trainer, lit_class):
    dtypes = []

    class Spy(lp.StableRank):
        def in_metric(self, weight, metric, rank=None, memory=None):
            dtypes.append((weight.dtype, (weight @ weight.mT).dtype))
            return super().in_metric(weight, metric, rank, memory)

    for injection in ("loss", "gradient"):
        make_trainer(precision="bf16-mixed", callbacks=[lp.PrehabCallback(Spy(), injection=injection)]).fit(
            lit_class(mlp), loader
        )
    assert set(dtypes) == {(torch.float32, torch.float32)}


def gradients_per_step(prehab, mlp, loader, make_trainer, lit_class, **settings):
    lit = lit_class(mlp, lambda parameters: RecordingSGD(parameters, lr=0.0))
    trainer = make_trainer(callbacks=[prehab] if prehab else [], **settings)
    trainer.fit(lit, loader)
    return trainer.optimizers[0].seen


def test_epochs_steps_and_ramp_say_when(mlp, loader, make_trainer, lit_class):
    plain = gradients_per_step(None, mlp, loader, make_trainer, lit_class, max_epochs=3)
    penalty = torch.autograd.grad(exact_penalty(targets_of(mlp), 1.0), [layer.weight for layer in targets_of(mlp)])[0]

    def factors(**settings):
        prehab = lp.PrehabCallback(EXACT, 1.0, **settings)
        seen = gradients_per_step(prehab, mlp, loader, make_trainer, lit_class, max_epochs=3)
        return [
            round(float(((a[0] - b[0]) * penalty).sum() / penalty.square().sum()), 3)
            for a, b in zip(seen, plain, strict=True)
        ]

    assert factors() == [1.0] * 18
    assert factors(start_epoch=1, stop_epoch=2) == [0.0] * 6 + [1.0] * 6 + [0.0] * 6
    assert factors(every_n_steps=3) == [1.0, 0.0, 0.0] * 6
    assert factors(start_epoch=1, ramp_steps=4) == [0.0] * 6 + [0.25, 0.5, 0.75] + [1.0] * 9


@pytest.mark.parametrize("space", ["activation", "loss"])
def test_spaces_multiply_the_weight_by_the_roots_of_the_statistics(
    space, mlp, loader, make_trainer, lit_class, data, monkeypatch
):
    """With a learning rate of 0 the statistics of the first steps can be collected again by hand."""
    monkeypatch.setattr("lightning_prehab.callbacks._timeline.CALIBRATION_BATCHES", 12)  # two epochs
    prehab = lp.PrehabCallback(EXACT, 1.0, space=space)
    plain = gradients_per_step(None, mlp, loader, make_trainer, lit_class, max_epochs=4)
    seen = gradients_per_step(prehab, mlp, loader, make_trainer, lit_class, max_epochs=4)
    targets = lp.find_targets(mlp)

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    statistics = lp.collect_statistics(mlp, targets, [data.tensors], forward=loss, gradients=True)

    def root(gram):
        values, vectors = torch.linalg.eigh(gram.double())
        return (vectors * values.clamp_min(0).sqrt()).float()  # any root has the same spectrum

    values = []
    for name, layer in targets.items():
        m = layer.weight @ root(statistics[name].input_second_moment())
        if space == "loss":
            m = root(statistics[name].gradient_second_moment()).mT @ m
        s = torch.linalg.svdvals(m)
        values.append(s.square().sum() / s[0].square())
    expected = torch.autograd.grad(torch.stack(values).mean(), list(mlp.parameters()), allow_unused=True)
    for ours, theirs in zip(seen[11], plain[11], strict=True):
        assert torch.equal(ours, theirs)  # 12 steps of calibration, no penalty yet
    for ours, theirs, extra in zip(seen[12], plain[12], expected, strict=True):
        torch.testing.assert_close(
            ours - theirs, torch.zeros_like(ours) if extra is None else extra, atol=2e-5, rtol=2e-3
        )


def test_stops_at_the_surgery_and_takes_targets_and_ranks_from_it(mlp, loader, make_trainer, lit_class):
    asked = []

    class Spy(lp.TailEnergy):
        def __call__(self, matrix, rank=None, memory=None):
            asked.append((tuple(matrix.shape), rank))
            return super().__call__(matrix, rank, memory)

    compression = lp.CompressionCallback(epoch=2, keep=0.5, exclude_modules="net.4", factorization=lp.SVD())
    prehab = lp.PrehabCallback(Spy(), 0.1)
    make_trainer(max_epochs=4, callbacks=[prehab, compression]).fit(lit_class(mlp), loader)
    ranks = {(16, 12): int(0.5 * 192 / 28), (14, 16): int(0.5 * 224 / 30)}
    assert len(asked) == 2 * 6 * 2  # two epochs, six steps, two targets
    assert set(asked) == set(ranks.items())
    assert compression.report.ranks == {"net.0": ranks[16, 12], "net.2": ranks[14, 16]}


def test_planned_ranks_that_need_statistics_come_from_the_first_steps(mlp, loader, make_trainer, lit_class):
    ranks = set()

    class Spy(lp.TailEnergy):
        def __call__(self, matrix, rank=None, memory=None):
            ranks.add(rank)
            return super().__call__(matrix, rank, memory)

    compression = lp.CompressionCallback(epoch=2, keep=0.4, calibration_batches=4)
    make_trainer(max_epochs=3, callbacks=[lp.PrehabCallback(Spy(), 0.1, space="loss"), compression]).fit(
        lit_class(mlp), loader
    )
    assert ranks
    assert None not in ranks


def test_nothing_is_left_behind(mlp, loader, make_trainer, lit_class):
    lit = lit_class(mlp)
    keys = {name: set(vars(module)) for name, module in lit.named_modules() if name}

    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(callbacks=[lp.PrehabCallback(space="loss"), Fail()], num_sanity_val_steps=0).fit(lit, loader)
    assert {name: set(vars(module)) for name, module in lit.named_modules() if name} == keys
    assert all(not module._forward_hooks for module in lit.modules())


def test_the_global_random_state_is_that_of_a_run_without(mlp, loader, make_trainer, lit_class):
    states = []
    for callbacks in ([], [lp.PrehabCallback()], [lp.PrehabCallback(space="loss")]):
        torch.manual_seed(7)
        make_trainer(callbacks=callbacks).fit(lit_class(mlp), loader)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_a_loss_without_graph_is_still_the_users_error(mlp, loader, make_trainer, lit_class):
    class Detached(lit_class):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    with pytest.raises(RuntimeError, match="does not require grad"):
        make_trainer(callbacks=[lp.PrehabCallback()]).fit(Detached(mlp), loader)


@pytest.mark.parametrize("injection", ["loss", "gradient"])
def test_a_step_without_loss_is_skipped(mlp, loader, make_trainer, lit_class, injection):
    class Sometimes(lit_class):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    make_trainer(callbacks=[lp.PrehabCallback(injection=injection)]).fit(Sometimes(mlp), loader)
    assert any(not torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_frozen_layers_are_left_out(mlp, loader, make_trainer, lit_class):
    mlp[0].weight.requires_grad_(False)
    shapes = set()

    class Spy(lp.StableRank):
        def in_metric(self, weight, metric, rank=None, memory=None):
            shapes.add(tuple(weight.shape))
            return super().in_metric(weight, metric, rank, memory)

    make_trainer(callbacks=[lp.PrehabCallback(Spy())]).fit(lit_class(mlp), loader)
    assert shapes == {(14, 16), (6, 14)}
    mlp.requires_grad_(False)
    mlp[0].bias.requires_grad_(True)
    with pytest.raises(TargetError, match="all targets are frozen"):
        make_trainer(callbacks=[lp.PrehabCallback()]).fit(lit_class(mlp), loader)


def test_errors_name_the_layer(mlp, loader, make_trainer, lit_class):
    with torch.no_grad():
        mlp[2].weight[0, 0] = float("nan")
    compression = lp.CompressionCallback(epoch=1, factorization=lp.SVD())
    with pytest.raises(lp.PrehabError, match="Layer 'net.2'"):
        make_trainer(max_epochs=2, callbacks=[lp.PrehabCallback(lp.TailEnergy()), compression]).fit(
            lit_class(mlp), loader
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": -1.0},
        {"strength": float("nan")},
        {"ramp_steps": -1},
        {"space": "fourier"},
        {"start_epoch": -1},
        {"start_epoch": 3, "stop_epoch": 3},
        {"every_n_steps": 0},
        {"injection": "magic"},
    ],
    ids=str,
)
def test_wrong_settings(wrong):
    with pytest.raises(ArgumentError, match="got"):
        lp.PrehabCallback(**wrong)


def test_a_target_rank_is_needed_before_training_starts(mlp, loader, make_trainer, lit_class):
    with pytest.raises(ArgumentError, match="aims at a target rank: add a CompressionCallback"):
        make_trainer(callbacks=[lp.PrehabCallback(lp.TailEnergy())]).fit(lit_class(mlp), loader)
    make_trainer(callbacks=[lp.PrehabCallback(lp.TailEnergy(rank=2))]).fit(lit_class(mlp), loader)


def test_no_target(mlp, loader, make_trainer, lit_class):
    with pytest.raises(TargetError, match="near names|Near names"):
        make_trainer(callbacks=[lp.PrehabCallback(target_modules="net.7")]).fit(lit_class(mlp), loader)


def test_a_users_own_penalty_in_one_class(mlp, loader, make_trainer, lit_class):
    from dataclasses import dataclass

    from lightning_prehab.regularizers import Penalty

    @dataclass(frozen=True)
    class Frobenius(Penalty):
        def __call__(self, matrix, rank=None, memory=None):
            return matrix.square().sum()

    plain = gradients_per_step(None, mlp, DataLoader(loader.dataset, 96), make_trainer, lit_class)
    seen = gradients_per_step(
        lp.PrehabCallback(Frobenius(), 0.5), mlp, DataLoader(loader.dataset, 96), make_trainer, lit_class
    )
    torch.testing.assert_close(seen[0][0] - plain[0][0], mlp[0].weight.detach() / 3, atol=1e-6, rtol=1e-5)


def manual_every_second_batch(net):
    class Manual(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = net

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]) / 2)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Manual()


class Strengths(pl.Callback):
    """The strength at each optimizer step at which the penalty acts."""

    def __init__(self, prehab):
        self.prehab, self.seen = prehab, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(
            self.prehab.strength * ramp(self.prehab._way.steps, self.prehab.ramp_steps)
            if self.prehab._acts(trainer)
            else None
        )


@pytest.mark.parametrize("manual", [True, False])
def test_ramps_and_intervals_count_optimizer_steps_under_accumulation(manual, mlp, loader, make_trainer, lit_class):
    def run(**settings):
        prehab = lp.PrehabCallback(strength=1.0, **settings)
        watch = Strengths(prehab)
        lit = manual_every_second_batch(mlp) if manual else lit_class(mlp)
        accumulate = {} if manual else {"accumulate_grad_batches": 2}
        make_trainer(max_epochs=2, callbacks=[prehab, watch], **accumulate).fit(lit, loader)
        return watch.seen

    assert run(ramp_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert run(every_n_steps=2) == [1.0, None, 1.0, None, 1.0, None]


def test_manual_optimization_leaves_autocast_on_and_we_turn_it_off(mlp, loader, make_trainer):
    dtypes = set()

    class Spy(lp.StableRank):
        def in_metric(self, weight, metric, rank=None, memory=None):
            dtypes.add((weight @ weight.mT).dtype)
            return super().in_metric(weight, metric, rank, memory)

    for injection in ("loss", "gradient"):
        prehab = lp.PrehabCallback(Spy(), injection=injection)
        make_trainer(precision="bf16-mixed", callbacks=[prehab]).fit(manual_every_second_batch(mlp), loader)
    assert dtypes == {torch.float32}


def test_short_runs_still_get_their_penalty(mlp, loader, make_trainer, lit_class):
    """24 batches before the surgery, 64 wanted for statistics: half of them must do."""
    prehab = lp.PrehabCallback(lp.TailEnergy())
    watch = Strengths(prehab)
    compression = lp.CompressionCallback(4)
    make_trainer(max_epochs=5, callbacks=[prehab, compression, watch]).fit(lit_class(mlp), loader)
    assert [strength is not None for strength in watch.seen] == [False] * 12 + [True] * 12 + [False] * 6


def test_a_penalty_that_never_begins_says_so(mlp, data, make_trainer, lit_class):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*data.tensors, strict=True))

    with pytest.warns(UserWarning, match=r"still collecting statistics \(6 batches\).*nothing was regularized"):
        make_trainer(callbacks=[lp.PrehabCallback(space="loss")]).fit(lit_class(mlp), DataLoader(Stream(), 16))


def test_a_layer_frozen_on_the_way_is_left_out(mlp, loader, make_trainer, lit_class):
    class Freeze(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net[0].weight.requires_grad_(batch_idx < 3)

    for injection in ("loss", "gradient"):
        make_trainer(callbacks=[lp.PrehabCallback(injection=injection), Freeze()]).fit(lit_class(mlp), loader)


@pytest.mark.parametrize("how", ["target_modules", "frozen"])
def test_planned_ranks_are_those_of_all_targets_of_the_surgery(how, mlp, loader, make_trainer, lit_class):
    """Also where prehab acts on some of them only, and overrides name the others."""
    ranks = set()

    class Spy(lp.TailEnergy):
        def __call__(self, matrix, rank=None, memory=None):
            ranks.add((matrix.shape[0], rank))
            return super().__call__(matrix, rank, memory)

    settings = {"target_modules": "net.0"} if how == "target_modules" else {}
    if how == "frozen":
        mlp[2].weight.requires_grad_(False)
    lit = lit_class(mlp, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    compression = lp.CompressionCallback(2, 0.4, calibration_batches=6, rank_overrides={"net.2": 2, "net.4": "dense"})
    make_trainer(max_epochs=3, callbacks=[lp.PrehabCallback(Spy(), **settings), compression]).fit(lit, loader)
    assert ranks == {(16, compression.report.ranks["net.0"])}


def test_logging_survives_weights_that_are_not_finite(mlp, loader, make_trainer, lit_class):
    class Break(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():
                pl_module.net[0].weight.fill_(float("nan"))

    trainer = make_trainer(callbacks=[lp.PrehabCallback(), Break()])
    trainer.fit(lit_class(mlp), loader)
    assert trainer.callback_metrics["prehab/stable_rank"].isnan()
