import pytest
import torch
from torch import nn

from lightning_prehab.layers import LowRankLinear, LowRankPlusSparseLinear, PivotLayer
from lightning_prehab.layers.pairs import factor_pairs, factors_in
from tests.layers.every_layer import Case, every_case, name_of


def dense_product(pair):
    """The matrix of a pair, differentiable, by the layer's own property: the independent road."""
    layer = pair.layer
    shown = layer.weight.clone()
    if isinstance(layer, LowRankPlusSparseLinear):
        shown = shown - layer._sparse_matrix().detach()
    return shown


@pytest.mark.parametrize(("kind", "number"), every_case(), ids=name_of)
def test_size_gradients_are_those_of_autograd_for_every_layer(kind, number):
    pairs = factor_pairs(nn.ModuleDict({"layer": Case(kind, number).layer}))
    assert pairs
    assert all(pair.name.startswith("layer") for pair in pairs)
    for pair in pairs:
        expected = torch.autograd.grad(0.5 * dense_product(pair).square().sum(), pair.both)
        for ours, theirs in zip(pair.size_gradients(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "number"), every_case(), ids=name_of)
def test_even_scales_change_no_bit_of_the_product_of_any_layer(kind, number):
    for pair in factor_pairs(Case(kind, number).layer):
        assert pair.scalable is not isinstance(pair.layer, PivotLayer)
        if not pair.scalable:
            continue
        with torch.no_grad():
            pair.A.mul_(23.0)
            before = dense_product(pair)
            scales = pair.even_scales()
            for parameter, scale in zip(pair.both, scales, strict=True):
                parameter.mul_(scale)
            assert torch.equal(dense_product(pair), before)
            assert pair.even_scales() is None
            a, b = pair._matrices()
            ratio = a.norm(dim=-1) / b.norm(dim=-2)
        assert 0.5 <= float(ratio.min()) <= float(ratio.max()) <= 2.0


def test_what_is_no_ordinary_parameter_is_left_out():
    model = nn.ModuleList(LowRankLinear(6, 5, 2) for _ in range(4))
    nn.utils.parametrizations.weight_norm(model[0].A)
    model[1].B = nn.Sequential(model[1].B)
    del model[2].A.weight
    assert [pair.name for pair in factor_pairs(model)] == ["3"]
    sparse = LowRankPlusSparseLinear(6, 5, 2, 3)
    assert [id(one) for one in factors_in(factor_pairs(sparse))] == [
        id(sparse.A.weight),
        id(sparse.B.weight),
        id(sparse.values),
    ]


def test_zero_factors_have_nothing_to_share_out():
    layer = LowRankLinear(6, 5, 2)
    nn.init.zeros_(layer.B.weight)
    assert factor_pairs(layer)[0].even_scales() is None


def test_half_precision_is_summed_in_float32():
    layer = LowRankLinear(600, 500, 2, dtype=torch.float16)
    nn.init.constant_(layer.A.weight, 20.0)  # |A|^2 is beyond the largest number of float16
    pair = factor_pairs(layer)[0]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in pair.size_gradients())
