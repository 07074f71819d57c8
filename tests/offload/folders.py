"""Small folders of transformers, and batches for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from lightning_prehab.offload.work import Work
from tests.tiny_llama import llama

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 48}


def opt() -> nn.Module:
    """With projections between the embeddings and the blocks."""
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=48,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
        )
    )


def mistral() -> nn.Module:
    """With a window shorter than the text."""
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    return transformers.MistralForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "half a llama": lambda: llama().to(torch.bfloat16),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)),
    "opt": opt,
    "mistral": mistral,
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
}


def dense(name: str, folder: Path) -> type[nn.Module]:
    """Writes a model with random weights, in several files; the answer is its class."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(folder, max_shard_size="20KB")
    return type(model)


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Some with padding."""
    found = []
    for number in range(count):
        ids = torch.randint(48, (3, 12), generator=torch.Generator().manual_seed(number))
        mask = torch.ones_like(ids)
        mask[0, 8:] = number % 2
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


class Killed(BaseException):
    """In the place of a kill."""


@contextmanager
def killed_after(stages: int, monkeypatch) -> Iterator[list[str]]:
    """Inside, the work ends when so many stages are done, right before the next one is noted."""
    seen: list[str] = []
    finish = Work.finish

    def counting(work: Work, stage: str, note: object = True) -> None:
        if len(seen) == stages:
            raise Killed
        finish(work, stage, note)
        seen.append(stage)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "finish", counting)
        yield seen
