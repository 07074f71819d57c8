"""Targets that nobody trains while others are trained: frozen loss networks, teachers."""

import copy
import warnings
from itertools import chain

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import nn

import lightning_prehab as lp
from lightning_prehab.surgery.untrained import held_by_none


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.MultiheadAttention(8, 2), nn.Conv1d(8, 8, 3))


def sgd(*modules):
    return torch.optim.SGD(chain.from_iterable(module.parameters() for module in modules), lr=0.1)


def test_those_that_no_optimizer_holds_are_counted_and_the_first_is_named():
    model = nn.ModuleDict({"student": net(), "teacher": net()})
    targets = lp.find_targets(model)
    warning = held_by_none(targets, [sgd(model["student"])])
    assert warning.startswith("6 of 12 targets are held by no optimizer (first: 'teacher.0').")
    assert "exclude_modules" in warning
    assert held_by_none(targets, [sgd(model["student"]), sgd(model["teacher"])]) is None  # a GAN
    assert held_by_none(targets, []) is None  # nobody trains
    assert held_by_none(targets, [sgd(nn.Linear(2, 2))]) is None  # nor a part of this
    attention = held_by_none(targets, [torch.optim.SGD([model["student"][2].in_proj_weight], lr=0.1)])
    assert attention.startswith("9 of 12")


def test_compress_with_optimizers_says_it_once():
    model = nn.ModuleDict({"student": nn.Sequential(nn.Linear(8, 8)), "teacher": nn.Sequential(nn.Linear(8, 8))})
    optimizer = sgd(model["student"])
    with pytest.warns(UserWarning, match="1 of 2 targets are held by no optimizer .first: 'teacher.0'") as seen:
        lp.compress_(model, 0.5, optimizers=iter([optimizer]))
    assert len(seen) == 1
    assert [parameter.shape for parameter in optimizer.param_groups[0]["params"]] == [(2, 8), (8, 2), (8,)]


class MomentumTeacher(Callback):
    """Follows the student slowly, as in BYOL, MoCo and Mean Teacher."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        for slow, fast in zip(pl_module.teacher.parameters(), pl_module.net.parameters(), strict=False):
            if slow.shape == fast.shape:
                slow.data.lerp_(fast.data, 0.1)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("exclude", [None, "teacher.*"])
def test_a_teacher_beside_the_student_in_training(lit, loader, make_trainer, exclude, frozen, caplog):
    """Frozen, it may as well be a backbone: that is no reason to warn."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    lit.teacher = copy.deepcopy(lit.net).requires_grad_(not frozen)
    lit.make_optimizer = lambda _: torch.optim.SGD(lit.net.parameters(), lr=0.05)
    compression = lp.CompressionCallback(1, 0.5, factorization=lp.SVD(), exclude_modules=exclude)
    trainer = make_trainer(max_epochs=3, callbacks=[compression, MomentumTeacher()])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(lit, loader)
    found = [str(one.message) for one in seen if "held by no optimizer" in str(one.message)]
    assert len(found) == (0 if exclude or frozen else 1)
    said = [text for text in caplog.messages if "3 of 6 targets are frozen (first: 'teacher.0')" in text]
    assert len(said) == (1 if frozen and not exclude else 0)
    assert any(isinstance(layer, lp.LowRankLinear) for layer in lit.teacher) == (exclude is None)
    assert any(isinstance(layer, lp.LowRankLinear) for layer in lit.net)


def test_nothing_is_said_of_what_is_going_to_be_unfrozen(lit, loader, make_trainer):
    lit.backbone, lit.net = lit.net[:3], lit.net[3:]
    forward = lit.net.forward
    lit.net.forward = lambda x: forward(lit.backbone(x))
    lit.make_optimizer = lambda _: torch.optim.SGD([p for p in lit.parameters() if p.requires_grad], lr=0.05)
    callbacks = [lp.CompressionCallback(2, 0.5, factorization=lp.SVD()), BackboneFinetuning(1)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*held by no optimizer")
        make_trainer(max_epochs=3, callbacks=callbacks).fit(lit, loader)
    assert isinstance(lit.backbone[0], lp.LowRankLinear)


def test_nothing_is_said_where_all_is_trained(lit, loader, make_trainer):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*held by no optimizer")
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1, 0.5)]).fit(lit, loader)
