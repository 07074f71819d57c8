"""The settings of a refinement."""

import copy

import pytest
import torch
import yaml
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError
from lightning_prehab.refinement.course import MEASUREMENTS, Course
from lightning_prehab.refinement.settings import Refinement


@pytest.mark.parametrize(
    "wish", [Refinement(), Refinement(12, scope="blocks", lr=1e-4, rows=2, checkpointing=True, measure="squared")]
)
def test_there_and_back_as_yaml(wish):
    assert Refinement.from_dict(yaml.safe_load(yaml.safe_dump(wish.to_dict()))) == wish


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0),
        ("steps", True),
        ("lr", float("nan")),
        ("lr", 0.0),
        ("lr", "fast"),
        ("rows", 0),
        ("held_back", 1.0),
        ("scope", "layers"),
        ("measure", "loss"),
        ("precision", "fp8"),
        ("checkpointing", "auto"),
        ("patience", 0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_what_is_out_of_range_is_named(setting, value):
    with pytest.raises(ArgumentError, match=setting):
        Refinement(**{setting: value})


def test_from_a_dictionary_with_another_key():
    with pytest.raises(ArgumentError, match="step"):
        Refinement.from_dict({"step": 3})


def test_the_rate_of_the_model_goes_with_what_the_cut_has_cost(monkeypatch):
    """Of predictions, in nats; a rate that is given, blocks, and other measures stay as they are."""
    rates = []
    usual = torch.optim.AdamW

    def noted(parameters, lr, **settings):
        rates.append(lr)
        return usual(parameters, lr=lr, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", noted)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 6))
    batches = [torch.randn(32, 12) for _ in range(4)]
    for measure, given in (("divergence", None), ("squared", None), ("divergence", 3e-4)):
        model = copy.deepcopy(dense)
        lp.compress_(model, 0.4, batches)
        found = lp.refine_(model, dense, batches, lp.Refinement(2, lr=given, measure=measure, scope="model"))
        share = min(max(found.before ** (2 / 3), 0.1), 1.0) if measure == "divergence" else 1.0
        assert rates.pop() == pytest.approx(given or 2e-4 * share)
        assert 0 < found.before < 1


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 15, 20, 128])
def test_a_course_measures_at_most_eight_times_and_the_usual_patience_waits_for_all_of_them(steps):
    weight = nn.Parameter(torch.zeros(()))
    measured = iter(range(1000))  # worse and worse
    course = Course([weight], steps, 1e-3, Refinement().patience)
    found = course.run(range(steps), lambda _: weight.square(), lambda: float(next(measured)), phase=None)
    assert (found.steps, found.kept) == (steps, False)
    assert next(measured) <= 1 + MEASUREMENTS
