"""nn.MultiheadAttention as four matrices: what is seen of them, and what takes their place."""

import copy
import itertools

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.factorizations import Factors
from lightning_prehab.kinds.attention import MultiheadAttentionKind
from lightning_prehab.layers.attention import PARTS, LowRankMultiheadAttention

KIND = MultiheadAttentionKind()


def watch(module, parts=PARTS):
    """Handles, and what was seen of each part: inputs, outputs and gradients as rows."""
    views = KIND.views(module)
    names = {id(view): part for part, view in views.items()}
    seen = {part: ([], [], []) for part in parts}

    def see(used, x, y):
        (view,) = used
        xs, ys, gs = seen[names[id(view)]]
        assert x.shape[:-1] == y.shape[:-1]
        xs.append(x.detach().reshape(-1, x.shape[-1]))
        ys.append(y.detach().reshape(-1, y.shape[-1]))
        if y.requires_grad:
            y.register_hook(lambda g: gs.append(g.reshape(-1, g.shape[-1])))

    return KIND.watch(module, [views[part] for part in parts], see), seen


def remove(handles):
    for handle in handles:
        handle.remove()


def attention(**settings):
    module = nn.MultiheadAttention(16, 4, dtype=torch.float64, **settings)
    for parameter in module.parameters():
        if parameter.dim() != 2:
            nn.init.normal_(parameter)
    return module


def given(module, same=False, batched=True):
    x = [torch.randn(3, n, size).double() for n, size in ((5, 16), (7, module.kdim), (7, module.vdim))]
    x = x if batched else [t[0] for t in x]
    x = x if module.batch_first or not batched else [t.transpose(0, 1) for t in x]
    return [x[0]] * 3 if same else x


def test_views_are_the_blocks_of_the_weights():
    packed, separate = attention(), attention(kdim=12, vdim=24, bias=False)
    views = KIND.views(packed)
    assert tuple(views) == PARTS
    for index, part in enumerate(PARTS[:3]):
        assert views[part].parameter is packed.in_proj_weight
        assert torch.equal(views[part].weight, packed.in_proj_weight[16 * index : 16 * index + 16])
    assert views["out_proj"].parameter is packed.out_proj.weight
    assert all(view.bias is not None and view.weight.shape == (16, 16) for view in views.values())
    views = KIND.views(separate)
    assert [(v.out_features, v.in_features) for v in views.values()] == [(16, 16), (16, 12), (16, 24), (16, 16)]
    assert [views[part].parameter for part in PARTS[:3]] == [
        separate.q_proj_weight,
        separate.k_proj_weight,
        separate.v_proj_weight,
    ]
    assert not any(view.bias is not None for view in views.values())


def test_a_view_writes_its_own_block_alone():
    module = attention()
    before = module.in_proj_weight.detach().clone()
    KIND.views(module)["k_proj"].write_(torch.ones(16, 16))
    assert torch.equal(module.in_proj_weight[16:32], torch.ones(16, 16).double())
    assert torch.equal(module.in_proj_weight[:16], before[:16])
    assert torch.equal(module.in_proj_weight[32:], before[32:])
    assert module.in_proj_weight.grad_fn is None


