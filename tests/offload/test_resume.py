"""Whenever the process ends, the same call goes on where it was; another call has nothing to do with it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.offload.work import Work
from lightning_prehab.offload.writer import FolderWriter
from lightning_prehab.plan.spectra import Solver

pytest.importorskip("transformers")

from tests.offload.folders import Killed, batches, dense, killed_after

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer calibration tokens")


def compress(folder: Path, output: str = "small", **settings):
    recipe = lp.Recipe(0.5, factorization=settings.pop("factorization", None))
    return lp.compress_folder(folder / "dense", folder / output, recipe, batches(), progress=False, **settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("factorization", "step"), [(lp.KroneckerSVD(), 3), (lp.WhitenedSVD(centered=True), 7)], ids=["back", "forward"]
)
def test_every_stage_is_done_once(factorization, step, tmp_path, monkeypatch):
    dense("llama", tmp_path / "dense")
    expected = compress(tmp_path, "whole", factorization=factorization)
    solved: list[str] = []
    solve = Solver.__call__
    monkeypatch.setattr(Solver, "__call__", lambda self, names: (solved.extend(names), solve(self, names))[1])
    done: list[str] = []
    for _ in range(100):
        try:
            with killed_after(step, monkeypatch) as seen:
                report = compress(tmp_path, factorization=factorization)
            done += seen
            break
        except Killed:
            done += seen
            assert not (tmp_path / "small").exists()
    assert len(done) == len(set(done)) > 20
    assert report.ranks == expected.ranks
    assert report.weight_errors == expected.weight_errors
    ours, theirs = weights(tmp_path / "small"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if isinstance(factorization, lp.KroneckerSVD):
        assert len(solved) < 2 * len(set(solved))  # those alone that were solved when the process ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small", "whole"]


def test_a_kill_after_the_last_step_leaves_nothing_to_do(tmp_path, monkeypatch):
    dense("llama", tmp_path / "dense")
    with monkeypatch.context() as patch:
        patch.setattr(Work, "clear", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            compress(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()}
    assert compress(tmp_path).keep <= 0.5
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small"]


def test_another_wish_does_not_mix(tmp_path, monkeypatch, capsys):
    dense("llama", tmp_path / "dense")
    expected = compress(tmp_path, "whole", factorization=lp.SVD())
    with killed_after(9, monkeypatch), pytest.raises(Killed):
        compress(tmp_path)
    (left,) = tmp_path.glob(".small.*")
    recipe = lp.Recipe(0.5, factorization=lp.SVD())
    report = lp.compress_folder(tmp_path / "dense", tmp_path / "small", recipe, batches())
    assert report.weight_errors == expected.weight_errors
    assert f"unfinished work of another wish in {left}" in capsys.readouterr().err
    assert left.is_dir()
    os.utime(tmp_path / "dense" / "config.json")  # and another model is another wish
    with killed_after(2, monkeypatch), pytest.raises(Killed):
        compress(tmp_path, overwrite=True)
    assert len(list(tmp_path.glob(".small.*"))) == 2


def test_memory_that_is_in_use_elsewhere_makes_no_other_wish(tmp_path, monkeypatch):
    from lightning_prehab.offload import needs

    dense("llama", tmp_path / "dense")
    monkeypatch.setattr(needs, "LATER", 0)
    monkeypatch.setattr(needs, "COPIES", 0.0)
    done: list[str] = []
    for used in (0, 1000, 2000):
        monkeypatch.setattr(needs, "resident", lambda used=used: used)
        with killed_after(7, monkeypatch) as seen, pytest.raises(Killed):
            compress(tmp_path, memory=2**20)
        done += [stage for stage in seen if stage != "fit"]
    assert len(done) == len(set(done)) > 15
    compress(tmp_path, memory=2**20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small"]


def test_two_processes_do_not_work_on_the_same(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    work = Work(tmp_path / "small", {"wish": 1})
    with pytest.raises(lp.PrehabError, match="Another process works on this very wish"):
        Work(tmp_path / "small", {"wish": 1})
    Work(tmp_path / "small", {"wish": 2}).clear()
    work.close()
    Work(tmp_path / "small", {"wish": 1}).clear()
    assert list(tmp_path.iterdir()) == []


KILLER = """
import os, signal, sys
from pathlib import Path
import lightning_prehab as lp
from lightning_prehab.offload.work import Work
from tests.offload.folders import batches
finish = Work.finish
def killing(work, stage, note=True):
    if stage.startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    finish(work, stage, note)
