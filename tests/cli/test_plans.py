"""One calibration is enough: plan --output, compress --plan."""

import json
import os
import re
import shutil
import stat
import sys
import warnings

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.cli import main, plans
from lightning_prehab.statistics import calibration
from tests.cli.test_commands import Lit, LitConv, bert, refused, run, same  # noqa: F401  # bert is a fixture


class LitSeveral(Lit):
    """A fused projection, a convolution in groups, and one that has several forms."""

    def __init__(self):
        super().__init__(20)
        self.net = nn.Sequential(
            nn.Unflatten(1, (2, 5, 1)), nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        )
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = self.net(x).flatten(2).mT
        return self.head(self.attention(x, x, x, need_weights=False)[0])


LINEAR = {Lit: ["net.*"], LitConv: [], LitSeveral: ["head"]}


@pytest.fixture(params=[Lit, LitConv, LitSeveral])
def words(request, tmp_path, make_trainer, monkeypatch):
    """A checkpoint, its class and its data, as words of the command line."""
    module = sys.modules[request.param.__module__]
    monkeypatch.setitem(sys.modules, "lit_of_a_user", module)
    trainer = make_trainer(max_epochs=1, limit_train_batches=0)
    trainer.fit(request.param(), torch.utils.data.DataLoader(torch.randn(8, 10), batch_size=8))
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    torch.save(torch.randn(64, 10), tmp_path / "data.pt")
    monkeypatch.chdir(tmp_path)
    return ["dense.ckpt", "--model", f"lit_of_a_user.{request.param.__name__}"], ["--data", "data.pt"], request.param


@pytest.fixture
def no_calibration(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a second calibration")

    def forbid():
        monkeypatch.setattr(calibration, "_pass", forbidden)

    return forbid


@pytest.mark.parametrize("evaluate", ["0", "0.2"])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--method", "whitened"],
        ["--method", "activation"],
        ["--method", "fisher"],
        ["--policy", "zero-sum"],
        ["--policy", "probe"],
        ["--layers-at-once", "1"],
        ["--recipe", "auto.yaml"],
        ["--recipe", "sparse.yaml"],
        ["--split-fused"],
        ["--layout", "pivot"],
    ],
    ids=" ".join,
)
def test_a_plan_gives_the_very_weights_of_compress(words, options, evaluate, capsys, no_calibration):
    model, data, kind = words
    auto = lp.KroneckerSVD(gradient_shrinkage="auto", input_shrinkage="auto")
    lp.Recipe(factorization=auto).to_yaml("auto.yaml")
    lp.Recipe(factorization=lp.LowRankPlusSparse(0.05), target_modules=LINEAR[kind]).to_yaml("sparse.yaml")
    if "sparse.yaml" in options and kind is LitConv:
        pytest.skip("has no linear layers")
    data = [*data, "--evaluate", evaluate]
    run(capsys, "compress", *model, *data, *options, "--keep", 0.6, "--output", "at-once")
    said = run(capsys, "plan", *model, *data, *options, "--keep", 0.6, "--output", "plan.yaml")
    (command,) = re.findall("^Next: lightning-prehab (.*)$", said, flags=re.MULTILINE)
    no_calibration()
    more = [word for word in options if word in ("--layers-at-once", "1")]
    run(capsys, *command.replace("FOLDER", "planned").split(), *model[1:], *more)
    one, other = (lp.load_compressed(folder, kind()) for folder in ("at-once", "planned"))
    assert any(isinstance(module, lp.layers.LowRankLayer) for module in one.modules())
    assert same(one, other)
    reports = [json.loads((folder / "report.json").read_text()) for folder in map(plans.Path, ("at-once", "planned"))]
    for layer in reports[0]["layers"] + reports[1]["layers"]:
        if layer["rank"] is None:  # what stays dense was not decomposed a second time
            del layer["spectrum"]
    assert reports[0]["layers"] == reports[1]["layers"]
    for name in ("skipped", "scores"):
        assert reports[0][name] == reports[1][name]
    assert (reports[0]["scores"] is None) == (evaluate == "0")


