"""The blocks of a model are run as the model runs them, or the model is refused with the reason."""

import json

import pytest
import torch
from torch import nn

import lightning_prehab as lp

pytest.importorskip("transformers")

import transformers

from lightning_prehab.offload.chain import Chain
from lightning_prehab.offload.skeleton import Skeleton, Source
from tests.offload.folders import MODELS, SIZES, batches, dense

IDS = {"input_ids": torch.arange(8)[None]}


def albert() -> nn.Module:
    return transformers.AlbertModel(transformers.AlbertConfig(**SIZES, embedding_size=16))


def bloom() -> nn.Module:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=48, d_model=32, d_ff=64, d_kv=8, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("name", MODELS)
def test_a_chain_gives_what_the_model_gives(name, tmp_path):
    kind = dense(name, tmp_path)
    model = kind.from_pretrained(tmp_path, dtype="auto").eval()
    skeleton = Skeleton(Source(tmp_path))
    chain = Chain(skeleton)
    batch = batches(2)[1]
    entrance = chain.enter(batch)
    chain.rest()
    states = entrance.states
    with torch.no_grad():
        for number, block in enumerate(chain.blocks):
            with skeleton.loaded(block):
                states = chain.run(number, states, entrance.calls[number])
        assert all(tensor.isnan().all() for tensor in skeleton.model.parameters())  # nothing stays in memory
        output = chain.leave(batch, states)
        chain.rest()
        torch.testing.assert_close(output.logits, model(**batch).logits)
    assert all(tensor.isnan().all() for tensor in skeleton.model.parameters())
    assert all(parameter.requires_grad for parameter in skeleton.model.parameters())


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (albert, IDS, "AlbertModel cannot be run block by block"),
        (bloom, IDS, "cannot be run block by block: 'transformer.h.0' returns more than hidden states"),
        (t5, {**IDS, "decoder_input_ids": IDS["input_ids"]}, "cannot be run block by block"),
        (mixtral, IDS, "lays the weights out in another way than the model does"),
    ],
)
def test_what_cannot_be_driven_is_refused(model, batch, message, tmp_path):
    model().save_pretrained(tmp_path / "dense")
    with pytest.raises(lp.PrehabError, match=message):
        lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, [batch], progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_something_between_two_blocks_is_seen(tmp_path):
    dense("llama", tmp_path)
    skeleton = Skeleton(Source(tmp_path))
    skeleton.model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1.0, *args[1:]))
    with pytest.raises(lp.PrehabError, match="'model.layers.1' is given something else than what 'model.layers.0'"):
        Chain(skeleton).enter(IDS)


def test_under_autocast_the_states_keep_their_dtype(tmp_path):
    dense("llama", tmp_path)
    chain = Chain(Skeleton(Source(tmp_path)))
    states, call = torch.randn(2, 8, 32), chain.enter(IDS).calls[0]
    chain.blocks[0].forward = lambda *args, **_: nn.functional.linear(args[0], torch.eye(32))
    with torch.autocast("cpu", torch.bfloat16):
        assert chain.run(0, states, call).dtype == torch.float32


def test_the_dtype_is_that_of_the_config_or_else_of_the_file(tmp_path):
    dense("half a llama", tmp_path)
    assert Skeleton(Source(tmp_path)).model.dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_bytes())
    for dtype, expected in (("float16", torch.float16), (None, torch.bfloat16)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        skeleton = Skeleton(Source(tmp_path))
        assert skeleton.model.dtype == expected
        with skeleton.loaded(skeleton.model):
            loaded = type(skeleton.model).from_pretrained(tmp_path, dtype="auto").state_dict()
            assert all(torch.equal(tensor, loaded[name]) for name, tensor in skeleton.model.state_dict().items())


def test_a_folder_that_lacks_something_is_refused(tmp_path):
    dense("llama", tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[-1].rename(tmp_path / "elsewhere")
    with pytest.raises(lp.PrehabError, match=f"lacks {files[-1].name}, which its index names"):
        Source(tmp_path)
    (tmp_path / "elsewhere").rename(files[-1])
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": 48', '"vocab_size": 50'))
    with pytest.raises(lp.PrehabError, match="is \\[48, 32\\] in model-0.* and \\[50, 32\\] in LlamaForCausalLM"):
        Skeleton(Source(tmp_path))
    (tmp_path / "config.json").write_text(config.replace("LlamaForCausalLM", "MyOwn"))
    with pytest.raises(lp.PrehabError, match="config.json names 'MyOwn'"):
        Skeleton(Source(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(lp.PrehabError, match="config.json cannot be read"):
        Skeleton(Source(tmp_path))
