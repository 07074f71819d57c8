"""examples/cluster, on two processes and on two "nodes": requeued, killed, restarted, with the end of one process.

With every act, and in float64, where roundings stay small whatever training makes of them.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cluster"
LIMIT = 1800
STEPS = 25  # of an epoch
TOLERANCE = 1e-6
pytestmark = [pytest.mark.ddp, pytest.mark.slow]
WAYS = [
    "ddp",
    pytest.param(
        "fsdp2",
        marks=pytest.mark.skipif(
            tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="FSDP2 on the CPU needs torch 2.10"
        ),
    ),
]
#: Starts the tasks of a job as srun does, on this machine.
SRUN = """#!/bin/bash
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NODEID=0 "$@" &
  tasks+=($!)
done
for task in "${tasks[@]}"; do
  wait "$task" || exit
done
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SLURM_SUBMIT_DIR/scontrol.log"
"""


def environment(**more):
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", **more}


#: What the example leaves out of the third act, in its place after the schedule.
MORE_ACTS = """    - class_path: RehabDistillation
      init_args: {strength: 0.5}
    - class_path: FactorTraining
      init_args: {product_decay: 0.01, rate_B: 2.0, rebalance_every: 7}
    - class_path: cluster_faults.Float64
"""


def configure(folder, way, fault=None, same=False):
    """A shorter run than the example's, with more acts; with something that happens in it once."""
    text = (EXAMPLE / f"{way}.yaml").read_text()
    for old, new in (
        ("max_epochs: 8", "max_epochs: 4\n  enable_progress_bar: false\n  enable_model_summary: false"),
        ("epoch: 5", "epoch: 2"),
        ("regularizer: TailShrinkage\n", "regularizer: TailShrinkage\n        self_distillation: 0.5\n"),
        ("init_args: {warmup_steps: 20}\n", "init_args: {warmup_steps: 20}\n" + MORE_ACTS),
        ("default_root_dir: run", f"default_root_dir: {folder / 'run'}"),
    ):
        assert old in text
        text = text.replace(old, new)
    more = ""
    if fault is not None:
        more += "    - class_path: cluster_faults.Once\n      init_args: "
        more += f"{{folder: {folder}, step: {fault[0]}, signal_name: {fault[1]}}}\n"
    if same:
        more += "    - class_path: cluster_faults.SameOnAllRanks\n"
    text = text.replace("data:\n", more + "data:\n")
    folder.mkdir(exist_ok=True)
    (folder / f"{way}.yaml").write_text(text)
    return folder / f"{way}.yaml"


def run(command, **settings):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=LIMIT, check=False, **settings
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def end_of(folder):
    """The matrices that the last weights stand for."""
    (path,) = (folder / "run" / "checkpoints").glob("epoch=3.ckpt")
    if path.is_dir():
        dcp_to_torch_save(path, folder / "consolidated")
        path = folder / "consolidated"
    state = torch.load(path, weights_only=True)["state_dict"]
    layers = [name.removesuffix(".A.weight") for name in state if name.endswith(".A.weight")]
    assert len(layers) == 4
    products = {f"{name}.weight": state.pop(f"{name}.B.weight") @ state.pop(f"{name}.A.weight") for name in layers}
    return {**state, **products}


