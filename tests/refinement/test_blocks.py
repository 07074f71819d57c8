"""Which modules are taken for the blocks of a network."""

import pytest
import timm
import torch
import transformers
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import TargetError
from lightning_prehab.refinement.blocks import find_blocks


def config(kind, **sizes):
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.AutoConfig.for_model(kind, vocab_size=50, **{**small, **sizes})


def transformer(kind, **sizes):
    return transformers.AutoModel.from_config(config(kind, **sizes))


MODELS = {
    "llama": (lambda: transformer("llama"), [f"layers.{i}" for i in range(3)]),
    "one layer": (lambda: transformer("llama", num_hidden_layers=1), ["layers.0"]),
    "mixtral, experts inside": (
        lambda: transformer("mixtral", num_local_experts=4, num_key_value_heads=2),
        [f"layers.{i}" for i in range(3)],
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)),
        ["transformer.h.0", "transformer.h.1"],
    ),
    "bert": (lambda: transformer("bert"), [f"encoder.layer.{i}" for i in range(3)]),
    "torch encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        ["layers.0", "layers.1"],
    ),
    "timm vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, img_size=32, num_classes=5),
        ["blocks.0", "blocks.1"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of(name):
    make, expected = MODELS[name]
    model = make()
    found = find_blocks(model)
    assert [one for one, _ in found] == expected
    assert all(model.get_submodule(one) is block for one, block in found)


def test_blocks_are_the_same_after_the_cut():
    model = transformer("llama", num_key_value_heads=2)
    before = [name for name, _ in find_blocks(model)]
    lp.compress_(model, keep=0.5, factorization=lp.SVD())
    assert [name for name, _ in find_blocks(model)] == before


def test_a_model_without_blocks_says_so():
    with pytest.raises(TargetError, match="Sequential has no blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_of_classes_that_alternate_all_are_blocks():
    block = lambda other: nn.Sequential(nn.Linear(4, 4)) if other else nn.TransformerEncoderLayer(4, 1, 4)  # noqa: E731
    model = nn.ModuleList([block(i % 2) for i in range(4)])
    assert [name for name, _ in find_blocks(model)] == ["0", "1", "2", "3"]
    assert torch.is_tensor(next(find_blocks(model)[0][1].parameters()))
