"""Every language model of the zoo writes with its cache what it writes without."""

import pytest
import torch
from architectures import ARCHITECTURES

import lightning_prehab as lp
from tests.integrations.test_own_samples import Tokenizer, by_hand, ids

pytestmark = pytest.mark.slow
WRITERS = [one for one in ARCHITECTURES if one.family in ("text decoder", "mixture of experts")]


@pytest.mark.parametrize("architecture", WRITERS, ids=lambda one: one.id)
def test_own_samples(architecture):
    model = architecture.build()
    found = ids(lp.own_samples(model, Tokenizer(), 2, 6, dtype=torch.float32, progress=False))
    assert torch.equal(found, by_hand(model, 2, 6, [1]))


def test_there_are_many():
    assert len(WRITERS) > 20