def test_only_the_exact_type_with_its_own_forward_pass_fits():
    class Mine(nn.MultiheadAttention):
        pass

    module = nn.MultiheadAttention(16, 4)
    assert KIND.fits(module)
    assert not KIND.fits(Mine(16, 4))
    assert KIND.refusal(module) is None
    model = nn.ModuleList([module])
    handles, _ = watch(module)
    assert "0.q_proj" in lp.find_targets(model)
    remove(handles)
    module.forward = lambda *_: None
    with pytest.raises(lp.PrehabError, match="was replaced on the instance"):
        lp.find_targets(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 12, "vdim": 24},
    ],
    ids=str,
)
def test_a_watched_layer_gives_the_same_and_is_left_as_it_was(settings):
    module = attention(dropout=0.3, **settings)
    before = dict(module.__dict__), repr(module)
    for training, same, batched, need_weights in itertools.product((True, False), repeat=4):
        if same and module.kdim != 16:
            continue
        x = given(module.train(training), same, batched)
        results = []
        for watched in (False, True):
            handles, _ = watch(module) if watched else ([], {})
            torch.manual_seed(1)
            output, weights = module(*x, need_weights=need_weights)
            module.zero_grad()
            output.square().sum().backward()
            results.append((output, weights, torch.rand(2)))
            gradients = [p.grad.clone() for p in module.parameters()]
            results[-1] += (gradients,)
            remove(handles)
        torch.testing.assert_close(results[1][:3], results[0][:3], atol=0, rtol=0)
        torch.testing.assert_close(results[1][3], results[0][3], atol=1e-9, rtol=1e-9)
    assert "forward" not in module.__dict__
    assert not module._forward_pre_hooks
    assert set(module.__dict__) == set(before[0])
    assert repr(module) == before[1]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_what_is_seen_are_the_projections_by_definition(batch_first, same):
    module = attention(batch_first=batch_first)
    x = given(module, same)
    handles, seen = watch(module)
    output, _ = module(*x)
    output.sin().sum().backward()
    remove(handles)
    tokens = [t if batch_first else t.transpose(0, 1) for t in x]
    tokens = [t.reshape(-1, t.shape[-1]) for t in tokens]
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    for part, own, weight, bias in zip(PARTS, tokens, weights, biases, strict=False):
        ((inputs,), (outputs,), (gradients,)) = seen[part]
        torch.testing.assert_close(inputs, own)  # the batch first, whatever the layout
        torch.testing.assert_close(outputs, own @ weight.mT + bias)
        torch.testing.assert_close(inputs.mT @ inputs, own.mT @ own)
        index = PARTS.index(part)
        rows = slice(16 * index, 16 * index + 16)
        torch.testing.assert_close(gradients.mT @ inputs, module.in_proj_weight.grad[rows])
        torch.testing.assert_close(gradients.sum(0), module.in_proj_bias.grad[rows])
    ((inputs,), (outputs,), (gradients,)) = seen["out_proj"]
    result = output if batch_first else output.transpose(0, 1)
    torch.testing.assert_close(outputs, result.reshape(-1, 16))
    torch.testing.assert_close(inputs @ module.out_proj.weight.mT + module.out_proj.bias, outputs)
    torch.testing.assert_close(gradients.mT @ inputs, module.out_proj.weight.grad)
    torch.testing.assert_close(gradients, result.detach().cos().reshape(-1, 16))


