"""Whole runs in two gloo processes, DDP and FSDP2, against one process. One start serves all, since the start costs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("site_worker.py")
OLDEST = (2, 10)  # of FSDP2 on the CPU
pytestmark = [
    pytest.mark.ddp,
    pytest.mark.skipif(
        tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST,
        reason="FSDP2 on the CPU needs torch 2.10",
    ),
]
#: Runs, by what they are like and where; tests/integration/test_ddp.py has more of DDP.
RUNS = [
    ("default", "ddp"),
    ("trials", "ddp"),
    ("default", "fsdp"),
    ("pivot", "fsdp"),
    ("sparse", "fsdp"),
    ("several", "fsdp"),
    ("trials", "fsdp"),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    return folder, run


@pytest.fixture(scope="module")
def worker():
    sys.path.insert(0, str(WORKER.parent))
    try:
        import site_worker

        yield site_worker
    finally:
        sys.path.remove(str(WORKER.parent))


def test_two_processes(started):
    _, run = started
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    passed = [line.removeprefix("passed: ") for line in run.stdout.splitlines() if line.startswith("passed: ")]
    table = next(
        node.value.right
        for node in ast.walk(ast.parse(WORKER.read_text()))
        if isinstance(node, ast.Return) and isinstance(node.value, ast.BinOp) and isinstance(node.value.right, ast.Dict)
    )
    others = [ast.literal_eval(key) for key in table.keys]
    assert passed == [f"{name}, {kind}" for name, kind in RUNS] + others


def test_the_report_is_printed_once_and_the_memory_is_said_once(started):
    """Of the first run: one table, though there are two processes."""
    _, run = started
    first = run.stdout.split("passed: default, ddp")[0]
    assert len(re.findall("times smaller", first)) == 1


@pytest.fixture(scope="module")
def alone(worker):
    found = {}

    def of(name):
        if name not in found:
            found[name] = worker.results_of(name, "one")
        return found[name]

    return of


def test_the_runs_are_known(worker):
    assert worker.RUNS == RUNS
    assert {name for name, _ in RUNS} == set(worker.SETTINGS)


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_the_end_is_that_of_one_process(name, kind, started, alone):
    """Weights as products, moments, ranks and the predicted increase, with AdamW, clipping and accumulation."""
    folder, _ = started
    found, expected = torch.load(folder / f"{name}_{kind}.pt"), alone(name)
    assert found["ranks"] == expected["ranks"]
    assert any(rank is not None for rank in found["ranks"].values())
    if expected["loss_increase"] is None:
        assert found["loss_increase"] is None
    else:  # out of twice as many losses, each of half as many samples
        assert found["loss_increase"] == pytest.approx(expected["loss_increase"], rel=0.1)
    assert found["state"].keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        torch.testing.assert_close(found["state"][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["default", "trials"])
def test_shards_predict_what_copies_predict(name, started):
    folder, _ = started
    ddp, fsdp = (torch.load(folder / f"{name}_{kind}.pt")["loss_increase"] for kind in ("ddp", "fsdp"))
    assert fsdp == pytest.approx(ddp, rel=1e-4)
