"""Blocks and kinds, for the names that real models have."""

import pytest

from lightning_prehab.plan.layer_plan import LayerPlan
from lightning_prehab.report.heat_map import heat_map


def mapped(names):
    found = heat_map(LayerPlan(name, 4, 4, 1) for name in names)
    return None if found is None else (list(found.blocks.values()), list(found.kinds.values()))


EXPERTS = [f"layers.{i}.moe.experts.{j}.{w}" for i in range(2) for j in range(8) for w in ("w1", "w2")]
CASES = {
    "bert": (
        [
            f"bert.encoder.layer.{i}.{k}"
            for i in range(2)
            for k in ("attention.output.dense", "output.dense", "self.key")
        ],
        (["0", "1"], ["attention.output.dense", "output.dense", "key"]),
    ),
    "resnet": (
        ["conv1", *(f"layer{i}.{j}.conv{k}" for i in (1, 2) for j in (0, 1) for k in (1, 2)), "layer2.0.downsample.0"],
        (["layer1.0", "layer1.1", "layer2.0", "layer2.1"], ["conv1", "conv2", "downsample.0"]),
    ),
    "swin": (
        [f"layers.{i}.blocks.{j}.{k}" for i in range(2) for j in range(3) for k in ("qkv", "proj")],
        ([f"layers.{i}.blocks.{j}" for i in range(2) for j in range(3)], ["qkv", "proj"]),
    ),
    "experts": (
        [*(f"layers.{i}.attn.{k}" for i in range(2) for k in "qkvo"), *EXPERTS],
        (["0", "1"], ["q", "k", "v", "o", "w1", "w2"]),
    ),
    "encoder and decoder": (
        [f"{part}.block.{i}.{k}" for part in ("encoder", "decoder") for i in range(2) for k in ("q", "k")],
        (["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"], ["q", "k"]),
    ),
    "diffusion": (
        [f"blocks.{i}.{k}" for i in range(3) for k in ("attn1.to_q", "attn2.to_q", "ff.net.0", "ff.net.2")],
        (["0", "1", "2"], ["attn1.to_q", "attn2.to_q", "net.0", "net.2"]),
    ),
    "numbers only": (["0", "2", "4"], None),
    "one block": (["net.0.a", "net.0.b"], None),
    "one kind": (["net.0.a", "net.1.a"], None),
    "nothing": ([], None),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_and_kinds(case):
    names, expected = CASES[case]
    assert mapped(names) == expected


def test_every_layer_of_a_block_is_in_one_cell():
    found = heat_map(LayerPlan(name, 4, 4, 1) for name in CASES["experts"][0])
    assert sum(map(len, found.cells.values())) == len(CASES["experts"][0])
    assert {len(layers) for layers in found.cells.values()} == {1, 8}
