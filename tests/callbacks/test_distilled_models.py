"""Models that make it hard to see what training_step asks them."""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.utils.checkpoint
from lightning.pytorch import callbacks as pl_callbacks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.errors import StatisticsError, UnsupportedError
from tests.tiny_llama import llama


def kl(student, teacher):
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


class Lit(pl.LightningModule):
    """Notes its gradients; with ``strength`` the distillation is in its own training_step."""

    def __init__(self, strength=None, dense=None, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.strength, self.dense, self.seen = strength, [dense], []

    def training_step(self, batch, batch_idx):
        raise NotImplementedError

    def on_before_optimizer_step(self, optimizer):
        self.seen.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def net():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 5))


def cut(module):
    found = copy.deepcopy(module)
    lp.compress_(found, 0.4, factorization=lp.SVD())
    return found


@pytest.fixture
def rows():
    x = torch.randn(64, 12)
    return DataLoader(TensorDataset(x, torch.randint(5, (64,))), 16)


def same_gradients(one, other, **tolerance):
    assert len(one.seen) == len(other.seen) > 0
    for mine, theirs in zip(one.seen, other.seen, strict=True):
        torch.testing.assert_close(mine, theirs, **{"atol": 1e-6, "rtol": 1e-5, **tolerance})


class Text(Lit):
    def training_step(self, batch, batch_idx):
        output = self.model(**batch)
        if self.strength is None:
            return output.loss
        with torch.no_grad():
            right = self.dense[0](**batch)
        counted = torch.cat([batch["labels"][:, 1:] != -100, torch.ones_like(batch["labels"][:, :1]).bool()], 1)
        counted &= batch["attention_mask"].bool()
        return output.loss + self.strength * kl(output.logits, right.logits)[counted].mean()


def texts():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        tokens = torch.randint(1, 48, (3, 10), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, 6:] = 0
        labels = tokens.masked_fill(mask == 0, -100)
        labels[:, :3] = -100  # a prompt
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return DataLoader(found, batch_size=None)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "not reentrant"])
def test_a_language_model_of_transformers(checkpointing, make_trainer):
    """Labels that do not count, padding, a cache of keys and values, dropout, activations that are computed twice."""
    dense = llama(attention_dropout=0.1)
    student = cut(dense)
    if checkpointing is not None:
        student.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        student.enable_input_require_grads()

    def run(strength, *callbacks):
        torch.manual_seed(5)
        lit = Text(strength, copy.deepcopy(dense).eval(), model=copy.deepcopy(student).train())
        make_trainer(max_epochs=2, callbacks=list(callbacks)).fit(lit, texts())
        return lit

    rehab = lp.RehabDistillation(0.6, teacher=copy.deepcopy(dense))
    same_gradients(run(0.6), run(None, rehab))
    assert rehab._distiller._comparison.shifted


class Contrastive(Lit):
    def training_step(self, batch, batch_idx):
        x = batch[0]
        one, other = self.net(x), self.net(x.flip(0))
        with torch.no_grad():
            self.net(x)  # monitoring is no part of the loss
        loss = nn.functional.mse_loss(one, other.detach()) + one.square().mean()
        if self.strength is not None:
            with torch.no_grad():
                rights = self.dense[0](x), self.dense[0](x.flip(0))
            pairs = zip((one, other), rights, strict=True)
            loss = loss + self.strength * sum(nn.functional.mse_loss(*pair) for pair in pairs) / 2
        return loss


class InParts(Lit):
    """Modules one after the other, one of them without weights, and a loss that is a module."""

    def training_step(self, batch, batch_idx):
        answer = self.head(self.act(self.body(batch[0])))
        loss = self.loss(answer, batch[1])
        if self.strength is not None:
            with torch.no_grad():
                right = self.dense[0](batch[0])
            loss = loss + self.strength * kl(answer, right).mean()
        return loss


