"""Settings of the wrong type or out of range: one sentence with the name and the value, when the object is made."""

import inspect
import math
import types
import typing

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, PlanError, TargetError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.regularizers import Penalty, Shrinkage

#: What has no default.
REQUIRED = {"epoch": 1, "keep": 0.5, "energy": 0.9, "density": 0.1}


def all_kinds():
    """What people make with settings: callbacks, the recipe, and everything on the shelves."""
    public = [getattr(lp, name) for name in lp.__all__]
    shelves = (Factorization, RankPolicy, Penalty, Shrinkage)
    callbacks = (lp.CompressionCallback, lp.PrehabCallback, lp.RehabSchedule, lp.FactorTraining)
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


def model():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def batches():
    return [torch.randn(40, 16) for _ in range(2)]


def used_up():
    found = iter(batches())
    list(found)
    return found


def cut(**wrong):
    return lp.compress_(**{"model": model(), "keep": 0.5, "batches": batches(), **wrong})


#: What people write, and what they are told.
WRONG = {
    "percent": (lambda: cut(keep=60), "must lie in (0, 1], got 60. For 60 % write 0.6."),
    "text": (lambda: cut(keep="0.5"), "got '0.5'. Give a Python number."),
    "a policy for keep": (lambda: cut(keep=lp.RankRatio(0.5)), "A policy is given by its name: policy=..."),
    "batches for keep": (lambda: cut(keep=batches()), "Batches come after it: compress_(model, 0.5, batches)."),
    "one batch": (lambda: cut(batches={"x": torch.ones(2, 16)}), "batches is one mapping; give an iterable"),
    "one tensor": (lambda: cut(batches=torch.ones(2, 16)), "batches is one tensor; give an iterable"),
    "a function": (lambda: cut(batches=batches), "batches must be a list, a DataLoader or another iterable"),
    "a number of batches": (lambda: cut(batches=5), "batches must be a list, a DataLoader or another iterable"),
    "a path of batches": (lambda: cut(batches="data.txt"), "batches must be a list, a DataLoader or another iterable"),
    "no batches": (lambda: cut(batches=[]), "needs at least one batch"),
    "used up": (lambda: cut(batches=used_up()), "A generator can be gone through once only"),
    "a criterion": (lambda: cut(loss=nn.MSELoss()), "lambda model, batch: criterion(model(batch[0]), batch[1])"),
    "a loss by name": (lambda: cut(loss="mse"), "The loss must be a function (model, batch) -> scalar, got 'mse'"),
    "a loss without a graph": (lambda: cut(loss=lambda m, b: m(b).mean().detach()), "The loss has no gradient"),
    "a class": (lambda: cut(factorization=lp.SVD), "; write SVD(...)"),
    "a name": (lambda: cut(factorization="whitened_svd"), "got 'whitened_svd'; write WhitenedSVD(...)"),
    "an unknown name": (lambda: cut(policy="best"), "got 'best'; give an object of one of "),  # and of yours
    "one optimizer": (
        lambda: cut(optimizers=torch.optim.SGD(model().parameters())),
        "optimizers is one optimizer; give a list",
    ),
    "a path": (lambda: cut(model="model.pt"), "The model must be an nn.Module, got 'model.pt'; build or load"),
    "a state dict": (lambda: cut(model=model().state_dict()), "The model must be an nn.Module, got OrderedDict"),
    "a class of models": (lambda: cut(model=nn.Linear), "make one first: Linear(...)"),
    "no targets": (lambda: cut(target_modules="blocks.*.fc"), "matches no layer. There are 2: 0, 2."),
    "a model for targets": (lambda: lp.make_plan(model(), 0.5), "write make_plan(find_targets(model), ...)"),
    "a path for a plan": (lambda: lp.apply_plan_(model(), "plan.yaml"), "CompressionPlan.from_yaml(path) reads one"),
    "a strength first": (lambda: lp.PrehabCallback(0.1), "a strength comes second: PrehabCallback(StableRank(), 0.1)"),
    "a regularizer by name": (lambda: lp.PrehabCallback("stable_rank"), "write StableRank()"),
    "a negative epoch": (lambda: lp.CompressionCallback(-1), "epoch is a whole number that counts from 0, or 'auto'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_people_write_and_are_told(what):
    wrong, text = WRONG[what]
    with pytest.raises(lp.PrehabError) as caught:
        wrong()
    assert text in str(caught.value)
    assert len(str(caught.value)) < 420


@pytest.mark.parametrize("whole", [True, False])
def test_a_second_cut(whole):
    """Deeper than the first, or refused; another one by way of the dense layers."""
    net = model()
    lp.compress_(net, 0.6, batches(), target_modules=None if whole else ["0"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(TargetError, match=r"is compressed already \(low-rank layers: .*to_dense_\(model\) first"):
        lp.compress_(net, 0.9, batches())
    with pytest.raises(TargetError, match=r"is compressed already \(low-rank layers: 1, the first '0'\)"):
        lp.compress_(net, 0.6, batches(), target_modules=["0"])
    if whole:
        with pytest.raises(TargetError, match="cut_again=True takes low-rank layers too, for a deeper cut"):
            lp.find_targets(net)
    with pytest.raises(TargetError, match="Layer '0' .LowRankLinear. cannot be cut: it is low-rank already; to_dense_"):
        lp.find_targets(net, ["0"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    if not whole:
        assert "low-rank already" in lp.make_plan(lp.find_targets(net), lp.RankRatio(0.5), lp.SVD()).skipped["0"]
        assert lp.compress_(net, 0.5, batches(), target_modules=["2"]).ranks["2"] is not None
    assert lp.compress_(net, 0.2, batches()).keep <= 0.2
    lp.to_dense_(net)
    report = lp.compress_(net, 0.3, batches())
    assert report.keep <= 0.3
    assert isinstance(net[0], lp.LowRankLinear)


def test_a_plan_that_was_carried_out_says_what_it_has_found():
    net = model()
    plan = lp.make_plan(lp.find_targets(net), 0.5, lp.SVD())
    lp.apply_plan_(net, plan)
    with pytest.raises(PlanError, match=r"expects a 16x16 weight, the model has a LowRankLinear\(.*before any surgery"):
        lp.apply_plan_(net, plan)


def test_ranks_that_can_be_no_multiple_are_said_so():
    targets = lp.find_targets(model())  # break-even at 7 and 5
    plan = lp.make_plan(targets, lp.RankRatio(0.9), lp.SVD(), rank_multiple_of=6)
    assert [layer.reason for layer in plan.layers] == [None, "not a multiple of 6: ranks above 5 save nothing"]
    assert "not a multiple of 6: ranks above 5 save nothing: 2" in str(plan)
    assert lp.CompressionPlan.from_yaml(plan.to_yaml()) == plan
    assert plan.with_ranks({"2": "dense"}).layers[1].reason == "chosen by hand"
    by_hand = lp.make_plan(targets, lp.RankRatio(0.9), lp.SVD(), None, {"2": 3}, 6)
    assert by_hand.layers[1].reason is None
