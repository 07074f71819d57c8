"""Whole runs under tensor parallelism, in two processes and in two times two, against one process.

One start of each serves all checks, since the start is what costs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("parallel_worker.py")
OLDEST = (2, 10)  # of tensor parallelism here
pytestmark = [
    pytest.mark.ddp,
    pytest.mark.skipif(
        tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST,
        reason="tensor parallelism needs torch 2.10",
    ),
]
#: Runs, by the number of processes.
RUNS = {
    2: ["default", "several", "several, penalty", "activation", "sequence"],
    4: ["default", "several, penalty"],
}
OTHERS = {2: ["tokens", "checkpoints", "refusals", "changes in place"], 4: ["tokens", "checkpoints"]}
#: How far runs in float64 may be apart, as a share; 4e-14 was seen.
TOLERANCE = 1e-10


def start(processes, folder):
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"),
            *map(str, (WORKER, folder)),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    passed = [line.removeprefix("passed: ") for line in run.stdout.splitlines() if line.startswith("passed: ")]
    assert passed == RUNS[processes] + OTHERS[processes]


@pytest.fixture(scope="module")
def alone():
    """What one process ends with."""
    sys.path.insert(0, str(WORKER.parent))
    try:
        import parallel_worker as worker
    finally:
        sys.path.remove(str(WORKER.parent))
    known = {}

    def of(name):
        if name not in known:
            known[name] = worker.results_of(name)
        return known[name]

    return of


def same(folder, name, expected):
    """Ranks, the effect of the cut, and all weights and moments, of factors those of their products."""
    found = torch.load(folder / f"{name}.pt")
    assert found["ranks"] == expected["ranks"]
    assert any(rank is not None for layer, rank in found["ranks"].items() if "blocks" in layer)
    if name == "activation":  # where biases are shifted it is not tried
        assert found["increase"] is None
    else:
        assert found["increase"] == pytest.approx(expected["increase"], rel=1e-5, abs=1e-9)
    assert found["state"].keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        error = (found["state"][key] - value).norm() / value.norm()
        assert error <= TOLERANCE, (key, float(error))


def test_two_processes(tmp_path, alone):
    start(2, tmp_path)
    for name in RUNS[2]:
        same(tmp_path, name, alone(name))


@pytest.mark.slow
def test_two_times_two_processes(tmp_path, alone):
    start(4, tmp_path)
    for name in RUNS[4]:
        same(tmp_path, name, alone(name))
