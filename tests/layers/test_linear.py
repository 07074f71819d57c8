import copy

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prehab as lp

LAYOUTS = pytest.mark.parametrize("made", [lp.LowRankLinear, lp.PivotLinear])


def sparse_layer(dtype=torch.float64, bias=True, nonzeros=9):
    """With factors and entries that are not zero."""
    linear = nn.Linear(12, 7, bias=bias, dtype=dtype)
    factors = lp.LowRankPlusSparse(nonzeros / 84, lp.SVD())(linear.weight, 3)
    return lp.LowRankPlusSparseLinear.from_factors(factors.A, factors.B, linear, factors.sparse), linear, factors


@LAYOUTS
def test_forward_is_the_dense_product(made):
    layer = made.from_linear(nn.Linear(12, 7, dtype=torch.float64), 3)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    if made is lp.PivotLinear:
        product = torch.cat([layer.D.weight, layer.C.weight @ layer.D.weight])[layer.order]
    else:
        product = layer.B.weight @ layer.A.weight
    expected = x @ product.mT + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), expected)


def test_parameters_stand_in_the_order_of_a_fresh_optimizer():
    assert [name for name, _ in lp.LowRankLinear(4, 4, 2).named_parameters()] == ["A.weight", "B.weight", "B.bias"]
    assert [name for name, _ in lp.LowRankLinear(4, 4, 2, bias=False).named_parameters()] == ["A.weight", "B.weight"]


def test_parameters_of_pivot_rows_are_as_many_as_it_says():
    for m, n, rank in [(7, 12, 3), (12, 7, 7), (5, 5, 1), (64, 48, 30)]:
        layer = lp.PivotLinear(n, m, rank)
        assert [name for name, _ in layer.named_parameters()] == ["bias", "D.weight", "C.weight"]
        assert sum(p.numel() for p in layer.parameters()) == rank * (m + n - rank) + m
        assert layer.order.dtype == torch.int64
        assert layer.count_dense() == m * n + m


@pytest.mark.parametrize("seed", range(0, 200, 25))
def test_pivot_rows_are_the_truncated_svd_in_float32(seed):
    generator = torch.Generator().manual_seed(seed)
    for number in range(seed, seed + 25):
        m, n = torch.randint(1, 65, (2,), generator=generator).tolist()
        top = min(m, n)
        rank = {0: top, 1: 1}.get(number % 4, int(torch.randint(1, top + 1, (), generator=generator)))
        linear = nn.Linear(n, m, bias=False)
        with torch.no_grad():
            linear.weight.normal_(generator=generator)
        u, s, vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        expected = u[:, :rank] * s[:rank] @ vh[:rank]
        found = lp.PivotLinear.from_linear(linear, rank).weight.detach().double()
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_weight_and_bias_are_read_only():
    layer = lp.LowRankLinear(4, 3, 2)
    for name in ("weight", "bias"):
        with pytest.raises((AttributeError, KeyError)):
            setattr(layer, name, nn.Parameter(torch.zeros(3, 4)))
    assert lp.LowRankLinear(4, 3, 2, bias=False).bias is None


@LAYOUTS
def test_weight_is_differentiable(made):
    layer = made(4, 3, 2)
    layer.weight.square().sum().backward()
    for part in layer.children():
        assert part.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@LAYOUTS
def test_from_linear_is_the_truncated_svd(bias, dtype, made):
    linear = nn.Linear(9, 6, bias=bias, dtype=dtype)
    low = made.from_linear(linear, 2)
    s = np.linalg.svd(linear.weight.detach().double().numpy(), compute_uv=False)
    error = (linear.weight - low.weight).detach().double().norm().item()
    assert error == pytest.approx(np.sqrt((s[2:] ** 2).sum()), rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert all(part.weight.dtype == dtype for part in low.children())
    assert low.bias is linear.bias


@LAYOUTS
def test_from_linear_at_full_rank_and_back(made):
    linear = nn.Linear(9, 6)
    dense = made.from_linear(linear, 6).to_linear()
    assert type(dense) is nn.Linear
    x = torch.randn(4, 9)
    torch.testing.assert_close(dense(x), linear(x), atol=1e-5, rtol=1e-5)
    assert dense.bias is not linear.bias


@pytest.mark.parametrize("rank", [0, 4, -2])
@LAYOUTS
def test_rank_out_of_range(rank, made):
    with pytest.raises(lp.PrehabError, match=rf"rank must lie in \[1, 3\].*got {rank}"):
        made(5, 3, rank)


@LAYOUTS
def test_state_dict_deepcopy_half_and_meta(made):
    layer = made.from_linear(nn.Linear(8, 6), 3)
    clone = copy.deepcopy(layer)
    torch.testing.assert_close(clone.weight, layer.weight)
    fresh = made(8, 6, 3)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh.weight, layer.weight)
    assert layer.half().weight.dtype == torch.float16
    assert made(8, 6, 3, device="meta").weight.device.type == "meta"


