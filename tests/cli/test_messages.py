"""What the command line says of wrong words: one sentence, and where to read on."""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.cli import arguments, evaluation, main
from lightning_prehab.report import figures
from tests.cli.test_commands import Lit, bert, refused, run  # noqa: F401  # bert is a fixture
from tests.tiny_llama import llama

PARSER, COMMANDS = arguments.build_parser()
#: Enough to be understood, whatever else is wrong.
LEAST = {
    "plan": ["x"],
    "compress": ["x", "--output", "y"],
    "report": ["x"],
    "bench": ["x", "--compressed", "y"],
}
OPTIONS = [
    (command, action)
    for command, parser in COMMANDS.items()
    for action in parser._actions
    if action.option_strings and action.dest != "help"
]
NAMED = pytest.mark.parametrize(("command", "action"), OPTIONS, ids=lambda one: getattr(one, "dest", one))


def wrong(capsys, *words: object) -> str:
    """The sentence about wrong words."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    sentence, more = err.splitlines()
    assert sentence.startswith("error: ")
    assert more.startswith('"lightning-prehab ')
    assert more.endswith('--help" says what can be given.')
    return sentence.removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give a command: plan, compress, report, bench."),
        ("fly", "there is no command 'fly'; there are plan, compress, report, bench."),
        ("compres x", "there is no command 'compres'; did you mean compress?"),
        ("--keep 0.3 plan x", "give the command before its options: plan, compress, report, bench."),
        ("plan", "missing: SOURCE (Hugging Face folder, or a Lightning checkpoint (.ckpt))."),
        ("compress x", "missing: --output (the folder to write)."),
        ("bench x", "missing: --compressed (the folder that compress has written)."),
        ("plan x y", "'y' is one word too many."),
        ("compress x --ouput y", "there is no option --ouput; did you mean --output?"),
        ("compress x -o y", "there is no option -o; did you mean --output?"),
        ("compress x --zzz=3", "there is no option --zzz."),
        ("compress x --outp y", "there is no option --outp; did you mean --output?"),
        ("plan x --keep 60", "--keep must be in (0, 1], got 60; 60 % is 0.6."),
        ("plan x --keep 0.3 2", "--keep must be in (0, 1], got 2; 2 % is 0.02."),
        ("plan x --keep 0", "--keep must be in (0, 1], got 0."),
        ("plan x --keep -1", "--keep must be in (0, 1], got -1."),
        ("plan x --keep nan", "--keep must be in (0, 1], got nan."),
        ("plan x --keep 0,5", "--keep must be a number in (0, 1], such as 0.5, got 0,5."),
        ("plan x --keep 60%", "--keep must be a number in (0, 1], such as 0.5, got 60%."),
        ("plan --keep 0.5 x", "--keep must be a number in (0, 1], such as 0.5, got x."),
        ("plan x --batch-size 0", "--batch-size must be a whole number, at least 1, got 0."),
        ("plan x --max-length -1", "--max-length must be a whole number, at least 1, got -1."),
        ("plan x --layers-at-once 1.5", "--layers-at-once must be a whole number, at least 1, got 1.5."),
        ("bench x --compressed y --batch-sizes 1 0", "--batch-sizes must be a whole number, at least 1, got 0."),
        ("plan x --device meta", "--device cannot be meta: it holds no values."),
        ("plan x --rank-override a", "--rank-override takes PATTERN=RANK, got 'a'."),
        ("plan x --rank-override =3", "--rank-override takes PATTERN=RANK, got '=3'."),
        ("plan x --rank-override a=many", "--rank-override 'a=many': give a rank, a share of the parameters such as"),
        ("plan x --data nowhere.txt", "--data nowhere.txt does not exist."),
        ("plan x --recipe .", "--recipe . is a folder, give a file."),
        (
            "report x --png ranks",
            "--png takes NAME=FILE with a NAME of ranks, errors, parameters, spectra, latency, got",
        ),
    ],
)
def test_wrong_words(words, message, capsys):
    assert wrong(capsys, *words.split()).startswith(message)


def test_the_nearest_name_of_a_method(capsys):
    told = wrong(capsys, "plan", "x", "--method", "kroneker")
    assert told == f"--method must be one of {', '.join(arguments.METHODS)}, got 'kroneker'; did you mean kronecker?"


@NAMED
def test_every_option_misspelled_leads_to_it(command, action, capsys):
    (option,) = action.option_strings
    for typed in (option[:-2] + option[-1], option[:4] + option[5:], option + "s"):
        if typed not in COMMANDS[command]._option_string_actions:
            told = wrong(capsys, command, *LEAST[command], typed, "3")
            assert told == f"there is no option {typed}; did you mean {option}?"


@NAMED
def test_every_option_without_its_value_is_named(command, action, capsys):
    if action.nargs in (0, "?"):
        pytest.skip("takes none, or needs none")
    words = [word for word in LEAST[command] if word not in (action.option_strings[0], "y")]
    if action.required:
        told = wrong(capsys, command, *words, action.option_strings[0])
    else:
        told = wrong(capsys, command, *LEAST[command], action.option_strings[0])
    assert told.startswith(f"{action.option_strings[0]} expected ")


def test_every_option_says_what_it_is():
    for command, action in OPTIONS:
        assert action.help, (command, action.dest)
        assert len(action.help) < 110
        assert action.nargs == 0 or not isinstance(action, argparse._StoreAction) or action.metavar or action.type
    assert arguments.FIGURES == figures.FIGURES
    told = next(action.help for _, action in OPTIONS if action.dest == "evaluate")
    assert f"({evaluation.SHARE} of {evaluation.FEWEST_ROWS} rows and more)" in told


def test_sources_that_cannot_be_read(bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    hub = refused(capsys, "plan", "HuggingFaceTB/SmolLM2-135M")
    assert "There is no folder HuggingFaceTB/SmolLM2-135M." in hub
    assert "hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M" in hub
    assert 'save_pretrained("SmolLM2-135M")' in hub
    assert "hf download gpt2 --local-dir gpt2" in refused(capsys, "plan", "gpt2")
    for path in ("./gpt2", "/nowhere/gpt2", "a/b/c", "gpt2.ckpt"):
        assert "hf download" not in refused(capsys, "plan", path)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert "load it with transformers (gguf_file=)" in refused(capsys, "plan", "model.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "give the folder that holds it" in refused(capsys, "plan", "model.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    assert 'save them anew in Python: model.save_pretrained("old")' in refused(capsys, "plan", "old")
    (tmp_path / "old" / "model.safetensors").write_bytes(b"")
    (tmp_path / "old" / "config.json").write_text(json.dumps({"model_type": "of_the_future"}))
    told = refused(capsys, "plan", "old")
    assert "old cannot be loaded (ValueError: " in told
    assert len(told) < 400

    llama().save_pretrained("silent")
    assert 'tokenizer.save_pretrained("silent")' in refused(capsys, "plan", "silent", "--data", bert / "text.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xff")
    assert "is no text in UTF-8" in refused(capsys, "plan", bert, "--data", "latin.txt")
    assert "KroneckerSVD(" in refused(capsys, "plan", bert, "--method", "kronecker")
    for policy in ("probe", "zero-sum"):
        assert "needs --data, text or batches" in refused(capsys, "compress", bert, "--policy", policy, "--output", "x")


def test_a_model_that_is_compressed_already(bert, tmp_path, capsys, monkeypatch, make_trainer):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    run(capsys, "compress", bert, "--output", "small")
    (tmp_path / "older").mkdir()  # a folder of an older version is no Hugging Face one
    (tmp_path / "older" / "structure.json").write_bytes((tmp_path / "small" / "structure.json").read_bytes())
    model = llama()
    lp.compress_(model, 0.4)
    model.save_pretrained("by-python")
    monkeypatch.setitem(sys.modules, "lit_of_a_user", sys.modules[Lit.__module__])
    lit = Lit(20)
    lp.compress_(lit, 0.4)
    trainer = make_trainer(max_epochs=1, limit_train_batches=0)
    trainer.fit(lit, torch.utils.data.DataLoader(torch.randn(8, 10), batch_size=8))
    trainer.save_checkpoint("low.ckpt")
    for words in (["small"], ["older"], ["by-python"], ["low.ckpt", "--model", "lit_of_a_user.Lit"]):
        for command in (["plan"], ["compress", "--output", "x"], ["bench", "--compressed", "small"]):
            told = refused(
                capsys, command[0], *words, *command[1:], *(["--keep", "0.5"] if command[0] != "bench" else [])
            )
            if command[0] == "bench" or words == ["older"]:
                assert f"{words[0]} is compressed already: give the dense model that it was made of" in told
            else:
                assert "The model is compressed already (low-rank layers: " in told
    assert "is a compressed model without its report" in refused(capsys, "report", "by-python")


def test_a_compressed_folder_is_cut_deeper(bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    run(capsys, "compress", bert, "--output", "small", "--keep", "0.6")
    told = run(capsys, "compress", "small", "--output", "smaller", "--keep", "0.3")
    assert " -> " in told
    reports = [lp.CompressionReport.load_json(Path(folder) / "report.json") for folder in ("small", "smaller")]
    assert reports[0].keep <= 0.6
    assert reports[1].keep <= 0.3
    assert reports[1].parameters_before == reports[0].parameters_before
    assert {layer.was for layer in reports[1].plan.layers} >= {layer.rank for layer in reports[0].plan.layers}
    run(capsys, "plan", "small", "--keep", "0.4", "--output", "plan.yaml")
    run(capsys, "compress", "small", "--plan", "plan.yaml", "--output", "by-plan")
    assert lp.CompressionReport.load_json(Path("by-plan") / "report.json").keep <= 0.4
    assert "low-rank layers" in refused(capsys, "compress", "small", "--keep", "0.6", "--output", "x")


def test_folders_of_the_wrong_kind(bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    told = refused(capsys, "report", bert)
    assert f"{bert} is a dense model, there is no report of it; lightning-prehab compress {bert} --output" in told
    assert "holds no report.json; give a folder that compress has written" in refused(capsys, "report", tmp_path)
    assert "nowhere does not exist; give a folder that compress has written" in refused(capsys, "report", "nowhere")
    assert "--compressed nowhere does not exist" in refused(capsys, "bench", bert, "--compressed", "nowhere")
    assert "holds no structure.json" in refused(capsys, "bench", bert, "--compressed", bert)
    (tmp_path / "file").write_text("")
    assert "--compressed file is no folder" in refused(capsys, "bench", bert, "--compressed", "file")


@pytest.mark.parametrize(("name", "said"), [("text.txt", "12 lines, "), ("one.pt", "20 rows in 3 batches")])
def test_how_much_data_there_is(name, said, bert, tmp_path, capsys):  # noqa: F811
    if name == "one.pt":
        torch.save(torch.randint(5, (20, 4)), tmp_path / name)
    path = bert / name if name == "text.txt" else tmp_path / name
    run(capsys, "plan", bert)
    assert main(["plan", str(bert), "--data", str(path)]) == 0
    err = capsys.readouterr().err
    assert f"{path}: {said}" in err
    if name == "text.txt":
        words = sum(len(line.split()) for line in path.read_text().splitlines())
        assert f"{words:,} tokens in " in err


def test_an_argument_is_named_as_its_option(bert, tmp_path, capsys):  # noqa: F811
    for option, value in (("--target-modules", "nope"), ("--exclude-modules", "nope"), ("--rank-override", "nope=3")):
        told = refused(capsys, "plan", bert, option, value)
        assert told.startswith(f"error: {option}: 'nope' matches no layer"), told
    (tmp_path / "recipe.yaml").write_text("target_modules: nope\n")
    told = refused(capsys, "plan", bert, "--recipe", tmp_path / "recipe.yaml")
    assert told.startswith("error: target_modules: 'nope' matches no layer"), told  # as it stands in the file


def test_one_of_a_thing_is_said_so(bert, tmp_path, capsys):  # noqa: F811
    (tmp_path / "one.txt").write_text((bert / "text.txt").read_text().split()[0] + "\n")
    assert main(["plan", str(bert), "--data", str(tmp_path / "one.txt")]) == 0
    assert re.search(r": 1 line, 1 token in 1 batch\n", capsys.readouterr().err)


def test_text_of_unknown_words_is_refused(bert, tmp_path, capsys):  # noqa: F811
    (tmp_path / "other.txt").write_text("☃ ☃\n☃\n")
    told = refused(capsys, "plan", bert, "--data", tmp_path / "other.txt")
    assert "knows no word of it; give text of the model" in told
    (tmp_path / "other.txt").write_text("☃ ☃\n" + (bert / "text.txt").read_text().splitlines()[0])
    run(capsys, "plan", bert, "--data", tmp_path / "other.txt")


def test_a_file_that_is_no_plan(bert, tmp_path, capsys):  # noqa: F811
    told = refused(capsys, "compress", bert, "--plan", bert / "text.txt", "--output", tmp_path / "small")
    assert "it is cut off, or another one" in told


def test_special_tokens_that_the_tokenizer_knows_are_text(bert, tmp_path, capsys):  # noqa: F811
    (tmp_path / "special.txt").write_text("[PAD] [PAD]\n[PAD]\n")
    run(capsys, "plan", bert, "--data", tmp_path / "special.txt")
