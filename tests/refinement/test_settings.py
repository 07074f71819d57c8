"""The settings of a refinement."""

import pytest
import yaml

from lightning_prehab.errors import ArgumentError
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
    ],
)
def test_what_is_out_of_range_is_named(setting, value):
    with pytest.raises(ArgumentError, match=setting):
        Refinement(**{setting: value})


def test_from_a_dictionary_with_another_key():
    with pytest.raises(ArgumentError, match="step"):
        Refinement.from_dict({"step": 3})
