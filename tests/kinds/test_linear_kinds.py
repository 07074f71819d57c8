"""Fused projections as row blocks, and the transposed linear layer of transformers."""

import copy
from unittest import mock

import pytest
import timm
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, CheckpointError, TargetError
from lightning_prehab.factorizations import Factors
from lightning_prehab.kinds import Kind, kind_of, register_kind, view_of
from lightning_prehab.kinds.fused import fused_blocks
from lightning_prehab.layers.blocks import LowRankBlocks, LowRankConv1D, LowRankConv1DBlocks
from lightning_prehab.surgery.structure import follow_state_dict_
from tests.same_model import assert_same_model

BLOCKS = {"q": 10, "k": 6, "v": 6}


class Attention(nn.Module):
    """A fused projection with grouped queries, and one of the kind that is transposed."""

    num_heads, num_kv_heads = 5, 3  # of two rows each: 10 + 6 + 6

    def __init__(self, transposed=False, bias=True):
        super().__init__()
        self.qkv = Conv1D(22, 12) if transposed else nn.Linear(12, 22, bias=bias)
        self.out = Conv1D(12, 10) if transposed else nn.Linear(10, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).split(list(BLOCKS.values()), -1)
        return x + self.out(q * torch.tanh(torch.cat([k + v, v[..., :4]], -1)))


class Model(nn.Module):
    def __init__(self, transposed=False, bias=True):
        super().__init__()
        self.attn = Attention(transposed, bias)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.attn(x))


def batches():
    return [torch.randn(40, 12) @ torch.diag(torch.linspace(2, 0.2, 12)) for _ in range(3)]


