"""Benchmarks that nobody has run for long still run: a small part of each that needs no data."""

import copy
import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

import lightning_prehab as lp
from tests.tiny_llama import llama

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark_named(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path, benchmark_named):
    assert benchmark_named(path.stem).__doc__


def test_what_a_penalty_costs(benchmark_named):
    module = benchmark_named("penalty_overhead")
    for space in module.SPACES:
        block = module.Block(64, 128, fused=False)
        for regularizer in module.REGULARIZERS.values():
            layers = module.layers_of(block, space)
            assert len(layers) == 6
            before = [layer.parameter.detach().clone() for layer in layers]
            module.calls(regularizer, layers)()
            changed = [not torch.equal(b, layer.parameter) for b, layer in zip(before, layers, strict=True)]
            assert not any(changed) or all(changed)
        if space == "activation":
            module.authors_stable_rank(layers)
            module.authors_nuclear_norm(layers)


def test_what_statistics_cost(benchmark_named):
    module = benchmark_named("calibration_overhead")

    def vision():
        return module.Vision(module.VisionTransformer(16, 8, depth=1, embed_dim=16, num_heads=2, num_classes=10), 16, 4)

    for row in module.METHODS:
        assert len(module.on_steps(vision, row, 1)) == 1
    ratios = module.own_pass(lambda: module.llama(2, 8, layers=1, width=16, hidden=32), 1)
    assert module.shown(module.OWN_PASS, ratios).endswith("passes")


def test_the_paths_of_the_gate_are_there():
    named = re.findall(r"\btests/[\w/.]+", (ROOT / ".ci" / "run").read_text())
    assert len(named) >= 5
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.fixture
def rivals(benchmark_named):
    return benchmark_named("smollm2_rivals")


def blocks_of_tokens(rows: int = 8) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(1, 48, (rows, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "labels": part} for part in tokens.split(2)]


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
def test_pruning_keeps_the_largest_entries(rivals, keep):
    model = llama()
    before = {name: layer.weight.detach().clone() for name, layer in lp.find_targets(model).items()}
    kept = rivals.prune_by_magnitude_(model, keep)
    assert keep - 0.01 < kept <= keep
    for name, layer in lp.find_targets(model).items():
        left = layer.weight != 0
        assert torch.equal(layer.weight[left], before[name][left])
        assert before[name][~left].abs().max() < before[name][left].abs().min()


