import copy
from contextlib import suppress

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, CheckpointError, StatisticsError, TargetError, UnsupportedError
from lightning_prehab.surgery.hooks import hooks_of
from tests.same_model import assert_same_weights


def divergence(student, teacher, temperature=1.0):
    p = (teacher / temperature).log_softmax(-1)
    q = (student / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


class Classifier(pl.LightningModule):
    """Dropout and running statistics inside, and three ways to call the net."""

    def __init__(self, how="net"):
        super().__init__()
        self.how = how
        self.net = nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 14), nn.Linear(14, 5)
        )
        self.norms = []

    def forward(self, x):
        return self.net(x)

    def answer(self, x):
        if self.how == "self":
            return self(x)
        if self.how == "parts":
            h = self.net[:5](x)
            return self.net[5](h)
        return self.net(x)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.answer(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]).clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


class ByHand(Classifier):
    """The same with the distillation in its training_step."""

    def __init__(self, strength, temperature=1.0, task=1.0, **settings):
        super().__init__(**settings)
        self.strength, self.temperature, self.task, self.dense = strength, temperature, task, []

    def on_before_surgery(self, trainer, pl_module):
        self.dense = [copy.deepcopy(self.net).eval()]  # a list: no part of the module

    def loss(self, batch):
        answer = self.answer(batch[0])
        task = nn.functional.cross_entropy(answer, batch[1])
        self.task_loss = task.detach()
        if not self.dense:
            return task
        with torch.no_grad():
            right = self.dense[0](batch[0])
        distance = divergence(answer.float(), right.float(), self.temperature)
        return self.task * task + self.strength * distance


@pytest.fixture
def classes():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(96, 12, generator=generator)
    return DataLoader(TensorDataset(x, (x @ torch.randn(12, 5, generator=generator)).argmax(-1)), 16)


def trained(module, callbacks, loader, make_trainer, **settings):
    state = Classifier().state_dict()
    torch.manual_seed(7)
    module.load_state_dict(state)
    trainer = make_trainer(max_epochs=3, callbacks=[lp.CompressionCallback(1, 0.5), *callbacks], **settings)
    trainer.fit(module, loader)
    return module, trainer


