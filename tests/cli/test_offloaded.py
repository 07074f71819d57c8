"""``compress --offload``."""

import json

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.cli import main
from lightning_prehab.cli.arguments import parse
from lightning_prehab.cli.offloaded import _NOT_HERE

pytest.importorskip("transformers")

from tests.offload.folders import batches, dense

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer calibration tokens")


@pytest.fixture
def folder(tmp_path):
    dense("llama", tmp_path / "dense")
    rows = {name: torch.cat([batch[name] for batch in batches()]) for name in batches()[0]}
    torch.save(rows, tmp_path / "data.pt")
    return tmp_path


def command(folder, *options: str) -> int:
    data = ["--data", str(folder / "data.pt"), "--batch-size", "3"]
    return main(["compress", str(folder / "dense"), "--output", str(folder / "small"), "--offload", *data, *options])


def test_it_writes_what_the_ordinary_way_writes(folder, capsys):
    assert command(folder, "--keep", "0.5", "--memory", "100GB") == 0
    out, err = capsys.readouterr()
    assert "2 blocks, one at a time: about" in err
    assert "written to" in out
    assert "from_pretrained" in out
    arguments = ["compress", str(folder / "dense"), "--output", str(folder / "ordinary"), "--keep", "0.5"]
    assert main([*arguments, "--data", str(folder / "data.pt"), "--batch-size", "3", "--evaluate", "0"]) == 0
    ours, theirs = (lp.CompressionReport.load_json(folder / name / "report.json") for name in ("small", "ordinary"))
    assert ours.ranks == theirs.ranks
    assert ours.weight_errors == pytest.approx(theirs.weight_errors, rel=1e-4)
    names = [{path.name for path in (folder / name).iterdir()} for name in ("small", "ordinary")]
    assert {name for name in names[1] if "weights-" not in name} == {
        name for name in names[0] if "weights-" not in name
    }
    assert main(["report", str(folder / "small")]) == 0
    bench = ["bench", str(folder / "dense"), "--compressed", str(folder / "small"), "--batch-sizes", "1"]
    assert main([*bench, "--data", str(folder / "data.pt"), "--max-length", "8"]) == 0


@pytest.mark.parametrize("words", [["--refine", "4"], ["--refine"]])
def test_it_refines_block_by_block(words, folder, capsys):
    assert command(folder, "--method", "svd", *words) == 0
    found = lp.CompressionReport.load_json(folder / "small" / "report.json").refinement
    assert (found.scope, found.measure) == ("blocks", "squared")
    assert found.steps <= 2 * (int(words[1]) if words[1:] else 32)
    assert found.summary() in " ".join(capsys.readouterr().out.split())
    assert found.after <= found.before


def test_json_and_force(folder, capsys):
    assert command(folder) == 0
    assert command(folder) == 1
    assert "exists; give --force" in capsys.readouterr().err
    assert command(folder, "--force", "--json", "--keep", "0.4") == 0
    assert json.loads(capsys.readouterr().out)["report"]["keep"] <= 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluate", "0.1"], "--evaluate needs the whole model"),
        (["--layers-at-once", "2"], "leave --layers-at-once out"),
        (["--model", "some.Class"], "leave --model out"),
        (["--policy", "probe"], "tries cuts on the whole model"),
        (["--memory", "little"], "memory must be bytes"),
        (["--memory", "2MB"], "is too little"),
        (["--device", "cuda"], "computes on the CPU"),
        (["--refine", "--data", "none"], "with --offload give --data FILE"),
        (["--self-share", "0.5"], "--self-share has the whole model write text"),
        (["--data", "self"], "--data self has the whole model write text"),
        (["--trials", "2"], "--trials tries cuts on the whole model"),
        (["--data", "none", "--trials", "2"], "--trials tries cuts on the whole model"),
        (["--self-sequences", "2"], "--self-sequences has the whole model write text"),
        (["--data", "none", "--method", "whitened"], "needs --data"),
    ],
)
def test_what_needs_the_whole_model_is_refused(options, message, folder, capsys):
    assert command(folder, *options) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "small").exists()


#: Options of compress that mean the same with --offload.
HERE = {"source", "output", "keep", "force", "offload", "memory", "data", "batch_size", "max_length", "all", "json"}
HOW = {"recipe", "method", "policy", "target_modules", "exclude_modules", "rank_override", "rank_multiple_of"}
HOW |= {"split_fused", "layout", "refine"}


def test_no_option_is_passed_over_in_silence():
    """What the offloaded way does not read, it refuses: see the cases above."""
    refused = {"evaluate", "device", *_NOT_HERE}
    assert {*vars(parse(["compress", "x", "--output", "y"]))} - {"command"} == HERE | HOW | refused


@pytest.mark.parametrize("words", [["--data", "none"], []])
def test_without_data_it_says_what_that_means(words, folder, capsys):
    arguments = ["compress", str(folder / "dense"), "--output", str(folder / "small"), "--offload"]
    assert main([*arguments, *words]) == 0
    out, err = capsys.readouterr()
    assert "SVD()" in out
    assert "without --data plain SVD is used" in err


def test_memory_alone_has_no_meaning(folder, capsys):
    assert main(["compress", str(folder / "dense"), "--output", str(folder / "small"), "--memory", "3GB"]) == 1
    assert "--memory is for --offload" in capsys.readouterr().err