@pytest.mark.parametrize("group", [32, 40])
def test_rounding_leaves_so_many_values_in_a_group_and_changes_nothing_twice(rivals, group):
    model = llama()
    before = {name: layer.weight.detach().clone() for name, layer in lp.find_targets(model).items()}
    rivals.round_again_(model, 2, group)
    once = {name: layer.weight.detach().clone() for name, layer in lp.find_targets(model).items()}
    for name, weight in once.items():
        entries, rounded = (one.flatten().roll(-group // 2) for one in (before[name], weight))
        for old, new in zip(entries.split(group), rounded.split(group), strict=True):
            assert 1 < len(new.unique()) <= 4
            assert (new - old).abs().max() <= 1.001 * (old.max() - old.min()) / 6
    rivals.round_again_(model, 2, group)
    for name, layer in lp.find_targets(model).items():
        torch.testing.assert_close(layer.weight, once[name])


def test_a_model_of_fewer_blocks_still_writes(rivals):
    model = llama()
    model.model.layers = torch.nn.ModuleList(copy.deepcopy(model.model.layers[0]) for _ in range(5))
    model.config.num_hidden_layers = 5
    for layer in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        torch.nn.init.zeros_(layer.weight)  # passes on what it gets
    blocks = list(model.model.layers)
    assert rivals.drop_blocks_(model, 0.8, blocks_of_tokens()) == 0.8
    assert [blocks.index(block) for block in model.model.layers] == [0, 2, 3, 4]
    tokens = blocks_of_tokens()[0]["input_ids"]
    with_cache = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(with_cache, model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, use_cache=False))


def test_the_update_of_svd_llm_trains_one_factor_after_the_other_and_keeps_the_size(rivals, monkeypatch):
    model = llama()
    lp.compress_(model, lp.Recipe(policy=lp.RankRatio(0.5), factorization=lp.SVD()), progress=False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, lp.LowRankLinear)}
    seen = []
    train = rivals.train_

    def spied(model, *rest):
        seen.append({name: (layer.A.weight.detach().clone(), layer.B.weight.clone()) for name, layer in layers.items()})
        train(model, *rest)

    monkeypatch.setattr(rivals, "train_", spied)
    names = set(model.state_dict())
    rivals.update_in_sequence_(model, blocks_of_tokens(), 6, 0)
    assert set(model.state_dict()) == names
    first, second = seen
    for name, layer in layers.items():
        assert torch.equal(first[name][0], second[name][0])  # A rested while B was trained
        assert not torch.equal(first[name][1], second[name][1])
        assert torch.equal(second[name][1], layer.B.weight)
        assert not torch.equal(second[name][0], layer.A.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def study(benchmark_named, tmp_path, monkeypatch):
    """The study of SmolLM2 with a tiny model in its place."""
    module, parts = benchmark_named("smollm2"), benchmark_named("smollm2_parts")

    class Characters:
        """A tokenizer with a token for a character."""

        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [1 + ord(letter) % 47 for letter in text]}

        def apply_chat_template(self, said, **_):
            return {"input_ids": torch.tensor([self(said[0]["content"], add_special_tokens=False)["input_ids"]])}

        def decode(self, tokens, **_):
            return "".join(chr(97 + int(token) % 26) for token in tokens)

    def read_model(device="cpu"):
        assert device == "cpu"
        torch.manual_seed(0)
        return llama(), Characters()

    monkeypatch.setattr(module, "read_model", read_model)
    monkeypatch.setattr(parts, "SEQUENCES", 16)
    monkeypatch.setattr(parts, "TEST", 2)
    monkeypatch.setattr(parts, "LENGTH", 32)
    monkeypatch.setattr(parts, "NEW_TOKENS", 4)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.jsonl")
    letters = "".join(map(chr, torch.randint(97, 123, (3000,), generator=torch.Generator().manual_seed(1)).tolist()))
    for name in ("valid.txt", "test.txt", "input.txt"):
        (tmp_path / name).write_text(letters + name)
    return module, tmp_path


def test_the_study_goes_on_where_it_was(study, capsys, monkeypatch):
    """One calibration and one decomposition for all keeps; the cut is that of compress_; nothing is made twice."""
    module, folder = study
    where = ["smollm2.py", str(folder), "--cache", str(folder / "cache"), "--threads", "1"]
    settings = ["--rows", "dense", "default", "calibrated", "--texts", "wikitext", "--seeds", "0"]

    def run(*keeps: str) -> list[dict[str, object]]:
        monkeypatch.setattr("sys.argv", [*where, *settings, "--keeps", *keeps])
        module.main()
        return [json.loads(line) for line in module.RESULTS.read_text().splitlines()]

    collected = []
    collect = lp.collect_statistics
    monkeypatch.setattr(lp, "collect_statistics", lambda *args, **kw: collected.append(1) or collect(*args, **kw))
    first = run("0.6")
    second = run("0.6", "0.4")
    assert len(collected) == 1
    assert second[: len(first)] == first
    assert [(row["row"], row["keep"]) for row in second] == [
        ("dense", 1.0), ("default", 0.6), ("calibrated", 0.6), ("default", 0.4), ("calibrated", 0.4)
    ]  # fmt: skip
    assert all(row["kept"] <= row["keep"] for row in second)
    rows = second[1]["costs"]
    assert set(rows) == {"calibrate", "decompose", "cut", "evaluate"}
    assert all(part["processor_seconds"] >= 0 for part in rows.values())

    texts = module.Texts(folder, module.read_model()[1])
    model, _ = module.read_model()
    made = json.loads(module.RESULTS.read_text().splitlines()[0])
    assert made["perplexity"]["wikitext"] == pytest.approx(
        module.perplexity(model, texts.scored["wikitext"], half=False), rel=0.02
    )
    printed = capsys.readouterr().out
    assert "| **KroneckerSVD, one budget (default)** |" in printed