def test_the_attention_before_the_output_projection_is_that_of_a_single_head_by_hand():
    module = nn.MultiheadAttention(6, 1, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    handles, seen = watch(module)
    module(x, x, x)
    remove(handles)
    q, k, v = (x[0] @ w.mT for w in module.in_proj_weight.chunk(3))
    expected = torch.softmax(q @ k.mT / 6**0.5, -1) @ v
    torch.testing.assert_close(seen["out_proj"][0][0], expected)


def test_separate_weights_have_their_own_gradients():
    module = attention(kdim=12, vdim=24, batch_first=True)
    handles, seen = watch(module)
    module(*given(module))[0].sin().sum().backward()
    remove(handles)
    for part in PARTS[:3]:
        ((inputs,), _, (gradients,)) = seen[part]
        torch.testing.assert_close(gradients.mT @ inputs, getattr(module, f"{part}_weight").grad)


def test_only_the_wanted_parts_are_seen():
    module = attention()
    handles, seen = watch(module, ("v_proj",))
    module(*given(module))
    remove(handles)
    assert {part: len(xs) for part, (xs, _, _) in seen.items()} == {"v_proj": 1}


def test_unbatched_inputs_are_seen_as_they_are():
    module = attention()
    x = given(module, batched=False)
    handles, seen = watch(module)
    module(*x)
    remove(handles)
    assert torch.equal(seen["k_proj"][0][0], x[1])


def test_queries_keys_and_values_are_seen_as_one_tensor_where_they_are_one():
    for batch_first in (True, False):
        module = attention(batch_first=batch_first)
        found = []
        handles = KIND.watch(module, list(KIND.views(module).values()), lambda _, x, y, found=found: found.append(x))
        x = given(module, same=True)
        module(*x)
        remove(handles)
        assert found[0] is found[1] is found[2]
        assert not batch_first or found[0] is x[0]


def test_watching_survives_errors_and_other_watchers():
    module = attention(batch_first=True)
    first, seen_first = watch(module)
    second, seen_second = watch(module)
    with pytest.raises(lp.PrehabError):
        module(*given(module), key_padding_mask=torch.zeros(1, 1))
    module(*given(module))
    remove(first)
    remove(first)
    module(*given(module))
    assert [len(seen["q_proj"][0]) for seen in (seen_first, seen_second)] == [1, 2]
    remove(second)
    assert "forward" not in module.__dict__
    module(*given(module))
    assert len(seen_second["q_proj"][0]) == 2


def test_an_error_of_the_watcher_leaves_nothing_behind():
    def broken(views, x, y):
        raise RuntimeError("broken")

    module = attention()
    handles = KIND.watch(module, list(KIND.views(module).values()), broken)
    with pytest.raises(RuntimeError, match="broken"):
        module(*given(module))
    remove(handles)
    assert "forward" not in module.__dict__
    module(*given(module))


def test_a_copy_of_a_watched_layer_uses_its_own_weights():
    module = attention()
    handles, _ = watch(module)
    other = copy.deepcopy(module)
    remove(handles)
    with torch.no_grad():
        other.out_proj.weight.zero_()
        other.out_proj.bias.zero_()
    assert not other(*given(module))[0].any()
    assert module(*given(module))[0].any()


@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_an_encoder_does_not_hide_the_layer(padded):
    """With padding the encoder makes nested tensors: the padding is then not seen at all."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 16).double()
    mask = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None] if padded else None
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=mask)
        watched = [watch(layer.self_attn) for layer in encoder.layers]
        found = encoder(x, src_key_padding_mask=mask)
        remove(handle for handles, _ in watched for handle in handles)
        again = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)
    assert torch.equal(again, expected)
    tokens = x[~mask] if padded else x.reshape(-1, 16)
    for part in PARTS[:3]:
        assert torch.equal(watched[0][1][part][0][0], tokens)
    for _, seen in watched:
        assert all(len(rows) == len(tokens) for xs, ys, _ in seen.values() for rows in xs + ys)
    weight, bias = encoder.layers[0].self_attn.in_proj_weight, encoder.layers[0].self_attn.in_proj_bias
    torch.testing.assert_close(watched[0][1]["q_proj"][1][0], tokens @ weight[:16].mT + bias[:16])


def test_compiled_layers_are_seen_too():
    module = attention(batch_first=True)
    x = given(module, same=True)
    expected = module(*x)[0]
    compiled = torch.compile(module, backend="eager")
    compiled(*x)
    torch.compiler.reset()
    handles, seen = watch(module)
    torch.testing.assert_close(compiled(*x)[0], expected)
    remove(handles)
    torch.compiler.reset()
    torch.testing.assert_close(compiled(*x)[0], expected)
    assert all(len(xs) == 1 for xs, _, _ in seen.values())


def exact_factors(view):
    return Factors(torch.eye(view.in_features).to(view.weight), view.weight.detach().clone())


@pytest.mark.parametrize("parts", [PARTS, ("q_proj",), ("out_proj", "k_proj")])
def test_what_takes_the_place_has_the_same_function_and_biases(parts):
    module = attention(dropout=0.2, add_bias_kv=True, batch_first=True).eval()
    views = KIND.views(module)
    cut = KIND.low_rank(module, views, {part: exact_factors(views[part]) for part in parts})
    assert type(cut) is LowRankMultiheadAttention
    for part in PARTS:
        assert type(getattr(cut, part)) is (lp.LowRankLinear if part in parts else nn.Linear)
    assert cut.in_proj_bias is module.in_proj_bias
    assert cut.bias_k is module.bias_k
    own = cut.out_proj.B if "out_proj" in parts else cut.out_proj
    assert own.bias is module.out_proj.bias
    assert not any(child.training for child in cut.modules())
    x = given(module)
    torch.testing.assert_close(cut(*x), module(*x))
    torch.testing.assert_close(cut.to_dense()(*x), module(*x))


def test_a_sparse_part_is_kept():
    module = attention()
    views = KIND.views(module)
    factors = lp.LowRankPlusSparse(0.1, lp.SVD())(views["v_proj"].weight.detach(), 3)
    cut = KIND.low_rank(module, views, {"v_proj": factors})
    assert type(cut.v_proj) is lp.LowRankPlusSparseLinear
    torch.testing.assert_close(cut.v_proj.weight, factors.product())