def exact(matrix):
    """Factors of full rank."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Factors((s[:, None] * vh).to(matrix), u.to(matrix))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_views_show_the_matrices_that_the_layer_multiplies_with(transposed, blocks):
    layer = Model(transposed).attn.qkv
    x, start = torch.randn(7, 12), 0
    y = layer(x)
    for view in kind_of(layer).views(layer, blocks).values():
        rows = view.out_features
        torch.testing.assert_close(view.inputs(x) @ view.weight.mT + view.bias, y[:, start : start + rows])
        torch.testing.assert_close(view.outputs(y), y[:, start : start + rows])
        new = torch.randn(view.shape)
        view.write_(new)
        assert torch.equal(view.weight, new)
        y, start = layer(x), start + rows
    assert start == 22


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cut", [["q", "k", "v"], ["k"], [""]])
def test_at_full_rank_the_layer_does_the_same_and_finds_the_way_back(transposed, cut):
    dense = Model(transposed).attn.qkv
    kind = kind_of(dense)
    views = kind.views(dense, None if cut == [""] else BLOCKS)
    low = kind.low_rank(dense, views, {part: exact(views[part].weight.detach()) for part in cut})
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(low(x), dense(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(low.weight, dense.weight, atol=1e-5, rtol=1e-5)
    assert any(parameter is dense.bias for parameter in low.parameters())  # the same object
    back = low.to_dense()
    assert type(back) is type(dense)
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
    torch.testing.assert_close(back(x), dense(x), atol=1e-5, rtol=1e-5)
    assert back.bias is not dense.bias


@pytest.mark.parametrize("transposed", [False, True])
def test_the_plan_takes_fused_projections_apart(transposed):
    model = Model(transposed)
    names = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.out", "head"]
    assert list(lp.find_targets(model)) == ["attn.qkv", "attn.out", "head"]

    def apart(*patterns, **settings):
        return list(lp.find_targets(model, *patterns, split_fused=True, **settings))

    assert apart() == names
    assert apart("attn.qkv") == names[:3]  # the name of the layer stands for its blocks
    assert apart("qkv") == names[:3]
    assert apart(exclude_modules=["qkv.k", "*.out"]) == ["attn.qkv.q", "attn.qkv.v", "head"]
    with pytest.raises(TargetError, match=r"'qkv\.z'.*attn\.qkv"):
        apart("qkv.z")
    plan = lp.make_plan(
        lp.find_targets(model, split_fused=True), 0.6, lp.SVD(), rank_overrides={"qkv": 2, "qkv.v": "dense"}
    )
    assert plan.ranks["attn.qkv.q"] == plan.ranks["attn.qkv.k"] == 2
    assert plan.ranks["attn.qkv.v"] is None


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_statistics_are_those_of_each_block(transposed, split):
    model = Model(transposed)
    targets = lp.find_targets(model, "attn.qkv", split_fused=split)
    [batch] = batches()[:1]

    def loss(net, x):
        return net(x).square().sum() / len(x)

    found = lp.collect_statistics(model, targets, [batch], forward=loss, gradients=True)
    seen = {}
    handle = model.attn.qkv.register_forward_hook(lambda module, args, y: (y.retain_grad(), seen.update(y=y))[0])
    loss(model, batch).backward()
    handle.remove()
    gradient, start = seen["y"].grad, 0
    for name, target in targets.items():
        view = view_of(target)
        g = gradient[:, start : start + view.out_features]
        torch.testing.assert_close(found[name].input_second_moment(), batch.mT @ batch / 40)
        torch.testing.assert_close(found[name].gradient_second_moment(), g.mT @ g * 40)
        torch.testing.assert_close(
            found[name].mean_weight_gradient(), view.matrix(view.parameter.grad), atol=1e-6, rtol=1e-4
        )
        start += view.out_features
    if split:  # one set of input sums for all blocks
        assert found["attn.qkv.q"].input_gram is found["attn.qkv.v"].input_gram


@pytest.mark.parametrize("factorization", [lp.SVD(), lp.KroneckerSVD(), lp.WhitenedSVD(centered=True)])
@pytest.mark.parametrize(("transposed", "bias"), [(False, True), (False, False), (True, True)])
def test_compress_counts_right_and_cuts_what_the_plan_says(transposed, bias, factorization):
    model = Model(transposed, bias)
    dense = copy.deepcopy(model)
    given = batches()
    report = lp.compress_(model, 0.5, given, factorization=factorization, split_fused=True)
    assert report.keep <= 0.5
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after
    for name, rank in report.ranks.items():
        if rank is not None:
            assert model.get_submodule(name).rank == rank
    expected = LowRankConv1DBlocks if transposed else LowRankBlocks
    assert type(model.attn.qkv) is expected
    assert torch.isfinite(model(given[0])).all()
    lp.to_dense_(model)
    old, new = (
        {name: view_of(target).weight for name, target in lp.find_targets(net, split_fused=True).items()}
        for net in (dense, model)
    )
    for name, error in report.weight_errors.items():
        torch.testing.assert_close(
            float((new[name] - old[name]).norm() / old[name].norm()), error, atol=1e-5, rtol=1e-4
        )
    assert type(model.attn.qkv) is type(dense.attn.qkv)


def test_a_transposed_layer_is_cut_like_its_linear_twin():
    model = Model(transposed=True)
    twin = Model()
    for ours, theirs in ((model.attn.qkv, twin.attn.qkv), (model.attn.out, twin.attn.out)):
        theirs.weight.data.copy_(ours.weight.data.mT)
        theirs.bias.data.copy_(ours.bias.data)
    twin.head.load_state_dict(model.head.state_dict())
    given = batches()
    reports = [lp.compress_(net, 0.4, given) for net in (model, twin)]
    assert reports[0].ranks == reports[1].ranks
    assert type(model.attn.out) is LowRankConv1D
    torch.testing.assert_close(model(given[0]), twin(given[0]), atol=1e-5, rtol=1e-4)
    assert model.attn.out.weight.shape == (10, 12)


@pytest.mark.parametrize("transposed", [False, True])
def test_optimizer_state_follows_each_block(transposed):
    model = Model(transposed)
    optimizer = torch.optim.Adam(model.named_parameters(), lr=1e-3)
    for batch in batches():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    weight = model.attn.qkv.weight
    moment = optimizer.state[weight]["exp_avg"].clone()
    moment = moment.mT if transposed else moment
    second = optimizer.state[weight]["exp_avg_sq"].clone()
    second = second.mT if transposed else second
    plan = lp.make_plan(
        lp.find_targets(model, split_fused=True), 0.9, lp.SVD(), rank_overrides={"qkv": 2, "qkv.k": "dense", "out": 3}
    )
    lp.apply_plan_(model, plan, optimizers=[optimizer])
    blocks = model.attn.qkv
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in sorted_as(optimizer, model)]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    q = blocks.q
    torch.testing.assert_close(optimizer.state[q.A.weight]["exp_avg"], q.B.weight.mT @ moment[:10])
    torch.testing.assert_close(optimizer.state[q.B.weight]["exp_avg"], moment[:10] @ q.A.weight.mT)
    assert torch.equal(optimizer.state[blocks.k.weight]["exp_avg"], moment[10:16])
    assert torch.equal(optimizer.state[blocks.k.weight]["exp_avg_sq"], second[10:16])
    model(batches()[0]).square().mean().backward()
    optimizer.step()


def sorted_as(optimizer, model):
    """Names and parameters of the model in the order of the optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(parameter)], parameter) for parameter in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize("transposed", [False, True])