def assert_same_end(folder, reference):
    """Each matrix, to a share of its own size."""
    found = end_of(folder)
    assert found.keys() == reference.keys()
    assert all(one.dtype == torch.float64 for one in found.values())
    differences = {name: float((found[name] - one).norm() / one.norm()) for name, one in reference.items()}
    print(f"difference: {max(differences.values()):.1e}")
    assert max(differences.values()) < TOLERANCE, differences


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The end of the run on one process."""
    folder = tmp_path_factory.mktemp("one")
    alone = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    command = [sys.executable, EXAMPLE / "train.py", "--config", configure(folder, "ddp"), *alone]
    assert "validation accuracy" in run(command, env=environment())
    assert "nothing left to train after" in run(command, env=environment())
    return end_of(folder)


@pytest.mark.parametrize("way", WAYS)
def test_a_slurm_job_requeues_itself_inside_an_epoch_and_goes_on(way, reference, tmp_path):
    """The signal reaches one process alone, between a gradient and its step: before the cut, or after it."""
    step = {"ddp": STEPS + 20, "fsdp2": 2 * STEPS + 9}[way]
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    config = configure(tmp_path, way, (step, "SIGUSR1"))
    slurm = {"JOB_ID": "4242", "JOB_NAME": "digits", "NTASKS": "2", "NNODES": "1", "NTASKS_PER_NODE": "2"}
    slurm |= {"SUBMIT_DIR": str(tmp_path), "NODELIST": "127.0.0.1"}
    port = {"MASTER_PORT": str(free_port())}
    variables = environment(**{f"SLURM_{name}": value for name, value in slurm.items()}, **port)
    variables["PATH"] = f"{tools}{os.pathsep}{variables['PATH']}"
    job = ["bash", EXAMPLE / "job.sh", config]
    assert "parameters, validation accuracy" not in run(job, env=variables, cwd=EXAMPLE)
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4242\n"
    assert (tmp_path / "run" / "hpc_ckpt_1.ckpt").exists()
    assert "parameters, validation accuracy" in run(job, env=variables, cwd=EXAMPLE)
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4242\n"  # not once more
    assert_same_end(tmp_path, reference)


def free_port():
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


@pytest.fixture
def nodes():
    """For each of two nodes what a command starts with, its address and its network interface.

    They are network namespaces with a cable between them; where they cannot be made, two addresses of this machine.
    """
    names = [f"prehab{os.getpid()}{end}" for end in "ab"]
    wires = [f"w{os.getpid() % 10**7}{end}" for end in "ab"]
    addresses = ["10.99.7.1", "10.99.7.2"]
    made = [["ip", "netns", "add", name] for name in names]
    made.append(["ip", "link", "add", wires[0], "netns", names[0], "type", "veth", "peer", wires[1], "netns", names[1]])
    for name, wire, address in zip(names, wires, addresses, strict=True):
        inside = ["ip", "-n", name]
        made += [[*inside, "address", "add", f"{address}/24", "dev", wire]]
        made += [[*inside, "link", "set", one, "up"] for one in (wire, "lo")]
    try:
        for command in made:
            subprocess.run(command, check=True, capture_output=True)
        yield [(["ip", "netns", "exec", n], a, w) for n, a, w in zip(names, addresses, wires, strict=True)]
    except (OSError, subprocess.CalledProcessError):
        yield [([], "127.0.0.1", "lo"), ([], "127.0.0.2", "lo")]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.parametrize("way", WAYS)
def test_two_nodes_of_two_processes_one_of_which_is_killed_and_restarted(way, nodes, reference, tmp_path):
    config = configure(tmp_path, way, (2 * STEPS + 7, "SIGKILL"), same=way == "ddp")
    port, started = free_port(), []
    for before, address, interface in nodes:
        command = [*before, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc-per-node=2", "--max-restarts=1", "--rdzv-id=prehab", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={nodes[0][1]}:{port}", f"--local-addr={address}"]
        command += [f"--rdzv-conf=is_host={int(not started)}", EXAMPLE / "train.py"]
        command += ["--config", config, "--trainer.num_nodes", "2"]
        if way == "fsdp2":
            command += ["--trainer.strategy.init_args.data_parallel_size", "4"]
        variables = environment(GLOO_SOCKET_IFNAME=interface, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(list(map(str, command)), env=variables, start_new_session=True, **pipes))
    try:
        told = [process.communicate(timeout=LIMIT)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-4000:] for text in told)
    assert (tmp_path / "happened").read_text() == "restart 0"
    assert sum("parameters, validation accuracy" in text for text in told) == 1
    assert_same_end(tmp_path, reference)
