"""From two factors to the pivot layout and back: the function stays, optimizers go on, or nothing happens."""

import copy

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.layers import LowRankLayer, PivotLayer, packed, unpacked
from lightning_prehab.layers.blocks import LowRankConv1D, LowRankConv1DBlocks
from lightning_prehab.layers.packing import why_not_packed
from tests.layers.every_layer import CASES, Case, attention, every_case, in_blocks, name_of
from tests.replaceable import HOOK_METHODS as METHODS

PACKABLE = [
    lambda: lp.LowRankLinear(12, 8, 3),
    lambda: lp.LowRankLinear(12, 8, 3, bias=False),
    lambda: lp.LowRankLinear(12, 8, 8),
    in_blocks,
    lambda: in_blocks(kind=LowRankConv1DBlocks),
    lambda: LowRankConv1D(12, 8, 3),
    lambda: lp.LowRankConv1d(12, 8, 3, 2, padding="same"),
    lambda: lp.LowRankConv2d(12, 8, (3, 2), 2, 2, padding=1, padding_mode="reflect"),
    lambda: attention(batch_first=True),
]
INPUTS = {lp.LowRankConv1d: (5, 12, 7), lp.LowRankConv2d: (5, 12, 7, 7), lp.LowRankMultiheadAttention: (5, 7, 12)}


def run(layer, x):
    attends = isinstance(layer, lp.LowRankMultiheadAttention | nn.MultiheadAttention)
    output = layer(x, x, x) if attends else layer(x)
    return output if isinstance(output, torch.Tensor) else output[0]


def model_of(make):
    layer = make()
    return nn.Sequential(nn.Identity(), layer), torch.randn(INPUTS.get(type(layer), (5, 12)))