class InPlace(Lit):
    """Changes its logits, and skips a batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.net(batch[0])
            return None
        answer = self.net(batch[0])
        answer.div_(2.0)
        loss = nn.functional.cross_entropy(answer, batch[1])
        if self.strength is not None:
            with torch.no_grad():
                right = self.dense[0](batch[0])
            loss = loss + self.strength * kl(answer, right).mean()
        return loss


class Returns(Lit):
    """All sorts of outputs."""

    def __init__(self, *args, kind="tuple", **modules):
        super().__init__(*args, **modules)
        self.kind = kind

    def forward(self, x):
        logits = self.net(x)
        if self.kind == "tuple":
            return logits.square().mean(), logits, [logits.sum()]
        return {"dict": {"logits": logits, "past": None}, "object": SimpleNamespace(logits=logits)}[self.kind]

    def training_step(self, batch, batch_idx):
        output = self(batch[0])
        logits = {"tuple": lambda: output[1], "dict": lambda: output["logits"], "object": lambda: output.logits}
        answer = logits[self.kind]()
        loss = nn.functional.cross_entropy(answer, batch[1])
        if self.strength is not None:
            with torch.no_grad():
                right = self.dense[0](batch[0])
            loss = loss + self.strength * kl(answer, right).mean()
        return loss


@pytest.mark.parametrize("kind", ["tuple", "dict", "object"])
def test_outputs_of_all_kinds(kind, rows, make_trainer):
    dense = net()
    student = cut(dense)

    def run(strength, *callbacks):
        lit = Returns(strength, dense, kind=kind, net=copy.deepcopy(student))
        make_trainer(callbacks=list(callbacks)).fit(lit, rows)
        return lit

    teacher = Returns(kind=kind, net=copy.deepcopy(dense))
    same_gradients(run(0.6), run(None, lp.RehabDistillation(0.6, teacher=teacher)))


def parts(module):
    return {"body": module[:3], "act": module[3], "head": module[4], "loss": nn.CrossEntropyLoss()}


@pytest.mark.parametrize(("kind", "names"), [(Contrastive, None), (InParts, parts)])
def test_several_calls_in_one_step(kind, names, rows, make_trainer):
    dense = net()
    student = cut(dense)
    data = rows if names else DataLoader(TensorDataset(rows.dataset.tensors[0]), 16)  # no labels: numbers

    def modules(one):
        return names(one) if names else {"net": one}

    def run(strength, *callbacks):
        lit = kind(strength, dense, **modules(copy.deepcopy(student)))
        make_trainer(callbacks=list(callbacks)).fit(lit, data)
        return lit

    teacher = kind(**modules(copy.deepcopy(dense)))
    same_gradients(run(0.6), run(None, lp.RehabDistillation(0.6, teacher=teacher)))


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_logits_that_are_changed_in_place_and_a_batch_that_is_skipped(settings, rows, make_trainer):
    """The answer is what has become of it."""
    dense = net()
    student = cut(dense)

    def run(strength, *callbacks):
        lit = InPlace(strength, dense, net=copy.deepcopy(student))
        make_trainer(callbacks=list(callbacks), **settings).fit(lit, rows)
        return lit

    same_gradients(run(0.6), run(None, lp.RehabDistillation(0.6, teacher=copy.deepcopy(dense))))


class Adversarial(Lit):
    """Two losses, two optimizers, by hand; the loss of the generator is the output of an operation that keeps it."""

    def __init__(self, *args, **modules):
        super().__init__(*args, **modules)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        fake = self.generator(batch[0])
        real = self.critic(torch.tanh(batch[0][:, :5]))
        loss = self.critic(fake.detach()).mean() - real.mean() + real.square().mean()
        self.manual_backward(loss)
        second.step()
        second.zero_grad()
        first.zero_grad()
        loss = torch.sigmoid(-self.critic(fake).mean())
        if self.strength is not None:
            with torch.no_grad():
                right = self.dense[0](batch[0])
            loss = loss + self.strength * nn.functional.mse_loss(fake, right)
        self.manual_backward(loss)
        self.seen.append({name: p.grad.clone() for name, p in self.generator.named_parameters()})
        first.step()

    def on_before_optimizer_step(self, optimizer):
        pass

    def configure_optimizers(self):
        return [torch.optim.SGD(one.parameters(), lr=0.05) for one in (self.generator, self.critic)]


def test_manual_optimization_of_several_losses(rows, make_trainer):
    dense = net()
    student, critic = cut(dense), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def run(strength, *callbacks):
        modules = {"generator": copy.deepcopy(student), "critic": copy.deepcopy(critic)}
        lit = Adversarial(strength, dense, **modules)
        make_trainer(callbacks=list(callbacks)).fit(lit, DataLoader(TensorDataset(rows.dataset.tensors[0]), 16))
        return lit

    teacher = Adversarial(generator=copy.deepcopy(dense), critic=copy.deepcopy(critic))
    rehab = lp.RehabDistillation(0.6, teacher=teacher, module="generator")
    same_gradients(run(0.6), run(None, rehab))
    refused = lp.RehabDistillation(teacher=copy.deepcopy(dense), forward=lambda module, batch: module(batch[0]))
    with pytest.raises(UnsupportedError, match="which of the losses of a manual optimization"):
        run(None, refused)


class Beside(Lit):
    """A second network that is not cut, and has been trained on since."""

    def training_step(self, batch, batch_idx):
        answer = self.net(batch[0])
        loss = nn.functional.cross_entropy(answer, batch[1]) + self.other(batch[0]).square().mean()
        if self.strength is not None:
            with torch.no_grad():
                right = self.dense[0](batch[0])
            loss = loss + self.strength * kl(answer, right).mean()
        return loss


def test_what_is_not_cut_is_not_taught(rows, make_trainer):
    dense = net()
    student = cut(dense)

    def run(strength, *callbacks):
        torch.manual_seed(4)
        lit = Beside(strength, dense, net=copy.deepcopy(student), other=nn.Linear(12, 5))
        make_trainer(callbacks=list(callbacks)).fit(lit, rows)
        return lit

    teacher = Beside(net=copy.deepcopy(dense), other=nn.Linear(12, 5))
    same_gradients(run(0.6), run(None, lp.RehabDistillation(0.6, teacher=teacher)))


class TwoBackwards(Lit):
    """The first backward pass calls the net again, to compute what was not kept."""

    def __init__(self, **modules):
        super().__init__(**modules)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            answer = torch.utils.checkpoint.checkpoint(self.net, batch[0], use_reentrant=False)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(answer, batch[1]))
            optimizer.step()


def test_what_is_computed_twice_is_asked_once(rows, make_trainer):
    asked = []
    dense = net()
    dense.register_forward_hook(lambda module, args, output: asked.append(output))
    make_trainer(callbacks=[lp.RehabDistillation(teacher=dense)]).fit(TwoBackwards(net=cut(net())), rows)
    assert len(asked) == 2 * len(rows)


class ByBlocks(Lit):
    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        if self.strength is not None:
            ours, theirs = self.hidden(self.model, batch), self.hidden(self.dense[0], batch)
            mask = batch["attention_mask"].bool()
            pairs = [(one[mask], other[mask].detach()) for one, other in zip(ours, theirs, strict=True)]
            shares = [(one - other).square().sum() / other.square().sum() for one, other in pairs]
            loss = loss + self.strength * torch.stack(shares).mean()
        return loss

    @staticmethod
    def hidden(model, batch):
        found = []
        layers = model.model.layers
        handles = [one.register_forward_hook(lambda module, args, output: found.append(output)) for one in layers]
        model(**batch)
        for handle in handles:
            handle.remove()
        return [one[0] if isinstance(one, tuple) else one for one in found]


@pytest.mark.parametrize("named", [None, "model.model.layers.?"])
def test_features_of_blocks(named, make_trainer):
    dense = llama()
    student = cut(dense)

    def run(strength, *callbacks):
        lit = ByBlocks(strength, dense, model=copy.deepcopy(student))
        make_trainer(callbacks=list(callbacks)).fit(lit, texts())
        return lit

    teacher = ByBlocks(model=copy.deepcopy(dense))
    rehab = lp.RehabDistillation(0.6, form="features", feature_modules=named, teacher=teacher)
    same_gradients(run(0.6), run(None, rehab))


@pytest.mark.parametrize("how", ["lit", "inner", "in place"])
def test_compiled(how, rows, make_trainer):
    dense = net()
    student = cut(dense)

    class Plain(Lit):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def run(compiled):
        lit = Plain(net=copy.deepcopy(student))
        rehab = lp.RehabDistillation(0.6, teacher=Plain(net=copy.deepcopy(dense)))
        if compiled and how == "inner":
            lit.net = torch.compile(lit.net, backend="eager")
        elif compiled and how == "in place":
            lit.net.compile(backend="eager")
        given = torch.compile(lit, backend="eager") if compiled and how == "lit" else lit
        make_trainer(max_epochs=2, callbacks=[rehab]).fit(given, rows)
        for seen in lit.seen:
            for name in [name for name in seen if "_orig_mod." in name]:
                seen[name.replace("_orig_mod.", "")] = seen.pop(name)
        return lit

    same_gradients(run(False), run(True))


def test_beside_an_average_of_the_weights(rows, make_trainer):
    kind = getattr(pl_callbacks, "EMAWeightAveraging", None)
    if kind is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    dense = net()

    class Plain(Lit):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def run(*callbacks):
        lit = Plain(net=cut(dense))
        rehab = lp.RehabDistillation(0.6, teacher=copy.deepcopy(dense))
        make_trainer(max_epochs=2, callbacks=[rehab, *callbacks]).fit(lit, rows)
        return lit

    same_gradients(run(), run(kind()))


class OnlyLoss(Lit):
    def forward(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self(batch)


class NoCall(Lit):
    def training_step(self, batch, batch_idx):
        weight = self.net[0].weight if hasattr(self.net[0], "weight") else self.net[0].A.weight
        return weight.square().sum()


class Between(Lit):
    """The second module is given something that was computed from what the first one has returned."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.body(batch[0]) + 1.0), batch[1])


