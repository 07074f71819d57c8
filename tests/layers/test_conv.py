import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.layers.conv import LowRankConv1d, LowRankConv2d, kernel_to_matrix, matrix_to_kernel
from tests.conv_reference import cases, convolve
from tests.same_model import assert_same_model

SCHEMES = ["channel", "spatial"]


def low_rank(conv, rank, scheme="channel"):
    return (LowRankConv1d if isinstance(conv, nn.Conv1d) else LowRankConv2d).from_conv(conv, rank, scheme)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_forward_is_the_convolution_with_the_product(case, data):
    conv, x = case.conv(), case.input()
    m, n = conv.out_channels // conv.groups, conv.weight[0].numel()
    low = low_rank(conv, data.draw(st.integers(1, min(m, n))))
    np.testing.assert_allclose(low(x).detach().flatten(2), convolve(conv, x, low.weight), atol=1e-10)
    assert low(x).shape == conv(x).shape
    torch.testing.assert_close(low(x[0]), low(x)[0])
    torch.testing.assert_close(low.to_dense()(x), low(x))
    assert repr(low.to_dense()) == repr(conv)
    assert low.bias is conv.bias
    fresh = type(low)(*case.channels, rank=low.rank, **case.settings, dtype=torch.float64)
    fresh.load_state_dict(low.state_dict())
    assert_same_model(fresh, low, x)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(dims=[2], groups=[1]), st.data())
def test_forward_of_the_spatial_scheme(case, data):
    conv, x = case.conv(), case.input()
    (m, n), (height, width) = conv.weight.shape[:2], conv.kernel_size
    low = low_rank(conv, data.draw(st.integers(1, min(m * width, n * height))), "spatial")
    np.testing.assert_allclose(low(x).detach().flatten(2), convolve(conv, x, low.weight), atol=1e-10)
    assert low(x).shape == conv(x).shape
    torch.testing.assert_close(low(x[0]), low(x)[0])
    assert low.A.kernel_size == (height, 1)
    assert low.B.kernel_size == (1, width)
    assert sum(p.numel() for p in low.parameters()) == low.rank * (n * height + m * width) + (conv.bias is not None) * m
    whole = low_rank(conv, min(m * width, n * height), "spatial")
    torch.testing.assert_close(whole.weight, conv.weight)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_from_conv_is_the_truncated_svd_of_each_group(kind, groups):
    conv = kind(6, 8, 3, groups=groups, dtype=torch.float64)
    low = low_rank(conv, 2)
    for rows, product in zip(conv.weight.chunk(groups), low.weight.chunk(groups), strict=True):
        s = np.linalg.svd(rows.detach().flatten(1).numpy(), compute_uv=False)
        assert (rows - product).norm().item() == pytest.approx(np.sqrt((s[2:] ** 2).sum()))


