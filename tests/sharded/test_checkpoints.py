"""Checkpoints of sharded runs, by two real gloo processes; one start serves all checks, since the start is what costs.

One process loads what they have left.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError

WORKER = Path(__file__).with_name("checkpoints_worker.py")
pytestmark = [
    pytest.mark.ddp,
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="FSDP2 on the CPU needs torch 2.10"
    ),
]


def start(processes: int, *arguments: object) -> list[str]:
    """Runs the worker; the names of the checks that have passed."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"),
            *map(str, (WORKER, *arguments)),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    return [line.removeprefix("passed: ") for line in run.stdout.splitlines() if line.startswith("passed: ")]


def table(name: str) -> list[str]:
    found = next(
        node.value
        for node in ast.walk(ast.parse(WORKER.read_text()))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name
    )
    return [ast.literal_eval(key) for key in found.keys]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    assert start(2, folder) == table("CHECKS")
    return folder


def test_two_processes(written):
    """All checks have passed on both."""


def test_one_process_loads_what_is_left(written):
    from tests.sharded import checkpoints_worker as worker

    folder, file = written / f"folder-{worker.EPOCHS - 1}.ckpt", written / f"file-{worker.EPOCHS - 1}.ckpt"
    with pytest.raises(CheckpointError, match="python -m lightning.fabric.utilities.consolidate_checkpoint"):
        lp.load_from_checkpoint(worker.Lit, folder)
    broken = shutil.copytree(folder, written / "broken.ckpt")
    (broken / "meta.pt").unlink()
    with pytest.raises(CheckpointError, match=r"is no complete checkpoint: meta.pt is missing"):
        lp.load_from_checkpoint(worker.Lit, broken)
    whole = written / "whole.ckpt"
    command = [sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(folder)]
    subprocess.run([*command, "--output_file", str(whole)], check=True, capture_output=True, timeout=1800)
    loaded = [lp.load_from_checkpoint(worker.Lit, path) for path in (whole, file)]
    assert any(isinstance(part, lp.LowRankLinear) for part in loaded[0].modules())
    for (name, one), (_, other) in zip(*(lit.state_dict().items() for lit in loaded), strict=True):
        assert torch.equal(one, other), name
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[lp.CompressionCallback(1)],
    )  # fmt: skip
    results = [trainer.validate(worker.Lit(), worker.Loader(), path, verbose=False) for path in (whole, file)]
    assert results[0] == results[1]


@pytest.mark.slow
def test_other_numbers_of_processes_go_on(written):
    from tests.sharded import checkpoints_worker as worker

    for processes in (4, 2):
        assert start(processes, written, "spread") == list(worker.SPREAD)
    four, two = (torch.load(written / f"on-{processes}.ckpt.start", weights_only=True) for processes in (4, 2))
    torch.testing.assert_close(four, two, rtol=0, atol=0)
    file = torch.load(written / "flat-file-2.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(four[0], dict(file), rtol=0, atol=0)
