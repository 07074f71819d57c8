"""Adapters of peft: nobody loses one, whichever came first."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_prehab as lp

peft = pytest.importorskip("peft")

IDS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def llama():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def adapted(model, **settings):
    settings = {"target_modules": ["q_proj", "v_proj"], **settings}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **settings)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_layers_under_an_adapter_are_left_alone_unless_they_are_named():
    model = adapted(llama())
    targets = lp.find_targets(model, exclude_modules="lm_head")
    assert not any("q_proj" in name or "v_proj" in name or "lora" in name for name in targets)
    assert any(name.endswith("k_proj") for name in targets)
    reasons = {name: reason for name, reason in targets.skipped.items() if "q_proj" in name}
    assert len(reasons) == 3  # the base layer and both of the adapter
    assert all("merge it first (merge_and_unload)" in reason for reason in reasons.values())
    assert [name.rpartition("q_proj.")[2] for name in lp.find_targets(model, "q_proj.base_layer")] == ["base_layer"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_that_was_there_before_the_cut_can_be_merged(use_dora):
    model = adapted(llama(), use_dora=use_dora)
    lp.compress_(model, 0.5, exclude_modules="lm_head")
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.01
    close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_into_factors_is_refused_until_they_are_dense_again(use_dora, safe_merge):
    model = adapted(llama(), use_dora=use_dora)
    lp.compress_(model, 0.5, target_modules=["q_proj.base_layer", "v_proj.base_layer"])
    expected = logits(model)
    with pytest.raises(lp.PrehabError, match="The weight of a LowRankLinear .* an adapter that is merged"):
        model.merge_adapter(safe_merge=safe_merge)
    close(logits(model), expected)
    lp.to_dense_(model)
    model.merge_adapter()
    close(logits(model), expected)
    model.unmerge_adapter()
    close(logits(model), expected)


def test_an_adapter_that_was_merged_before_the_cut_is_not_taken_out_silently():
    model = adapted(llama())
    model.merge_adapter()
    lp.compress_(model, 0.9, target_modules="q_proj.base_layer")
    with pytest.raises(lp.PrehabError, match="The weight of a LowRankLinear"):
        model.unmerge_adapter()


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_on_a_compressed_model(use_dora):
    model = llama()
    lp.compress_(model, 0.5, exclude_modules="lm_head")
    base = logits(model)
    model = adapted(model, target_modules="all-linear", use_dora=use_dora)
    expected = logits(model)
    assert (base - expected).abs().max() > 0.01
    with pytest.raises(lp.PrehabError, match="has an adapter of peft on its factors, which would be lost"):
        lp.to_dense_(model)
    model.merge_adapter()
    close(logits(model), expected)
    model.unmerge_adapter()
    close(logits(model), expected)
    merged = model.merge_and_unload()
    close(logits(merged), expected)
    lp.to_dense_(merged)
    close(logits(merged), expected)