def test_the_spatial_scheme_is_the_truncated_svd_of_its_matrix():
    conv = nn.Conv2d(4, 5, (3, 7), dtype=torch.float64)
    matrix = np.empty((5 * 7, 4 * 3))
    for o, c, i, j in np.ndindex(*conv.weight.shape):
        matrix[o * 7 + j, c * 3 + i] = conv.weight.detach()[o, c, i, j]
    np.testing.assert_array_equal(kernel_to_matrix(conv.weight.detach(), "spatial"), matrix)
    s = np.linalg.svd(matrix, compute_uv=False)
    error = (low_rank(conv, 5, "spatial").weight - conv.weight).norm().item()
    assert error == pytest.approx(np.sqrt((s[5:] ** 2).sum()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_factors_and_matrices_go_back_and_forth(scheme):
    conv = nn.Conv2d(4, 5, (3, 2))
    assert torch.equal(matrix_to_kernel(kernel_to_matrix(conv.weight, scheme), conv.weight.shape, scheme), conv.weight)
    low = low_rank(conv, 3, scheme)
    a, b = low.factors()
    again = LowRankConv2d.from_factors(a, b, conv, scheme)
    assert torch.equal(again.A.weight, low.A.weight)
    assert torch.equal(again.B.weight, low.B.weight)
    torch.testing.assert_close(b @ a, kernel_to_matrix(low.weight, scheme))


def test_a_one_by_one_convolution_is_a_linear_layer():
    conv, x = nn.Conv2d(6, 8, 1, stride=2, padding=1), torch.randn(2, 6, 5, 5)
    low = low_rank(conv, 2)
    assert [tuple(p.shape) for p in low.parameters()] == [(2, 6, 1, 1), (8, 2, 1, 1), (8,)]
    torch.testing.assert_close(low_rank(conv, 6)(x), conv(x), atol=1e-5, rtol=1e-5)


def test_settings_are_those_of_the_dense_layer():
    conv = nn.Conv2d(4, 6, 3, 2, 1, 2, 2, bias=False, padding_mode="circular")
    low = LowRankConv2d(4, 6, 3, 2, 2, 1, 2, 2, False, "circular")
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(low, name) == getattr(conv, name)
    assert low.weight.shape == conv.weight.shape
    assert low.bias is None
    assert repr(low.to_dense()) == repr(conv)
    assert [name for name, _ in low.named_parameters()] == ["A.weight", "B.weight"]
    assert "4, 6, kernel_size=(3, 3), rank=2, groups=2, scheme='channel'" in repr(low)
    with pytest.raises((AttributeError, KeyError)):
        low.weight = nn.Parameter(conv.weight)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 6, 3, 0), {}, r"rank must lie in \[1, 6\] for a 6x36 matrix \(channel\), got 0"),
        ((4, 6, 3, 7), {}, "got 7"),
        ((4, 6, 3, 13), {"scheme": "spatial"}, r"rank must lie in \[1, 12\] for a 18x12 matrix \(spatial\), got 13"),
        ((4, 6, 3, 4), {"groups": 2}, r"rank must lie in \[1, 3\] for 2 groups of 3x18"),
        ((4, 6, 3, 2), {"groups": 2, "scheme": "spatial"}, "groups=2. Use scheme='channel'"),
        ((4, 6, 3, 2), {"scheme": "tucker"}, "scheme must be 'channel' or 'spatial', got 'tucker'"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(ArgumentError, match=message):
        LowRankConv2d(*arguments, **options)
    if options.get("scheme") == "spatial":
        with pytest.raises(ArgumentError, match="two-dimensional convolutions without groups"):
            LowRankConv1d(4, 6, 3, 2, scheme="spatial")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weight_is_differentiable(scheme):
    low = LowRankConv2d(3, 4, 3, 2, padding=1, dtype=torch.float64, scheme=scheme)

    def kernel(a, b):
        return torch.func.functional_call(Weight(low), {"layer.A.weight": a, "layer.B.weight": b}, ())

    parts = [p.detach().clone().requires_grad_() for p in (low.A.weight, low.B.weight)]
    assert torch.autograd.gradcheck(kernel, parts)


class Weight(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.weight


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_dtypes_devices_and_flags(scheme):
    conv = nn.Conv2d(4, 6, 3, padding="same").eval().to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    state = torch.get_rng_state()
    low = low_rank(conv, 3, scheme)
    dense = low.to_dense()
    assert torch.equal(torch.get_rng_state(), state)
    assert not low.training
    assert not dense.training
    assert not low.A.weight.requires_grad
    assert not dense.weight.requires_grad
    assert low.bias.requires_grad
    assert dense.bias is not low.bias
    clone, moved = copy.deepcopy(low), copy.deepcopy(low).to(device="meta")
    torch.testing.assert_close(clone.weight, low.weight)
    moved.load_state_dict(low.state_dict(), assign=True)
    x = torch.randn(2, 4, 5, 5)
    assert_same_model(moved, low, x)
    torch.testing.assert_close(low(x.to(memory_format=torch.channels_last)), low(x))
    for dtype in (torch.bfloat16, torch.float16):
        y = copy.deepcopy(low).to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), low(x), atol=5e-2, rtol=5e-2)
    half = nn.Conv2d(4, 6, 3, dtype=torch.bfloat16)
    assert low_rank(half, 3, scheme).A.weight.dtype == torch.bfloat16
    assert LowRankConv2d(4, 6, 3, 2, device="meta", scheme=scheme)(x.to("meta")).shape == (2, 6, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert low(x).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_checkpointing_gives_the_same_gradients(scheme):
    from torch.utils.checkpoint import checkpoint

    low, x = LowRankConv2d(3, 4, 3, 2, scheme=scheme), torch.randn(2, 3, 6, 6)
    expected = torch.autograd.grad(low(x).square().sum(), list(low.parameters()))
    found = torch.autograd.grad(checkpoint(low, x, use_reentrant=False).square().sum(), list(low.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_and_exports_without_a_graph_break(scheme):
    low, x = LowRankConv2d(3, 4, 3, 2, padding=1, padding_mode="reflect", scheme=scheme), torch.randn(2, 3, 6, 6)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(low, backend="eager", fullgraph=True)(x), low(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(Weight(low), backend="eager", fullgraph=True)(), low.weight)
    program = torch.export.export(low, (x,))
    torch.testing.assert_close(program.module()(x), low(x))
    signal = LowRankConv1d(3, 4, 3, 2)
    compiled = torch.compile(signal, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[..., 0]), signal(x[..., 0]))


def test_flops_are_those_of_the_factors():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 16, 8, 8)
    for scheme, per_position in (("channel", 3 * (16 * 9 + 12)), ("spatial", 3 * (16 * 3 + 12 * 3))):
        with FlopCounterMode(display=False) as counter:
            LowRankConv2d(16, 12, 3, 3, padding=1, scheme=scheme)(x)
        assert counter.get_total_flops() == 2 * 2 * 64 * per_position