class Cached(Lit):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0], past_key_values=[batch[0]]).mean()


class WithPast(nn.Sequential):
    def forward(self, x, past_key_values=None):
        return super().forward(x)


CANNOT = {
    "only the loss": (OnlyLoss, lambda one: {"net": one}, StatisticsError, r"no module that returns logits .*forward="),
    "no call": (NoCall, lambda one: {"net": one}, StatisticsError, "calls no module of the model"),
    "in between": (
        Between,
        lambda one: {"body": one[:3], "head": one[3:]},
        UnsupportedError,
        "'head' is called with something",
    ),
    "cached": (Cached, lambda one: {"net": WithPast(*one)}, UnsupportedError, "called with past_key_values"),
}


@pytest.mark.parametrize("name", CANNOT)
@pytest.mark.parametrize("kept", ["given", "given before the cut", "kept at the cut", "kept before prehab"])
def test_what_cannot_be_asked_is_refused_with_the_way_out(name, kept, rows, make_trainer):
    """At the first batch of the fit, before any step, also where the cut comes later."""
    kind, modules, error, match = CANNOT[name]
    dense, steps = net(), []
    teacher = kind(**modules(copy.deepcopy(dense))) if kept.startswith("given") else None
    callbacks = [lp.RehabDistillation(0.6, teacher=teacher)]
    if kept != "given":
        callbacks.append(lp.CompressionCallback(2, 0.4, factorization=lp.SVD()))
    if kept == "kept before prehab":
        callbacks[0] = lp.PrehabCallback(lp.StableRank(), start_epoch=1, self_distillation=0.5)

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, *_):
            steps.append(1)

    lit = kind(**modules(cut(dense) if kept == "given" else dense))
    with pytest.raises(error, match=match) as caught:
        make_trainer(max_epochs=3, callbacks=[*callbacks, Watch()]).fit(lit, rows)
    assert "module=" in str(caught.value)
    assert steps == []
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in lit.modules())


