from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_prehab.distillation.comparison import Comparison


def kl(student, teacher, temperature):
    loss = nn.KLDivLoss(reduction="none", log_target=True)
    logs = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * loss(*logs).sum(-1)


def decided(batch, temperature=1.0, output=None, model=None):
    comparison = Comparison(temperature)
    comparison.decide(model, output, [batch])
    return comparison


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_value_and_gradient_are_those_of_torch(temperature, scale):
    answer, right = torch.randn(6, 5), torch.randn(6, 5)
    batch = [torch.randn(6, 3), torch.randint(5, (6,))]
    comparison = decided(batch, temperature, right)
    assert comparison.measure == "divergence"
    value, gradient = comparison.gradient(answer, right, [batch], scale)
    leaf = answer.clone().requires_grad_()
    expected = kl(leaf, right, temperature).mean()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(scale * expected, leaf)[0])


def test_other_answers_have_a_mean_squared_error():
    answer, right = torch.randn(6, 5), torch.randn(6, 5)
    batch = [torch.randn(6, 3), torch.randn(6, 5)]
    comparison = decided(batch, output=right)
    value, gradient = comparison.gradient(answer, right, [batch], 1.0)
    leaf = answer.clone().requires_grad_()
    expected = nn.functional.mse_loss(leaf, right)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


def text(shift):
    tokens = torch.randint(1, 7, (3, 6))
    labels = tokens.clone() if shift else torch.randint(0, 7, (3, 6))
    labels[:, :2] = -100
    labels[2, 3:] = -100
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_do_not_count(shift, masked):
    batch = text(shift)
    labels = batch["labels"]
    counted = labels != -100
    if shift:  # the label of a position stands at the next one
        counted = torch.cat([counted[:, 1:], torch.ones(3, 1, dtype=torch.bool)], 1)
    if masked:
        batch["attention_mask"] = torch.ones(3, 6, dtype=torch.long)
        batch["attention_mask"][1, 4:] = 0
        counted &= batch["attention_mask"].bool()
    answer, right = torch.randn(3, 6, 7), torch.randn(3, 6, 7)
    comparison = decided(batch, output=right)
    value, gradient = comparison.gradient(answer, right, [batch], 1.0)
    torch.testing.assert_close(value, kl(answer, right, 1.0)[counted].mean())
    assert (gradient[~counted] == 0).all()
    assert (gradient[counted] != 0).all()


def test_a_batch_in_which_nothing_counts_gives_zero():
    batch = text(False)
    batch["labels"].fill_(-100)
    answer, right = torch.randn(3, 6, 7), torch.randn(3, 6, 7)
    value, gradient = decided(batch, output=right).gradient(answer, right, [batch], 1.0)
    assert value == 0
    assert (gradient == 0).all()


def test_features_have_a_relative_error():
    answer, right = torch.randn(2, 6, 7), torch.randn(2, 6, 7)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    value = Comparison(relative=True).value(answer, right, [{"attention_mask": mask}])
    kept = mask.bool()
    torch.testing.assert_close(value, (answer - right)[kept].square().sum() / right[kept].square().sum())


def test_half_precision_does_not_round_small_gradients_away():
    answer, right = torch.zeros(4, 50_000, dtype=torch.float16), torch.zeros(4, 50_000, dtype=torch.float16)
    right[:, 0] = 8
    batch = [torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)]
    _, gradient = decided(batch, output=right).gradient(answer, right, [batch], 1024.0)
    assert (gradient != 0).all()


def test_what_a_decoder_predicts_has_the_mask_of_the_target():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(is_encoder_decoder=True)
    answer, right = torch.randn(3, 6, 7), torch.randn(3, 6, 7)
    labels = torch.randint(0, 7, (3, 6))
    labels[:, 4:] = -100
    batch = {"input_ids": torch.randint(1, 7, (3, 6)), "attention_mask": torch.eye(3, 6, dtype=torch.long)}
    batch["labels"] = labels
    comparison = decided(batch, output={"logits": right}, model=model)
    expected = kl(answer, right, 1.0)[labels != -100].mean()
    torch.testing.assert_close(comparison.value(answer, right, [batch]), expected)
