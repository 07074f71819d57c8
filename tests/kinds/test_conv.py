import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations import Factors
from lightning_prehab.kinds.conv import ChannelView, ConvKind, SpatialView
from lightning_prehab.layers.conv import LowRankConv1d, LowRankConv2d
from tests.conv_reference import cases, patches


def gradients(conv, x):
    """The output, the gradients of some loss in the output and in the weight."""
    y = conv(x)
    g = torch.randn_like(y)
    return y, g, torch.autograd.grad(y, conv.weight, g)[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_channel_tokens(case):
    conv, x = case.conv(), case.input()
    view = ConvKind().views(conv)[""]
    y, g, weight_gradient = gradients(conv, x)
    expected = patches(conv, x)
    tokens, grads = view.inputs(x), view.outputs(g)
    np.testing.assert_array_equal(tokens.reshape(expected.shape), expected)
    assert tokens.shape[:-1] == grads.shape[:-1]
    np.testing.assert_allclose(
        torch.einsum("bl...n,bl...k->...nk", tokens, tokens).reshape(case.settings["groups"], *2 * tokens.shape[-1:]),
        np.einsum("blgn,blgk->gnk", expected, expected),
        atol=1e-10,
    )
    products = torch.einsum("bl...m,bl...n->...mn", grads, tokens).reshape(view.out_features, view.in_features)
    torch.testing.assert_close(products, view.matrix(weight_gradient))

    parts = view.groups()
    assert len(parts) == view.group_count == conv.groups
    rows = view.weight.chunk(conv.groups)
    for number, part in enumerate(parts):
        assert part.group_count == 1
        assert part.weight.shape == (part.out_features, part.in_features)
        assert torch.equal(part.weight, rows[number])
        assert (part.bias is None) == (conv.bias is None)
        assert torch.equal(part.inputs(x), tokens if conv.groups == 1 else tokens[:, :, number])
        assert torch.equal(part.outputs(y), view.outputs(y) if conv.groups == 1 else view.outputs(y)[:, :, number])
        product = part.inputs(x) @ part.weight.mT
        torch.testing.assert_close(product + (0 if part.bias is None else part.bias), part.outputs(y))
        assert torch.equal(part.inputs(x[0]), part.inputs(x[:1]))
        assert torch.equal(part.outputs(g[0]), part.outputs(g[:1]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(dims=[2], groups=[1]))
def test_spatial_tokens(case):
    conv, x = case.conv(), case.input()
    view = SpatialView(conv)
    _, g, weight_gradient = gradients(conv, x)
    tokens, grads = view.inputs(x), view.outputs(g)
    assert tokens.shape[:-1] == grads.shape[:-1]
    assert tokens.shape[2:] + grads.shape[2:] == (view.in_features, view.out_features)
    products = torch.einsum("blm,bln->mn", grads, tokens)
    torch.testing.assert_close(products, view.matrix(weight_gradient))
    assert torch.equal(view.inputs(x[0]), view.inputs(x[:1]))
    assert torch.equal(view.outputs(g[0]), view.outputs(g[:1]))

    # What comes out of the matrix, summed over taps in numpy, is the output.
    mapped = (
        (tokens @ view.weight.mT).detach().reshape(len(x), g.shape[2], -1, *conv.weight.shape[:1], case_width(conv))
    )
    marks = view.outputs(torch.arange(1.0, 1 + g.shape[3]).expand(1, conv.out_channels, g.shape[2], -1))
    marks = marks.reshape(1, g.shape[2], -1, conv.out_channels, case_width(conv))[0, 0, :, 0].long() - 1
    y = np.zeros(conv(x).shape)
    for column, taps in enumerate(marks.tolist()):
        for tap, place in enumerate(taps):
            if place >= 0:
                y[:, :, :, place] += mapped[:, :, column, :, tap].transpose(1, 2).numpy()
    bias = 0 if conv.bias is None else conv.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(y + bias, conv(x).detach(), atol=1e-10)


def case_width(conv):
    return conv.kernel_size[1]


def test_spatial_tokens_leave_out_zero_padding_and_untouched_columns():
    x = torch.randn(1, 2, 6, 6)
    assert SpatialView(nn.Conv2d(2, 3, 3, padding=1)).inputs(x).shape == (1, 6 * 6, 6)
    assert SpatialView(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")).inputs(x).shape == (1, 6 * 8, 6)
    assert SpatialView(nn.Conv2d(2, 3, (3, 2), stride=(1, 4))).inputs(x).shape == (1, 4 * 4, 6)


@pytest.mark.parametrize("group", [None, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_write_is_the_inverse_of_the_matrix(layout, group):
    conv = nn.Conv2d(4, 6, 3, groups=1 if group is None else 2).to(memory_format=layout)
    strides, version = conv.weight.stride(), conv.weight._version
    views = [ChannelView(conv, group)] if group is not None else [ChannelView(conv), SpatialView(conv)]
    for view in views:
        before = conv.weight.detach().clone()
        matrix = torch.randn(view.out_features, view.in_features)
        view.write_(matrix)
        assert torch.equal(view.weight, matrix)
        assert conv.weight.stride() == strides
        assert conv.weight._version > version
        assert view.parameter is conv.weight
        if group is not None:
            assert torch.equal(conv.weight[:3], before[:3])
        moment = torch.zeros_like(conv.weight)
        view.write_(2 * matrix, into=moment)
        assert torch.equal(view.matrix(moment), 2 * matrix)
        assert torch.equal(view.weight, matrix)


def test_matrices_of_moments_and_gradients():
    conv = nn.Conv2d(4, 6, (3, 5))
    moment = torch.randn_like(conv.weight)
    assert torch.equal(ChannelView(conv).matrix(moment), moment.flatten(1))
    spatial = SpatialView(conv).matrix(moment)
    assert spatial[1 * 5 + 2, 3 * 3 + 1] == moment[1, 3, 1, 2]


@pytest.mark.parametrize("conv", [nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, bias=False)])
def test_kind(conv):
    kind = ConvKind()
    views = kind.views(conv)
    assert list(views) == [""]
    assert views[""].bias is conv.bias
    assert kind.fits(conv)
    assert not kind.linear
    a, b = torch.randn(2 * conv.groups, views[""].in_features), torch.randn(6, 2)
    low = kind.low_rank(conv, views, {"": Factors(a, b)})
    assert type(low) is (LowRankConv1d if isinstance(conv, nn.Conv1d) else LowRankConv2d)
    assert low.bias is conv.bias
    assert torch.equal(low.factors()[0], a)
    assert torch.equal(low.factors()[1], b)
    with pytest.raises(ArgumentError, match="no row blocks"):
        kind.views(conv, {"q": 3})


@pytest.mark.parametrize("groups", [1, 2])
def test_factors_are_folded_as_the_module_holds_them(groups):
    conv = nn.Conv2d(4, 6, (3, 2), groups=groups)
    for view in [ChannelView(conv)] if groups > 1 else [ChannelView(conv), SpatialView(conv)]:
        a, b = torch.randn(2 * groups, view.in_features), torch.randn(view.out_features, 2)
        low = LowRankConv2d.from_factors(a, b, conv, view.scheme)
        folded = view.fold(a, b)
        assert torch.equal(folded[0], low.A.weight)
        assert torch.equal(folded[1], low.B.weight)
        back = view.unfold(*folded)
        assert torch.equal(back[0], a)
        assert torch.equal(back[1], b)
        with pytest.raises(RuntimeError, match="Expected kernels of shapes"):
            view.unfold(folded[0], folded[1].repeat(1, 1, 1, 3))


def test_who_reads_the_same():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    alike, strided = nn.Conv2d(4, 2, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3, 2, padding=1)
    assert ChannelView(conv).reads == ChannelView(alike).reads
    assert len({ChannelView(conv).reads, ChannelView(strided).reads, SpatialView(conv).reads, None}) == 4
    groups = ChannelView(nn.Conv2d(4, 6, 3, padding=1, groups=2)).groups()
    assert len({ChannelView(conv).reads, *(view.reads for view in groups)}) == 3


def test_other_modules_do_not_fit():
    class Own(nn.Conv2d):
        pass

    for module in (
        Own(2, 2, 1), nn.ConvTranspose1d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3), nn.Conv3d(2, 2, 3), nn.Linear(2, 2),
        nn.LazyConv2d(2, 3),
    ):  # fmt: skip
        assert not ConvKind().fits(module)


def test_the_spatial_kind_takes_the_channel_scheme_where_there_is_no_other():
    kind = ConvKind("spatial")
    for conv in (nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, (1, 3)), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3)):
        assert type(kind.views(conv)[""]) is ChannelView
    conv = nn.Conv2d(4, 6, 3)
    views = kind.views(conv)
    assert type(views[""]) is SpatialView
    low = kind.low_rank(conv, views, {"": Factors(torch.randn(2, 12), torch.randn(18, 2))})
    assert low.scheme == "spatial"
    with pytest.raises(ArgumentError, match="got 'both'"):
        ConvKind("both")
    with pytest.raises(ArgumentError, match="without groups"):
        SpatialView(nn.Conv2d(4, 6, 3, groups=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    conv = nn.Conv2d(2, 3, 3, padding=1, dtype=dtype)
    x = torch.randn(2, 2, 4, 4, dtype=dtype)
    for view in (ChannelView(conv), SpatialView(conv)):
        exact = type(view)(copy.deepcopy(conv).float())
        assert torch.equal(view.inputs(x).float(), exact.inputs(x.float()))
        g = torch.randn(2, 3, 4, 4, dtype=dtype)
        assert torch.equal(view.outputs(g).float(), exact.outputs(g.float()))


def test_patches_are_copied_once():
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)
    view = ChannelView(conv)
    assert view.inputs(x).is_contiguous()  # flattening to tokens takes no second copy
    pointwise = ChannelView(nn.Conv2d(4, 6, 1)).inputs(x)
    assert pointwise.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"kernel_size": 3, "stride": 3}, 3),  # a patch embedding
        ({"kernel_size": (2, 3), "stride": (1, 4)}, 3),  # columns that nobody sees
        ({"kernel_size": (3, 2), "stride": (1, 3), "dilation": (1, 2), "padding": (1, 0)}, 2),
        ({"kernel_size": 2, "stride": 2, "padding": 1, "padding_mode": "reflect"}, 2),
        ({"kernel_size": 2, "stride": 2, "padding": 1}, 1),  # columns of padding are no tokens
        ({"kernel_size": 3, "stride": 2}, 1),  # columns that are seen twice
        ({"kernel_size": 2, "stride": 2, "dilation": 2}, 1),
    ],
)
def test_outputs_that_stand_alone_are_counted_once(settings, copies):
    conv = nn.Conv2d(2, 4, **settings)
    view, g = SpatialView(conv), torch.randn_like(conv(torch.randn(2, 2, 13, 12)))
    assert view.copies == copies
    rows = view.outputs(g).flatten(0, 1)
    distinct = view.distinct_outputs(g).flatten(0, 1)
    statistics = lp.LayerStatistics(view.in_features, view.out_features, gradients=True)
    for _ in range(2):
        statistics.add_gradient_gram(distinct.mT @ distinct, copies)
    torch.testing.assert_close(statistics.gradient_gram, 2 * rows.mT @ rows)