if sys.argv[2]:
    Work.finish = killing
folder = Path(sys.argv[1])
lp.compress_folder(folder / "dense", folder / "small", 0.5, batches(), progress=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
def test_killed_processes_leave_what_they_have_done(tmp_path):
    dense("llama", tmp_path / "dense")
    expected = compress(tmp_path, "whole")
    paths = os.pathsep.join([str(Path(lp.__file__).parents[1]), *sys.path])
    for stage in (
        "states-0",
        "statistics-block-1",
        "decomposed-model.layers.0",
        "shard-model.layers.0",
        "complete",
        "",
    ):
        command = [sys.executable, "-c", KILLER, str(tmp_path), stage]
        code = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode
        assert code == (-signal.SIGKILL if stage else 0)
        assert (tmp_path / "small").exists() == (not stage)
    ours, theirs = weights(tmp_path / "small"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    report = lp.CompressionReport.load_json(tmp_path / "small" / "report.json")
    assert report.weight_errors == expected.weight_errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small", "whole"]


def size_of(folder: Path) -> int:
    return sum(tensor.numel() for tensor in weights(folder).values())


def killed_while_clearing(folder: Path, monkeypatch, **settings) -> None:
    """The new folder is in its place, and the work folder is still there."""
    with monkeypatch.context() as patch:
        patch.setattr(Work, "clear", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            compress(folder, **settings)


def test_an_output_that_is_gone_is_made_again(tmp_path, monkeypatch):
    dense("llama", tmp_path / "dense")
    compress(tmp_path, "whole")
    killed_while_clearing(tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "small")
    compress(tmp_path)
    ours, theirs = weights(tmp_path / "small"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_output_of_another_wish_is_not_taken_for_this_one(tmp_path, monkeypatch):
    dense("llama", tmp_path / "dense")
    compress(tmp_path, "whole")
    killed_while_clearing(tmp_path, monkeypatch)
    lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.9, batches(), progress=False, overwrite=True)
    with pytest.raises(lp.PrehabError, match="exists; give overwrite"):
        compress(tmp_path)
    assert compress(tmp_path, overwrite=True).keep <= 0.5
    assert size_of(tmp_path / "small") == size_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small", "whole"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("removed", [0, 1, 4, 20])
def test_a_kill_while_the_work_is_cleared_up_leaves_a_call_that_works(removed, overwrite, tmp_path, monkeypatch):
    dense("llama", tmp_path / "dense")
    if overwrite:
        lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.9, batches(), progress=False)
    left = iter(range(removed))
    unlink = os.unlink

    def killing(path, *args, **kwargs):
        if finished and next(left, None) is None:
            raise Killed
        unlink(path, *args, **kwargs)

    finished = []
    finish = FolderWriter.finish
    monkeypatch.setattr(FolderWriter, "finish", lambda self, report: (finished.append(1), finish(self, report)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killing)
        with pytest.raises(Killed):
            compress(tmp_path, overwrite=overwrite)
    report = compress(tmp_path, overwrite=True)
    assert report.keep <= 0.5
    assert size_of(tmp_path / "small") == report.parameters_after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small"]


def test_a_source_that_changes_while_it_is_read_gives_no_output(tmp_path, monkeypatch):
    dense("llama", tmp_path / "dense")
    finish, seen = Work.finish, []

    def changing(work, stage, note=True):
        seen.append(stage)
        if len(seen) == 12:
            os.utime(tmp_path / "dense" / "config.json", (1, 1))
        finish(work, stage, note)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "finish", changing)
        with pytest.raises(lp.PrehabError, match="was changed while it was read"):
            compress(tmp_path)
    assert not (tmp_path / "small").exists()
    compress(tmp_path)
