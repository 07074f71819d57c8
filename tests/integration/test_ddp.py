"""Two real gloo processes. One start serves all checks, since the start is what costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.mark.ddp
def test_two_processes():
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(WORKER)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    table = next(
        node.value
        for node in ast.walk(ast.parse(WORKER.read_text()))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHECKS"
    )
    expected = [ast.literal_eval(key) for key in table.keys]
    assert [
        line.removeprefix("passed: ") for line in run.stdout.splitlines() if line.startswith("passed: ")
    ] == expected