SETTINGS = [
    {},
    {"accumulate_grad_batches": 4},
    {"gradient_clip_val": 0.1},
    {"precision": "bf16-mixed"},
    {"scale": 1024.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("how", ["net", "self", "parts"])
def test_gradients_are_those_of_a_hand_written_step(how, settings, classes, make_trainer, scaled_precision):
    settings = dict(settings)
    scale = settings.pop("scale", None)
    extra = {} if scale is None else {"plugins": scaled_precision(scale)}
    torch.manual_seed(0)
    hand, _ = trained(ByHand(0.7, 2.0, how=how), [], classes, make_trainer, **settings, **extra)
    extra = {} if scale is None else {"plugins": scaled_precision(scale)}
    torch.manual_seed(0)
    rehab = lp.RehabDistillation(0.7, temperature=2.0, precision="full" if scale else "auto")  # nothing is in half here
    ours, trainer = trained(Classifier(how), [rehab], classes, make_trainer, **settings, **extra)
    atol = 2e-3 if "precision" in settings else 1e-6
    assert len(hand.norms) == len(ours.norms)
    for one, other in zip(hand.norms, ours.norms, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)
    assert trainer.callback_metrics["rehab/distillation"] > 0
    assert trainer.callback_metrics["rehab/teacher"] == pytest.approx(0.7)


@pytest.mark.parametrize("task", [0.0, 0.3])
def test_the_task_has_a_factor_of_its_own_and_what_is_logged_has_not(task, classes, make_trainer):
    torch.manual_seed(0)
    hand, _ = trained(ByHand(0.7, task=task), [], classes, make_trainer)
    torch.manual_seed(0)
    rehab = lp.RehabDistillation(0.7, task_strength=task)
    ours, trainer = trained(Classifier(), [rehab], classes, make_trainer)
    for one, other in zip(hand.norms, ours.norms, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], hand.task_loss, atol=1e-6, rtol=1e-5)


def test_with_a_forward_of_its_own(classes, make_trainer):
    """The second forward pass draws its own dropout: without that the gradients are those of the hand-written step."""

    def run(module, *callbacks):
        torch.manual_seed(0)
        module.net[3] = nn.Identity()
        return trained(module, callbacks, classes, make_trainer)[0]

    hand = run(ByHand(0.7, task=0.5))
    rehab = lp.RehabDistillation(0.7, task_strength=0.5, forward=lambda module, batch: module.net(batch[0]))
    for one, other in zip(hand.norms, run(Classifier(), rehab).norms, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_from_the_teacher_to_the_task(shape, classes, make_trainer):
    class Watch(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append((rehab.factor, rehab._task_factor))

    rehab, watch = lp.RehabDistillation(0.8, task_strength=0.2, fade_epochs=1.0, shape=shape), Watch()
    module, _ = trained(Classifier(), [watch, rehab], classes, make_trainer, accumulate_grad_batches=2)
    assert watch.seen[:6] == [(0.0, 1.0)] * 6  # before the cut
    assert watch.seen[6:8] == [(0.8, 0.2)] * 2  # one step
    assert watch.seen[12:] == [(0.0, 1.0)] * 6
    third = 1 / 3 if shape == "linear" else 0.25
    assert watch.seen[8] == pytest.approx((0.8 * (1 - third), 0.2 + 0.8 * third))
    assert rehab.is_over
    assert rehab._distiller.teacher is None
    assert rehab.state_dict()["teacher"] is None
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())


class Killed(Exception):
    pass


@pytest.mark.filterwarnings("ignore:RehabDistillation. the teacher fades over")
@pytest.mark.parametrize("settings", [{}, {"precision": "half"}, {"fade_steps": 20, "task_strength": 0.1}], ids=str)
@pytest.mark.parametrize("killed_at", [8, 14, 20])
def test_killed_and_resumed_bit_by_bit(killed_at, settings, make_trainer, classes, tmp_path):
    """From one file, wherever it is moved to; it loads with weights_only=True."""

    class Kill(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == killed_at:
                raise Killed

    def run(*extra, path=None):
        torch.manual_seed(3)
        module = Classifier()
        module.net[3] = nn.Identity()  # the state of randomness is not in checkpoints
        rehab = lp.RehabDistillation(0.5, **settings)
        saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        callbacks = [lp.CompressionCallback(1, 0.5), rehab, saved, *extra]
        trainer = make_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
        with suppress(Killed):
            trainer.fit(module, classes, ckpt_path=path)
        return module, rehab

    whole, rehab = run()
    run(Kill())
    at = killed_at // 6 * 6
    moved = (tmp_path / f"step={at}.ckpt").rename(tmp_path / "moved.ckpt")
    file = torch.load(moved, weights_only=True)
    assert (file["callbacks"]["RehabDistillation"]["teacher"] is None) == (at == 6)
    resumed, other = run(path=moved)
    assert_same_weights(whole, resumed)
    assert other.factor == rehab.factor
    one, two = (each.state_dict()["teacher"] for each in (rehab, other))
    assert (one is None) == (two is None)
    for name in one or {}:
        assert torch.equal(one[name], two[name])


@pytest.mark.parametrize("kind", ["file", "weights", "lightning", "module", "other module"])
def test_a_teacher_that_is_given_needs_no_cut_in_this_run(kind, classes, make_trainer, tmp_path):
    dense, student = Classifier(), Classifier()
    teacher = {"lightning": dense, "module": dense.net}.get(kind)
    if kind == "other module":
        teacher = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 5))
    if kind == "file":
        teacher = tmp_path / "dense.ckpt"
        saver = make_trainer(max_epochs=0, enable_checkpointing=True)
        saver.fit(dense, classes)
        saver.save_checkpoint(teacher)
    elif kind == "weights":
        teacher = tmp_path / "dense.pt"
        torch.save(dense.state_dict(), teacher)
    lp.compress_(student, 0.4, factorization=lp.SVD())
    rehab = lp.RehabDistillation(teacher=teacher, task_strength=0.0)
    distances = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            distances.append(float(trainer.callback_metrics["rehab/distillation"]))

    trainer = make_trainer(max_epochs=6, callbacks=[rehab, Note()])
    trainer.fit(student, classes)
    right = teacher if kind == "other module" else dense.net
    with torch.no_grad():
        x = classes.dataset.tensors[0]
        found = divergence(student.eval().net(x), right.eval()(x))
    assert found < distances[0]
    assert sum(distances[-6:]) < sum(distances[:6])
    assert rehab.state_dict()["teacher"] is None


def test_hooks_of_the_user_see_the_student_alone(classes, make_trainer):
    """Also those on the layers, and those that come after the teacher was made; the teacher asks none of them."""
    module, seen = Classifier(), []

    class Hooks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = len(seen)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert len(seen) - self.before == 2
            assert all(one in set(pl_module.modules()) for one in seen[self.before :])

    for one in (module.net, module.net[2]):
        one.register_forward_hook(lambda part, *_: seen.append(part))
    rehab = lp.RehabDistillation()
    trained(module, [rehab, Hooks()], classes, make_trainer)
    assert not any(hooks_of(one) for one in rehab._distiller.teacher.module.modules())


def test_of_several_fits_each_has_its_own_teacher(classes, make_trainer):
    rehab = lp.RehabDistillation()
    compression = lp.CompressionCallback(1, 0.5)
    first = Classifier()
    make_trainer(max_epochs=2, callbacks=[compression, rehab]).fit(first, classes)
    one = rehab._distiller.teacher
    make_trainer(max_epochs=2, callbacks=[compression, rehab]).fit(first, classes)  # goes on with the cut model
    assert rehab._distiller.teacher is one
    make_trainer(max_epochs=2, callbacks=[compression, rehab]).fit(Classifier(), classes)
    assert rehab._distiller.teacher is not one


def test_what_the_teacher_takes_is_said_before_training(classes, make_trainer, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trained(Classifier(), [lp.RehabDistillation()], classes, make_trainer)
    said = [record.message for record in caplog.records if "RehabDistillation" in record.message]
    assert len(said) == 2
    assert "becomes the teacher, 0.0 MB on cpu beside the model" in said[0]
    assert said[1] == "RehabDistillation compares the predictions (logits) of net with the teacher's."


def test_neither_statistics_nor_validation_are_touched(classes, make_trainer):
    """The teacher is in eval mode; no hooks are there outside of training batches."""

    class Module(Classifier):
        def validation_step(self, batch, batch_idx):
            hooks = [one._forward_hooks or one._forward_pre_hooks for one in self.modules()]
            assert self.trainer.current_epoch == 0 or not any(hooks)  # before the cut the calibration has some

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if rehab._distiller.teacher is not None:
                statistics.append(rehab._distiller.teacher.module.net[1].running_mean.clone())

    statistics = []
    rehab = lp.RehabDistillation()
    trainer = make_trainer(max_epochs=3, callbacks=[lp.CompressionCallback(1, 0.5), rehab])
    trainer.fit(Module(), classes, classes)
    assert len(statistics) == 12
    assert all(torch.equal(one, statistics[0]) for one in statistics)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"strength": -1.0}, "strength must be finite and not negative, got -1.0"),
        ({"task_strength": float("nan")}, "task_strength"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"form": "both"}, "form"),
        ({"shape": "square"}, "shape"),
        ({"precision": "bf16"}, "precision"),
        ({"fade_steps": 2, "fade_epochs": 1.0}, "not both"),
        ({"fade_steps": 0}, "fade_steps"),
        ({"teacher": 3}, "teacher must be the path of a checkpoint or a module, got 3"),
        ({"forward": "net"}, "forward must be a function"),
        ({"forward": nn.Linear(1, 1)}, "forward must be a function"),
        ({"forward": print, "form": "features"}, "leave out"),
        ({"feature_modules": ["net.0"]}, "give that too"),
        ({"device": "gpu"}, "torch knows"),
    ],
    ids=str,
)
def test_wrong_settings(wrong, match):
    with pytest.raises(ArgumentError, match=match):
        lp.RehabDistillation(**wrong)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"module": "nett"}, "no module 'nett'"),
        ({"form": "features", "feature_modules": ["nett"]}, "'nett' matches no layer"),
        ({"form": "features"}, "Classifier has no blocks"),
    ],
)
def test_names_that_are_not_there_are_told_before_anything_is_trained(wrong, match, classes, make_trainer):
    module = Classifier()
    callbacks = [lp.CompressionCallback(1), lp.RehabDistillation(**wrong)]
    with pytest.raises(TargetError, match=match):
        make_trainer(max_epochs=2, callbacks=callbacks).fit(module, classes)
    assert not module.norms


