"""Whole runs with every act, under DDP, FSDP2 and HSDP, end as one process does. One start serves all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sharded.acts_worker import VERSION, checks

WORKER = Path(__file__).with_name("acts_worker.py")


@pytest.mark.ddp
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_end_is_that_of_one_process(processes):
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", str(WORKER)],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    passed = [line.removeprefix("passed: ") for line in run.stdout.splitlines() if line.startswith("passed: ")]
    whole_runs = [f"{name}, {way}" for name, way in checks(processes, VERSION >= (2, 10))]
    assert passed == [*whole_runs, "settings that differ"]
