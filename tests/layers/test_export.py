"""Compressed models as plain graphs, and back to dense layers."""

import copy
from math import prod

import pytest
import timm
import torch
import transformers
from torch import nn

import lightning_prehab as lp


@pytest.fixture
def compressed():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16, bias=False)).eval()
    lp.compress_(model, keep=0.5)
    return model


def test_to_dense_keeps_the_function(compressed):
    x = torch.randn(4, 32)
    expected = compressed(x).detach()
    product = compressed[0].B.weight @ compressed[0].A.weight
    assert lp.to_dense_(compressed) == ["0", "2"]
    assert [type(layer) for layer in compressed] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(compressed[0].weight, product)
    assert compressed[2].bias is None
    assert not compressed[0].training
    torch.testing.assert_close(compressed(x), expected, atol=1e-5, rtol=1e-5)
    assert lp.to_dense_(compressed) == []


def test_to_dense_by_name(compressed):
    with pytest.raises(lp.PrehabError, match="names: 'nowhere' matches no layer"):
        lp.to_dense_(compressed, ["0", "nowhere"])
    assert isinstance(compressed[0], lp.LowRankLinear)
    assert lp.to_dense_(compressed, "2") == ["2"]
    assert isinstance(compressed[0], lp.LowRankLinear)
    assert type(compressed[2]) is nn.Linear


def test_export_and_trace_give_two_products_for_each_layer(compressed):
    x = torch.randn(4, 32)
    program = torch.export.export(compressed, (x,))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.linear.default"] * 2 + ["aten.relu.default"] + ["aten.linear.default"] * 2
    torch.testing.assert_close(program.module()(x), compressed(x))
    torch.testing.assert_close(torch.jit.trace(compressed, x)(x), compressed(x))


def test_a_sparse_part_in_onnx_runs(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    lp.compress_(model, keep=0.5, factorization=lp.LowRankPlusSparse(0.05, lp.SVD()))
    assert isinstance(model[0], lp.LowRankPlusSparseLinear)
    x = torch.randn(4, 32)
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), atol=1e-4, rtol=1e-4)


def test_onnx_is_plain_products(compressed, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    x = torch.randn(4, 32)
    program = torch.onnx.export(compressed, (x,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert len(kinds) == 5
    assert set(kinds) <= {"Gemm", "MatMul", "Relu"}
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), compressed(x).detach(), atol=1e-4, rtol=1e-4)


def test_the_pivot_layout_in_onnx_is_two_products_and_one_gather(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(lp.PivotLinear.from_linear(nn.Linear(32, 24), 8)).eval()
    x = torch.randn(4, 32)
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert sorted(kinds) == ["Add", "Concat", "Gather", "MatMul", "MatMul"]
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), atol=1e-4, rtol=1e-4)


