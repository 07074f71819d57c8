"""examples/hf_text_classifier.py and examples/hf_trainer.py in fast runs, in this process."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

import lightning_prehab as lp

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example as a script; returns the model that it has saved, and its table of accuracies and losses."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    saved = []
    save = transformers.PreTrainedModel.save_pretrained

    def watch(model, *arguments, **settings):
        saved.append(model)
        save(model, *arguments, **settings)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", watch)

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, "--fast", "--output", "small", *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out
        rows = re.findall(r"^(.*?)  +(0\.\d{4}|1\.0000)  +(\d+\.\d{4})$", printed, flags=re.MULTILINE)
        assert "keep 0.3" in printed
        assert re.search(r"times fewer parameters: accuracy \S+ % before the cut, \S+ % at the end\.$", printed.strip())
        return saved[-1], {moment: (float(accuracy), float(loss)) for moment, accuracy, loss in rows}

    yield start
    sys.modules.pop("hf_sentences", None)


def loaded(folder, saved, keep):
    """The classifier from the files: the one that was trained, with the share of the parameters that was asked for."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    weights, expected = model.state_dict(), saved.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    config = model.config
    dense = 2 * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)  # both encoder layers
    dense += config.hidden_size * (config.hidden_size + config.num_labels)  # pooler and classifier
    assert any(isinstance(layer, lp.LowRankLinear) for layer in model.bert.encoder.modules())
    products = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert sum(layer.weight.numel() for layer in products) <= keep * dense
    return model


def test_text_classifier_with_a_generated_model(run):
    saved, rows = run("hf_text_classifier.py", "--accelerator", "cpu", "--keep", "0.3")
    assert list(rows) == ["before the cut", "right after", "after rehab", "saved and loaded again"]
    assert rows["after rehab"] == pytest.approx(rows["saved and loaded again"], abs=1.5e-4)
    model = loaded("small", saved, 0.3)
    tokenizer = transformers.AutoTokenizer.from_pretrained("small")
    batch = tokenizer(["the plot was not bad", "the film was dull"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum() == 7 + 6
    assert model(**batch).logits.shape == (2, 2)


def test_trainer_with_a_model_and_sentences_of_ones_own(run, tmp_path):
    hf_sentences = importlib.import_module("hf_sentences")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_sentences.write_small_bert(tmp_path / "model")
    for name, count in (("train", 96), ("dev", 32)):
        lines = [f"{text}\t{label}" for text, label in hf_sentences.generate(count, seed=count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    files = "--model", "model", "--train", "train.tsv", "--validation", "dev.tsv", "--lr", "1e-3"
    saved, rows = run("hf_trainer.py", *files, "--cpu", "--keep", "0.3")
    assert list(rows) == ["before the cut", "right after", "after recovery", "saved and loaded again"]
    assert rows["after recovery"] == pytest.approx(rows["saved and loaded again"], abs=1.5e-4)
    model = loaded("small", saved, 0.3)
    assert model.config.id2label == {0: "bad", 1: "good"}

    (tmp_path / "dev.tsv").write_text("the plot was good\tgood\nthe plot\n")
    with pytest.raises(SystemExit, match="dev.tsv, line 2: no text<TAB>label: 'the plot'"):
        run("hf_trainer.py", *files)


def test_they_are_named_in_the_docs():
    page = (ROOT / "docs" / "howto" / "hugging-face.md").read_text()
    for name in ("hf_text_classifier.py", "hf_trainer.py"):
        assert f"python examples/{name} --model" in page
