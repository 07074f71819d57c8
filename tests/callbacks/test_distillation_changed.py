"""Distillation where something is not as it was: other settings on resume, inputs that are changed, lent teachers."""

import copy
from contextlib import suppress

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.distillation.comparison import Comparison
from lightning_prehab.errors import StatisticsError, UnsupportedError
from tests.callbacks.test_distillation import Classifier, classes, divergence  # noqa: F401

CUT = {"factorization": lp.SVD()}
SHORT_RUN = pytest.mark.filterwarnings("ignore:Rehab.* left")


class Distances(pl.Callback):
    """What the distance to the teacher was, step by step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if "rehab/distillation" in trainer.callback_metrics:
            self.found.append(float(trainer.callback_metrics["rehab/distillation"]))


class Net(pl.LightningModule):
    """Any net, any loss."""

    def __init__(self, net, loss=nn.functional.cross_entropy):
        super().__init__()
        self.net, self.task_loss = net, loss

    def training_step(self, batch, batch_idx):
        return self.task_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.fixture
def halfway(classes, make_trainer, tmp_path):  # noqa: F811
    """``halfway(*callbacks)``: a checkpoint after 9 of 18 steps, 3 after the cut."""

    def run(*callbacks):
        saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=9, save_top_k=-1)
        callbacks = [lp.CompressionCallback(1, 0.5), *callbacks, saved]
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(Classifier(), classes)
        return tmp_path / "step=9.ckpt"

    return run


@pytest.fixture
def go_on(classes, make_trainer):  # noqa: F811
    def run(path, *callbacks, epochs=3, loader=None):
        callbacks = [lp.CompressionCallback(1, 0.5), *callbacks]
        trainer = make_trainer(max_epochs=epochs, callbacks=callbacks)
        trainer.fit(Classifier(), classes if loader is None else loader, ckpt_path=path)
        return trainer

    return run


@pytest.mark.parametrize("faded", [False, True])
@pytest.mark.parametrize("kind", ["module", "file"])
def test_a_teacher_that_is_given_on_resume_teaches(kind, faded, halfway, go_on, tmp_path):
    path = halfway(lp.RehabDistillation(fade_steps=2) if faded else lp.RehabDistillation())
    other = Classifier()
    teacher = other
    if kind == "file":
        teacher = tmp_path / "other.pt"
        torch.save(other.state_dict(), teacher)
    rehab = lp.RehabDistillation(teacher=teacher)
    go_on(path, rehab)
    found = rehab._distiller.teacher.module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in other.state_dict().items())
    assert rehab.factor == 1.0
    assert rehab.state_dict()["teacher"] is None


@pytest.mark.parametrize("forms", [("logits", "features"), ("features", "logits")])
def test_what_is_compared_may_change_on_resume(forms, halfway, go_on):
    settings = {"logits": {}, "features": {"form": "features", "feature_modules": ["net.2", "net.4"]}}
    path = halfway(lp.RehabDistillation(**settings[forms[0]]))
    rehab = lp.RehabDistillation(**settings[forms[1]])
    go_on(path, rehab)
    assert rehab._distiller._comparison.measure == ("squared" if forms[1] == "features" else "divergence")


@SHORT_RUN
@pytest.mark.parametrize(
    ("before", "now", "factor"),
    [
        ({}, {"fade_steps": 12, "task_strength": 0.0}, 1 - 12 / 12),
        ({}, {"fade_steps": 24}, 1 - 12 / 24),
        ({}, {"fade_epochs": 4.0}, 1 - 12 / 24),
        ({"fade_steps": 100}, {}, 1.0),
        ({"fade_steps": 20}, {"fade_steps": 20}, 1 - 12 / 20),
    ],
    ids=str,
)
def test_a_fade_that_is_given_on_resume_counts_from_the_cut(before, now, factor, halfway, go_on):
    path = halfway(lp.RehabDistillation(**before))
    rehab = lp.RehabDistillation(**now)
    go_on(path, rehab)
    assert rehab.factor == pytest.approx(factor)


def test_a_longer_fade_needs_the_teacher_that_is_gone(halfway, go_on):
    path = halfway(lp.RehabDistillation(fade_steps=2))
    go_on(path, lp.RehabDistillation(fade_steps=2))
    with pytest.raises(UnsupportedError, match="holds no teacher"):
        go_on(path, lp.RehabDistillation(fade_steps=50))


@SHORT_RUN
@pytest.mark.parametrize(
    ("before", "now", "factor"),
    [
        ({"warmup_steps": 24}, {"warmup_steps": 48, "start_factor": 0.5}, 0.5 + 0.5 * 12 / 48),
        ({"warmup_steps": 24}, {"warmup_epochs": 8.0, "start_factor": 0.5}, 0.5 + 0.5 * 12 / 48),
        ({"warmup_steps": 48}, {"warmup_steps": 2}, 1.0),
        ({"warmup_steps": 2}, {"warmup_steps": 2, "end_factor": 0.0, "decay_steps": 18}, 1 - 9 / 18),
        ({"warmup_steps": 2}, {"warmup_steps": 2, "end_factor": 0.0}, 0.0),
        ({"warmup_steps": 2, "end_factor": 0.0}, {"warmup_steps": 2}, 1.0),
    ],
    ids=str,
)
def test_a_schedule_that_is_given_on_resume_counts_from_the_cut(before, now, factor, halfway, go_on):
    """A decay counts from where the run goes on: 9 of its steps are then made."""
    path = halfway(lp.RehabSchedule(**before))
    rehab = lp.RehabSchedule(**now)
    go_on(path, rehab)
    assert rehab.factor() == pytest.approx(factor)


class Shifts(nn.Module):
    """Changes its input in place, or what it is given in."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Linear(14, 5))

    def forward(self, batch):
        if self.how == "pop":
            batch.pop("labels")
            return self.layers(batch["x"])
        x = batch["x"]
        return self.layers(x.sub_(1.0).mul_(2.0) if self.how == "in place" else (x - 1.0) * 2.0)