@pytest.mark.slow
def test_every_row_of_the_study_can_be_made(study, monkeypatch, capsys):
    module, folder = study
    rows = {"input_ids": torch.randint(1, 48, (20, 32), generator=torch.Generator().manual_seed(2))}
    monkeypatch.setattr(lp, "own_samples", lambda *_, **__: [rows])
    monkeypatch.setattr(lp, "Refinement", partial(lp.Refinement, 1))
    monkeypatch.setattr(module, "STEPS", {"model": 2})
    monkeypatch.setattr(module, "REHAB_STEPS", 1)
    where = [str(folder), "--cache", str(folder / "cache"), "--threads", "1", "--keeps", "0.6", "--seeds", "0"]
    for chosen in (["--texts", "wikitext"], ["--texts", *list(module.TEXTS)[1:], "--rows", "refined"]):
        monkeypatch.setattr("sys.argv", ["smollm2.py", *where, *chosen])
        module.main()
    found = module.stored(module.RESULTS)
    assert {key[0] for key in found} == set(module.ROWS)
    assert {key[:2] for key in found if key[0] == "refined"} == {("refined", text) for text in module.TEXTS}
    for (name, _, _, keep), row in found.items():
        assert name in module.UNCUT or 0.5 <= row["kept"] <= keep, name
        assert ("train" in row["costs"]) == (bool(module.ROWS[name].after)), name
        assert ("rehab" in row["costs"]) == module.ROWS[name].rehab, name
    by_name = {key[0]: row["perplexity"]["wikitext"] for key, row in found.items() if key[1] in (None, "wikitext")}
    assert len(set(by_name.values())) > len(by_name) - 3  # they differ in what they do
    monkeypatch.setattr("sys.argv", ["smollm2.py", "--table"])
    capsys.readouterr()
    module.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    for name, text in module.settings_of(found):  # perplexity and times the dense one, of two texts, and cost
        lines = [line for line in printed if line.startswith(f"| {module.title(name, text)} |")]
        assert len(lines) == {"dense": 2, "rounded": 3, "dense-rehab": 3}.get(name, 5), name
        assert len({line.count("|") for line in lines}) <= 2


def test_calibration_does_not_see_what_is_scored(study):
    module, folder = study
    texts = module.Texts(folder, module.read_model()[1])
    parts = sys.modules["smollm2_parts"]
    assert {name: tuple(blocks.shape) for name, blocks in texts.scored.items()} == dict.fromkeys(
        ("wikitext", "shakespeare"), (2, 32)
    )
    play = (folder / "input.txt").read_text()
    behind = int(parts.TRAIN_SHARE * len(play))
    assert len(texts.given("shakespeare")) == behind
    mixed = texts.calibration("mixed", 0)
    assert mixed["input_ids"].shape == (16 + parts.TRIED, 32)
    assert not torch.equal(mixed["input_ids"], texts.calibration("mixed", 1)["input_ids"])
    assert torch.equal(mixed["input_ids"], texts.calibration("mixed", 0)["input_ids"])


def test_a_tiny_model_reads_and_writes_tokens(benchmark_named, monkeypatch):
    module = benchmark_named("tokens_per_second")
    monkeypatch.setattr(module, "LENGTH", 8)
    monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr(module, "MULTIPLES", (1,))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    small = {"vocab_size": 16, "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2}
    rows = module.measure(transformers.LlamaConfig(**{**module.CONFIG, **small}), 0.5, least=0.0)
    assert len(rows) == 4 * (1 + len(module.LAYOUTS))
    assert all(row["kept"] <= row["keep"] or row["layout"] == "dense" for row in rows)
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_a_step_of_writing_is_one_more_token_of_the_model(benchmark_named, monkeypatch):
    module = benchmark_named("tokens_per_second")
    monkeypatch.setattr(module, "LENGTH", 8)
    small = {"vocab_size": 16, "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**module.CONFIG, **small})).eval()
    model = module.Model(whole.config)
    model.embedding, model.norm = whole.model.embed_tokens, whole.model.norm
    block = whole.model.layers[0]
    tokens = torch.randint(16, (1, 9))
    with torch.no_grad():
        expected = whole(tokens).logits[:, -1:]
        torch.testing.assert_close(model.call([block], module.through, tokens, write=False), expected)
        past = whole(tokens[:, :8], use_cache=True).past_key_values.layers[0]
        model.past = [module.Past(past.keys, past.values)]
        torch.testing.assert_close(model.call([block], module.through, tokens[:, 8:], write=True), expected)
