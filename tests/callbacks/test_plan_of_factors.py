"""The plan that a resumed run carries out says how its stored factors are stored."""

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.callbacks._checkpoint import plan_of_factors
from lightning_prehab.linalg.factors import Factors


@pytest.mark.parametrize(("layout", "parameters"), [("factors", 3 * (8 + 12)), ("pivot", 3 * (8 + 12 - 3))])
def test_the_layout_and_the_count_are_those_of_the_factors(layout, parameters):
    factors = Factors(torch.randn(3, 12), torch.randn(8, 3))
    factors = factors.pivoted() if layout == "pivot" else factors
    (layer,) = plan_of_factors(nn.Sequential(nn.Linear(12, 8)), {"0": factors}, lp.SVD()).layers
    assert (layer.layout, layer.rank, layer.parameters) == (layout, 3, parameters)
