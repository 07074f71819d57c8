"""Latencies by what is called on what; no time is asserted."""

import copy
import json

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, CheckpointError
from lightning_prehab.plan import timing
from lightning_prehab.report import latency
from lightning_prehab.report.latency import BatchLatency, ModelLatency, compare_latencies


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-6)


class Shared(nn.Module):
    """Calls one layer twice, one by keyword, reads the weight of a third, and drops out."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.read = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.twice(self.drop(self.twice(torch.tanh(self.first(input=x)))))
        return nn.functional.linear(x, self.read.weight)


@pytest.fixture
def pair():
    dense = Shared().train()
    low = copy.deepcopy(dense)
    for name in ("first", "twice", "read"):
        setattr(low, name, lp.LowRankLinear.from_linear(getattr(dense, name), rank=3))
    low.first.forward = lambda input: type(low.first).forward(low.first, input)
    return dense, low


def test_what_is_measured(pair, monkeypatch):
    dense, low = pair
    outputs = []

    def fake(calls, device):
        assert not torch.is_grad_enabled()
        assert not dense.training
        assert not low.training
        assert not dense.first._forward_pre_hooks or not dense.twice._forward_pre_hooks
        outputs.append([call() for call in calls.values()])
        return dict.fromkeys(calls, 0.0) | {None: 2.0 * len(outputs), 1: 1.0 * len(outputs)}

    monkeypatch.setattr(latency, "time_calls", fake)
    dense.first.weight.grad = torch.ones(16, 12)
    x = torch.randn(5, 12)
    found = compare_latencies(dense, low, [x, (x[:2],)])

    assert found.batches[0] == BatchLatency(5, 6.0, 3.0, {"first": (2.0, 1.0), "twice": (4.0, 2.0)})
    assert found.batches[1] == BatchLatency(2, 12.0, 6.0, {"first": (8.0, 4.0), "twice": (10.0, 5.0)})
    assert found.largest is found.batches[0]
    count = sum(p.numel() for p in dense.parameters()), sum(p.numel() for p in low.parameters())
    assert (found.parameters_before, found.parameters_after) == count
    hidden = torch.tanh(nn.functional.linear(x, dense.first.weight, dense.first.bias))
    expected = nn.functional.linear(hidden, dense.twice.weight, dense.twice.bias)
    torch.testing.assert_close(outputs[1][0], expected)
    torch.testing.assert_close(outputs[1][1], nn.functional.linear(hidden, low.twice.weight, low.twice.bias))
    torch.testing.assert_close(outputs[2][0], dense.eval()(x))
    torch.testing.assert_close(outputs[2][1], low.eval()(x))


def test_models_stay_as_they_are(pair):
    dense, low = pair
    dense.first.weight.grad = torch.ones(16, 12)
    found = compare_latencies(dense, low, [torch.randn(5, 12)], forward=lambda model, batch: model(batch * 2))
    assert found.batches[0].dense_seconds > 0
    assert dense.training
    assert low.training
    assert torch.equal(dense.first.weight.grad, torch.ones(16, 12))
    assert all(not module._forward_pre_hooks for module in dense.modules())
    with pytest.raises(ArgumentError, match="shapes cannot"):
        compare_latencies(dense, low, [torch.randn(5, 11)])
    assert all(not module._forward_pre_hooks for module in dense.modules())
    assert dense.training


def test_a_layer_of_several_is_one():
    """What takes the place of a whole module is measured as a whole, not by its parts."""

    class Wrapped(nn.Sequential):
        pass

    dense = nn.Sequential(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), nn.Linear(4, 4))
    low = copy.deepcopy(dense)
    low[0] = Wrapped(lp.LowRankLinear.from_linear(dense[0][0], 2), copy.deepcopy(dense[0][1]))
    assert list(compare_latencies(dense, low, [torch.randn(3, 12)]).batches[0].layers) == ["0"]


def test_wrong_arguments(pair):
    with pytest.raises(ArgumentError, match="no batches to measure"):
        compare_latencies(*pair, [])
    with pytest.raises(ArgumentError, match="dense model is on cpu, the compressed one on meta"):
        compare_latencies(pair[0], nn.Linear(2, 2, device="meta"), [torch.ones(1, 12)])


def test_files(pair, tmp_path):
    found = compare_latencies(*pair, [torch.randn(5, 12)])
    data = json.loads(json.dumps(found.to_dict()))
    assert ModelLatency.from_dict(data) == found
    (tmp_path / "bench.json").write_text(json.dumps(data))
    assert ModelLatency.load_json(tmp_path / "bench.json") == found
    del data["latency"][0]["layers"]
    assert ModelLatency.from_dict(data).batches[0].layers == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("threads"),
        lambda d: d.update(latency=[]),
        lambda d: d.update(latency="x"),
        lambda d: d.update(parameters_dense=-1),
        lambda d: d["latency"][0].update(dense_seconds=0.0),
        lambda d: d["latency"][0].update(dense_seconds=float("nan")),
        lambda d: d["latency"][0].update(compressed_seconds="fast"),
        lambda d: d["latency"][0].update(batch_size=True),
        lambda d: d["latency"][0].update(layers=[{"name": "a"}]),
        lambda d: d["latency"][0].update(layers=3),
    ],
)
def test_damaged_files(change, tmp_path):
    data = ModelLatency("cpu", 1, 9, 8, (BatchLatency(1, 0.5, 0.25, {"a": (0.1, 0.2)}),)).to_dict()
    ModelLatency.from_dict(data)
    change(data)
    (tmp_path / "bench.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"bench.json holds no latencies: .*Write it with: bench"):
        ModelLatency.load_json(tmp_path / "bench.json")


@pytest.mark.parametrize("text", [None, "", "[1, 2]", "{", "[" * 100_000])
def test_other_files(text, tmp_path):
    if text is not None:
        (tmp_path / "bench.json").write_text(text)
    with pytest.raises(CheckpointError, match="bench.json holds no latencies"):
        ModelLatency.load_json(tmp_path / "bench.json")


def test_in_the_report(mlp):
    report = lp.compress_(mlp, 0.5)
    name = next(name for name, rank in report.ranks.items() if rank is not None)
    counts = report.parameters_before, report.parameters_after
    batches = BatchLatency(8, 0.004, 0.002, {name: (0.003, 0.001)}), BatchLatency(1, 0.004, 0.002)
    measured = ModelLatency("cpu", 1, *counts, batches)
    assert "ms" not in report.table().columns
    full = report.with_latency(measured)
    assert "\nforward pass of 8 rows 4.000 -> 2.000 ms on cpu (2.00 times as fast)\n" in str(full)
    cells = {row["layer"]: row.get("ms", "") for row in full.table().rows}
    assert {key: value for key, value in cells.items() if value} == {name: "3.000 -> 1.000"}
    assert lp.CompressionReport.from_dict(json.loads(json.dumps(full.to_dict())), full.plan.factorization) == full
    with pytest.raises(ArgumentError, match=r"model of 9 -> 8 parameters, the report is about [0-9]+ -> "):
        report.with_latency(ModelLatency("cpu", 1, 9, 8, batches))
