import copy

import pytest
import torch
from torch import nn

from lightning_prehab.layers import LowRankConv2d, LowRankLinear, PivotLinear
from lightning_prehab.layers.pairs import factor_pairs
from lightning_prehab.surgery.rescaling import rebalance_
from lightning_prehab.surgery.wrapped import family

#: Optimizers whose step is the same for factors of any sizes, if moments follow and the rate is scaled as the factors.
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, eps=0.0, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=0.0, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=0.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, eps=0.0),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01, eps=0.0),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, lambd=0.0),
}
#: How a step of a factor that is multiplied by s must change, if the rate stays: SGD 1/s, those without a unit 1.
UNITS = {"SGD": -1, "ASGD": -1, "Adadelta": 1, "Rprop": 1}


def prepared(make, layer):
    """A layer that has been trained for some steps, its optimizer, and gradients for another one."""
    torch.manual_seed(0)
    with torch.no_grad():
        layer.A.weight.mul_(40.0)
    optimizer = make(list(layer.parameters()))
    for _ in range(3):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_that_of_the_old_factors_in_the_units_of_the_new_ones(name):
    layer = LowRankLinear(6, 5, 2)
    optimizer = prepared(OPTIMIZERS[name], layer)
    twin = copy.deepcopy(layer)
    twin_optimizer = OPTIMIZERS[name](list(twin.parameters()))
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, other in zip(layer.parameters(), twin.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    pair, product = factor_pairs(layer)[0], layer.weight.detach().clone()
    scales = pair.even_scales()
    assert rebalance_(pair, family(optimizer))
    assert torch.equal(layer.weight, product)
    start, twin_start = (copy.deepcopy(list(one.parameters())) for one in (layer, twin))
    optimizer.step()
    twin_optimizer.step()
    for place, scale in enumerate(scales):
        moved = list(layer.parameters())[place] - start[place]
        expected = list(twin.parameters())[place] - twin_start[place]
        torch.testing.assert_close(moved, expected * scale ** UNITS.get(name, 0), rtol=1e-4, atol=1e-6)


def test_groups_of_a_convolution_and_pending_gradients():
    layer = LowRankConv2d(6, 8, 3, 2, groups=2)
    prepared(OPTIMIZERS["SGD"], layer)
    kernel = layer.weight.detach().clone()
    pair = factor_pairs(layer)[0]
    before = [parameter.grad * parameter.detach() for parameter in pair.both]  # which no scale changes
    assert rebalance_(pair, [])
    assert torch.equal(layer.weight, kernel)
    for parameter, expected in zip(pair.both, before, strict=True):
        assert torch.equal(parameter.grad * parameter, expected)


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.Adafactor(p, lr=0.01), lambda p: Listed(p, lr=0.01)],
    ids=["Adafactor", "unknown"],
)
def test_a_state_of_unknown_meaning_leaves_everything_as_it_is(make):
    layer = LowRankLinear(6, 5, 2)
    optimizer = prepared(make, layer)
    before = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    assert not rebalance_(factor_pairs(layer)[0], family(optimizer))
    torch.testing.assert_close((layer.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)


class Listed(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["past"] = [parameter.grad.clone()]
        return super().step(closure)


def test_the_pivot_layout_is_not_scalable():
    assert not factor_pairs(nn.Sequential(PivotLinear(6, 5, 2)))[0].scalable
