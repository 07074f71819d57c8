"""A LLaMA with random weights, small enough for any test."""

from typing import Any

import transformers


def llama(**settings: Any) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).eval()
