"""The drop-in for nn.MultiheadAttention against the dense module that has the products of its factors as weights."""

import copy
import itertools

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.layers.attention import PARTS, LowRankMultiheadAttention
from tests.same_model import assert_same_model

KINDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "sizes": {"kdim": 12, "vdim": 24, "batch_first": True},
    "sizes, both, no bias": {"kdim": 12, "vdim": 24, "add_bias_kv": True, "add_zero_attn": True, "bias": False},
}


def dense_attention(dtype=torch.float64, **settings):
    """With biases that are not zero."""
    attention = nn.MultiheadAttention(16, 4, dtype=dtype, **settings)
    for parameter in attention.parameters():
        if parameter.dim() != 2:
            nn.init.normal_(parameter)
    return attention


def exact_child(weight, low_rank, bias=None):
    """A child with the very weight: one factor is the identity."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone())
    linear.bias = bias
    if not low_rank:
        return linear
    one = torch.eye(min(rows, columns), dtype=weight.dtype)
    a, b = (one, weight) if columns <= rows else (weight, one)
    return lp.LowRankLinear.from_factors(a, b, linear)


def exact(attention, low_rank=PARTS):
    weights = attention.in_proj_weight
    inputs = (
        [getattr(attention, f"{part}_weight") for part in PARTS[:3]] if weights is None else weights.chunk(3, dim=0)
    )
    children = {part: exact_child(w, part in low_rank) for part, w in zip(PARTS, inputs, strict=False)}
    out = attention.out_proj
    children["out_proj"] = exact_child(out.weight, "out_proj" in low_rank, out.bias)
    return LowRankMultiheadAttention.from_parts(attention, children)


def inputs(attention, same, keys=7, batched=True, positions=5):
    """Queries, keys and values."""
    keys = positions if same else keys
    found = [torch.randn(3, positions, 16), torch.randn(3, keys, attention.kdim), torch.randn(3, keys, attention.vdim)]
    found = [x.to(attention.out_proj.weight.dtype) for x in found]
    if not batched:
        found = [x[0] for x in found]
    elif not attention.batch_first:
        found = [x.transpose(0, 1).contiguous() for x in found]
    return [found[0]] * 3 if same else found


def padding(keys, batched=True):
    mask = torch.zeros(3, keys, dtype=torch.bool)
    mask[1, -2:] = True
    return mask if batched else mask[1]


def check(dense, cut, given, **settings):
    """Same output, same weights, same random numbers drawn, same gradients of what they share."""
    results = []
    for module in (dense, cut):
        torch.manual_seed(3)
        leaves = {id(x): x.detach().clone().requires_grad_() for x in given}
        output, weights = module(*(leaves[id(x)] for x in given), **settings)
        module.zero_grad()
        output.square().sum().backward()
        shared = [p.grad for p in (module.in_proj_bias, module.bias_k, module.out_proj.bias) if p is not None]
        results.append((output, weights, torch.rand(2), [x.grad for x in leaves.values()], copy.deepcopy(shared)))
    torch.testing.assert_close(results[1], results[0], atol=1e-9, rtol=1e-9)
    return results[1]


@pytest.mark.parametrize("low_rank", [PARTS, (), ("k_proj", "out_proj")], ids=["all", "none", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_dense_module_does(kind, low_rank):
    dense = dense_attention(dropout=0.4, **KINDS[kind])
    for training, same, need_weights, padded in itertools.product((True, False), repeat=4):
        if same and dense.kdim != 16:
            continue
        given = inputs(dense, same)
        cut = exact(dense.train(training), low_rank)
        mask = padding(5 if same else 7) if padded else None
        _, weights, *_ = check(dense, cut, given, need_weights=need_weights, key_padding_mask=mask)
        assert (weights is not None) == need_weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batched", [True, False])
def test_masks(kind, batched):
    dense = dense_attention(dropout=0.2, **KINDS[kind])
    cut = exact(dense)
    given = inputs(dense, same=False, batched=batched)
    heads = 12 if batched else 4
    flags = torch.rand(5, 7) < 0.4
    flags[:, 0] = False
    masks = [flags, torch.randn(5, 7).double(), torch.rand(heads, 5, 7) < 0.3, torch.randn(heads, 5, 7).double()]
    masks[2][..., 0] = False
    for mask, need_weights, padded in itertools.product(masks, (True, False), (True, False)):
        pads = padding(7, batched) if padded else None
        if pads is not None and mask.is_floating_point():
            pads = torch.zeros(pads.shape, dtype=mask.dtype).masked_fill_(pads, -3.0)
        check(dense, cut, given, attn_mask=mask, key_padding_mask=pads, need_weights=need_weights)


@pytest.mark.parametrize("kind", ["plain", "batch first", "both"])
def test_causal_masks(kind):
    dense = dense_attention(**KINDS[kind])
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    given = inputs(dense, same=False, keys=5)
    for need_weights, padded in itertools.product((True, False), (True, False)):
        pads = torch.zeros(3, 5).double() if padded else None
        settings = {"key_padding_mask": pads, "need_weights": need_weights, "is_causal": True}
        check(dense, exact(dense), given, attn_mask=mask, **settings)


def test_weights_of_each_head():
    dense = dense_attention(batch_first=True)
    _, weights, *_ = check(dense, exact(dense), inputs(dense, same=True), average_attn_weights=False)
    assert weights.shape == (3, 4, 5, 5)


def test_dropout_draws_what_the_dense_module_draws():
    dense = dense_attention(dropout=0.5)
    cut = exact(dense)
    given = inputs(dense, same=True)
    for need_weights in (True, False):
        torch.manual_seed(0)
        first = cut(*given, need_weights=need_weights)[0]
        assert not torch.equal(first, cut(*given, need_weights=need_weights)[0])
        torch.manual_seed(0)
        torch.testing.assert_close(dense(*given, need_weights=need_weights)[0], first, atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_an_encoder_layer(norm_first, batch_first):
    settings = {"dropout": 0.3, "batch_first": batch_first, "norm_first": norm_first, "dtype": torch.float64}
    dense = nn.TransformerEncoderLayer(16, 4, 32, **settings)
    cut = copy.deepcopy(dense)
    cut.self_attn = exact(cut.self_attn)
    x = torch.randn(3, 5, 16).double() if batch_first else torch.randn(5, 3, 16).double()
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for training, grad, mask, pads in itertools.product((True, False), (True, False), (None, causal), (None, True)):
        results = []
        for layer in (dense, cut):
            torch.manual_seed(1)
            with torch.set_grad_enabled(grad):
                pad = None if pads is None else torch.zeros(3, 5).double().masked_fill_(padding(5), -torch.inf)
                results.append(layer.train(training)(x, src_mask=mask, src_key_padding_mask=pad))
        torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)])
def test_inside_an_encoder_that_makes_nested_tensors(which):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dtype=torch.float64)
    dense = nn.TransformerEncoder(layer, 2).eval()
    cut = copy.deepcopy(dense)
    for index in which:
        cut.layers[index].self_attn = exact(cut.layers[index].self_attn)
    x = torch.randn(3, 5, 16).double()
    with torch.no_grad():
        expected = dense(x, src_key_padding_mask=padding(5))
        assert not expected[1, -2:].any()  # the padding was left out and filled in again
        found = cut(x, src_key_padding_mask=padding(5))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)
    results = []
    for model in (dense.train(), cut.train()):
        torch.manual_seed(0)
        results.append(model(x, src_key_padding_mask=padding(5)))
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("norm_first", [True, False])
def test_inside_a_decoder_layer(norm_first):
    settings = {"batch_first": True, "norm_first": norm_first, "dtype": torch.float64}
    dense = nn.TransformerDecoderLayer(16, 4, 32, **settings)
    cut = copy.deepcopy(dense)
    cut.self_attn, cut.multihead_attn = exact(cut.self_attn), exact(cut.multihead_attn)
    x, memory = torch.randn(3, 5, 16).double(), torch.randn(3, 7, 16).double()
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    pads = torch.zeros(3, 7).double().masked_fill_(padding(7), -torch.inf)
    for training, grad in itertools.product((True, False), (True, False)):
        results = []
        for layer in (dense, cut):
            torch.manual_seed(1)
            with torch.set_grad_enabled(grad):
                results.append(
                    layer.train(training)(x, memory, causal, memory_key_padding_mask=pads, tgt_is_causal=True)
                )
        torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-9)


def test_the_weights_can_be_read_under_the_dense_names():
    dense = dense_attention()
    cut = exact(dense)
    torch.testing.assert_close(cut.in_proj_weight, dense.in_proj_weight)
    torch.testing.assert_close(torch.cat([cut.q_proj_weight, cut.k_proj_weight, cut.v_proj_weight]), cut.in_proj_weight)
    cut.in_proj_weight.square().sum().backward()
    torch.testing.assert_close(cut.q_proj.B.weight.grad, 2 * dense.in_proj_weight[:16])
    assert exact(dense_attention(kdim=12)).in_proj_weight is None
    with pytest.raises((AttributeError, KeyError)):
        cut.in_proj_weight = nn.Parameter(torch.zeros(48, 16))


def test_parameters_are_shared_and_named():
    dense = dense_attention(add_bias_kv=True)
    cut = exact(dense, ("q_proj", "out_proj")).eval()
    for name in ("in_proj_bias", "bias_k", "bias_v"):
        assert getattr(cut, name) is getattr(dense, name)
    assert cut.out_proj.bias is dense.out_proj.bias
    own, children = ["in_proj_bias", "bias_k", "bias_v"], ["q_proj.A.weight", "q_proj.B.weight"]
    children += ["k_proj.weight", "v_proj.weight", "out_proj.A.weight", "out_proj.B.weight", "out_proj.B.bias"]
    assert list(cut.state_dict()) == own + children
    assert [name for name, _ in cut.named_parameters()] == own + children


@pytest.mark.parametrize("kind", KINDS)
def test_to_dense_keeps_the_function(kind):
    settings = KINDS[kind]
    ranks = {"q_proj": 3, "v_proj": 2, "out_proj": 4}
    cut = LowRankMultiheadAttention(16, 4, ranks, dropout=0.2, dtype=torch.float64, **settings).eval()
    for parameter in cut.parameters():
        nn.init.normal_(parameter)
    cut.q_proj.A.weight.requires_grad_(False)
    state = torch.get_rng_state()
    dense = cut.to_dense()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(dense) is nn.MultiheadAttention
    assert not dense.training
    reference = nn.MultiheadAttention(16, 4, dropout=0.2, dtype=torch.float64, **settings)
    assert [(n, p.shape) for n, p in dense.named_parameters()] == [
        (n, p.shape) for n, p in reference.named_parameters()
    ]
    assert repr(dense) == repr(reference)
    given = inputs(dense, same=False)
    torch.testing.assert_close(dense(*given), cut(*given), atol=1e-10, rtol=1e-9)
    assert not {id(p) for p in dense.parameters()} & {id(p) for p in cut.parameters()}
    check(dense.train(), cut.train(), given)


def test_to_dense_of_children_that_got_a_bias_of_their_own():
    cut = LowRankMultiheadAttention(16, 4, {"q_proj": 3}, bias=False, dtype=torch.float64)
    cut.q_proj.B.bias = nn.Parameter(torch.randn(16, dtype=torch.float64))
    dense = cut.to_dense()
    torch.testing.assert_close(dense.in_proj_bias, torch.cat([cut.q_proj.bias, torch.zeros(32).double()]))
    assert not dense.out_proj.bias.any()
    given = inputs(dense, same=True)
    torch.testing.assert_close(dense(*given), cut(*given))


def test_state_dict_copy_and_dtypes():
    ranks = {"k_proj": 3, "out_proj": 2}
    cut = LowRankMultiheadAttention(16, 4, ranks, add_bias_kv=True, batch_first=True)
    other = LowRankMultiheadAttention(16, 4, ranks, add_bias_kv=True, batch_first=True)
    other.load_state_dict(cut.state_dict())
    given = inputs(cut.to_dense(), same=True)
    expected = cut(*given)
    assert_same_model(other, cut, *given)
    assert_same_model(copy.deepcopy(cut), cut, *given)
    half = copy.deepcopy(cut).bfloat16()
    output, _ = half(*[given[0].bfloat16()] * 3)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected[0], atol=0.05, rtol=0.05)
    meta = LowRankMultiheadAttention(16, 4, ranks, add_bias_kv=True, batch_first=True, device="meta")
    assert meta(*[given[0].to("meta")] * 3)[0].shape == (3, 5, 16)
    meta.to_empty(device="cpu").load_state_dict(cut.state_dict())
    assert_same_model(meta, cut, *given)


def test_autocast_is_that_of_the_dense_module():
    dense = dense_attention(torch.float32, batch_first=True, add_bias_kv=True)
    cut = exact(dense)
    given = inputs(dense, same=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = cut(*given), dense(*given)
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_compile_and_export():
    cut = LowRankMultiheadAttention(16, 4, {"q_proj": 3, "v_proj": 2}, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    settings = {"need_weights": False, "key_padding_mask": padding(5)}
    expected = cut(x, x, x, **settings)[0]
    compiled = torch.compile(cut, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x, **settings)[0], expected)
    program = torch.export.export(cut, (x, x, x), settings, dynamic_shapes=None)
    torch.testing.assert_close(program.module()(x, x, x, **settings)[0], expected)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    layer.self_attn = cut
    program = torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), layer(x))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("aten.linear.default") == 8  # 2 + 1 + 2 + 1 of the attention, 2 behind it
    assert calls.count("aten.scaled_dot_product_attention.default") == 1


def test_what_does_not_fit_is_said():
    with pytest.raises(lp.PrehabError, match="num_heads must divide embed_dim, got 3 heads for size 16"):
        LowRankMultiheadAttention(16, 3, {})
    with pytest.raises(lp.PrehabError, match="'qproj' is not a projection; there are q_proj, k_proj, v_proj, out_proj"):
        LowRankMultiheadAttention(16, 4, {"qproj": 3})
    with pytest.raises(lp.PrehabError, match="rank must lie in"):
        LowRankMultiheadAttention(16, 4, {"q_proj": 17})
    cut = LowRankMultiheadAttention(16, 4, {"q_proj": 3}, batch_first=True)
    x = torch.randn(3, 5, 16)
    with pytest.raises(lp.PrehabError, match="as many keys as values; got shapes"):
        cut(x, x, x[:, :4])
    with pytest.raises(lp.PrehabError, match=r"attn_mask must have shape \(5, 5\) or \(12, 5, 5\), got \(5, 4\)"):
        cut(x, x, x, attn_mask=torch.zeros(5, 4))
    with pytest.raises(lp.PrehabError, match=r"key_padding_mask must have shape \(3, 5\), got \(5, 3\)"):
        cut(x, x, x, key_padding_mask=torch.zeros(5, 3))
    with pytest.raises(lp.PrehabError, match="attn_mask must be boolean or floating"):
        cut(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.int64))
    with pytest.raises(lp.PrehabError, match="is_causal says what attn_mask holds"):
        cut(x, x, x, is_causal=True)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    with pytest.raises(lp.PrehabError, match="A nested tensor is taken where"):
        cut(nested, nested, nested, key_padding_mask=padding(5)[:2])
