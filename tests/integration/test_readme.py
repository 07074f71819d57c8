"""What the README says, runs."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    if 'from_pretrained("small")' not in block  # test_readme_folder.py runs it after the commands
]


def test_there_are_python_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[index], f"README.md, python block {index}", "exec"), {"__name__": "readme"})


def test_ci_runs_the_two_commands():
    commands = re.findall(r"^python3 -m venv \.venv && .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    assert "examples/vit_digits.py" in commands[0]
    assert "pytest" in commands[1]


def test_the_example_in_a_fast_run():
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "vit_digits.py"), "--fast", "--accelerator", "cpu"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("keep 0.") >= 3
    told = run.stdout[run.stdout.index("\nrun ") :]
    assert re.search(r"[0-9.]+ times fewer parameters: accuracy [0-9.]+ % before the cut, [0-9.]+ % at the end", told)
    assert max(map(len, told.splitlines())) <= 100
    for noise in ("Warning", "Tip", "GPU available", "stopped"):
        assert noise not in run.stdout + run.stderr, noise


TABLES = sorted(set(re.findall(r"python (benchmarks/\w+\.py)((?: --\w+)* --table)", README)))


def test_there_are_tables():
    assert len(TABLES) >= 8


@pytest.mark.parametrize(("script", "options"), TABLES)
def test_stored_results_are_printed(script, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *options.split()])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.count("|") >= 3 or "  " in line]
    assert len(rows) >= 4


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 200


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", README)
    assert len(links) > 15
    missing = [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
    assert missing == []


def test_the_version_is_in_the_changelog():
    from lightning_prehab.__about__ import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