class Logits(nn.Module):
    """The first output of a model, from positional inputs: ``torch.jit.trace`` takes no more than tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        output = self.model(*inputs)
        return output if isinstance(output, torch.Tensor) else output.logits


def bert_tiny():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=3,
        initializer_range=0.3,
    )
    mask = torch.ones(7, 9, dtype=torch.long)
    mask[2:, 5:] = 0
    return transformers.BertForSequenceClassification(config), {
        "input_ids": torch.randint(50, (7, 9)),
        "attention_mask": mask,
    }


def vit_tiny():
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, num_classes=5, embed_dim=32, depth=1, num_heads=2)
    return model, {"x": torch.randn(7, 3, 16, 16)}


def resnet_tiny():
    model = timm.models.ResNet(
        timm.models.resnet.Bottleneck,
        layers=(1, 1, 1, 1),
        channels=(4, 8, 8, 16),
        stem_width=8,
        num_classes=10,
        zero_init_last=False,  # else no residual branch would do anything
    )
    return model, {"x": torch.randn(7, 3, 32, 32)}


class Case:
    """A compressed model, seven inputs, what it and the dense model make of them, and its exported program."""

    def __init__(self, make):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model, self.inputs = make()
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name.startswith(("head.weight", "fc.weight")):
                        parameter.normal_()  # else the outputs would be as small as the tolerances
        self.model.eval()
        dense = self.outputs(self.inputs)
        lp.compress_(self.model, keep=0.5)
        self.expected = self.outputs(self.inputs)
        assert (self.expected - dense).abs().max() > 0.01  # what is compared below is the compressed model
        self.program = torch.export.export(
            self.model,
            (),
            kwargs=self.rows(3),
            dynamic_shapes={name: {0: torch.export.Dim("batch")} for name in self.inputs},
        )

    def rows(self, count):
        return {name: tensor[:count] for name, tensor in self.inputs.items()}

    def outputs(self, inputs):
        with torch.no_grad():
            return Logits(self.model)(*inputs.values())

    def products(self):
        """The shapes of the weights that are multiplied with: of the factors, and of the layers left alone."""
        return [tuple(layer.weight.shape) for layer in self.model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.fixture(scope="module", params=[bert_tiny, vit_tiny, resnet_tiny], ids=lambda make: make.__name__)
def case(request):
    return Case(request.param)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_models_export_with_a_free_batch_size(case):
    calls = [str(node.target) for node in case.program.graph.nodes if node.op == "call_function"]
    assert sum(call in ("aten.linear.default", "aten.conv2d.default") for call in calls) == len(case.products())
    assert {call.split(".")[0] for call in calls} <= {"aten", "<built-in function getitem>"}
    for count in (1, 3, 7):
        output = case.program.module()(**case.rows(count))
        close(output if isinstance(output, torch.Tensor) else output.logits, case.expected[:count])


def test_models_in_onnx_are_plain_products(case, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(case.program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(written)
    assert [entry.domain for entry in written.opset_import] == [""]
    assert {node.domain for node in written.graph.node} == {""}
    assert not written.functions

    weights = {tensor.name: tuple(tensor.dims) for tensor in written.graph.initializer}
    sizes = [
        prod(weights[name])
        for node in written.graph.node
        if node.op_type in ("Gemm", "MatMul", "Conv")
        for name in node.input
        if len(weights.get(name, ())) >= 2
    ]
    assert sorted(sizes) == sorted(prod(shape) for shape in case.products())  # no factor lost, none multiplied out

    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3, 7):
        (output,) = session.run(None, {name: tensor.numpy() for name, tensor in case.rows(count).items()})
        close(torch.from_numpy(output), case.expected[:count])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_models_in_torchscript(case, tmp_path):
    with torch.no_grad():
        torch.jit.trace(Logits(case.model), tuple(case.rows(3).values())).save(tmp_path / "model.pt")
        traced = torch.jit.load(tmp_path / "model.pt")
        for count in (1, 3, 7):
            close(traced(*case.rows(count).values()), case.expected[:count])


def test_models_back_to_dense_layers(case):
    model = copy.deepcopy(case.model)
    restored = lp.to_dense_(model)
    assert restored
    assert all(type(model.get_submodule(name)) in (nn.Linear, nn.Conv2d) for name in restored)
    assert not any(isinstance(module, lp.LowRankLinear) for module in model.modules())
    with torch.no_grad():
        close(Logits(model)(*case.inputs.values()), case.expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
        lambda: nn.TransformerEncoderLayer(16, 4, 32),
        lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True),
    ],
)
def test_attention_scripts_where_the_dense_one_does(make):
    model = make().eval()
    torch.jit.script(copy.deepcopy(model))
    lp.compress_(model, keep=0.6)
    assert any(isinstance(module, lp.LowRankMultiheadAttention) for module in model.modules())
    x = [torch.randn(3, 5, 16)] * (2 if isinstance(model, nn.TransformerDecoderLayer) else 1)
    with torch.no_grad():
        close(torch.jit.script(model)(*x), model(*x))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_scripted_attention_understands_masks(need_weights, batch_first):
    layer = lp.LowRankMultiheadAttention(16, 4, {"q_proj": 3, "out_proj": 4}, batch_first=batch_first).eval()
    nn.init.normal_(layer.in_proj_bias)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    x = torch.randn(3, 5, 16) if batch_first else torch.randn(5, 3, 16)
    masks = {"key_padding_mask": padding, "attn_mask": torch.ones(5, 5).triu(1).bool(), "need_weights": need_weights}
    scripted = torch.jit.script(layer)
    for given, settings in ((x, masks), (x[0], {"need_weights": need_weights})):
        found, expected = scripted(given, given, given, **settings), layer(given, given, given, **settings)
        close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None) == (not need_weights)
        if need_weights:
            close(found[1], expected[1])