def test_files_and_state_dicts_in_both_directions(transposed, tmp_path):
    pytest.importorskip("safetensors")
    model = Model(transposed)
    dense = copy.deepcopy(model)
    plan = lp.make_plan(
        lp.find_targets(model, split_fused=True), 0.9, lp.SVD(), rank_overrides={"qkv": 2, "qkv.k": "dense"}
    )
    lp.apply_plan_(model, plan)
    x = batches()[0]
    lp.save_compressed(model, tmp_path)
    assert_same_model(lp.load_compressed(tmp_path, Model(transposed)), model, x)
    other = Model(transposed)
    lp.compress_(other, 0.9, factorization=lp.SVD(), split_fused=True)
    assert_same_model(lp.load_compressed(tmp_path, other), model, x)  # of other ranks
    assert follow_state_dict_(other, dense.state_dict()) == ["attn.qkv", "attn.out", "head"]
    other.load_state_dict(dense.state_dict())
    assert_same_model(other, dense, x)
    state = model.state_dict()
    state["attn.qkv.q.A.weight"] = torch.zeros(2, 13)
    with pytest.raises(CheckpointError, match=r"attn\.qkv\.q.*\(2, 13\).*10x12"):
        follow_state_dict_(Model(transposed), state)


def test_fused_projections_are_known_by_name():
    gpt = type("Parent", (nn.Module,), {"is_cross_attention": True})()
    assert fused_blocks("c_attn", 64, gpt) == {"k": 32, "v": 32}
    assert fused_blocks("gate_up_proj", 20, None) == {"gate": 10, "up": 10}
    assert fused_blocks("qkv", 22, Attention()) == BLOCKS
    assert fused_blocks("qkv", 23, None) is None
    assert fused_blocks("fc1", 66, None) is None
    assert fused_blocks("query_key_value", 66, None) is None  # mixed head by head


def test_blocks_refuse_what_does_not_fit_together():
    with pytest.raises(ArgumentError, match="one input size"):
        LowRankBlocks({"a": nn.Linear(3, 4), "b": nn.Linear(4, 4)})
    with pytest.raises(ArgumentError, match=r"\(8,\), got \(4,\)"):
        LowRankBlocks({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)}, nn.Parameter(torch.zeros(4)))


def test_subclasses_that_compute_the_same_are_cut_others_are_not():
    class Linear(nn.Linear):
        """The same name elsewhere says nothing."""

    class Other(timm.layers.Linear):
        """Nor does a known parent."""

    model = nn.Sequential(timm.layers.Linear(8, 8), FalconLinear(8, 8, bias=False), Linear(8, 8), Other(8, 8))
    x, dense = torch.randn(5, 8), copy.deepcopy(model)
    report = lp.compress_(model, 0.5)
    assert report.ranks == {"0": 2, "1": 2}
    assert report.plan.skipped == {"2": "Linear is not a layer kind that can be cut", "3": mock.ANY}
    for new, old in zip(model[:2], dense[:2], strict=True):
        with torch.no_grad():
            old.weight.copy_(new.weight)
        torch.testing.assert_close(new(x), old(x))


def test_a_kind_of_ones_own_is_used_everywhere(monkeypatch):
    class Doubled(nn.Linear):
        """A subclass whose forward pass nobody else knows."""

    from lightning_prehab import kinds
    from lightning_prehab.kinds.linear import LinearKind

    class DoubledKind(LinearKind):
        def fits(self, module):
            return type(module) is Doubled

    monkeypatch.setattr(kinds, "_kinds", list(kinds._kinds))
    model = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8))
    assert "0" in lp.find_targets(model).skipped
    register_kind(DoubledKind())
    assert list(lp.compress_(model, 0.5).ranks) == ["0", "1"]
    with pytest.raises(ArgumentError, match="Expected a Kind"):
        register_kind(DoubledKind)
    with pytest.raises(ArgumentError, match="Embedding"):
        view_of(nn.Embedding(3, 3))
    assert issubclass(DoubledKind, Kind)


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_behave_like_a_module(transposed):
    model = Model(transposed)
    plan = lp.make_plan(
        lp.find_targets(model, split_fused=True), 0.9, lp.SVD(), rank_overrides={"qkv": 2, "qkv.k": "dense"}
    )
    lp.apply_plan_(model, plan)
    layer, x = model.attn.qkv, torch.randn(3, 12)
    copied = copy.deepcopy(layer)
    assert_same_model(copied, layer, x)
    assert copied.q.A.weight is not layer.q.A.weight
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert copied.to("meta")(x.to("meta")).shape == (3, 22)
    layer.float()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(layer)(x)
    assert explained.graph_break_count == 0
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    vector = torch.nn.utils.parameters_to_vector(layer.parameters())
    torch.nn.utils.vector_to_parameters(vector * 2, layer.parameters())
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(layer.parameters()), 2 * vector)
    checkpointed = torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (checkpointed, layer(x))]
    torch.testing.assert_close(*grads)
