"""The command line, on files as people have them."""

import json
import os
import runpy
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.cli import main
from lightning_prehab.cli.inputs import read_batches
from lightning_prehab.plan import timing
from lightning_prehab.report.latency import verdict
from tests.large_report import large_report

transformers = pytest.importorskip("transformers")
TEXT = "the cat sat on the mat\na dog ran\n\nthe dog sat on a cat and ran and ran\n" * 4


class Lit(pl.LightningModule):
    def __init__(self, width: int = 24):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 5))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LitConv(Lit):
    def __init__(self):
        super().__init__(20)
        self.net = nn.Sequential(
            nn.Unflatten(1, (5, 2, 1)), nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()
        )
        with torch.no_grad():  # separable
            self.net[2].weight.copy_(self.net[2].weight.sum(3, True) * self.net[2].weight.sum(2, True).mean(1, True))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", *sorted(set(TEXT.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def ckpt(tmp_path, make_trainer, monkeypatch) -> Path:
    monkeypatch.setitem(sys.modules, "lit_of_a_user", sys.modules[__name__])
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(Lit(20), torch.utils.data.DataLoader(torch.randn(8, 10), batch_size=8))
    path = tmp_path / "lit.ckpt"
    trainer.save_checkpoint(path)
    return path


def run(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]  # beside what is said of the work
    return error


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_text_gives_what_compress_gives(bert, tmp_path, capsys):
    out = tmp_path / "deep" / "small"
    data = json.loads(
        run(capsys, "compress", bert, "--data", bert / "text.txt", "--keep", 0.4, "--output", out, "--json")
    )
    lines = [line for line in TEXT.splitlines() if line]
    tokens = transformers.AutoTokenizer.from_pretrained(bert)(lines, padding=True, return_tensors="pt")
    batches = [{key: value[start : start + 8] for key, value in tokens.items()} for start in (0, 8)]
    reference = transformers.BertForSequenceClassification.from_pretrained(bert)
    report = lp.compress_(reference, 0.4, batches)
    assert any(rank is not None for rank in report.ranks.values())
    assert {layer["name"]: layer["rank"] for layer in data["report"]["layers"]} == report.ranks
    fresh = transformers.BertForSequenceClassification.from_pretrained(bert)
    assert same(lp.load_compressed(out, fresh), reference)
    assert lp.CompressionReport.load_json(out / "report.json") == report
    assert (out / "config.json").is_file()
    assert (out / "tokenizer.json").read_bytes() == (bert / "tokenizer.json").read_bytes()
    assert os.listdir(out.parent) == ["small"]
    assert str(report) in run(capsys, "report", out)


@pytest.mark.parametrize("kind", ["list.pt", "tensor.pt", "one.safetensors", None])
def test_checkpoint_with_and_without_data(ckpt, tmp_path, capsys, kind):
    from safetensors.torch import save_file

    x = torch.randn(20, 10)
    batches, words = list(x.split(8)), []
    if kind is None:
        batches = None
    else:
        words = ["--data", tmp_path / kind]
        if kind == "one.safetensors":
            save_file({"x": x}, tmp_path / kind)
        else:
            torch.save(batches if kind == "list.pt" else x, tmp_path / kind)
    out = tmp_path / "out"
    common = [ckpt, "--model", "lit_of_a_user.Lit", *words]
    plans = json.loads(run(capsys, "plan", *common, "--keep", 0.3, 0.6, "--json"))["plans"]
    run(capsys, "compress", *common, "--keep", 0.6, "--output", out)
    reference = Lit.load_from_checkpoint(ckpt, map_location="cpu")
    report = lp.compress_(reference, 0.6, batches)
    assert same(lp.load_compressed(out, Lit(20)), reference)
    planned = {layer["name"]: layer["rank"] for layer in plans[1]["layers"]}
    assert planned == {name: rank or "dense" for name, rank in report.ranks.items()}
    assert plans[0]["keep"] <= 0.3
    assert plans[0]["keep"] < plans[1]["keep"] <= 0.6
    assert plans[1]["factorization"]["class_path"].endswith(".SVD" if kind is None else ".KroneckerSVD")