def test_without_a_teacher_to_be_had(classes, make_trainer, tmp_path):
    with pytest.raises(UnsupportedError, match="add a CompressionCallback, or give a teacher"):
        make_trainer(callbacks=[lp.RehabDistillation()]).fit(Classifier(), classes)
    two = [lp.CompressionCallback(1), lp.RehabDistillation(), lp.RehabDistillation()]
    with pytest.raises(UnsupportedError, match="Keep one of them"):
        make_trainer(max_epochs=2, callbacks=two).fit(Classifier(), classes)
    _, trainer = trained(Classifier(), [], classes, make_trainer)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    late = make_trainer(max_epochs=5, callbacks=[lp.CompressionCallback(1, 0.5), lp.RehabDistillation()])
    with pytest.raises(UnsupportedError, match="the checkpoint holds no teacher"):
        late.fit(Classifier(), classes, ckpt_path=tmp_path / "cut.ckpt")


def test_a_teacher_that_does_not_fit(classes, make_trainer, tmp_path):
    torch.save({}, tmp_path / "empty.pt")
    torch.save({"net.0.weight": torch.ones(3)}, tmp_path / "short.pt")
    wide = Classifier().state_dict() | {"net.5.weight": torch.ones(7, 14), "net.5.bias": torch.ones(7)}
    torch.save(wide, tmp_path / "wide.pt")
    (tmp_path / "damaged.pt").write_bytes(b"nothing")
    for name, match in [
        ("missing.pt", r"missing.pt' cannot be read \(FileNotFoundError"),
        ("damaged.pt", "damaged.pt' cannot be read"),
        ("empty.pt", "holds no weights"),
        ("short.pt", "The teacher's weights lack"),
        ("wide.pt", r"'net.5.weight' has shape \(7, 14\), that of the model \(5, 14\)"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            make_trainer(callbacks=[lp.RehabDistillation(teacher=tmp_path / name)]).fit(Classifier(), classes)
    other = nn.Linear(12, 7)
    with pytest.raises(StatisticsError, match=r"shape \(16, 5\), the teacher with \(16, 7\)"):
        make_trainer(callbacks=[lp.RehabDistillation(teacher=other)]).fit(Classifier(), classes)
    module = Classifier()
    with pytest.raises(UnsupportedError, match="is the model that is trained"):
        make_trainer(callbacks=[lp.RehabDistillation(teacher=module.net)]).fit(module, classes)
