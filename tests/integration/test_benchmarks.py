"""Benchmarks that nobody has run for long still run: a small part of each that needs no data."""

import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark_named(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path, benchmark_named):
    assert benchmark_named(path.stem).__doc__


def test_what_a_penalty_costs(benchmark_named):
    module = benchmark_named("penalty_overhead")
    for space in module.SPACES:
        block = module.Block(64, 128, fused=False)
        for regularizer in module.REGULARIZERS.values():
            layers = module.layers_of(block, space)
            assert len(layers) == 6
            before = [layer.parameter.detach().clone() for layer in layers]
            module.calls(regularizer, layers)()
            changed = [not torch.equal(b, layer.parameter) for b, layer in zip(before, layers, strict=True)]
            assert not any(changed) or all(changed)
        if space == "activation":
            module.authors_stable_rank(layers)
            module.authors_nuclear_norm(layers)


def test_what_statistics_cost(benchmark_named):
    module = benchmark_named("calibration_overhead")

    def vision():
        return module.Vision(module.VisionTransformer(16, 8, depth=1, embed_dim=16, num_heads=2, num_classes=10), 16, 4)

    for row in module.METHODS:
        assert len(module.on_steps(vision, row, 1)) == 1
    ratios = module.own_pass(lambda: module.llama(2, 8, layers=1, width=16, hidden=32), 1)
    assert module.shown(module.OWN_PASS, ratios).endswith("passes")


def test_the_paths_of_the_gate_are_there():
    named = re.findall(r"\btests/[\w/.]+", (ROOT / ".ci" / "run").read_text())
    assert len(named) >= 5
    assert [path for path in named if not (ROOT / path).exists()] == []