def test_a_plan_of_convolutions_is_what_compress_does(tmp_path, make_trainer, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lit_of_a_user", sys.modules[__name__])
    trainer = make_trainer(max_epochs=1, limit_train_batches=0)
    trainer.fit(LitConv(), torch.utils.data.DataLoader(torch.randn(8, 10), batch_size=8))
    trainer.save_checkpoint(tmp_path / "conv.ckpt")
    torch.save(torch.randn(64, 10), tmp_path / "data.pt")
    words = [tmp_path / "conv.ckpt", "--model", "lit_of_a_user.LitConv", "--data", tmp_path / "data.pt", "--keep", 0.4]
    (plan,) = json.loads(run(capsys, "plan", *words, "--json"))["plans"]
    done = json.loads(run(capsys, "compress", *words, "--evaluate", 0, "--output", tmp_path / "out", "--json"))[
        "report"
    ]
    assert [layer["name"] for layer in plan["layers"]] == ["net.1", "net.2"]
    assert plan["layers"][1]["form"] == "spatial"
    for asked, found in zip(plan["layers"], done["layers"], strict=True):
        assert (asked["shape"], asked["rank"]) == (found["shape"], found["rank"] or "dense")
    loaded = lp.load_compressed(tmp_path / "out", LitConv())
    assert loaded.net[2].scheme == "spatial"


def test_plan_shows_a_table_for_each_keep(bert, capsys):
    text = run(capsys, "plan", bert, "--keep", 0.2, 0.8, "--exclude-modules", "classifier", "*.pooler.*")
    assert text.count("bert.encoder.layer.1.output.dense ") == 2
    assert text.count("2 left: excluded by exclude_modules: bert.pooler.dense, classifier") == 2


def test_nothing_is_overwritten_unless_asked(ckpt, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["compress", ckpt, "--model", "lit_of_a_user.Lit", "--output", out]
    run(capsys, *words, "--keep", 0.5)
    (out / "mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "exists; give --force" in refused(capsys, *words, "--keep", 0.3)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(capsys, *words, "--keep", 0.3, "--force")
    assert lp.CompressionReport.load_json(out / "report.json").keep <= 0.3
    assert not (out / "mine.txt").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("cat")
    assert "--force leaves it" in refused(capsys, *words[:-1], other, "--force")
    assert os.listdir(other) == ["cat.jpg"]
    assert "lies inside" in refused(capsys, *words[:-1], out / "sub")
    assert "not a folder to write in" in refused(capsys, *words[:-1], other / "cat.jpg" / "sub")
    assert sorted(os.listdir(other)) == ["cat.jpg"]
    assert not (out / "sub").exists()


def test_a_failure_leaves_the_old_folder(ckpt, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = ["compress", ckpt, "--model", "lit_of_a_user.Lit", "--output", out]
    run(capsys, *words)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    files = sorted(os.listdir(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device", "report.json")

    monkeypatch.setattr(lp.CompressionReport, "save_json", full)
    assert "report.json: No space left on device" in refused(capsys, *words, "--keep", 0.3, "--force")
    monkeypatch.undo()
    real = os.replace

    def no_move(source, target):
        if Path(target) == out and Path(source).name == "new":
            raise OSError(5, "Input/output error", str(out))
        real(source, target)

    monkeypatch.setitem(sys.modules, "lit_of_a_user", sys.modules[__name__])
    monkeypatch.setattr(os, "replace", no_move)
    assert "Input/output error" in refused(capsys, *words, "--keep", 0.3, "--force")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == files


def test_bench(bert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-6)
    run(capsys, "compress", bert, "--output", tmp_path / "out")
    words = ["bench", bert, "--compressed", tmp_path / "out", "--batch-sizes", 1, 3]
    rows = json.loads(run(capsys, *words, "--json"))["latency"]
    assert [row["batch_size"] for row in rows] == [1, 3]
    for row in rows:
        assert row["verdict"] == verdict(row["dense_seconds"], row["compressed_seconds"])
        assert {layer["name"] for layer in row["layers"]} == {
            name for name, rank in lp.CompressionReport.load_json(tmp_path / "out/report.json").ranks.items() if rank
        }
    assert "medians of this machine" in run(capsys, *words, "--data", bert / "text.txt")


def test_bench_in_the_report(bert, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-6)
    out, bench = tmp_path / "out", tmp_path / "bench.json"
    run(capsys, "compress", bert, "--output", out)
    assert "Latencies were not measured" in refused(capsys, "report", out, "--png", f"latency={tmp_path / 'l.png'}")
    assert not (tmp_path / "l.png").exists()
    bench.write_text(run(capsys, "bench", bert, "--compressed", out, "--batch-sizes", 2, "--json"))
    words = [
        "report",
        out,
        "--bench",
        bench,
        "--png",
        f"latency={tmp_path / 'l.png'}",
        "--html",
        tmp_path / "page.html",
    ]
    assert "forward pass of 2 rows" in run(capsys, *words)
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "page.html").read_text().count("not measured") == 1  # the quality
    run(capsys, "compress", bert, "--keep", 0.2, "--output", tmp_path / "other")
    assert "measure the models of this report" in refused(capsys, "report", tmp_path / "other", "--bench", bench)


def test_wrong_inputs(bert, ckpt, tmp_path, capsys):
    assert "nowhere does not exist" in refused(capsys, "plan", tmp_path / "nowhere")
    assert "give --model some.module" in refused(capsys, "plan", ckpt)
    assert "cannot be imported" in refused(capsys, "plan", ckpt, "--model", "no.such.Class")
    assert "not a LightningModule class" in refused(capsys, "plan", ckpt, "--model", "json.JSONDecoder")
    assert "holds no config.json" in refused(capsys, "plan", tmp_path)
    assert "needs --data" in refused(capsys, "plan", bert, "--method", "whitened")
    assert "--device 'warp' cannot be used" in refused(capsys, "plan", bert, "--device", "warp")
    (tmp_path / "bad.ckpt").write_bytes(b"nothing")
    assert "is damaged" in refused(capsys, "plan", tmp_path / "bad.ckpt", "--model", "lit_of_a_user.Lit")
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        assert name in refused(capsys, "plan", bert, "--data", tmp_path / name)
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(3)}, tmp_path / "uneven.pt")
    assert "a: 2, b: 3" in refused(capsys, "plan", bert, "--data", tmp_path / "uneven.pt")
    (tmp_path / "long.txt").write_text("cat " * 40)
    assert "a smaller --max-length" in refused(capsys, "plan", bert, "--data", tmp_path / "long.txt")
    run(capsys, "plan", bert, "--data", tmp_path / "long.txt", "--max-length", 16)
    torch.save({"input_ids": torch.full((2, 3), 9999)}, tmp_path / "other.pt")
    assert "the model cannot be called on a batch of type" in refused(
        capsys, "plan", bert, "--data", tmp_path / "other.pt"
    )
    assert "text needs a Hugging Face folder" in refused(
        capsys, "plan", ckpt, "--model", "lit_of_a_user.Lit", "--data", bert / "text.txt"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("layers"), "not a whole compression report"),
        (lambda d: d.update(version=9), "version 9 cannot be read"),
        (lambda d: d.update(method={"class_path": "os.system"}), "not one of this package"),
        (lambda d: d["layers"][0].update(shape=None), "not a whole compression report"),
        (lambda d: d["layers"][0].update(rank="x"), "report.json"),
        (lambda d: d.update(parameters_before="many"), "not a whole compression report"),
        (lambda d: d.update(skipped=[1]), "not a whole compression report"),
        (lambda d: d["layers"][0].update(spectrum=3), "not a whole compression report"),
        (lambda d: d["layers"][0]["spectrum"].update(indices=[0]), "ascending indices from 1"),
        (lambda d: d.update(latency={}), "not whole latencies"),
    ],
)
def test_hostile_reports(mlp, tmp_path, capsys, change, message):
    path = tmp_path / "report.json"
    lp.compress_(mlp, 0.5).save_json(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    err = refused(capsys, "report", path)
    assert message in err
    assert "report.json" in err


def test_run_as_a_module(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_prehab", "report", "missing.json"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("lightning_prehab", run_name="__main__", alter_sys=True)
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: missing.json does not exist; give a folder")


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("transformers", "hf", ["plan", "bert"]),
        ("safetensors.torch", "hf", ["plan", "lit.ckpt", "--model", "lit_of_a_user.Lit", "--data", "x.safetensors"]),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, extra, words, ckpt, bert, capsys, monkeypatch):
    monkeypatch.chdir(ckpt.parent)
    Path("bert").symlink_to(bert)
    Path("x.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install 'lightning-prehab[{extra}]'" in refused(capsys, *words)


def test_text_without_transformers_is_one_sentence(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(lp.PrehabError, match="^Hugging Face folders need transformers: pip install"):
        read_batches(str(bert / "text.txt"), str(bert), 8, 8)


def test_all_shows_every_layer(bert, tmp_path, capsys):
    large = large_report()
    large.save_json(tmp_path / "report.json")
    text, every = (run(capsys, "report", tmp_path / "report.json", *words) for words in ([], ["--all"]))
    assert text == f"{large}\n"
    assert every == f"{large.table(every_layer=True)}\n"
    assert "model.layers.29.mlp.down_proj " in every
    assert "model.layers.29" not in text
    assert run(capsys, "plan", bert, "--all") == run(capsys, "plan", bert)  # few layers are all shown anyway


@pytest.mark.parametrize("error", [MemoryError("none"), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_memory_that_is_not_there_is_one_sentence(bert, capsys, monkeypatch, error):
    def greedy(*args, **settings):
        raise error

    monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", greedy)
    told = refused(capsys, "plan", bert, "--data", bert / "text.txt")
    assert type(error).__name__ in told
    assert "A smaller --batch-size or --max-length takes less." in told


def test_other_errors_of_the_process_come_through(bert, monkeypatch):
    def broken(*args, **settings):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("lightning_prehab.cli.commands.plan_budgets", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["plan", str(bert), "--data", "none"])


def test_a_path_that_goes_up_again_is_left(bert, tmp_path, capsys):
    run(capsys, "compress", bert, "--output", tmp_path / "new" / ".." / "small", "--method", "svd")
    assert (tmp_path / "new" / ".." / "small" / "structure.json").is_file()
