"""Models that transformers has loaded from quantized files: ordinary again, or refused before the work."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import lightning_prehab as lp
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.integrations.huggingface import prepare_for_saving
from tests.same_model import assert_same_weights
from tests.tiny_llama import llama

pytestmark = pytest.mark.usefixtures("rounded_by_address")
IDS = torch.arange(10).view(2, 5)
METHODS = sorted(set(AUTO_QUANTIZER_MAPPING) - {"lightning_prehab"})


def marked(method, where=("model", "config")):
    """A model with what quantizers leave on it: those of transformers stay there where they dequantize."""
    model = llama()
    entry = SimpleNamespace(quant_method=method, to_dict=lambda: {"quant_method": method})
    if "model" in where:
        model.hf_quantizer = SimpleNamespace(quantization_config=entry)
        model.is_quantized, model.quantization_method = True, method
    if "config" in where:
        model.config.quantization_config = entry
        model.config._is_quantized = True
    return model


def assert_round_trip(model, folder, ids=IDS):
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    assert_same_weights(again, model)
    torch.testing.assert_close(again(ids).logits, expected)
    assert any(isinstance(module, lp.LowRankLinear) for module in again.modules())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", [("model",), ("config",), ("model", "config")])
def test_an_ordinary_model_that_says_it_is_quantized_can_be_cut_and_saved(method, where, tmp_path):
    model = marked(method, where)
    lp.compress_(model, 0.5)
    assert_round_trip(model, tmp_path)
    assert model.half().dtype == torch.float16  # no longer forbidden


class OtherLinear(nn.Linear):
    """Quantizes its input on the way, say."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("odd", ["class", "weight"])
def test_one_that_is_quantized_is_refused_before_the_work(method, odd):
    model = marked(method)
    mlp = model.model.layers[0].mlp
    if odd == "class":
        mlp.up_proj = OtherLinear(32, 64, bias=False)
    else:
        mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    plan = lp.make_plan(lp.find_targets(model), 0.5, lp.SVD())
    seen = []

    def batches():
        seen.append(1)
        yield {"input_ids": IDS}

    for cut in (lambda: lp.compress_(model, 0.5, batches()), lambda: lp.apply_plan_(model, plan)):
        with pytest.raises(UnsupportedError, match=f"quantized with '{method}'.*load it without quantization"):
            cut()
    assert seen == []
    assert not any(isinstance(module, lp.LowRankLinear) for module in model.modules())
    assert model.quantization_method == method


def test_a_class_that_takes_more_than_a_config_is_refused():
    class Mine(transformers.LlamaForCausalLM):
        def __init__(self, config, more):
            super().__init__(config)

    model = Mine(llama().config, 1)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedError, match="'gptq'"):
        lp.compress_(model, 0.5)


def test_a_quantized_teacher_beside_the_model_does_not_matter():
    teacher = marked("gptq")
    teacher.model.layers[0].mlp.up_proj = OtherLinear(32, 64, bias=False)
    both = nn.ModuleDict({"student": llama(), "teacher": teacher})
    lp.compress_(both, 0.5, target_modules="student.model.layers.*")
    assert teacher.quantization_method == "gptq"
    assert both["student"].config.quantization_config["quant_method"] == "lightning_prehab"
    with pytest.raises(UnsupportedError, match="'gptq'"):
        lp.compress_(both, 0.5, target_modules="teacher.model.layers.*")


def test_refused_when_fit_starts(lit, loader, make_trainer):
    lit.language = marked("gptq")
    lit.language.model.layers[0].mlp.up_proj = OtherLinear(32, 64, bias=False)
    trainer = make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1, 0.5)])
    with pytest.raises(UnsupportedError, match="'gptq'"):
        trainer.fit(lit, loader)
    assert lit.losses == []


def test_a_second_cut_and_one_by_hand(tmp_path):
    model = marked("gguf")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = lp.LowRankLinear.from_linear(mlp.up_proj, 4)
    prepare_for_saving(model)
    lp.compress_(model, 0.5, target_modules="model.layers.1.*")
    assert_round_trip(model, tmp_path)


def write_gguf(path):
    """A tiny quantized model, in the way of llama.cpp."""
    gguf = pytest.importorskip("gguf")
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(48)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(48)])
    sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    tensors = {"token_embd": (48, 32), "output": (48, 32), "output_norm": (32,)}
    for block in range(2):
        tensors |= {f"blk.{block}.{name}": size for name, size in sizes.items()}
        tensors |= {f"blk.{block}.attn_norm": (32,), f"blk.{block}.ffn_norm": (32,)}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, size in tensors.items():
        values = generator.standard_normal(size, dtype=np.float32) / 4
        if len(size) == 1:
            writer.add_tensor(f"{name}.weight", values + 1)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_from_a_gguf_file(calibrated, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    lp.compress_(model, 0.5, [{"input_ids": torch.randint(48, (8, 16))}] if calibrated else None)
    assert_round_trip(model, tmp_path / "saved")
