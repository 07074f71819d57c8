"""Statistics of compiled code: it sees hooks that come later, is compiled once for them, and not for each batch."""

import copy

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.statistics.collector import Collector


@pytest.mark.parametrize("way", [lambda net, backend: net.compile(backend=backend) or net, torch.compile])
def test_hooks_are_seen_and_compiled_once(way):
    torch.compiler.reset()
    compiled = []

    def counting(graph, example):
        compiled.append(graph)
        return graph.forward

    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    same = copy.deepcopy(net)
    run = way(net, backend=counting)
    run(torch.ones(5, 8)).sum().backward()  # compiled before there are hooks
    found, before, inputs = [], [], [torch.randn(5, 8) for _ in range(4)]
    for model, call in ((net, run), (same, same)):
        collector = Collector(lp.find_targets(model), lp.KroneckerSVD().wanted)
        collector.attach()
        for number, x in enumerate(inputs):
            collector.begin_batch(x, number)
            call(x).square().mean().backward()
            collector.end_batch()
            before.append(len(compiled))
        collector.detach()
        found.append(collector.statistics)
    assert before[0] == before[-1] > 1
    ours, expected = found
    for name, statistics in expected.items():
        assert int(ours[name].tokens) == int(statistics.tokens) == 20
        for (_, one), (_, other) in zip(ours[name].tensors(), statistics.tensors(), strict=True):
            torch.testing.assert_close(one, other)
    torch.compiler.reset()
