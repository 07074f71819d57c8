"""Models that people bring, at random initialization and tiny."""

import timm
import torch
import transformers

import lightning_prehab as lp


def test_timm_vision_transformer():
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=2)
    images = torch.randn(64, 3, 16, 16)
    report = lp.compress_(model, keep=0.4, batches=images.split(16), exclude_modules="head")
    assert report.keep <= 0.4
    assert set(report.plan.skipped) == {"head"}
    model(images).sum().backward()
    assert model.blocks[0].attn.qkv.A.weight.grad is not None


def test_bert_with_padding_trains_on():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    ids, mask = torch.randint(50, (40, 9)), torch.ones(40, 9, dtype=torch.long)
    mask[:, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, (40,))}
    statistics = lp.collect_statistics(model, lp.find_targets(model, "*.query"), [batch])
    assert {int(layer.tokens) for layer in statistics.values()} == {40 * 5}
    report = lp.compress_(model, keep=0.5, batches=[batch])
    assert report.keep <= 0.5
    assert not any("dense" in name for name in report.plan.skipped)
    model(**batch).loss.backward()


def test_gpt2_is_cut_and_lists_what_it_leaves():
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(50, (40, 9))
    report = lp.compress_(model, keep=0.5, batches=[{"input_ids": ids, "labels": ids}])
    assert list(report.ranks) == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert report.plan.skipped == {
        "transformer.wte": "embeddings are looked up, not multiplied",
        "transformer.wpe": "embeddings are looked up, not multiplied",
        "lm_head": "its weight is tied to another layer",
    }
    assert model.lm_head.weight is model.transformer.wte.weight
    model(ids, labels=ids).loss.backward()
    assert model.transformer.h[0].attn.c_attn.A.weight.grad is not None
    assert model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