def test_a_plan_is_measured_on_the_rows_that_were_held_back_while_their_file_is_the_same(
    bert,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text((bert / "text.txt").read_text() * 8)
    run(capsys, "plan", bert, "--data", "text.txt", "--evaluate", 0.2, "--output", "plan.yaml")
    compress = ["compress", bert, "--plan", "plan.yaml", "--output", "small", "--force"]
    run(capsys, *compress)
    scores = lp.CompressionReport.load_json("small/report.json").scores
    assert scores is not None
    assert "held-back rows of text.txt" in scores.data
    text.write_text("another\n" * 40)
    assert main(list(map(str, compress))) == 0
    assert "text.txt is not what it was" in capsys.readouterr().err
    assert lp.CompressionReport.load_json("small/report.json").scores is None
    text.unlink()
    run(capsys, *compress, "--evaluate", bert / "text.txt")
    assert lp.CompressionReport.load_json("small/report.json").scores is not None


def test_several_budgets_share_what_was_seen(bert, tmp_path, capsys, monkeypatch, no_calibration):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    words = ["plan", bert, "--data", bert / "text.txt", "--keep", 0.3, 0.5, "--output", "deep/plan.yaml"]
    said = run(capsys, *words)
    assert sorted(os.listdir("deep")) == ["plan-0.3.yaml", "plan-0.5.yaml", "plan.statistics"]
    size = sum(path.stat().st_size for path in (tmp_path / "deep/plan.statistics").iterdir())
    assert f"statistics written to deep/plan.statistics ({size / 1e6:,.1f} MB)" in said
    assert "plan written to deep/plan-0.3.yaml" in said
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("deep/**/*.*") if path.is_file()}
    assert modes == {0o666 & ~_umask()}
    no_calibration()
    for keep in (0.3, 0.5):
        run(capsys, "compress", bert, "--plan", f"deep/plan-{keep}.yaml", "--output", f"small-{keep}")
        planned = lp.CompressionPlan.from_yaml(f"deep/plan-{keep}.yaml")
        report = lp.CompressionReport.load_json(f"small-{keep}/report.json")
        assert report.ranks == planned.ranks
        assert report.keep == planned.keep
    assert "exists; give --force" in refused(capsys, *words)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run(capsys, *words, "--force")


