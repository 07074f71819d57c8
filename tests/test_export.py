"""Compressed models as plain graphs, and back to dense layers."""

import pytest
import torch
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
    torch.testing.assert_close(program.module()(x), compressed(x), atol=0, rtol=0)
    torch.testing.assert_close(torch.jit.trace(compressed, x)(x), compressed(x), atol=0, rtol=0)


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
