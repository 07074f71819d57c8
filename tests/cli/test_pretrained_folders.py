"""What ``compress`` writes for a Hugging Face folder is one too, with all that lies beside the weights."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.cli import main
from lightning_prehab.cli.outputs import how_to_load
from lightning_prehab.layers.linear import LowRankLayer
from tests.tiny_llama import llama

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=48, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4))


def mixtral() -> nn.Module:
    """Its experts lie in files in another way than in memory."""
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


MODELS = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "half a llama": lambda: llama().to(torch.bfloat16),
    "tied bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
    "plain bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "t5": t5,
    "gpt2": gpt2,
    "mixtral": mixtral,
}


def compressed(tmp_path: Path, *options: str) -> Path:
    """The folder that the command line makes of ``tmp_path / "dense"``."""
    assert main(["compress", str(tmp_path / "dense"), "--output", str(tmp_path / "small"), *options]) == 0
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "factors") for name in MODELS), ("llama", "pivot"), ("gpt2", "pivot")]
)
def test_every_loader_gives_the_same_model(name, layout, tmp_path, capsys):
    dense = MODELS[name]()
    dense.save_pretrained(tmp_path / "dense")
    folder = compressed(tmp_path, "--keep", "0.4", "--layout", layout)
    reference = type(dense).from_pretrained(tmp_path / "dense")
    lp.compress_(reference, 0.4, layout=layout)
    assert any(isinstance(module, LowRankLayer) for module in reference.modules())
    again, loading = type(dense).from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    old_way = lp.load_compressed(folder, type(dense).from_pretrained(tmp_path / "dense"))
    for found in (again, old_way):
        ours, theirs = found.state_dict(), reference.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    shared = len({p.data_ptr() for p in reference.state_dict().values()})
    assert len({p.data_ptr() for p in again.state_dict().values()}) == shared  # tied weights are tied
    assert again.dtype == dense.dtype

    lines = capsys.readouterr().out.split("To load it:\n")[1].splitlines()
    assert len(lines) == 3
    names: dict[str, object] = {}
    exec("\n".join(line.strip() for line in lines), names)  # what is printed can be typed
    assert type(names["model"]) is type(dense)


def test_the_weights_are_there_once(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    folder = compressed(tmp_path)
    (weights,) = folder.glob("*.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert size < weights.stat().st_size < 1.2 * size + 10_000
    others = [path for path in folder.iterdir() if path != weights]
    assert sum(path.stat().st_size for path in others) < 100_000


#: Files beside the weights, and whether they belong into the new folder.
BESIDE = {
    "generation_config.json": True,
    "preprocessor_config.json": True,
    "chat_template.jinja": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "special_tokens_map.json": True,
    "added_tokens.json": True,
    "vocab.txt": True,
    "merges.txt": True,
    "spiece.model": True,
    "tokenizer.model": True,
    "sentencepiece.bpe.model": True,
    "modules.json": True,
    "config_sentence_transformers.json": True,
    "sentence_bert_config.json": True,
    "1_Pooling/config.json": True,
    "additional_chat_templates/tool.jinja": True,
    "tokenization_own.py": True,
    "LICENSE": True,
    "README.md": False,
    "pytorch_model.bin": False,
    "optimizer.pt": False,
    "lines.txt": False,
    "trainer_state.json": False,
    ".git/config": False,
    "onnx/model.onnx": False,
}


def test_what_lies_beside_the_weights(tmp_path):
    dense = tmp_path / "dense"
    llama().save_pretrained(dense)
    for name in BESIDE:
        (dense / name).parent.mkdir(exist_ok=True)
        if not (dense / name).exists():
            (dense / name).write_text("{}")
    folder = compressed(tmp_path)
    assert {name for name in BESIDE if (folder / name).exists()} == {name for name in BESIDE if BESIDE[name]}
    assert {name for name in BESIDE if (dense / name).exists()} == set(BESIDE)
    written = {path.name for path in folder.iterdir() if path.name not in {name.split("/")[0] for name in BESIDE}}
    (weights,) = folder.glob("*.safetensors")
    assert written == {"config.json", "model.safetensors.index.json", "report.json", "structure.json", weights.name}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_new_files_and_of_copies(tmp_path, mask):
    dense = tmp_path / "dense"
    llama().save_pretrained(dense)
    (dense / "tokenizer.json").write_text("{}")
    (dense / "tokenizer.json").chmod(0o640)
    old = os.umask(mask)
    try:
        folder = compressed(tmp_path)
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes.pop("tokenizer.json") == 0o640
    modes.pop("generation_config.json")
    assert modes
    assert set(modes.values()) == {0o666 & ~mask}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


FRESH = """
import sys
import lightning_prehab
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer.apply_chat_template([{"role": "user", "content": "a b c"}], return_tensors="pt", return_dict=True)
print(model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist())
"""


def test_a_fresh_process_speaks_as_the_model_in_memory(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    dense = tmp_path / "dense"
    llama(tie_word_embeddings=True).save_pretrained(dense)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("?abcdefgh")}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="?", unk_token="?")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} h {% endfor %}"
    tokenizer.save_pretrained(dense)
    (tmp_path / "lines.txt").write_text("a b c d\ne f g h\n" * 20)
    folder = compressed(tmp_path, "--data", str(tmp_path / "lines.txt"), "--keep", "0.4", "--evaluate", "0")

    encoded = tokenizer(["a b c d", "e f g h"] * 20, padding=True, return_tensors="pt")
    batches = [
        dict(zip(encoded, part, strict=True)) for part in zip(*(t.split(8) for t in encoded.values()), strict=True)
    ]
    reference = transformers.AutoModelForCausalLM.from_pretrained(dense)
    lp.compress_(reference, 0.4, batches)
    ids = tokenizer("a b c h", return_tensors="pt")
    tokens = reference.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist()
    run = subprocess.run([sys.executable, "-c", FRESH, folder], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == tokens


def test_a_lightning_checkpoint_says_how_it_is_loaded(tmp_path):
    lines = how_to_load(nn.Linear(2, 2), tmp_path / "last.ckpt", Path("small"), "some.module.Lit")
    assert f'lp.load_compressed("small", lp.load_from_checkpoint(Lit, "{tmp_path}/last.ckpt"))' in lines
    assert "from some.module import Lit" in lines
