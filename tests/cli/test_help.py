"""Help and version answer at once: nothing large is imported for them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_prehab
from lightning_prehab import cli
from lightning_prehab.cli import arguments

LARGE = {"torch", "lightning", "transformers", "torchmetrics", "numpy", "safetensors", "matplotlib", "rich", "yaml"}
SCRIPT = """
import sys
from lightning_prehab.cli import main
try:
    main(sys.argv[1:])
finally:
    large = sys.modules.keys() & {large}
    assert not large, large
"""
COMMANDS = sorted(arguments.build_parser()[1])


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_nothing_large_is_imported(words):
    script = SCRIPT.replace("{large}", repr(LARGE))
    run = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "lightning-prehab" in run.stdout
    assert all(len(line) <= 100 for line in run.stdout.splitlines())


def test_neither_by_the_module_nor_by_the_package():
    module = [sys.executable, "-X", "importtime", "-m", "lightning_prehab", "plan", "--help"]
    run = subprocess.run(module, capture_output=True, text=True, check=False)
    imported = set(re.findall(r"\|\s+(\w+)", run.stderr))
    assert "argparse" in imported
    assert not imported & LARGE
    assert run.stdout.startswith("usage: lightning-prehab plan SOURCE")


def test_the_console_command_is_the_same():
    text = (Path(lightning_prehab.__file__).parents[1] / "pyproject.toml").read_text()
    (name, entry) = re.search(r'\[project.scripts\]\n(\S+) = "(\S+)"', text).groups()
    assert name == arguments.PROGRAM
    assert entry == f"{cli.__name__}:{cli.main.__name__}"
