import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lightning_prehab as lp
from lightning_prehab.errors import TargetError
from lightning_prehab.targets.names import clean_name


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "attn": nn.Linear(8, 8)})
            for _ in range(2)
        )
        self.head = nn.Linear(8, 4)


def test_patterns():
    model = Blocks()
    assert len(lp.find_targets(model)) == 7
    assert list(lp.find_targets(model, "blocks.*.mlp.*")) == [f"blocks.{i}.mlp.{j}" for i in (0, 1) for j in (0, 1)]
    assert list(lp.find_targets(model, ["head", "blocks.0.attn"])) == ["blocks.0.attn", "head"]
    left = lp.find_targets(model, exclude_modules=["*.mlp.*", "head"])
    assert list(left) == ["blocks.0.attn", "blocks.1.attn"]
    assert left.skipped["head"] == "excluded by exclude_modules"


def test_a_pattern_without_a_full_match_is_tried_on_the_ends():
    model = nn.ModuleDict({"model": Blocks()})
    assert list(lp.find_targets(model, "blocks.*.attn")) == ["model.blocks.0.attn", "model.blocks.1.attn"]
    both = nn.ModuleDict({"head": nn.Linear(8, 8), "model": Blocks()})
    assert list(lp.find_targets(both, "head")) == ["head"]


def test_a_projection_to_a_vocabulary_is_cut_only_if_it_is_named():
    with torch.device("meta"):
        model = nn.ModuleDict({"body": nn.Linear(8, 30_000), "lm_head": nn.Linear(8, 32_000)})
    targets = lp.find_targets(model)
    assert list(targets) == ["body"]
    assert targets.skipped == {
        "lm_head": "the Gram matrix of its 32,000 features takes 4.1 GB; name it to cut it all the same"
    }
    assert list(lp.find_targets(model, ["lm_*"])) == ["lm_head"]
    assert list(lp.find_targets(model, "*")) == ["body", "lm_head"]


def test_nothing_matched_lists_near_names():
    with pytest.raises(
        TargetError, match=r"target_modules: 'blocks.0.attm' matches no layer. Near names: blocks.0.attn"
    ):
        lp.find_targets(Blocks(), "blocks.0.attm")
    with pytest.raises(TargetError, match="exclude_modules: 'nothing' matches no layer"):
        lp.find_targets(Blocks(), exclude_modules="nothing")
    with pytest.raises(TargetError, match="no weight matrices"):
        lp.find_targets(nn.Sequential(nn.ReLU()))
    with pytest.raises(TargetError, match="has no layer to cut .*excluded"):
        lp.find_targets(Blocks(), exclude_modules="*")


class AttentionOfMine(nn.MultiheadAttention):
    """What it computes is not known."""


def test_everything_left_is_listed_with_its_reason():
    embedding = nn.Embedding(10, 8)
    tied = nn.Linear(8, 10, bias=False)
    tied.weight = embedding.weight
    pruned = nn.Linear(8, 8)
    prune.l1_unstructured(pruned, "weight", 0.5)
    model = nn.ModuleDict(
        {
            "ok": nn.Linear(8, 8),
            "embedding": embedding,
            "tied": tied,
            "pruned": pruned,
            "normed": parametrizations.weight_norm(nn.Linear(8, 8)),
            "conv": nn.ConvTranspose2d(3, 8, 3),
            "attention": AttentionOfMine(8, 2),
            "narrow": nn.Linear(8, 1),
            "low": lp.LowRankLinear(8, 8, 2),
            "lazy": nn.LazyLinear(8),
            "norm": nn.LayerNorm(8),
        }
    )
    targets = lp.find_targets(model)
    assert list(targets) == ["ok"]
    reasons = {
        "embedding": "embeddings",
        "tied": "tied to another layer",
        "pruned": "pruned or normalized",
        "normed": "parametrized",
        "conv": "ConvTranspose2d is not a layer kind",
        "attention": "AttentionOfMine is not a layer kind",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
        "narrow": r"no rank saves parameters (1x8)",
        "lazy": "LazyLinear",
        "low": "low-rank already; to_dense_",
    }
    assert set(targets.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in targets.skipped[name]
    with pytest.raises(TargetError, match="Layer 'tied' .Linear. cannot be cut: its weight is tied"):
        lp.find_targets(model, ["ok", "tied"])


def test_shared_module_appears_once_and_is_not_tied():
    layer = nn.Linear(8, 8)
    assert list(lp.find_targets(nn.ModuleDict({"a": layer, "b": layer}))) == ["a"]


def test_the_name_of_a_compiled_module_is_clean():
    assert clean_name("_orig_mod.net._orig_mod.0.weight") == "net.0.weight"
    model = nn.ModuleDict({"net": torch.compile(nn.Sequential(nn.Linear(8, 8)), backend="eager")})
    assert list(lp.find_targets(model)) == ["net.0"]


def test_model_parameters_counts_shared_ones_once():
    layer = nn.Linear(8, 8)
    assert lp.find_targets(nn.ModuleDict({"a": layer, "b": layer})).model_parameters == 72


def test_the_root_itself_and_recurrent_layers():
    with pytest.raises(TargetError, match=r"the model itself cannot be replaced; wrap it"):
        lp.find_targets(nn.Linear(8, 8))
    targets = lp.find_targets(nn.ModuleDict({"rnn": nn.LSTM(8, 8), "head": nn.Linear(8, 8)}))
    assert "LSTM is not a layer kind" in targets.skipped["rnn"]


def test_stacked_experts_are_listed_with_the_reason():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, 8, 16))
            self.down = nn.Parameter(torch.zeros(4, 16, 8))
            self.scale = nn.Parameter(torch.zeros(4, 1, 1))
            self.token = nn.Parameter(torch.zeros(1, 1, 8))

    model = nn.ModuleDict({"experts": Experts(), "gate": nn.Linear(16, 16)})
    reason = "it holds stacked matrices (up: 4x8x16, down: 4x16x8), which are not cut"
    assert lp.find_targets(model).skipped == {"experts": reason}
    scale = nn.Module()
    scale.layer_scale = nn.Parameter(torch.zeros(96, 1, 1))
    assert lp.find_targets(nn.ModuleDict({"scale": scale, "fc": nn.Linear(16, 16)})).skipped == {}
