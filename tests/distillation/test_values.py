from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from lightning_prehab.distillation.values import all_tensors, with_tensors

ONE, TWO = torch.ones(2), torch.zeros(3)


class Named(NamedTuple):
    one: torch.Tensor
    other: object


@dataclass
class Data:
    one: torch.Tensor
    other: object = None


@pytest.mark.parametrize(
    "value",
    [
        [ONE, TWO],
        (ONE, "text", {"deep": [TWO]}),
        {"one": ONE, "two": TWO, "number": 3},
        Named(ONE, TWO),
        Data(ONE, {"two": TWO}),
        BaseModelOutput(last_hidden_state=ONE, hidden_states=(TWO,)),
        [SimpleNamespace(logits=ONE, state=3), TWO],
    ],
    ids=lambda value: type(value).__name__,
)
def test_tensors_are_found_and_changed_in_a_copy(value):
    found = list(all_tensors(value))
    assert len(found) == 2
    assert found[0] is ONE
    assert found[1] is TWO
    made = with_tensors(value, lambda one: one + 1 if one is TWO else one)
    assert type(made) is type(value)
    first, second = all_tensors(made)
    assert first is ONE
    torch.testing.assert_close(second, TWO + 1)
    assert list(all_tensors(value))[1] is TWO
    assert with_tensors(value, lambda one: one) is value


def test_of_outputs_of_transformers_the_attributes_follow():
    made = with_tensors(BaseModelOutput(last_hidden_state=ONE), lambda one: one + 1)
    torch.testing.assert_close(made.last_hidden_state, ONE + 1)
    assert made[0] is made.last_hidden_state
