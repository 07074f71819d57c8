"""Prehab on weights in shards: two real gloo processes. One start serves all checks, since the start is what costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("prehab_worker.py")


@pytest.mark.ddp
@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="FSDP2 on the CPU is of 2.10")
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
    table = next(
        node.value
        for node in ast.walk(ast.parse(WORKER.read_text()))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHECKS"
    )
    expected = [ast.literal_eval(key) for key in table.keys]
    passed = [line.removeprefix("passed: ") for line in run.stdout.splitlines() if line.startswith("passed: ")]
    assert passed == expected
