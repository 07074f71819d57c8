"""Real gloo processes that hold a model in shards. One start serves all checks, since the start is what costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prehab.sharded import engine

WORKER = Path(__file__).with_name("surgery_worker.py")
pytestmark = pytest.mark.skipif(engine.version() < engine.OLDEST, reason="FSDP2 on the CPU needs torch 2.10")


def run(processes, table):
    command = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", str(WORKER)]
    run = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    named = next(
        node.value
        for node in ast.walk(ast.parse(WORKER.read_text()))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == table
    )
    passed = [line.removeprefix("passed: ") for line in run.stdout.splitlines() if line.startswith("passed: ")]
    assert passed == [ast.literal_eval(key) for key in named.keys]


@pytest.mark.ddp
def test_two_processes():
    run(2, "CHECKS")


@pytest.mark.ddp
@pytest.mark.slow
def test_four_processes():
    run(4, "CHECKS_OF_FOUR")
