import inspect

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.callbacks import _same_settings
from lightning_prehab.callbacks._same_settings import as_text, check_same_settings
from lightning_prehab.errors import ArgumentError


class TwoProcesses:
    world_size = 2


CALLBACKS = [
    lp.CompressionCallback(2),
    lp.CompressionCallback([1, 2], [0.5, 0.4]),
    lp.FactorTraining(rate_B=2.0),
    lp.PaperPrehab(),
    lp.PrehabCallback(),
    lp.RehabDistillation(),
    lp.RehabSchedule(),
]


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda one: type(one).__name__)
def test_no_argument_is_forgotten(callback):
    assert set(inspect.signature(type(callback)).parameters) <= callback._settings().keys()


def told_by(monkeypatch, *processes):
    monkeypatch.setattr(_same_settings.distributed, "is_initialized", lambda: True)
    told = [[(type(one).__name__, {k: as_text(v) for k, v in one._settings().items()}) for one in p] for p in processes]
    monkeypatch.setattr(_same_settings, "gather", lambda trainer, own: told)
    check_same_settings(TwoProcesses(), [])


def changed():
    """Each setting once with another value than it has by default."""
    return [
        lambda: (lp.CompressionCallback(2), lp.CompressionCallback(3), "epoch is 2 on rank 0 and 3 on rank 1"),
        lambda: (lp.CompressionCallback(1), lp.CompressionCallback("auto"), "epoch is 1 on rank 0 and 'auto'"),
        lambda: (lp.CompressionCallback(2, 0.5), lp.CompressionCallback(2, 0.4), "keep is 0.5 on rank 0 and 0.4"),
        lambda: (
            lp.CompressionCallback([1, 2], [0.5, 0.4]),
            lp.CompressionCallback([1, 2], [0.5, 0.3]),
            r"keep is \[0.5, 0.4\] on rank 0 and \[0.5, 0.3\]",
        ),
        lambda: (
            lp.CompressionCallback(2, factorization=lp.KroneckerSVD(gradient_shrinkage=0.1)),
            lp.CompressionCallback(2),
            r"CompressionCallback: factorization is KroneckerSVD\(gradient_shrinkage=0.1",
        ),
        lambda: (
            lp.PrehabCallback(lp.TailShrinkage(rank=3)),
            lp.PrehabCallback(),
            "PrehabCallback: regularizer is Tail",
        ),
        lambda: (lp.RehabDistillation(1.0), lp.RehabDistillation(2.0), "RehabDistillation: strength is 1.0 on rank 0"),
        lambda: (lp.FactorTraining(rate_A=2.0), lp.FactorTraining(rate_A=3.0), "FactorTraining: rate_A is 2.0"),
        lambda: (lp.RehabSchedule(5), lp.RehabSchedule(6), "RehabSchedule: warmup_steps is 5 on rank 0 and 6"),
        lambda: (lp.RehabSchedule(5), lp.FactorTraining(rate_A=2.0), "Rank 0 was given RehabSchedule, in this order"),
    ]


@pytest.mark.parametrize("case", changed())
def test_the_callback_and_the_setting_are_named(case, monkeypatch):
    one, other, said = case()
    told_by(monkeypatch, [one], [one])
    with pytest.raises(ArgumentError, match=said):
        told_by(monkeypatch, [one], [other])


def test_what_is_a_processs_own_may_differ(monkeypatch):
    one = lp.RehabDistillation(teacher="/here/teacher.ckpt", device="cuda:0", forward=lambda module, batch: batch)
    other = lp.RehabDistillation(teacher="/there/teacher.ckpt", device="cuda:1", forward=lambda module, batch: batch)
    told_by(monkeypatch, [one], [other])


class Plain:
    pass


def test_texts_do_not_depend_on_the_process():
    assert as_text(Plain()) == as_text(Plain())
    assert as_text({"b", "a", "c"}) == "{'a', 'b', 'c'}"
    assert as_text({"x": (1, 2.5)}) == "{'x': [1, 2.5]}"
    assert as_text([torch.zeros(2), nn.Linear(2, 2)]) == "[Tensor, Linear]"
    assert as_text(lp.ParameterBudget(0.5)) != as_text(lp.ParameterBudget(0.4))
