"""How a model is called on a batch: pairs of inputs and labels."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError
from lightning_prehab.statistics.batches import (
    as_predicted,
    ask_model,
    call_model,
    has_decoder,
    is_labelled,
    padding_mask,
)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, x, other):
        self.seen = other
        return x


class Optional(Two):
    def forward(self, x, other=None):
        return super().forward(x, other)


class Any(Two):
    def forward(self, *inputs):
        return super().forward(*inputs)


X = torch.randn(4, 3)
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("batch", [[X, LABELS], (X, LABELS), (X, LABELS.to(torch.uint8)), ({"x": X}, LABELS)])
def test_labels_are_not_given_to_a_model_of_one_argument(batch):
    model = nn.Identity() if isinstance(batch[0], dict) else nn.Sequential(nn.Linear(3, 2))
    assert is_labelled(model, batch)
    output = call_model(model, batch)
    assert output is batch[0] if isinstance(batch[0], dict) else torch.allclose(output, model(X))


def test_a_mask_is_no_place_for_labels():
    class Masked(nn.Linear):
        def forward(self, x, attn_mask=None, is_causal=False):
            assert attn_mask is None
            return super().forward(x)

    call_model(Masked(3, 2), [X, LABELS])


@pytest.mark.parametrize("kind", [Two, Optional, Any])
def test_a_model_that_takes_two_is_given_two(kind):
    model = kind()
    assert not is_labelled(model, [X, LABELS])
    call_model(model, [X, LABELS])
    assert model.seen is LABELS


@pytest.mark.parametrize(
    "batch",
    [
        [X, LABELS.float()],
        [X, LABELS.bool()],
        [X, LABELS[:, None]],
        [X, LABELS[:3]],
        [X, LABELS.tolist()],
        [X, LABELS, LABELS],
        [X, X],
    ],
)
def test_what_may_be_something_else_is_refused_and_the_way_out_named(batch):
    with pytest.raises(ArgumentError, match=r"cannot be called on a batch of type list .*; give data"):
        ask_model(nn.Sequential(nn.Linear(3, 2)), batch)


def test_image_models_are_calibrated_with_labelled_batches():
    """The labels change nothing: those that serve are sampled from the model."""
    models = [nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    images = [torch.randn(40, 3) for _ in range(3)]
    pairs = [[x, torch.randint(4, (40,))] for x in images]
    reports = [lp.compress_(model, 0.6, batches) for model, batches in zip(models, (images, pairs), strict=True)]
    assert reports[0] == reports[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_decoder_has_a_mask_of_its_own():
    plain, translator = nn.Linear(2, 2), nn.Linear(2, 2)
    translator.config = SimpleNamespace(is_encoder_decoder=True)
    assert not has_decoder(plain)
    assert not has_decoder(None)
    assert has_decoder(translator)
    assert has_decoder(nn.Sequential(translator))
    read = torch.tensor([[1, 1, 0]])
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": read}
    labels, mask = torch.tensor([[5, -100, -100]]), torch.tensor([[1, 0, 1]])
    assert as_predicted(batch, decoded=False) is batch
    assert padding_mask(as_predicted(batch, decoded=True)) is None
    assert padding_mask(as_predicted(batch | {"labels": labels}, decoded=True)).tolist() == [[True, False, False]]
    both = batch | {"labels": labels, "decoder_attention_mask": mask}
    assert padding_mask(as_predicted(both, decoded=True)).tolist() == [[True, False, True]]
    assert padding_mask(both).tolist() == [[True, True, False]]  # the batch is as it was
    assert as_predicted([both], decoded=True) == [both]
