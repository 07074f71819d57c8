"""What the README says, runs."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

#: What the documentation shows has enough calibration data.
pytestmark = pytest.mark.filterwarnings("error:.*fewer calibration tokens")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "benchmarks.md").read_text()
COMMAND = re.compile(r"python (benchmarks/\w+\.py)((?: --\w+)* --table)")
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    if 'from_pretrained("small")' not in block  # test_readme_folder.py runs it after the commands
]


def test_there_are_python_blocks():
    assert len(BLOCKS) >= 2


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


TABLES = sorted(set(COMMAND.findall(README + RESULTS)))


def test_there_are_tables():
    assert len(TABLES) >= 8


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a benchmark prints."""

    def run(script: str, options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [script, *options.split()])
        monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize(("script", "options"), TABLES)
def test_stored_results_are_printed(script, options, printed):
    rows = [line for line in printed(script, options) if line.count("|") >= 3 or "  " in line]
    assert len(rows) >= 4


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 200


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", README)
    assert len(links) > 15
    missing = [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
    assert missing == []


DECIMAL = re.compile(r"\d+\.\d+(?:e-?\d+)?")
#: The sections of docs/benchmarks.md that have tables, each with its first command.
SECTIONS = {
    title: (COMMAND.search(text).groups(), [line for line in text.splitlines() if line.startswith("| ")])
    for title, _, text in (section.partition("\n") for section in re.split(r"^## ", RESULTS, flags=re.MULTILINE)[1:])
    if "\n| " in text
}


def test_most_sections_have_tables():
    assert len(SECTIONS) >= 9
    assert sum(len(rows) for _, rows in SECTIONS.values()) >= 120


@pytest.mark.parametrize("title", SECTIONS)
def test_a_table_of_the_docs_has_the_numbers_that_its_command_prints(title, printed):
    """The means of a row, with their spreads, are in one row that is printed; other numbers are somewhere in them."""
    command, rows = SECTIONS[title]
    lines = printed(*command)
    known = set(DECIMAL.findall("\n".join(lines)))
    assert any(DECIMAL.search(row) for row in rows)
    for row in rows:
        numbers = row.partition("|")[2].partition("|")[2]
        means = re.findall(r"[\d.]+ ± [\d.]+", numbers)
        assert any(all(mean in line for mean in means) for line in lines), row
        assert set(DECIMAL.findall(numbers)) <= known, row


def test_the_version_is_in_the_changelog():
    from lightning_prehab.__about__ import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_is_of_this_version():
    from lightning_prehab.__about__ import __version__

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    settings = (ROOT / "pyproject.toml").read_text()
    assert cited.keys() >= {"cff-version", "message", "title", "authors"}  # what the format asks for
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == __version__
    assert f'license = "{cited["license"]}"' in settings
    assert all(f'"{word}"' in settings for word in cited["keywords"])
    (paper,) = cited["references"]
    assert paper.keys() >= {"type", "title", "authors"}
    assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
    assert paper["url"] in settings
    assert paper["url"] in README
