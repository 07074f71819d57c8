"""examples/cli: on two processes, killed after the surgery, resumed; and what it says of mistakes."""

import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "cli"
COMMAND = [sys.executable, str(EXAMPLE / "main.py"), "fit", "--config", str(EXAMPLE / "config.yaml")]
QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
SHORT = ["--trainer.max_epochs", "5", "--trainer.limit_train_batches", "12", "--trainer.callbacks.dirpath", "saved"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
LIMIT = 600


def start(folder, *arguments):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [*COMMAND, *QUIET, *arguments], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def finish(folder, *arguments):
    code = start(folder, *arguments).wait(LIMIT)
    return code, (folder / "log").read_text()


@pytest.mark.ddp
def test_two_processes_killed_after_the_surgery_resume_bit_by_bit(tmp_path):
    config = (EXAMPLE / "config.yaml").read_text().replace("epoch: 5", "epoch: 3")
    (tmp_path / "config.yaml").write_text(config)
    arguments = ["--config", str(tmp_path / "config.yaml"), *TWO, *SHORT]
    code, log = finish(tmp_path / "whole", *arguments)
    assert code == 0, log
    assert (
        len(re.findall(r"times fewer parameters: validation accuracy \S+% before the cut, \S+% at the end", log)) == 1
    )

    killed = start(tmp_path / "killed", *arguments)
    saved = tmp_path / "killed" / "saved" / "epoch=3.ckpt"  # the end of the epoch that begins with the surgery
    limit = time.monotonic() + LIMIT
    while not saved.exists() and killed.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(LIMIT) == -signal.SIGKILL, (tmp_path / "killed" / "log").read_text()
    code, log = finish(tmp_path / "killed", *arguments, "--ckpt_path", str(saved))
    assert code == 0, log

    one, two = (
        torch.load(tmp_path / name / "saved" / "epoch=4.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "killed")
    )
    assert one["net.0.A.weight"].shape[0] < 43
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """What the program says before it ends without a run; in this process, where all is imported already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the program sets it; undone after the test
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level

    def start(config: Path, *arguments: str) -> tuple[object, str, str, str]:
        monkeypatch.setattr(sys, "argv", ["main.py", "fit", "--config", str(config), *arguments])
        with pytest.raises((SystemExit, ValueError)) as end:
            runpy.run_path(str(EXAMPLE / "main.py"), run_name="__main__")
        code = end.value.code if isinstance(end.value, SystemExit) else 1
        return code, *capsys.readouterr(), str(end.value)

    yield start
    logger.setLevel(level)
    sys.modules.pop("digits", None)


def test_the_printed_config_is_the_same_when_it_is_read_again(say, tmp_path):
    printed = []
    for config in (EXAMPLE / "config.yaml", tmp_path / "printed.yaml"):
        code, out, *_ = say(config, "--print_config")
        assert not code
        printed.append(out)
        (tmp_path / "printed.yaml").write_text(out)
    assert printed[0] == printed[1]
    for name in ("PrehabCallback", "TailShrinkage", "CompressionCallback", "ParameterBudget", "RehabSchedule"):
        assert f"lightning_prehab.{name}" in printed[0]
    assert "keep: 0.2" in printed[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("keep: 0.2", "keep: 2.0"), "must lie in (0, 1], got 2.0"),
        (("calibration_batches: 24", "calibration_batchs: 16"), "calibration_batchs"),
        (("regularizer: TailShrinkage", "regularizer: TailShrinkag"), "TailShrinkag"),
    ],
)
def test_mistakes_are_named(change, message, say, tmp_path):
    text = (EXAMPLE / "config.yaml").read_text()
    assert change[0] in text
    (tmp_path / "config.yaml").write_text(text.replace(*change))
    code, _, *words = say(tmp_path / "config.yaml")
    assert code
    assert any(message in word for word in words)
