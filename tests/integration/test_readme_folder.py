"""The commands of the README for a Hugging Face folder, and the Python after them, as a newcomer types them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_prehab.cli import main
from lightning_prehab.cli.arguments import parse

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TEXT = "the cat sat on the mat\na dog ran\nthe dog sat on a cat and ran and ran\n" * 20


@pytest.fixture
def model_folder(tmp_path, monkeypatch) -> Path:
    """A language model with its tokenizer, and text, in the current folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from tests.tiny_llama import llama

    monkeypatch.chdir(tmp_path)
    words = ["[PAD]", "[UNK]", *sorted(set(TEXT.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        chat_template="{{ messages[0]['content'] }}",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained("my-model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama().save_pretrained("my-model")
    Path("lines.txt").write_text(TEXT)
    return tmp_path


def test_commands_in_a_sentence_are_understood():
    found = re.findall(r"`lightning-prehab (compress .*?)`", README.replace("\n", " "))
    assert len(found) >= 2
    for command in found:
        words = [word if word != "lines.txt" else __file__ for word in shlex.split(command)]
        parse([*words, *(["some", "--output", "small"] if words[1] == "--offload" else [])])


def test_the_commands_and_the_python_after_them(model_folder, capsys):
    commands = re.findall(r"^lightning-prehab (.*)$", README, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["plan", "compress", "report", "bench"]
    for command in commands:
        words = shlex.split(command)
        if words[0] == "compress":  # in a process of its own; the others here, where all is imported already
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
            program = [sys.executable, "-m", "lightning_prehab", *words]
            run = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
            assert run.returncode == 0, run.stderr[-3000:]
        else:
            assert main(words) == 0, command
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (after,) = (block for block in blocks if 'from_pretrained("small")' in block)
    capsys.readouterr()
    exec(compile(after, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()
    assert transformers.AutoTokenizer.from_pretrained("small").chat_template