def matrices(layer):
    return {name: p for name, p in layer.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("make", PACKABLE)
def test_there_and_back_is_the_same_function(make):
    model, x = model_of(make)
    if isinstance(model[1], LowRankConv1D | LowRankConv1DBlocks):
        pytest.importorskip("transformers")  # its dense form is a layer of transformers
    old = model[1].eval()
    expected, count = run(old, x), sum(p.numel() for p in model.parameters())
    biases = {id(p) for p in old.parameters() if p.dim() == 1}
    assert lp.to_pivot_(model) == ["1"]
    assert lp.to_pivot_(model) == []
    assert {id(p) for p in model.parameters() if p.dim() == 1} == biases
    assert not model[1].training
    smaller = sum(part.rank**2 for part in model.modules() if isinstance(part, PivotLayer))
    assert sum(p.numel() for p in model.parameters()) == count - smaller < count
    torch.testing.assert_close(run(model[1], x), expected, atol=1e-5, rtol=1e-5)
    dense = copy.deepcopy(model)
    assert lp.to_dense_(dense) == ["1"]
    torch.testing.assert_close(run(dense[1], x), expected, atol=1e-5, rtol=1e-5)
    assert lp.to_factors_(model) == ["1"]
    assert lp.to_factors_(model) == []
    assert type(model[1]) is type(old)
    assert {id(p) for p in model.parameters() if p.dim() == 1} == biases
    torch.testing.assert_close(run(model[1], x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", PACKABLE)
@pytest.mark.parametrize("change", [lp.to_pivot_, lp.to_factors_])
def test_first_moments_move_exactly(make, change):
    """A first moment that is the gradient is the gradient of what takes its place."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, x = model_of(make)
        model.double()
        x = x.double()
        if change is lp.to_factors_:
            lp.to_pivot_(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        run(model[1], x).square().sum().backward()
        optimizer.step()
        kept = {id(p): p for p in model.parameters()}
        assert change(model, optimizers=[optimizer]) == ["1"]
    optimizer.zero_grad()
    run(model[1], x).square().sum().backward()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    for name, parameter in matrices(model).items():
        if id(parameter) not in kept:
            found = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(found, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Rprop])
def test_others_go_on(kind):
    model = nn.Sequential(lp.LowRankLinear(12, 8, 3), nn.ReLU(), lp.LowRankLinear(8, 6, 2, bias=False))
    optimizer = kind([{"params": [p]} for p in model.parameters()], lr=1e-3)
    for change in (lp.to_pivot_, lp.to_factors_, lp.to_pivot_):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(5, 12)).square().sum().backward()
            optimizer.step()
        assert change(model, optimizers=[optimizer]) == ["0", "2"]
        assert {len(group["params"]) for group in optimizer.param_groups} == {1}
        for p in model.parameters():
            assert all(v.isfinite().all() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
            assert all(v.shape in (p.shape, ()) for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: lp.LowRankPlusSparseLinear(12, 8, 3, 6), "it has a sparse part"),
        (lambda: lp.LowRankConv2d(6, 8, 3, 2, groups=2), "its 2 groups have factors of their own"),
        (lambda: lp.LowRankConv2d(6, 8, 3, 2, scheme="spatial"), "of the spatial scheme"),
        (lambda: lp.LowRankConv2d(6, 8, 3, 8), "as many inner channels as outputs"),
    ],
)
def test_what_has_no_such_layout_says_why(make, reason):
    model = nn.Sequential(lp.LowRankLinear(12, 8, 3), make())
    with pytest.raises(lp.PrehabError, match=f"'1' has no pivot layout: .*{reason}"):
        lp.to_pivot_(model, "*")
    with pytest.raises(lp.PrehabError, match=reason):
        packed(model[1])
    assert type(model[0]) is lp.LowRankLinear
    assert lp.to_pivot_(model) == ["0"]
    with pytest.raises(lp.PrehabError, match="matches no layer"):
        lp.to_factors_(model, "nowhere")


@pytest.mark.parametrize("change", [lp.to_pivot_, lp.to_factors_])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("make", PACKABLE)
def test_what_is_half_frozen_stays_so(make, number, change):
    """Either part of the other layout comes of both, so it could be neither frozen nor trained."""
    model, _ = model_of(make)
    model.append(lp.LowRankLinear(12, 8, 3))
    if change is lp.to_factors_:
        assert lp.to_pivot_(model) == ["1", "2"]
    layer = next(m for m in model.modules() if isinstance(m, LowRankLayer) and {"A", "D"} & m._modules.keys())
    part = [child.weight for child in layer.children()][number]
    part.requires_grad_(False)
    before = list(model.modules())
    with pytest.raises(UnsupportedError, match="Layer '1' .*of . and . one is frozen.*Leave it out of names"):
        change(model, "*")
    assert list(model.modules()) == before
    if change is lp.to_pivot_:
        assert change(model) == ["2"]
    else:
        with pytest.raises(UnsupportedError, match="one is frozen"):
            change(model)
        assert change(model, "2") == ["2"]
    assert not part.requires_grad
    part.requires_grad_(True)
    assert change(model, "1") == ["1"]


@pytest.mark.parametrize("change", [lp.to_pivot_, lp.to_factors_])
@pytest.mark.parametrize("number", [0, 1])
def test_shared_weights_stay_shared(number, change):
    model = nn.Sequential(*(lp.LowRankLinear(8, 8, 3) for _ in range(3)))
    model.append(model[2])  # a layer that hangs in two places is one layer
    if change is lp.to_factors_:
        assert lp.to_pivot_(model) == ["0", "1", "2"]
    first, second = (list(layer.children())[number] for layer in model[:2])
    second.weight = first.weight
    before = list(model.modules())
    with pytest.raises(UnsupportedError, match="Layer '0' .*its weights are shared with another layer"):
        change(model, "*")
    assert list(model.modules()) == before
    assert change(model, None if change is lp.to_pivot_ else "2") == ["2"]
    assert model[2] is model[3]
    assert second.weight is first.weight


@pytest.mark.parametrize("change", [lp.to_pivot_, lp.to_factors_])
def test_what_is_stored_like_that_needs_no_reason(change):
    model = nn.Sequential(lp.LowRankLinear(8, 8, 3), lp.LowRankLinear(8, 8, 3))
    if change is lp.to_pivot_:
        lp.to_pivot_(model)
    children = [list(layer.children()) for layer in model]
    children[1][0].weight = children[0][0].weight
    children[0][0].weight.requires_grad_(False)
    assert change(model, "*") == []


@pytest.mark.parametrize(("kind", "number"), every_case(), ids=name_of)
def test_every_layer_is_packed_or_says_why_not(kind, number):
    case = Case(kind, number)
    if why_not_packed(case.layer) is not None:
        with pytest.raises(lp.PrehabError, match="has no pivot layout"):
            packed(case.layer)
        return
    other = packed(case.layer)
    torch.testing.assert_close(case.run(other), case.run(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.run(unpacked(other)), case.run(), atol=1e-5, rtol=1e-5)
    assert kind in CASES


HOOKED = [
    *(lambda part, method=method: getattr(part, method)(lambda *_: None) for method in METHODS),
    lambda part: part.weight.register_hook(lambda gradient: None),
    lambda part: part.weight.register_post_accumulate_grad_hook(lambda parameter: None),
]


@pytest.mark.parametrize("make", PACKABLE)
@pytest.mark.parametrize("change", [lp.to_pivot_, lp.to_factors_])
def test_hooks_of_the_parts_are_not_lost(make, change):
    """Whatever is hooked onto what is going to be gone: nothing happens until it is taken off."""
    model, _ = model_of(make)
    if change is lp.to_factors_:
        lp.to_pivot_(model)
    before = list(model.modules())
    layer = next(m for m in before if isinstance(m, LowRankLayer) and {"A", "D"} & m._modules.keys())
    for name, part in layer.named_children():
        for hook in HOOKED:
            handle = hook(part)
            with pytest.raises(UnsupportedError, match=rf"Layer '1' has hooks on 1.*\.{name}.*remove them first"):
                change(model)
            assert list(model.modules()) == before
            handle.remove()
    assert change(model) == ["1"]


def test_an_optimizer_that_cannot_follow_leaves_all_as_it_was():
    model = nn.Sequential(lp.LowRankLinear(12, 8, 3))
    before = list(model.modules())
    with pytest.raises(lp.PrehabError, match="LBFGS"):
        lp.to_pivot_(model, optimizers=[torch.optim.LBFGS(model.parameters())])
    assert list(model.modules()) == before


def test_adapters_stay_where_they_are():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"layer": lp.LowRankLinear(12, 8, 3)})
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["layer.A"]), model)
    with pytest.raises(lp.PrehabError, match="'layer' has an adapter of peft"):
        lp.to_pivot_(model)
