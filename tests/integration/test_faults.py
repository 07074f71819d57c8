"""SIGKILL at chosen and random points, on one device and on two processes; the harness is faults.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("faults.py")


@pytest.mark.ddp
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_runs_end_as_if_nothing_had_happened(processes, tmp_path):
    run = subprocess.run(
        [sys.executable, str(HARNESS), "--processes", str(processes), "--fixed", "--random", "2", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-2000:]}"
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["points"] >= 12
    assert summary["failures"] == 0
