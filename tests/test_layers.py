import copy

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prehab as lp


def test_forward_is_the_dense_product():
    layer = lp.LowRankLinear(12, 7, rank=3, dtype=torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = x @ (layer.B.weight @ layer.A.weight).mT + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), expected)


def test_parameters_stand_in_the_order_of_a_fresh_optimizer():
    assert [name for name, _ in lp.LowRankLinear(4, 4, 2).named_parameters()] == ["A.weight", "B.weight", "B.bias"]
    assert [name for name, _ in lp.LowRankLinear(4, 4, 2, bias=False).named_parameters()] == ["A.weight", "B.weight"]


def test_weight_and_bias_are_read_only():
    layer = lp.LowRankLinear(4, 3, 2)
    for name in ("weight", "bias"):
        with pytest.raises((AttributeError, KeyError)):
            setattr(layer, name, nn.Parameter(torch.zeros(3, 4)))
    assert lp.LowRankLinear(4, 3, 2, bias=False).bias is None


def test_weight_is_differentiable():
    layer = lp.LowRankLinear(4, 3, 2)
    layer.weight.square().sum().backward()
    assert layer.A.weight.grad.abs().sum() > 0
    assert layer.B.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_from_linear_is_the_truncated_svd(bias, dtype):
    linear = nn.Linear(9, 6, bias=bias, dtype=dtype)
    low = lp.LowRankLinear.from_linear(linear, 2)
    s = np.linalg.svd(linear.weight.detach().double().numpy(), compute_uv=False)
    error = (linear.weight - low.weight).detach().double().norm().item()
    assert error == pytest.approx(np.sqrt((s[2:] ** 2).sum()), rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert low.A.weight.dtype == dtype
    assert low.bias is linear.bias


def test_from_linear_at_full_rank_and_back():
    linear = nn.Linear(9, 6)
    dense = lp.LowRankLinear.from_linear(linear, 6).to_linear()
    assert type(dense) is nn.Linear
    x = torch.randn(4, 9)
    torch.testing.assert_close(dense(x), linear(x), atol=1e-5, rtol=1e-5)
    assert dense.bias is not linear.bias


@pytest.mark.parametrize("rank", [0, 4, -2])
def test_rank_out_of_range(rank):
    with pytest.raises(lp.PrehabError, match=rf"rank must lie in \[1, 3\].*got {rank}"):
        lp.LowRankLinear(5, 3, rank)


def test_state_dict_deepcopy_half_and_meta():
    layer = lp.LowRankLinear(8, 6, 3)
    clone = copy.deepcopy(layer)
    torch.testing.assert_close(clone.weight, layer.weight)
    fresh = lp.LowRankLinear(8, 6, 3)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh.weight, layer.weight)
    assert layer.half().weight.dtype == torch.float16
    assert lp.LowRankLinear(8, 6, 3, device="meta").weight.device.type == "meta"


def test_from_factors_keeps_flags_and_the_global_random_state():
    linear = nn.Linear(8, 6).eval()
    linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    low = lp.LowRankLinear.from_linear(linear, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not low.training
    assert not low.A.weight.requires_grad
    assert low.bias.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_inside_multihead_attention(training):
    attention = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    x = torch.randn(2, 5, 16)
    expected = attention(x, x, x)[0]
    attention.out_proj = lp.LowRankLinear.from_linear(attention.out_proj, 16)
    torch.testing.assert_close(attention(x, x, x)[0], expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, x, x)[0], expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_inside_transformer_encoder_layer(training, grad):
    encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(grad):  # without gradients, eval takes the fast path, which reads linear1.weight
        expected = encoder(x)
        encoder.linear1 = lp.LowRankLinear.from_linear(encoder.linear1, 16)
        encoder.linear2 = lp.LowRankLinear.from_linear(encoder.linear2, 16)
        torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=1e-5)
