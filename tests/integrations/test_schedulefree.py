"""Schedule-free optimizers: two iterates take turns in the place of the weight, and all parameters share a counter."""

import inspect

import pytest
import torch

import lightning_prehab as lp
from tests.taught import Training

schedulefree = pytest.importorskip("schedulefree")
#: Those with a closure evaluate the model themselves, at another place.
KINDS = {name: kind for name, kind in vars(schedulefree).items() if inspect.isclass(kind) and "Closure" not in name}


def taught(name, **settings):
    def make(model):
        if "Wrapper" in name:
            optimizer = KINDS[name](torch.optim.SGD(model.parameters(), lr=0.1), momentum=0.9)
        else:
            optimizer = KINDS[name](model.parameters(), lr=1e-2)
        optimizer.train()
        return optimizer

    return Training(make, **settings)


@pytest.mark.parametrize("bias", [True, False], ids=["", "a new bias"])
@pytest.mark.parametrize("name", KINDS)
def test_steps_stay_small_over_a_cut(name, bias):
    """A second moment that starts at zero while the counter goes on makes the first steps 26 times too large."""
    training = taught(name, bias=bias)
    training.walk(200)
    before, of_matrices = training.steps(20)
    training.cut(lp.WhitenedSVD(centered=True))
    training.parameters_keep_to_themselves()
    after, of_products = training.steps(20)
    assert max(after) < 3 * max(before)
    for matrix, product in zip(of_matrices, of_products, strict=True):
        assert matrix / 10 < product < 5 * matrix


@pytest.mark.parametrize("evaluating", [False, True], ids=["train", "eval"])
def test_both_iterates_start_at_the_cut(evaluating):
    training = taught("AdamWScheduleFree")
    training.walk(50)
    if evaluating:
        training.optimizer.eval()
    training.cut()
    factors = [p for module in (training.model[0], training.model[2]) for p in (module.A.weight, module.B.weight)]
    at_the_cut = [factor.detach().clone() for factor in factors]
    for factor, value in zip(factors, at_the_cut, strict=True):
        assert torch.equal(training.optimizer.state[factor]["z"], value)
    training.optimizer.train() if evaluating else training.optimizer.eval()
    for factor, value in zip(factors, at_the_cut, strict=True):
        torch.testing.assert_close(factor.detach(), value)
