import copy
import functools
import inspect
from collections import OrderedDict
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.callbacks import _distributed, _same_settings
from lightning_prehab.callbacks._same_settings import as_plain, as_told, check_same_settings
from lightning_prehab.errors import ArgumentError, PrehabError
from lightning_prehab.rank_policies import RankPolicy


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
    def told(callbacks):
        return [(type(one).__name__, as_told(one._settings())) for one in callbacks]

    monkeypatch.setattr(_same_settings.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(_distributed, "gather", lambda trainer, value: [value, value])
    monkeypatch.setattr(_same_settings, "gather", lambda trainer, own: list(map(told, processes)))
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


@dataclass(frozen=True)
class Noting(RankPolicy):
    """A policy of a user's own, which notes something that does not count."""

    keep: float = 0.5
    seen: float = field(default=0.0, compare=False)

    def __call__(self, layers):
        return lp.ParameterBudget(self.keep)(layers)


def alike():
    """Settings that mean the same, said in another way."""
    cut = functools.partial(lp.CompressionCallback, 2)
    several = functools.partial(lp.CompressionCallback, [1, 2])
    return {
        "a number of numpy's": (cut(np.float64(0.5)), cut(0.5)),
        "a whole number": (lp.RehabSchedule(3, start_factor=0), lp.RehabSchedule(3, start_factor=0.0)),
        "inside of a policy": (cut(policy=lp.ParameterBudget(1)), cut(policy=lp.ParameterBudget(1.0))),
        "overrides": (cut(rank_overrides={"a": 3, "b": 4}), cut(rank_overrides={"b": 4, "a": 3})),
        "names": (cut(target_modules=["a", "b"]), cut(target_modules=("b", "a"))),
        "one name": (cut(exclude_modules="a"), cut(exclude_modules=["a"])),
        "names of each cut": (
            several([lp.Recipe(keep, target_modules=["a", "b"]) for keep in (0.5, 0.4)]),
            several([lp.Recipe(keep, target_modules=["b", "a"]) for keep in (0.5, 0.4)]),
        ),
        "names of prehab": (
            lp.PrehabCallback(target_modules={"a", "b"}),
            lp.PrehabCallback(target_modules=["b", "a"]),
        ),
        "names of blocks": (
            lp.RehabDistillation(form="features", feature_modules=["a", "b"]),
            lp.RehabDistillation(form="features", feature_modules=["b", "a"]),
        ),
        "what does not count": (cut(policy=Noting(seen=1.0)), cut(policy=Noting(seen=2.0))),
        "functions": (
            lp.RehabDistillation(forward=functools.partial(max, 1)),
            lp.RehabDistillation(forward=functools.partial(max, 2)),
        ),
    }


@pytest.mark.parametrize("name", alike())
def test_what_means_the_same_is_the_same(name, monkeypatch):
    told_by(monkeypatch, *([one] for one in alike()[name]))


def other():
    """Settings that are near those above, and differ."""
    several = functools.partial(lp.CompressionCallback, [1, 2])
    return {
        "names": (lp.PrehabCallback(target_modules=["a", "b"]), lp.PrehabCallback(target_modules=["a", "c"])),
        "which cut": (
            several([lp.Recipe(0.5, target_modules="a"), lp.Recipe(0.4, target_modules="b")]),
            several([lp.Recipe(0.5, target_modules="b"), lp.Recipe(0.4, target_modules="a")]),
        ),
        "what counts": (
            lp.CompressionCallback(2, policy=Noting(0.5)),
            lp.CompressionCallback(2, policy=Noting(0.4)),
        ),
        "a function": (lp.RehabDistillation(forward=max), lp.RehabDistillation()),
    }


@pytest.mark.parametrize("name", other())
def test_what_means_something_else_is_not(name, monkeypatch):
    with pytest.raises(ArgumentError, match="All processes do parts of the same work"):
        told_by(monkeypatch, *([one] for one in other()[name]))


class Plain:
    pass


class Named:
    """It shows its address in a way of its own."""

    def __repr__(self):
        return f"<Named, object id {id(self):x}, or {id(self)}, or {hex(id(self)).upper()}>"


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("nothing to say")


class Ways(str):
    """Text of a class that other processes need not have."""


#: Equal values, as two processes may hold them.
EQUAL = {
    "numbers": (np.float64(0.5), 0.5, np.float32(0.5), Fraction(1, 2)),
    "whole numbers": (0, 0.0, np.int64(0), np.array(0), -0.0),
    "nothing": (float("nan"), np.float64("nan")),
    "truths": (True, np.True_),
    "text": ("a", np.str_("a"), Ways("a")),
    "sequences": ([1, 0.5], (1.0, np.float32(0.5))),
    "sets": ({"a", "b", "c"}, frozenset("cba")),
    "mappings": ({"a": 0, "b": 1}, OrderedDict(b=1, a=0.0)),
    "objects": (Plain(), Plain()),
    "objects with an address": (Named(), Named()),
    "objects that say nothing": (Unspeakable(), Unspeakable()),
    "mappings by objects": ({Plain(): 1}, {Plain(): 1}),
    "whole numbers beyond floats": (2**60 + 1, np.int64(2**60 + 1)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_values_are_equal_in_all_processes(name):
    first, *others = map(as_plain, EQUAL[name])
    for one in others:
        assert one == first
        assert copy.deepcopy([one]) == [first]  # as it comes out of a message


def test_values_that_differ_stay_different():
    values = [0, 0.5, 2**60, 2**60 + 1, None, "0", "a", [0], [0.5, 0], [0, 0.5], {"a": 0}, {"a": 1}, lp.SVD(), max, min]
    told = list(map(as_plain, values))
    assert all(told.index(one) == place for place, one in enumerate(told))


def test_settings_read_as_they_are_written():
    assert repr(as_plain({"x": (1, 2.5, "y", None, True)})) == "{'x': [1, 2.5, 'y', None, True]}"
    assert repr(as_plain(lp.ParameterBudget(0.5))).startswith("ParameterBudget(keep=0.5, ")
    assert repr(as_plain([torch.zeros(2), nn.Linear(2, 2), Unspeakable()])) == "[Tensor, Linear, Unspeakable]"


def test_settings_that_cannot_be_told_are_an_error_on_all_processes(monkeypatch):
    class Broken(lp.RehabSchedule):
        @property
        def warmup_steps(self):
            raise RuntimeError("read from a file that is not there")

        @warmup_steps.setter
        def warmup_steps(self, value):
            pass

    said = []

    def gathered(trainer, value):
        said.append(value)
        return [value, None]

    monkeypatch.setattr(_same_settings.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(_distributed, "gather", gathered)
    trainer = TwoProcesses()
    trainer.callbacks = [Broken(3)]
    with pytest.raises(RuntimeError, match="not there"):
        trainer.callbacks[0].setup(trainer, nn.Module(), "fit")
    assert said == ["read from a file that is not there"]  # the others have been told
    monkeypatch.setattr(_distributed, "gather", lambda trainer, value: ["not there", value])
    trainer.callbacks = [lp.RehabSchedule(3)]
    with pytest.raises(PrehabError, match="Rank 0 failed: not there"):
        trainer.callbacks[0].setup(trainer, nn.Module(), "fit")
