"""What the command line says of a model's worth."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.cli import main
from lightning_prehab.plan import timing
from lightning_prehab.statistics.held_back import hold_back
from tests.cli.test_messages import wrong
from tests.tiny_llama import llama

transformers = pytest.importorskip("transformers")
WORDS = ["the", "a", "cat", "dog", "mat", "sat", "ran", "on", "and", "red", "green", "old"]
#: 48 lines of 20 words.
LINES = [" ".join(WORDS[(3 * row + row % 5 * column) % len(WORDS)] for column in range(20)) for row in range(48)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("llama")
    names = ["[PAD]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama(max_position_embeddings=64).save_pretrained(path)
    (path / "text.txt").write_text("\n".join(LINES) + "\n")
    (path / "other.txt").write_text("\n".join(line[:30] for line in LINES[:5]))
    return path


def run(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 1
    return capsys.readouterr().err


def perplexity(model, tokens) -> float:
    """By hand, of rows without padding."""
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].double().numpy()
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return math.exp(-np.take_along_axis(logs, tokens[:, 1:, None].numpy(), -1).mean())


def tokens_of(folder, lines):
    return transformers.AutoTokenizer.from_pretrained(folder)(lines, return_tensors="pt")


def both(folder, small):
    dense = transformers.LlamaForCausalLM.from_pretrained(folder)
    return dense, lp.load_compressed(small, transformers.LlamaForCausalLM.from_pretrained(folder))


def test_a_tenth_is_held_back_and_measured_on(folder, tmp_path, capsys):
    out = tmp_path / "small"
    words = ["compress", folder, "--data", folder / "text.txt", "--keep", 0.3, "--output", out]
    text = run(capsys, *words)
    report = lp.CompressionReport.load_json(out / "report.json")
    assert report.scores.summary() in text
    assert report.scores.data == "8 held-back rows of text.txt"  # one batch of six

    whole = tokens_of(folder, LINES)
    batches = [{key: value[start : start + 8] for key, value in whole.items()} for start in range(0, 48, 8)]
    rest, (held,) = hold_back(batches, 0.1)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    lp.compress_(reference, 0.3, rest)
    dense, small = both(folder, out)
    for one, other in zip(small.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)  # calibrated with the rest alone
    assert report.scores.before.perplexity == pytest.approx(perplexity(dense, held["input_ids"]), rel=1e-6)
    assert report.scores.after.perplexity == pytest.approx(perplexity(small, held["input_ids"]), rel=1e-6)
    assert report.scores.before.count == 8 * 19
    assert report.scores.summary() in run(capsys, "report", out)


def test_a_file_a_share_and_nothing(folder, tmp_path, capsys):
    words = ["compress", folder, "--data", folder / "text.txt", "--keep", 0.3, "--json", "--output"]
    found = json.loads(run(capsys, *words, tmp_path / "a", "--evaluate", folder / "other.txt"))["report"]["scores"]
    assert found["data"] == "5 rows of other.txt"
    dense, _ = both(folder, tmp_path / "a")
    lines = [line[:30] for line in LINES[:5]]
    ids = [tokens_of(folder, line)["input_ids"] for line in lines]  # each alone: no padding
    losses = [math.log(perplexity(dense, one)) * (one.shape[1] - 1) for one in ids]
    count = sum(one.shape[1] - 1 for one in ids)
    assert len({one.shape[1] for one in ids}) > 1
    assert found["before"]["count"] == count
    assert found["before"]["loss"] == pytest.approx(sum(losses) / count, rel=1e-5)

    found = json.loads(run(capsys, *words, tmp_path / "b", "--evaluate", 0.5))["report"]["scores"]
    assert found["data"] == "24 held-back rows of text.txt"
    assert json.loads(run(capsys, *words, tmp_path / "c", "--evaluate", 0))["report"]["scores"] is None
    alike = [lp.load_compressed(tmp_path / name, llama(max_position_embeddings=64)) for name in "ac"]
    for one, other in zip(*(model.parameters() for model in alike), strict=True):
        assert torch.equal(one, other)


def test_few_rows_are_not_held_back_unless_asked_for(folder, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("\n".join(LINES[:29]))
    words = ["compress", folder, "--data", tmp_path / "few.txt", "--json", "--output"]
    assert json.loads(run(capsys, *words, tmp_path / "a"))["report"]["scores"] is None
    found = json.loads(run(capsys, *words, tmp_path / "b", "--evaluate", 0.1))["report"]["scores"]
    assert found["data"] == "3 held-back rows of few.txt"  # one of each batch of eight
    run(capsys, "compress", folder, "--output", tmp_path / "c")  # without data there is nothing to hold back


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_what_is_not_known_is_said(command, folder, tmp_path, capsys):
    def said(*words):
        output = [] if command == "plan" else ["--output", tmp_path / "small", "--force"]
        assert main([str(word) for word in (command, folder, *words, *output)]) == 0
        return capsys.readouterr().err

    (tmp_path / "few.txt").write_text("\n".join(LINES[:29]))
    blind, unmeasured = "without --data plain SVD is used", "not measured: fewer than 30 rows of --data"
    for words, expected in (
        (["--data", "none"], (True, False)),
        (["--data", tmp_path / "few.txt"], (False, True)),
        (["--data", tmp_path / "few.txt", "--evaluate", 0], (False, False)),
        (["--data", folder / "text.txt"], (False, False)),
    ):
        error = said(*words)
        assert (blind in error, unmeasured in error) == expected, words


def test_a_plan_predicts_for_the_rows_that_it_is_measured_on(folder, capsys):
    """They are of a file of their own, so the calibration is the same."""
    words = ["plan", folder, "--data", folder / "text.txt", "--keep", 0.3, "--json"]

    def predicted(evaluate):
        layers = json.loads(run(capsys, *words, "--evaluate", evaluate))["plans"][0]["layers"]
        assert [layer["rank"] for layer in layers] == ranks or not ranks
        ranks[:] = [layer["rank"] for layer in layers]
        return [layer["predicted"]["loss_increase"] for layer in layers]

    ranks: list[int | None] = []
    assert predicted(folder / "other.txt") != predicted(0)


def test_without_calibration_a_file_can_be_measured_on(folder, tmp_path, capsys):
    words = ["compress", folder, "--data", "none", "--json", "--output", tmp_path / "a"]
    words += ["--evaluate", folder / "other.txt"]
    assert json.loads(run(capsys, *words))["report"]["scores"]["data"] == "5 rows of other.txt"


def test_wrong_values(folder, tmp_path, capsys):
    words = ["compress", folder, "--output", tmp_path / "small", "--evaluate"]
    data = ["--data", folder / "text.txt"]
    assert "--evaluate 0.1 holds rows of --data back; give --data" in refused(capsys, *words, 0.1, "--data", "none")
    for value, message in (
        (1, "--evaluate must be a share in [0, 1) or a file, got 1."),
        ("-0.1", "--evaluate must be a share in [0, 1) or a file, got -0.1."),
        (tmp_path / "nowhere.txt", f"--evaluate {tmp_path / 'nowhere.txt'} does not exist."),
    ):
        assert wrong(capsys, *words, value, *data) == message
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert "--evaluate" in refused(capsys, *words, tmp_path / "bad.pt")
    assert not (tmp_path / "small").exists()


def test_bench_says_what_both_are_worth(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-6)
    out = tmp_path / "small"
    run(capsys, "compress", folder, "--data", folder / "text.txt", "--keep", 0.3, "--output", out)
    words = ["bench", folder, "--compressed", out, "--batch-sizes", 1]
    assert json.loads(run(capsys, *words, "--json"))["scores"] is None
    other = [*words, "--data", folder / "other.txt"]
    found = json.loads(run(capsys, *other, "--json"))["scores"]
    assert found["data"] == "5 rows of other.txt"
    dense, small = both(folder, out)
    text = run(capsys, *words, "--data", folder / "text.txt")
    assert "on 48 rows of text.txt (the name of the calibration data)" in text
    ids = tokens_of(folder, LINES)["input_ids"]
    assert f"perplexity {perplexity(dense, ids):.1f} -> {perplexity(small, ids):.1f} on" in text


def test_a_report_takes_the_scores_of_a_bench(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-6)
    out, bench = tmp_path / "small", tmp_path / "bench.json"
    run(capsys, "compress", folder, "--data", "none", "--output", out)
    words = ["bench", folder, "--compressed", out, "--batch-sizes", 1, "--json"]
    bench.write_text(run(capsys, *words, "--data", folder / "other.txt"))
    assert "on 5 rows of other.txt" in run(capsys, "report", out, "--bench", bench)
    bench.write_text(run(capsys, *words))
    assert "perplexity" not in run(capsys, "report", out, "--bench", bench)
    data = json.loads(bench.read_text())
    bench.write_text(json.dumps({**data, "scores": [1]}))
    assert "These are not" in refused(capsys, "report", out, "--bench", bench)
    bench.write_text(json.dumps({key: value for key, value in data.items() if key != "scores"}))  # as they were
    assert "perplexity" not in run(capsys, "report", out, "--bench", bench)
