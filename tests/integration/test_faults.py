"""SIGKILL at chosen and random points, on one device and on two processes; the harness is faults.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HARNESS = Path(__file__).with_name("faults.py")


@pytest.mark.ddp
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_runs_end_as_if_nothing_had_happened(processes, tmp_path):
    run = subprocess.run(
        [sys.executable, str(HARNESS), "--processes", str(processes), "--fixed", "--random", "2", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-2000:]}"
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["points"] >= 12
    assert summary["failures"] == 0


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="FSDP2 on the CPU: torch 2.10")
def test_killed_and_resumed_runs_of_shards_too(tmp_path):
    """One of two ranks is killed, while the surgery's statistics ride along, right after the swap, and later."""
    run = subprocess.run(
        [
            *(sys.executable, str(HARNESS), str(tmp_path), "--processes", "2", "--sharded"),
            *("--points", "calibrate:2", "swapped:1", "step:33"),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-2000:]}"
    assert json.loads(run.stdout.splitlines()[-1])["failures"] == 0