class OfBatch(Net):
    def training_step(self, batch, batch_idx):
        labels = batch["labels"]
        return self.task_loss(self.net(batch), labels)


@pytest.fixture
def dicts():
    generator = torch.Generator().manual_seed(1)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 96

        def __getitem__(self, index):
            if index == 0:
                generator.manual_seed(1)
            return {"x": torch.randn(12, generator=generator), "labels": index % 5}

    return DataLoader(Rows(), 16)


@pytest.mark.parametrize("own", [False, True], ids=["looked at", "forward"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["in place", "pop"])
def test_the_teacher_is_given_what_the_model_was_given(how, frozen, own, dicts, make_trainer):
    if own and how == "in place":
        pytest.skip("what a function of the user's does is the user's")
    found = {}
    for kind in (how, "copies"):
        torch.manual_seed(0)
        module, noted = OfBatch(Shifts(kind)), Distances()
        module.net.layers[0].requires_grad_(not frozen)
        forward = (lambda module, batch: module.net(batch)) if own else None
        callbacks = [lp.CompressionCallback(1, 0.5, **CUT), lp.RehabDistillation(forward=forward), noted]
        make_trainer(max_epochs=3, callbacks=callbacks).fit(module, dicts)
        found[kind] = noted.found
    if how == "in place":
        assert len(found[how]) == 12
        assert found[how] == pytest.approx(found["copies"], rel=1e-5)
    else:
        assert found[how][0] < 0.1


@pytest.mark.parametrize("size", [6, 4], ids=["", "as many classes as rows"])
def test_logits_of_each_pixel_are_compared_over_their_classes(size, make_trainer):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, size, size, generator=generator)
    labels = torch.randint(4, (12, size, size), generator=generator)
    labels[:, 0] = -100
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 4, 1))
    teacher, student = copy.deepcopy(net), Net(net)
    lp.compress_(student, 0.6, factorization=lp.SVD())
    with torch.no_grad():
        answers = [one.eval()(x).movedim(1, -1)[labels != -100] for one in (student.net, teacher)]
    noted = Distances()
    trainer = make_trainer(max_epochs=1, callbacks=[lp.RehabDistillation(teacher=teacher, module="net"), noted])
    trainer.fit(student, DataLoader(TensorDataset(x, labels), 12))
    assert noted.found[0] == pytest.approx(float(divergence(*answers)), rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "labels", "measure"),
    [
        ((2, 3, 5, 7), (2, 5, 7), "second"),
        ((2, 3, 4, 4), (2, 16, 16), "squared"),  # as of models that answer at a lower resolution
        ((2, 4, 5, 3), (2, 4, 5), "divergence"),
        ((2, 3, 3, 3), (2, 3, 3), "second"),
        ((2, 5, 3), (2, 5), "divergence"),
        ((2, 3), (2,), "divergence"),
        ((40, 3), (2, 4, 5), "flattened"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_where_the_classes_of_logits_are(named, shape, labels, measure):
    comparison, logits = Comparison(), torch.zeros(shape)
    comparison.decide(nn.Identity(), {"logits": logits} if named else logits, [torch.full(labels, 2)])
    if measure == "flattened":  # as the guide says: what is called logits is taken for them
        measure = "divergence" if named else "squared"
    assert ("second" if comparison.second else comparison.measure) == measure
    assert comparison.measure == ("squared" if measure == "squared" else "divergence")


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_a_teacher_that_was_lent_is_given_back_as_it_was(ends, classes, make_trainer):  # noqa: F811
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if ends != "well":
                raise KeyError

    teacher, student = Classifier(), Classifier()
    teacher.net[0].requires_grad_(False)
    teacher.net[3].eval()
    teacher.net.config = type("Config", (), {"use_cache": True})()

    def state():
        flags = [(one.training, len(one._forward_hooks)) for one in teacher.modules()]
        return flags, [one.requires_grad for one in teacher.parameters()], teacher.net.config.use_cache

    before, weights = state(), copy.deepcopy(teacher.state_dict())
    lp.compress_(student, 0.4, factorization=lp.SVD())
    rehab = lp.RehabDistillation(teacher=teacher)
    for _ in range(2):
        with suppress(KeyError):
            make_trainer(max_epochs=1, callbacks=[rehab, Fails()]).fit(student, classes)
        assert state() == before
        assert rehab._distiller.teacher.module is teacher
    assert all(torch.equal(weights[name], tensor) for name, tensor in teacher.state_dict().items())


def test_features_that_nothing_trained_comes_before_are_left_out(classes, make_trainer):  # noqa: F811
    module = Classifier()
    rehab = lp.RehabDistillation(form="features", feature_modules=["net.0", "net.4"])
    surgery = lp.CompressionCallback(1, 0.5, exclude_modules="net.0", **CUT)
    callbacks = [surgery, lp.FactorTraining(train="factors"), rehab]
    trainer = make_trainer(max_epochs=3, callbacks=callbacks)
    trainer.fit(module, classes)
    assert trainer.callback_metrics["rehab/distillation"] > 0


def test_features_of_frozen_modules_alone_are_told_before_anything_is_trained(classes, make_trainer):  # noqa: F811
    module = Classifier()
    module.net[0].requires_grad_(False)
    rehab = lp.RehabDistillation(form="features", feature_modules="net.0")
    trainer = make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1, 0.5, **CUT), rehab])
    with pytest.raises(StatisticsError, match="Nothing that comes before"):
        trainer.fit(module, classes)
    assert trainer.global_step == 0