class Features(Lit):
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def fails(module, batch):
    raise ZeroDivisionError


def no_tensor(module, batch):
    return "logits"


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"form": "features", "feature_modules": "unused"},
            StatisticsError,
            "None of the modules 'unused' .* is called",
        ),
        (
            {"form": "features", "feature_modules": "frozen"},
            StatisticsError,
            "None of the modules 'frozen' .* is called",
        ),
        ({"forward": fails}, ZeroDivisionError, ""),
        ({"forward": no_tensor}, StatisticsError, ""),
        ({"teacher": Features(net=net()[:3])}, StatisticsError, "shape"),
    ],
    ids=["unused features", "frozen features", "forward fails", "forward without tensors", "teacher"],
)
def test_settings_that_give_nothing_to_compare_are_told_at_the_first_batch(settings, error, match, rows, make_trainer):
    lit = Features(net=net(), unused=nn.Linear(2, 2), frozen=nn.Linear(12, 2).requires_grad_(False))
    before = copy.deepcopy(lit.state_dict())
    callbacks = [lp.RehabDistillation(**settings), lp.CompressionCallback(2, 0.4, factorization=lp.SVD())]
    with pytest.raises(error, match=match):
        make_trainer(max_epochs=3, callbacks=callbacks).fit(lit, rows)
    assert all(torch.equal(before[name], one) for name, one in lit.state_dict().items())


