"""Every way in gives what it gave before."""

import pytest
import torch

from tests.before_the_house import comparison
from tests.before_the_house.comparison import (
    assert_same_data,
    assert_same_weights,
    cuts,
    expected,
    in_shares,
    multiplied,
    ranks,
)
from tests.before_the_house.make import ENTRIES, METHODS, MODELS, build, machine

MOMENTS = {"compress": ["surgery"], "callback": ["surgery", "end"], "command line": ["surgery"]}


@pytest.mark.parametrize("entry", MOMENTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_plans_and_weights(model, method, entry, tmp_path):
    stored = expected()["results"][model][method][entry]
    found = ENTRIES[entry](model, method, tmp_path)
    assert found.keys() == stored.keys() == {"plan", "states"}
    assert_same_data(in_shares(found["plan"]), in_shares(stored["plan"]))
    assert list(found["states"]) == list(stored["states"]) == MOMENTS[entry]
    for moment, state in stored["states"].items():
        assert_same_weights(found["states"][moment], state)


@pytest.mark.parametrize("model", MODELS)
def test_the_record_is_whole(model):
    assert expected().keys() == {"machine", "results", "run", "planned"}
    assert expected()["machine"].keys() == machine().keys() == {"torch", "capability", "processor", "features", "cache"}
    results = expected()["results"]
    assert list(results) == list(MODELS) == ["mlp", "conv", "transformer"]
    assert list(results[model]) == list(METHODS) == ["default", "whitened", "svd"]
    for result in results[model].values():
        assert list(result) == list(ENTRIES) == list(MOMENTS)
        for stored in result.values():
            assert len(ranks(stored["plan"])) >= 2
            assert all(cuts(state) == ranks(stored["plan"]) for state in stored["states"].values())
    for entry in ENTRIES:
        plans = [ranks(results[model][method][entry]["plan"]) for method in METHODS]
        assert all(plans.count(plan) == 1 for plan in plans)
    surgery, end = results[model]["default"]["callback"]["states"].values()
    assert all(not torch.equal(surgery[name], end[name]) for name in end)


def test_products_stand_in_the_place_of_the_weights():
    for model, methods in expected()["results"].items():
        for result in methods.values():
            dense = build(model).state_dict()
            products = multiplied(result["compress"]["states"]["surgery"])
            for name, rank in ranks(result["compress"]["plan"]).items():
                inside = dense.get(f"{name}.weight", dense.get(f"{name.rpartition('.')[0]}.in_proj_weight"))
                size = inside.numel() // (1 if f"{name}.weight" in dense else 3)
                assert products[name].numel() == size
                assert torch.linalg.matrix_rank(products[name].flatten(1)) >= rank


def test_weights_are_compared_on_any_machine(monkeypatch):
    stored = expected()["results"]["conv"]["svd"]["callback"]["states"]["end"]
    sides = [f"{name}.{side}.weight" for name in cuts(stored) for side in "AB"]
    turned = {name: -value if name in sides else value for name, value in stored.items()}  # other factors, same product
    for same in (True, False):
        monkeypatch.setattr(comparison, "same_machine", lambda same=same: same)
        assert_same_weights(stored, stored)
        for name, value in stored.items():
            with pytest.raises(AssertionError):
                assert_same_weights({**stored, name: value + 1e-3}, stored)
            with pytest.raises(AssertionError):
                assert_same_weights({key: stored[key] for key in stored if key != name}, stored)
    assert_same_weights(turned, stored)
    monkeypatch.setattr(comparison, "same_machine", lambda: True)
    with pytest.raises(AssertionError):
        assert_same_weights(turned, stored)


def test_plans_are_compared():
    stored = expected()["results"]["conv"]["default"]["callback"]["plan"]
    assert_same_data({**stored}, stored)
    first, *others = stored["layers"]
    for changed in ({"rank": 1}, {"form": "other"}, {"predicted": {**first["predicted"], "relative_error": 0.01}}):
        with pytest.raises(AssertionError):
            assert_same_data({**stored, "layers": [{**first, **changed}, *others]}, stored)
    for layers in (others, [], [*stored["layers"], first]):
        with pytest.raises(AssertionError):
            assert_same_data({**stored, "layers": layers}, stored)
    assert_same_data({**stored, "new": 1}, stored, more=True)
    with pytest.raises(AssertionError):
        assert_same_data({**stored, "new": 1}, stored)
