"""Settings of the wrong type or out of range: one sentence with the name and the value, when the object is made."""

import inspect
import math
import types
import typing

import pytest

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.regularizers import Penalty, Shrinkage

#: What has no default.
REQUIRED = {"epoch": 1, "keep": 0.5, "energy": 0.9, "density": 0.1}


def all_kinds():
    """What people make with settings: callbacks, the recipe, and everything on the shelves."""
    public = [getattr(lp, name) for name in lp.__all__]
    shelves = (Factorization, RankPolicy, Penalty, Shrinkage)
    callbacks = (lp.CompressionCallback, lp.PrehabCallback, lp.RehabSchedule)
    return [
        kind
        for kind in public
        if isinstance(kind, type) and (issubclass(kind, shelves + callbacks) or kind is lp.Recipe)
    ]


def types_of(hint):
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return {kind for part in typing.get_args(hint) for kind in types_of(part)} if union else {hint}


def numbers():
    """Every setting that is a number, with values that it cannot have."""
    for kind in all_kinds():
        hints = typing.get_type_hints(kind.__init__)
        for name in inspect.signature(kind).parameters:
            kinds = types_of(hints.get(name, str))
            wrong = []
            if kinds & {int, float}:
                wrong = ["3", [3], -1, math.nan]
                wrong += [2.5] if float not in kinds else []
                wrong += [None] if types.NoneType not in kinds else []
            for value in wrong:
                yield pytest.param(kind, name, value, id=f"{kind.__name__}-{name}-{value}")


def test_there_are_many():
    assert len(list(numbers())) > 200


@pytest.mark.parametrize(("kind", "name", "value"), list(numbers()))
def test_a_number_that_cannot_be_used_is_named(kind, name, value):
    needed = {
        one: REQUIRED[one]
        for one, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    with pytest.raises(ArgumentError) as caught:
        kind(**{**needed, name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
