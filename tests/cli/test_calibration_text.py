"""What a model is calibrated with on the command line."""

import json
import os
from pathlib import Path

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.cli import calibration_text, main
from lightning_prehab.cli.inputs import read_batches
from lightning_prehab.plan.recipe import Recipe
from tests.cli.test_commands import refused, run, same
from tests.tiny_llama import llama

transformers = pytest.importorskip("transformers")
TEXT = "the cat sat on the mat\na dog ran\nthe dog sat on a cat and ran and ran\n" * 4
ROWS = ["--self-sequences", 32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A language model with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny"
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *sorted(set(TEXT.split())), *map(str, range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama(max_position_embeddings=24).save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def never_again(monkeypatch):
    """Call it, and from then on nothing may be written anew."""

    def fail(*args, **settings):
        raise AssertionError("written anew")

    return lambda: monkeypatch.setattr(calibration_text, "own_samples", fail)


def kept(place: Path) -> list[Path]:
    return sorted(place.glob("*-own-samples-*.safetensors"))


def test_self_gives_what_own_samples_give_and_is_made_once(folder, tmp_path, capsys, never_again):
    words = ["compress", folder, "--data", "self", *ROWS, "--evaluate", 0, "--json", "--keep"]
    data = json.loads(run(capsys, *words, 0.5, "--output", tmp_path / "half"))
    (file,) = kept(tmp_path)
    assert file.name.startswith("tiny-own-samples-")
    assert file.stat().st_mode & 0o777 == (tmp_path / "half" / "report.json").stat().st_mode & 0o777
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = lp.own_samples(model, tokenizer, 32, 24)
    stored = read_batches(str(file), str(folder), 8, 24)
    assert all(
        torch.equal(ours[name], theirs[name]) for ours, theirs in zip(batches, stored, strict=True) for name in ours
    )
    report = lp.compress_(model, 0.5, batches)
    assert {layer["name"]: layer["rank"] for layer in data["report"]["layers"]} == report.ranks
    assert same(lp.load_compressed(tmp_path / "half", transformers.LlamaForCausalLM.from_pretrained(folder)), model)
    never_again()
    run(capsys, *words, 0.4, "--output", tmp_path / "less")
    assert kept(tmp_path) == [file]
    assert sorted(os.listdir(tmp_path)) == sorted(["half", "less", file.name])


def test_other_weights_or_settings_have_other_samples(folder, tmp_path, capsys):
    run(capsys, "compress", folder, *ROWS, "--output", tmp_path / "a")
    run(capsys, "compress", folder, "--self-sequences", 31, "--output", tmp_path / "b")
    assert len(kept(tmp_path)) == 2
    other = tmp_path / "other" / "tiny"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    model.save_pretrained(other)
    run(capsys, "compress", other, *ROWS, "--output", tmp_path / "c")
    assert len(kept(tmp_path)) == 3


def test_an_interrupted_run_finds_them_and_leaves_nothing_half_written(
    folder, tmp_path, capsys, monkeypatch, never_again
):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    words = [str(word) for word in ("compress", folder, *ROWS, "--output", tmp_path / "out" / "small")]
    with monkeypatch.context() as broken:
        broken.setattr(calibration_text.os, "replace", interrupted)
        assert main(words) == 130
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as broken:
        broken.setattr("lightning_prehab.cli.commands.operate", interrupted)
        assert main(words) == 130
    assert kept(tmp_path / "out") == list((tmp_path / "out").iterdir())
    never_again()
    assert main(words) == 0


def test_a_language_model_without_data_uses_its_own_text_and_says_so(folder, tmp_path, capsys):
    assert main(["compress", str(folder), "--self-sequences", "32", "--output", str(tmp_path / "small")]) == 0
    out, err = capsys.readouterr()
    assert calibration_text._SAID in err
    assert "32 rows, 768 tokens in 4 batches" in err
    assert "KroneckerSVD" in out
    assert "held-back rows of tiny-own-samples-" in " ".join(out.split())
    assert "plain SVD is used" not in err


@pytest.mark.parametrize(
    "words",
    [["plan", "--output", "plan.yaml"], ["plan", "--data", "none", "--method", "svd", "--output", "plan.yaml"]]
    + [["compress", "--output", "small", *more] for more in ([], ["--data", "none"], ["--offload"])],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch, words):
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no file may have a byte; Python ignores the signal
    try:
        code = main([words[0], str(folder), *words[1:]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [[], ["--method", "svd"], ["--layout", "pivot", "--trials", 2]])
def test_a_refinement_trains_on_it_too(folder, tmp_path, capsys, more):
    words = ["compress", folder, "--output", tmp_path / "small", "--refine", 1, *more]
    assert json.loads(run(capsys, *words, *ROWS, "--json"))["report"]["refinement"]["steps"] <= 1
    assert "give --data FILE, or self" in refused(capsys, *words, "--force", "--data", "none")


@pytest.mark.parametrize("words", [["--data", "none"], ["--method", "svd"]])
def test_nothing_is_written_where_no_data_is_wanted(folder, tmp_path, capsys, words, never_again):
    never_again()
    assert "SVD()" in run(capsys, "compress", folder, *words, "--output", tmp_path / "small")
    assert kept(tmp_path) == []


def test_methods_that_need_data_have_it(folder, capsys):
    assert "WhitenedSVD" in run(capsys, "plan", folder, "--method", "whitened", *ROWS)
    assert "needs --data" in refused(capsys, "plan", folder, "--method", "whitened", "--data", "none")


def test_a_plan_keeps_them_for_the_cut(folder, tmp_path, capsys, monkeypatch, never_again):
    monkeypatch.chdir(tmp_path)
    run(capsys, "plan", folder, *ROWS, "--keep", 0.5, "--output", "plan.yaml")
    assert len(kept(tmp_path)) == 1
    never_again()
    text = run(capsys, "compress", folder, "--plan", "plan.yaml", "--output", "small")
    assert "held-back rows of tiny-own-samples-" in " ".join(text.split())
    direct = run(capsys, "compress", folder, *ROWS, "--keep", 0.5, "--output", "direct")
    assert text.splitlines()[:4] == direct.splitlines()[:4]


def test_a_plan_that_is_not_kept_keeps_no_samples(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(folder), "--self-sequences", "32"]) == 0
    out, err = capsys.readouterr()
    assert "KroneckerSVD" in out
    assert "own samples: 32 rows" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_shares_are_shares_of_tokens(folder, tmp_path, capsys, monkeypatch, share):
    seen = []
    monkeypatch.setattr("lightning_prehab.cli.commands.ProcessSite", lambda model, batches, **_: seen.append(batches))
    monkeypatch.setattr("lightning_prehab.cli.commands.operate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    words = [
        "compress",
        folder,
        "--data",
        folder.parent / "text.txt",
        "--self-share",
        share,
        "--output",
        tmp_path / "x",
    ]
    assert main([str(word) for word in [*words, "--batch-size", 2]]) == 130
    (batches,) = seen
    text = read_batches(str(folder.parent / "text.txt"), str(folder), 2, 128)
    theirs = [
        number
        for number, batch in enumerate(batches)
        if any(set(batch) == set(one) and torch.equal(batch["input_ids"], one["input_ids"]) for one in text)
    ]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    ours = sum(tokens) - sum(tokens[number] for number in theirs)
    assert len(theirs) == len(text)
    assert ours / sum(tokens) == pytest.approx(share, abs=0.02)
    if share == 0.5:
        assert theirs != list(range(len(theirs)))  # not one after the other
    assert kept(tmp_path)


@pytest.mark.parametrize("named", [False, True])
def test_tokens_in_a_file_are_mixed_with_own_samples(folder, tmp_path, capsys, named):
    ids = torch.randint(3, 20, (8, 16), generator=torch.Generator().manual_seed(0))
    torch.save({"input_ids": ids} if named else ids, tmp_path / "ids.pt")
    words = ["compress", folder, "--data", tmp_path / "ids.pt", "--self-share", 0.5, "--output", tmp_path / "small"]
    assert main([str(word) for word in words]) == 0
    assert "own samples beside" in capsys.readouterr().err
    assert (tmp_path / "small" / "structure.json").is_file()


def test_another_first_token_is_another_text(folder, tmp_path):
    from types import SimpleNamespace

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = SimpleNamespace(source=folder, output=tmp_path / "small", batch_size=4)
    first = calibration_text._written(model, settings, 4, 8)[1]
    model.generation_config.eos_token_id = model.config.eos_token_id = 11
    second = calibration_text._written(model, settings, 4, 8)[1]
    assert first != second
    assert calibration_text._written(model, settings, 4, 8)[1] == second


def test_what_is_refused(folder, tmp_path, capsys):
    words = ["compress", folder, "--output", tmp_path / "small"]
    for more in (["--data", "self"], ["--data", "none"], []):
        assert "give --data FILE too" in refused(capsys, *words, *more, "--self-share", 0.5)
    assert main([*map(str, words), "--self-share", "0.5"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1  # it does not say that own samples are taken, too
    text = folder.parent / "text.txt"
    for more in ([], ["--self-share", 0.5]):
        told = refused(capsys, *words, "--data", text, *more, "--self-sequences", 8)
        assert "has no effect here; leave it out (--self-share says how much" in told
    assert "has no effect here; leave it out." in refused(capsys, *words, "--data", "none", "--self-sequences", 8)
    torch.save([{"inputs_embeds": torch.zeros(4, 8, 32)}], tmp_path / "numbers.pt")
    assert "have no input_ids" in refused(capsys, *words, "--data", tmp_path / "numbers.pt", "--self-share", 0.5)
    for share in ("0", "1", "1.5", "half"):
        with pytest.raises(SystemExit):
            main([*map(str, words), "--data", str(folder.parent / "text.txt"), "--self-share", share])
        assert f"must be a number in (0, 1), such as 0.5, got {share}" in capsys.readouterr().err
    silent = tmp_path / "silent"
    silent.mkdir()
    for name in ("config.json", "model.safetensors"):
        (silent / name).write_bytes((folder / name).read_bytes())
    told = refused(capsys, "compress", silent, "--data", "self", "--output", tmp_path / "small")
    assert "holds no tokenizer to write own samples with" in told
    assert not calibration_text.can_write(str(silent))
    (silent / "tokenizer.json").write_text("{}")
    assert main(["plan", str(silent)]) == 0  # as without any data
    assert "no own samples: " in capsys.readouterr().err


def test_models_that_do_not_write(folder, tmp_path, capsys):
    reader = tmp_path / "reader"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(reader)
    sizes = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertForSequenceClassification(transformers.BertConfig(intermediate_size=32, **sizes)).save_pretrained(
        reader
    )
    told = refused(capsys, "plan", reader, "--data", "self")
    assert "BertForSequenceClassification" in told
    assert "writes text" in told
    assert "SVD()" in run(capsys, "plan", reader)  # as ever
    assert "give a Hugging Face folder" in refused(capsys, "plan", tmp_path / "x.ckpt", "--data", "self")


def test_data_of_a_recipe_that_looks_at_none():
    assert not calibration_text._profits(Recipe(0.5, factorization=lp.SVD(), policy=lp.RankRatio(0.5)))
    assert calibration_text._profits(Recipe(0.5))
    assert calibration_text._profits(Recipe(0.5, factorization=lp.SVD(), policy=lp.ProbeBudget(0.5)))