@pytest.mark.parametrize("name", ["plan-2026-11.yaml", "v1.5.yaml", "my plan-3.yml", "a-1e-05.b.yaml"])
def test_several_plans_find_their_statistics_whatever_the_name(name, bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    run(capsys, "plan", bert, "--data", bert / "text.txt", "--keep", 0.3, 0.5, "--output", name)
    stem, suffix = os.path.splitext(name)
    for keep in (0.3, 0.5):
        run(capsys, "compress", bert, "--plan", f"{stem}-{keep}{suffix}", "--output", f"small-{keep}")


def test_a_plan_with_little_data_is_warned_of_too(bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    run(capsys, "plan", bert, "--data", bert / "text.txt", "--output", "plan.yaml")
    (tmp_path / "line.txt").write_text((bert / "text.txt").read_text().splitlines()[0])
    words = ["compress", str(bert), "--plan", "plan.yaml", "--data", "line.txt", "--output", "small"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(words) == 0
    assert "fewer calibration tokens" in capsys.readouterr().err


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_ranks_can_be_edited(bert, tmp_path, capsys, monkeypatch, no_calibration):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    words = [bert, "--data", bert / "text.txt"]
    run(capsys, "plan", *words, "--keep", 0.4, "--output", "plan.yaml")
    made = lp.CompressionPlan.from_yaml("plan.yaml")
    name = next(layer.name for layer in made.layers if layer.rank is not None)
    dense = next(layer.name for layer in made.layers if layer.rank is None)
    made.with_ranks({name: 2, dense: 1}).to_yaml("plan.yaml")
    no_calibration()
    run(capsys, "compress", bert, "--plan", "plan.yaml", "--output", "small")
    ranks = lp.CompressionReport.load_json("small/report.json").ranks
    assert ranks == {**made.ranks, name: 2, dense: 1}


def test_a_method_without_statistics_has_none(bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert "statistics" not in run(capsys, "plan", bert, "--output", "plan.yaml")
    assert os.listdir() == ["plan.yaml"]
    run(capsys, "compress", bert, "--plan", "plan.yaml", "--output", "small")
    run(capsys, "compress", bert, "--output", "other")
    (one,), (other,) = tmp_path.glob("small/*.safetensors"), tmp_path.glob("other/*.safetensors")
    assert one.read_bytes() == other.read_bytes()


def test_what_does_not_fit_a_plan(bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    run(capsys, "plan", bert, "--data", bert / "text.txt", "--output", "plan.yaml", "--split-fused")
    words = ["compress", bert, "--plan", "plan.yaml", "--output", "small"]
    for option in (
        ["--keep", 0.3],
        ["--method", "svd"],
        ["--policy", "ratio"],
        ["--rank-override", "a=3"],
        ["--recipe", "plan.yaml"],
        ["--split-fused"],
        ["--layout", "pivot"],
        ["--target-modules", "a"],
        ["--exclude-modules", "a"],
        ["--rank-multiple-of", 2],
    ):
        assert f"{option[0]} has no effect with --plan" in refused(capsys, *words, *option)
    transformers = pytest.importorskip("transformers")
    shutil.copytree(bert, "changed")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained("changed")
    assert "with other weights than this one" in refused(capsys, "compress", "changed", *words[2:])
    run(capsys, "compress", "changed", *words[2:-1], "anew", "--data", bert / "text.txt", "--force")
    report = lp.CompressionReport.load_json("anew/report.json")
    assert report.ranks == lp.CompressionPlan.from_yaml("plan.yaml").ranks

    os.rename("plan.yaml", "other.yaml")
    assert "beside other.yaml there is no other.statistics" in refused(
        capsys, "compress", bert, "--plan", "other.yaml", "--output", "small"
    )
    os.rename("other.yaml", "plan-9.yaml")
    words[3] = "plan-9.yaml"
    part = tmp_path / "plan.statistics" / "part-1.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert "the checksum of part-1.safetensors is wrong" in refused(capsys, *words)
    part.unlink()
    assert "the statistics cannot be read" in refused(capsys, *words)
    assert not (tmp_path / "small").exists()


def test_where_a_plan_cannot_be_written(bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    words = ["plan", bert, "--data", bert / "text.txt", "--output"]
    assert "ends in .yaml" in refused(capsys, *words, "plan")
    (tmp_path / "file").write_text("")
    assert "not a folder to write in" in refused(capsys, *words, "file/plan.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "nothing that plan has written" in refused(capsys, *words, "folder.yaml", "--force")
    (tmp_path / "mine.statistics").mkdir()
    assert "nothing that plan has written" in refused(capsys, *words, "mine.yaml", "--force")
    assert sorted(os.listdir()) == ["file", "folder.yaml", "mine.statistics"]


def test_an_interrupted_plan_leaves_nothing(bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    for place in [(plans.PlanFiles, "write"), (lp.CompressionPlan, "to_yaml"), (plans.StatisticsWriter, "finish")]:
        with monkeypatch.context() as patch:
            patch.setattr(*place, stop)
            assert main(["plan", str(bert), "--data", str(bert / "text.txt"), "--output", "plan.yaml"]) == 130
        assert os.listdir() == []


def test_an_interrupted_plan_leaves_an_older_one_whole(bert, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    words = ["plan", str(bert), "--data", str(bert / "text.txt"), "--keep", "0.4", "0.6", "--output", "plan.yaml"]
    run(capsys, *words)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wrote, write = [], lp.CompressionPlan.to_yaml

    def stop_at_the_second(plan, path):
        wrote.append(path)
        if len(wrote) == 2:
            raise KeyboardInterrupt
        write(plan, path)

    monkeypatch.setattr(lp.CompressionPlan, "to_yaml", stop_at_the_second)
    assert main([*words, "--method", "activation", "--force"]) == 130
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