def test_a_module_that_begins_to_change_its_input_is_told(dicts, make_trainer):
    class Begins(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net.how = "in place" if trainer.global_step >= 9 else "copies"

    callbacks = [lp.CompressionCallback(1, 0.5, **CUT), lp.RehabDistillation(), Begins()]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks)
    with pytest.raises(UnsupportedError, match="has changed its input in place"):
        trainer.fit(OfBatch(Shifts("copies")), dicts)
    assert trainer.global_step == 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_of_another_dtype(dtype, classes, make_trainer):  # noqa: F811
    student, teacher = Classifier(), Classifier().to(dtype)
    lp.compress_(student, 0.4, factorization=lp.SVD())
    trainer = make_trainer(max_epochs=1, callbacks=[lp.RehabDistillation(teacher=teacher)])
    with pytest.raises(UnsupportedError, match=f"weights in {str(dtype)[6:]} and was given float32"):
        trainer.fit(student, classes)
    assert trainer.global_step == 0


def test_what_there_is_to_say_of_the_teacher(classes, halfway, go_on, make_trainer, caplog, tmp_path):  # noqa: F811
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    path = halfway(lp.RehabDistillation())
    assert "right before the cut becomes the teacher, 0.0 MB on cpu" in caplog.text
    caplog.clear()
    go_on(path, lp.RehabDistillation())
    assert "RehabDistillation: the teacher takes 0.0 MB on cpu." in caplog.text
    caplog.clear()
    callbacks = [lp.PrehabCallback(self_distillation=1.0), lp.CompressionCallback(1, 0.5), lp.RehabDistillation()]
    make_trainer(max_epochs=2, callbacks=callbacks).fit(Classifier(), classes)
    assert "stays after the cut" in caplog.text
    assert "right before the cut" not in caplog.text
    surgery = lp.CompressionCallback(1, 0.5)
    with pytest.warns(UserWarning, match="fades over 50 steps, and 6 are left"):
        make_trainer(max_epochs=2, callbacks=[surgery, lp.RehabDistillation(fade_steps=50)]).fit(Classifier(), classes)


def test_a_teacher_that_is_cut_itself_is_told(classes, make_trainer):  # noqa: F811
    module = Classifier()
    lp.compress_(module, 0.6, factorization=lp.SVD())
    surgery = lp.CompressionCallback(1, 0.3, **CUT)
    with pytest.warns(UserWarning, match="the model has been cut already, so that its teacher"):
        make_trainer(max_epochs=2, callbacks=[surgery, lp.RehabDistillation()]).fit(module, classes)
