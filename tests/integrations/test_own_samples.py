"""Text that a language model writes by itself."""

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, NumericalError, UnsupportedError
from lightning_prehab.integrations import own_samples as module
from lightning_prehab.progress import listening
from tests.tiny_llama import llama

transformers = pytest.importorskip("transformers")
VOCABULARY, LENGTH = 48, 12


class Tokenizer:
    """What is asked of one."""

    def __init__(self, bos=1, eos=2, size=VOCABULARY):
        self.bos_token_id, self.eos_token_id, self.all_special_ids, self.size = bos, eos, [0, 1, 2], size

    def __len__(self):
        return self.size


def tiny(kind="llama", **settings):
    config = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | settings
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            return llama()
        if kind == "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return KINDS[kind][0](KINDS[kind][1](**config | sizes | KINDS[kind][2])).eval()


#: One for each way to remember what was read: keys and values, in a window, with linear biases, a state.
KINDS = {
    "llama": (None, None, {}),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {}),
    "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, {}),
    "mistral": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        {"sliding_window": 4, "num_key_value_heads": 2},
    ),
    "bloom": (transformers.BloomForCausalLM, transformers.BloomConfig, {}),
    "mamba": (transformers.MambaForCausalLM, transformers.MambaConfig, {}),
}


def by_hand(model, sequences, length, firsts, ends=(2,), seed=0, temperatures=None):
    """Without a cache, one sequence after the other, the whole text anew for each token."""
    drawn = torch.rand(sequences, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    texts = []
    for row in drawn:
        text = [firsts[int(row[0] * len(firsts))]]
        for place in range(1, length):
            if text[-1] in ends:
                text.append(firsts[int(row[place] * len(firsts))])
                continue
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[0, -1].double()
            heat = 1.0 if temperatures is None else temperatures[place]
            total = (logits / heat).softmax(-1).cumsum(-1)
            text.append(int((total <= row[place] * total[-1]).sum()))
        texts.append(text)
    return torch.tensor(texts)


def ids(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_gives_what_reading_all_of_it_anew_gives(kind):
    model = tiny(kind)
    found = lp.own_samples(model, Tokenizer(), 3, LENGTH, batch_size=2, dtype=torch.float32, progress=False)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, LENGTH), (1, LENGTH)]
    assert all(torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"])) for batch in found)
    assert torch.equal(ids(found), by_hand(model, 3, LENGTH, [1]))
    assert len(set(ids(found).flatten().tolist())) > 10


def test_texts_that_end_go_on_with_another_one():
    model = tiny()
    model.generation_config.eos_token_id = [2, 7, 8, 9, 10, 11]
    found = ids(lp.own_samples(model, Tokenizer(), 4, 20, dtype=torch.float32, progress=False))
    ends = torch.isin(found[:, :-1], torch.tensor([2, 7, 8, 9, 10, 11]))
    assert ends.sum() >= 4
    assert (found[:, 1:][ends] == 1).all()
    assert torch.equal(found, by_hand(model, 4, 20, [1], {2, 7, 8, 9, 10, 11}))


@pytest.mark.parametrize(
    ("first", "bos", "expected"),
    [(None, 1, {1}), ("bos", 5, {5}), (7, 1, {7}), (None, None, None), ("any", 1, None)],
)
def test_the_first_token(first, bos, expected):
    model = tiny()
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    found = ids(lp.own_samples(model, Tokenizer(bos), 32, 2, first=first, progress=False))[:, 0].tolist()
    if expected is None:
        assert len(set(found)) > 8
        assert not set(found) & {0, 1, 2}
    else:
        assert set(found) == expected


def test_the_model_knows_the_first_token_where_the_tokenizer_does_not():
    model = tiny()
    model.generation_config.bos_token_id = 9
    assert (ids(lp.own_samples(model, Tokenizer(None), 2, 2, progress=False))[:, 0] == 9).all()


def test_same_seed_same_text_and_nothing_else_moves():
    model = tiny().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [part.training for part in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    config, state = model.generation_config, torch.get_rng_state()
    config.top_k, config.repetition_penalty, config.do_sample = 1, 9.0, True
    one, same, other = (ids(lp.own_samples(model, Tokenizer(), 2, LENGTH, seed=s, progress=False)) for s in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert model.generation_config is config
    assert config.top_k == 1
    assert torch.equal(
        ids(lp.own_samples(model.eval(), Tokenizer(), 2, LENGTH, seed=3, dtype=torch.float32, progress=False)),
        by_hand(model, 2, LENGTH, [1], seed=3),
    )


def test_what_goes_wrong_leaves_the_model_as_it_was():
    model = tiny().train()
    config = model.generation_config
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NumericalError, match="logits are not finite"):
        lp.own_samples(model, Tokenizer(), 2, 4, progress=False)
    assert model.training
    assert model.generation_config is config


def test_tokens_are_drawn_as_often_as_they_are_likely(monkeypatch):
    monkeypatch.setattr(module, "SIDE_BY_SIDE", 4000)
    model = tiny()
    with torch.no_grad():
        expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    found = ids(lp.own_samples(model, Tokenizer(), 4000, 2, dtype=torch.float32, progress=False))[:, 1]
    share = torch.bincount(found, minlength=VOCABULARY) / 4000
    assert (share - expected).abs().max() < 5 * (expected.max() / 4000).sqrt()


def test_a_vocabulary_that_is_padded_is_used_as_far_as_the_tokenizer_knows_it():
    found = ids(lp.own_samples(tiny(), Tokenizer(size=20), 8, LENGTH, progress=False))
    assert 15 < found.max() < 20


@pytest.mark.parametrize("first", [None, "any"])
def test_tokens_that_the_model_has_no_embedding_for_are_left_out(first):
    found = ids(lp.own_samples(tiny(), Tokenizer(bos=None, size=400), 64, 4, first=first, progress=False))
    assert 40 < found.max() < VOCABULARY


def test_temperatures():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight *= 20
    cold = ids(lp.own_samples(model, Tokenizer(), 8, LENGTH, temperature=1e-3, dtype=torch.float32, progress=False))
    assert (cold == cold[0]).all()  # the likeliest text
    falling = [2.0 + (0.5 - 2.0) * min(place / 10, 1.0) for place in range(LENGTH)]
    found = lp.own_samples(model, Tokenizer(), 3, LENGTH, temperature=(2.0, 0.5), dtype=torch.float32, progress=False)
    assert torch.equal(ids(found), by_hand(model, 3, LENGTH, [1], temperatures=falling))


def test_bfloat16_where_it_is_fast(monkeypatch):
    model, seen = tiny(), []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    monkeypatch.setattr(module, "_fast_at_bfloat16", lambda device: True)
    lp.own_samples(model, Tokenizer(), 1, 2, progress=False)
    lp.own_samples(model, Tokenizer(), 1, 2, dtype=torch.float32, progress=False)
    monkeypatch.setattr(module, "_fast_at_bfloat16", lambda device: False)
    lp.own_samples(model, Tokenizer(), 1, 2, progress=False)
    lp.own_samples(model.bfloat16(), Tokenizer(), 1, 2, progress=False)
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]


def test_progress_counts_tokens_to_the_last_one(monkeypatch):
    monkeypatch.setattr(module, "SIDE_BY_SIDE", 2)
    heard = []
    with listening(heard.append):
        lp.own_samples(tiny(), Tokenizer(), 3, 4, progress=False)
    assert {(one.phase, one.total) for one in heard} == {("sample", 12)}
    assert [one.done for one in heard] == sorted(one.done for one in heard)
    assert (heard[0].done, heard[-1].done) == (0, 12)


def test_they_calibrate_a_cut():
    model = tiny()
    report = lp.compress_(model, 0.5, lp.own_samples(model, Tokenizer(), 16, 16, progress=False))
    assert report.plan.factorization == lp.KroneckerSVD()
    assert report.keep <= 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequences": 0}, "sequences must be at least 1"),
        ({"length": 1}, "length must be at least 2"),
        ({"length": 4096}, "at most 2048, the positions of the model"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": (1.0, -1.0)}, "temperature must be positive"),
        ({"first": 48}, "first must be 'bos', 'any' or a token below 48, got 48"),
        ({"first": "BOS"}, "first must be"),
        ({"seed": -1}, "seed must not be negative"),
        ({"seed": 2**64}, "seed must be below"),
        ({"dtype": "bfloat16"}, "dtype must be a floating-point dtype of torch or None, got 'bfloat16'"),
        ({"dtype": torch.int8}, "dtype must be a floating-point dtype"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"tokenizer": None}, "needs the tokenizer of the model, got None"),
    ],
)
def test_what_cannot_be_used(settings, message):
    with pytest.raises(ArgumentError, match=message):
        lp.own_samples(**{"model": tiny(), "tokenizer": Tokenizer(), "progress": False} | settings)


def test_bos_that_nobody_knows():
    model = tiny()
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(ArgumentError, match="neither the tokenizer nor the model knows"):
        lp.own_samples(model, Tokenizer(None), first="bos", progress=False)


def test_models_that_do_not_write():
    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    both = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    for model, message in ((torch.nn.Linear(2, 2), "no model of transformers"), (both, "about a given one only")):
        with pytest.raises(UnsupportedError, match=message):
            lp.own_samples(model, Tokenizer(), progress=False)


def test_a_token_that_begins_and_ends_texts_does_both_at_once():
    """As that of GPT-2: it ends a text, and the next one needs no other to begin with."""
    model = tiny("gpt2")
    found = ids(lp.own_samples(model, Tokenizer(bos=2), 4, 24))
    assert torch.equal(found, by_hand(model, 4, 24, [2], ends=()))
    assert len(found.unique()) > 10