@pytest.mark.parametrize(
    "settings", [{}, {"forward": lambda module, batch: module.net(batch[0])}], ids=["training_step", "forward"]
)
def test_looking_ahead_changes_nothing(settings, rows, make_trainer):
    """The weights before the cut, with dropout and running statistics, are those without a teacher; no hook is left."""

    def run(*callbacks):
        torch.manual_seed(3)
        lit = Features(net=nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 5)))
        surgery = lp.CompressionCallback(2, 0.4, factorization=lp.SVD())
        states = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                assert not any(one._forward_hooks or one._forward_pre_hooks for one in pl_module.modules())
                assert all(one.training for one in pl_module.modules())

            def on_before_surgery(self, trainer, pl_module):
                states.append(copy.deepcopy(pl_module.state_dict()))

        make_trainer(max_epochs=3, callbacks=[*callbacks, surgery, Watch()]).fit(lit, rows)
        return states[0]

    torch.manual_seed(0)
    plain, ours = run(), run(lp.RehabDistillation(**settings))
    assert all(torch.equal(plain[name], one) for name, one in ours.items())


@pytest.mark.parametrize("kind", [OnlyLoss, Between])
def test_the_way_out_works(kind, rows, make_trainer):
    dense = net()
    modules = (lambda one: {"net": one}) if kind is OnlyLoss else (lambda one: {"body": one[:3], "head": one[3:]})

    def forward(module, batch):
        if kind is OnlyLoss:
            return module.net(batch[0])
        return module.head(module.body(batch[0]) + 1.0)

    teacher = kind(**modules(copy.deepcopy(dense)))
    trainer = make_trainer(callbacks=[lp.RehabDistillation(0.6, teacher=teacher, forward=forward)])
    trainer.fit(kind(**modules(cut(dense))), rows)
    assert trainer.callback_metrics["rehab/distillation"] > 0


def test_reentrant_checkpointing_of_features_is_refused(rows, make_trainer):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            x = x.clone().requires_grad_()
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True)

    class Plain(Lit):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    dense = net()
    settings = {"form": "features", "feature_modules": "net.inner.2", "teacher": Plain(net=Checkpointed(dense))}
    lit = Plain(net=Checkpointed(cut(dense)))
    with pytest.raises(UnsupportedError, match=r"'net.inner.2' returns has no gradient.*use_reentrant=False"):
        make_trainer(callbacks=[lp.RehabDistillation(**settings)]).fit(lit, rows)


def test_a_model_that_cannot_be_copied_stays_dense(rows, make_trainer):
    class Held(Lit):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    lit = Held(net=net())
    lit.stream = (number for number in range(3))
    callbacks = [lp.CompressionCallback(1, 0.4, factorization=lp.SVD()), lp.RehabDistillation()]
    with pytest.raises(UnsupportedError, match="Give a teacher: teacher="):
        make_trainer(max_epochs=2, callbacks=callbacks).fit(lit, rows)
    assert lit.trainer.global_step == 0
    assert all(type(one) in (nn.Linear, nn.Tanh) for one in lit.net)


@pytest.mark.filterwarnings("ignore:RehabDistillation. the teacher fades over")
def test_a_second_cut_keeps_the_first_teacher(rows, make_trainer):
    class Plain(Lit):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    class SecondCut(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                teachers.append(rehab._distiller.teacher)
                rehab.on_before_surgery(trainer, pl_module)
                rehab.on_surgery(trainer, pl_module, None)
                teachers.append(rehab._distiller.teacher)
                factors.append(rehab.factor)

    teachers, factors = [], []
    rehab = lp.RehabDistillation(fade_steps=20)
    callbacks = [lp.CompressionCallback(1, 0.4), rehab, SecondCut()]
    make_trainer(max_epochs=3, callbacks=callbacks).fit(Plain(net=net()), rows)
    assert teachers[0] is teachers[1] is not None
    assert factors == [1.0]  # begins anew
