import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lightning_prehab as lp
from lightning_prehab.integrations.huggingface import LowRankConfig, prepare_for_saving
from tests.same_model import assert_same_weights
from tests.tiny_llama import llama

WORKER = Path(__file__).with_name("hf_worker.py")
# from_pretrained leaves the weights where they lie in the file, at any address
pytestmark = pytest.mark.usefixtures("rounded_by_address")
IDS = torch.arange(10).view(2, 5)


def bert():
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16, tie_word_embeddings=False, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config).eval()


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config).eval()


def t5():
    config = transformers.T5Config(
        vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


#: name: model, inputs, arguments of from_pretrained, class that loads, generates
CASES = {
    "bert": (bert, {"input_ids": IDS}, {}, "AutoModelForSequenceClassification", False),
    "gpt2": (gpt2, {"input_ids": IDS}, {}, "AutoModelForCausalLM", True),
    "llama": (llama, {"input_ids": IDS}, {"device_map": "auto"}, "AutoModelForCausalLM", True),
    "llama_tied": (
        lambda: llama(tie_word_embeddings=True).to(torch.bfloat16),
        {"input_ids": IDS},
        {"dtype": torch.bfloat16, "device_map": "cpu"},
        "AutoModelForCausalLM",
        True,
    ),
    "vit": (vit, {"pixel_values": torch.ones(2, 3, 8, 8)}, {}, "AutoModelForImageClassification", False),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, {}, "T5ForConditionalGeneration", False),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, save_all(folder)


@pytest.fixture(scope="module")
def fresh(saved):
    """What a fresh process finds, with and without this package, and without transformers; see the worker."""
    process = subprocess.run(
        [sys.executable, str(WORKER), str(saved[0])], capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.rpartition("RESULT")[2])


def save_all(folder):
    ranks = {}
    for name, (make, inputs, arguments, kind, generates) in CASES.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make()
        lp.compress_(model, keep=0.5)
        with torch.no_grad():
            expected = {"class": kind, "arguments": arguments, "inputs": inputs, "logits": model(**inputs).logits}
        expected["weights"] = model.state_dict()
        if generates:
            expected["tokens"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        model.save_pretrained(folder / name, max_shard_size="10KB")
        torch.save(expected, folder / name / "expected.pt")
        ranks[name] = {n: m.rank for n, m in model.named_modules() if isinstance(m, lp.LowRankLinear)}
    return ranks


def test_round_trip_in_a_fresh_process(saved, fresh):
    ranks = saved[1]
    pytest.importorskip("accelerate")
    assert fresh["imported too early"] is False
    result = fresh["with both"]
    assert set(result) == set(CASES)
    for name, found in result.items():
        assert not isinstance(found, str), f"{name}: {found}"
        assert found["same weights"], name
        assert found["relative difference"] < (5e-2 if found["dtype"] == "torch.bfloat16" else 1e-5), name
        assert found["same tokens"], name
        assert found["ranks"] == ranks[name] != {}
        assert found["shards"] > 1
        assert found["left behind"] == []
    assert result["llama_tied"]["dtype"] == "torch.bfloat16"


def test_without_this_package_it_is_an_error_that_names_it(fresh):
    result = fresh["without this package"]
    assert set(result) == set(CASES)
    for found in result.values():
        assert isinstance(found, str)
        assert "lightning_prehab" in found
        assert "pip install" in found


def test_the_config_file_says_what_is_inside(saved):
    entry = json.loads((saved[0] / "bert" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "lightning_prehab"
    assert entry["format_version"] == 1
    layer = entry["layers"]["bert.encoder.layer.0.attention.self.query"]
    assert layer == {"shape": [32, 32], "rank": 8, "bias": True}


def test_the_base_model_from_the_file_of_one_with_a_head(saved):
    base = transformers.BertModel.from_pretrained(saved[0] / "bert")
    whole = transformers.BertForSequenceClassification.from_pretrained(saved[0] / "bert")
    assert_same_weights(base, whole.bert)
    torch.testing.assert_close(base(IDS).pooler_output, whole.bert(IDS).pooler_output)
    assert isinstance(base.encoder.layer[0].attention.self.query, lp.LowRankLinear)


def test_a_loaded_model_trains_casts_and_saves_again(saved, tmp_path):
    model = transformers.BertForSequenceClassification.from_pretrained(saved[0] / "bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert model.double().dtype == torch.float64
    model.float().save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(again.eval()(IDS).logits, model.eval()(IDS).logits)


def test_a_sparse_part_and_the_model_inside_another_module(tmp_path):
    wrapped = nn.ModuleDict({"model": bert()})
    lp.compress_(wrapped, keep=0.6, factorization=lp.LowRankPlusSparse(0.05, lp.SVD()))
    inner = wrapped["model"]
    inner.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again.bert.encoder.layer[0].output.dense, lp.LowRankPlusSparseLinear)
    assert_same_weights(again, inner)
    torch.testing.assert_close(again(IDS).logits, inner(IDS).logits)


def test_layers_exchanged_by_hand(tmp_path):
    model = bert()
    dense = model.bert.pooler.dense
    model.bert.pooler.dense = lp.LowRankLinear.from_linear(dense, 4)
    prepare_for_saving(model)
    assert list(model.config.quantization_config["layers"]) == ["bert.pooler.dense"]
    model.bert.pooler.dense = dense
    prepare_for_saving(model)
    assert "quantization_config" not in model.config.to_dict()
    assert "fusion_config" not in model.config.to_dict()


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"format_version": 3, "layers": {}}, "version 3"),
        ({"format_version": 1, "layers": {}, "later": 1}, "later"),
        ({"format_version": 1, "layers": {"a": {"shape": [4, 4], "rank": 0}}}, "cannot be read"),
        ({"format_version": 1, "layers": [1]}, "cannot be read"),
    ],
)
def test_entries_that_cannot_be_read(entry, match):
    with pytest.raises(lp.PrehabError, match=match):
        LowRankConfig.from_dict({"quant_method": "lightning_prehab", **entry})


def test_a_layer_that_the_model_does_not_have(saved, tmp_path):
    model = transformers.BertForSequenceClassification.from_pretrained(saved[0] / "bert")
    layers = model.config.quantization_config["layers"]
    layers["bert.encoder.layer.7.output.dense"] = layers["bert.encoder.layer.0.output.dense"]
    model.save_pretrained(tmp_path)
    with pytest.raises(lp.PrehabError, match="layer.7.output.dense"):
        transformers.BertForSequenceClassification.from_pretrained(tmp_path)


def test_works_where_transformers_is_missing(fresh):
    assert "lightning-prehab[hf]" in fresh["without transformers"]
