"""The third act under FSDP2, in two real gloo processes. One start serves all checks, since the start is what costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.sharded.rehab_worker import CHECKS

WORKER = Path(__file__).with_name("rehab_worker.py")
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.mark.ddp
@pytest.mark.skipif(VERSION < (2, 10), reason="FSDP2 on the CPU needs torch 2.10")
def test_two_processes():
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(WORKER)],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    passed = [line.removeprefix("passed: ") for line in run.stdout.splitlines() if line.startswith("passed: ")]
    assert passed == list(CHECKS)