@LAYOUTS
def test_from_factors_keeps_flags_and_the_global_random_state(made):
    linear = nn.Linear(8, 6).eval()
    linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    low = made.from_linear(linear, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not low.training
    assert not any(part.weight.requires_grad for part in low.children())
    assert low.bias.requires_grad
    assert not low.to_dense().weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
@LAYOUTS
def test_inside_multihead_attention(training, made):
    attention = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    x = torch.randn(2, 5, 16)
    expected = attention(x, x, x)[0]
    attention.out_proj = made.from_linear(attention.out_proj, 16)
    torch.testing.assert_close(attention(x, x, x)[0], expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, x, x)[0], expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@LAYOUTS
def test_inside_transformer_encoder_layer(training, grad, made):
    encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(grad):  # without gradients, eval takes the fast path, which reads linear1.weight
        expected = encoder(x)
        encoder.linear1 = made.from_linear(encoder.linear1, 16)
        encoder.linear2 = made.from_linear(encoder.linear2, 16)
        torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=1e-5)


class TestLowRankPlusSparse:
    @pytest.mark.parametrize("bias", [True, False])
    def test_forward_is_the_dense_reconstruction(self, bias):
        layer, linear, factors = sparse_layer(bias=bias)
        dense = layer.B.weight @ layer.A.weight
        for place, value in zip(layer.indices.tolist(), layer.values, strict=True):
            dense[place // 12, place % 12] += value
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, linear.bias))
        torch.testing.assert_close(layer.weight, dense)
        torch.testing.assert_close(layer.weight, factors.product())
        torch.testing.assert_close(layer.to_linear()(x), layer(x))
        assert type(layer.to_linear()) is nn.Linear
        assert layer.bias is linear.bias

    def test_gradients_reach_the_values(self):
        layer, _, _ = sparse_layer()
        x = torch.randn(4, 12, dtype=torch.float64)

        def run(a, b, values):
            parameters = {"A.weight": a, "B.weight": b, "values": values}
            return torch.func.functional_call(layer, parameters, x)

        parts = [part.detach().requires_grad_() for part in (layer.A.weight, layer.B.weight, layer.values)]
        assert torch.autograd.gradcheck(run, parts)
        layer(x).square().sum().backward()
        dense = layer.to_linear()
        dense(x).square().sum().backward()
        torch.testing.assert_close(layer.values.grad, dense.weight.grad.flatten()[layer.indices])

    def test_parameters_counts_and_repr(self):
        layer = lp.LowRankPlusSparseLinear(12, 7, 3, 9)
        assert [name for name, _ in layer.named_parameters()] == ["values", "A.weight", "B.weight", "B.bias"]
        assert [name for name, _ in layer.named_buffers()] == ["indices"]
        assert sum(p.numel() for p in layer.parameters()) == 3 * 19 + 7 + 9
        assert layer.indices.dtype == torch.int32
        assert layer.indices.unique().numel() == layer.nonzeros == 9
        assert "in_features=12, out_features=7, rank=3, nonzeros=9" in repr(layer)
        huge = lp.LowRankPlusSparseLinear(2**16, 2**15, 1, 4, device="meta")
        assert huge.indices.dtype == torch.int64
        for nonzeros in (-1, 85):
            with pytest.raises(lp.PrehabError, match=rf"nonzeros must lie in \[0, 84\].*got {nonzeros}"):
                lp.LowRankPlusSparseLinear(12, 7, 3, nonzeros)
        empty = lp.LowRankPlusSparseLinear.from_linear(nn.Linear(12, 7), 3)
        assert empty.nonzeros == 0
        torch.testing.assert_close(empty.weight, empty.B.weight @ empty.A.weight)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_low_precision_and_autocast(self, dtype):
        layer, linear, _ = sparse_layer(dtype=dtype)
        x = torch.randn(5, 12, dtype=dtype)
        assert layer.values.dtype == layer(x).dtype == dtype
        assert layer.indices.dtype == torch.int32
        dense = nn.functional.linear(x.double(), layer.weight.double(), linear.bias.double())
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(layer(x).double(), dense, atol=tolerance, rtol=tolerance)
        layer(x).float().sum().backward()
        assert layer.values.grad.dtype == dtype
        if dtype == torch.float32:
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.double(), dense, atol=5e-2, rtol=5e-2)

    def test_compiles_without_a_break(self):
        layer, _, _ = sparse_layer(torch.float32)
        x = torch.randn(5, 12)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x).sum().backward()
        assert layer.values.grad.abs().sum() > 0

    def test_state_dict_deepcopy_and_flags(self):
        layer, _, _ = sparse_layer(torch.float32)
        fresh = lp.LowRankPlusSparseLinear(12, 7, 3, 9)
        fresh.load_state_dict(layer.state_dict())
        for other in (copy.deepcopy(layer), fresh):
            torch.testing.assert_close(other.state_dict(), layer.state_dict(), atol=0, rtol=0)
            torch.testing.assert_close(other.weight, layer.weight)
        linear = nn.Linear(12, 7).eval()
        linear.weight.requires_grad_(False)
        state = torch.get_rng_state()
        low = lp.LowRankPlusSparseLinear.from_factors(
            layer.A.weight, layer.B.weight, linear, (layer.indices, layer.values)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert not low.training
        assert not low.values.requires_grad
        assert low.values.data_ptr() != layer.values.data_ptr()


@LAYOUTS
def test_meta_and_back_by_assignment(made):
    layer = made.from_linear(nn.Linear(8, 6), 3)
    moved = copy.deepcopy(layer).to(device="meta")
    moved.load_state_dict(layer.state_dict(), assign=True)
    torch.testing.assert_close(moved.state_dict(), layer.state_dict(), atol=0, rtol=0)
    x = torch.randn(2, 8)
    torch.testing.assert_close(moved(x), layer(x))


@LAYOUTS
def test_flops_are_those_of_the_parts(made):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        made(16, 12, 3)(torch.randn(5, 16))
    assert counter.get_total_flops() == 2 * 5 * 3 * (16 + 12 - (3 if made is lp.PivotLinear else 0))


@LAYOUTS
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_multiplies_in_half_precision(made, bias):
    layer = made(8, 6, 3, bias)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(y.float(), layer(x), atol=5e-2, rtol=5e-2)


@LAYOUTS
def test_parameters_to_vector_and_back(made):
    layer, other = made(8, 6, 3), made(8, 6, 3)
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector, other.parameters())  # views into the vector, at any address
    torch.testing.assert_close(other.state_dict(), layer.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(other.weight, layer.weight)


@LAYOUTS
def test_gradient_checkpointing_gives_the_same_gradients(made):
    from torch.utils.checkpoint import checkpoint

    layer = made(8, 6, 3)
    x = torch.randn(2, 8)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected)


@LAYOUTS
def test_compiles_without_a_graph_break(made):
    layer = made.from_linear(nn.Linear(8, 6), 3)
    x = torch.randn(2, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_factors_of_rank_one_have_the_usual_strides():
    """DDP compares the strides of parameters between processes; a column of a matrix has others."""
    u, vh = torch.randn(6, 6), torch.randn(8, 8)
    layer = lp.LowRankLinear.from_factors(vh.mT[:, :1].mT, u[:, :1], nn.Linear(8, 6))
    assert layer.A.weight.stride() == (8, 1)
    assert layer.B.weight.stride() == (1, 1)
    assert torch.equal(layer.B.weight, u[:, :1])
