"""What CONTRIBUTING.md says, runs; and the words that people try do what the gate does.

CONTRIBUTING.md is a session, as the pages under docs/ are: its blocks share one folder and one namespace, from top to
bottom. A block with a title is a file that a later block uses.
"""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import lightning_prehab as lp
from lightning_prehab import rank_policies
from lightning_prehab.errors import ArgumentError
from lightning_prehab.rank_policies import LayerChoices
from lightning_prehab.road import operate
from lightning_prehab.sites import ProcessSite
from tests.rank_policies import test_rank_policies as shelf

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
BLOCK = re.compile(r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(TEXT)
#: Files of people, not of the package.
TITLES = {title for _, title, _ in BLOCKS if title}
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))


@pytest.fixture
def session(tmp_path, monkeypatch):
    """The names that are there when all blocks have run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = {"__name__": "contributing"}
    for index, (language, title, code) in enumerate(BLOCKS):
        if title:
            (tmp_path / title).write_text(code)
        elif language == "python":
            exec(compile(code, f"CONTRIBUTING.md, block {index}", "exec"), names)
    yield names
    for title in TITLES:
        sys.modules.pop(Path(title).stem, None)


def make(*words: str) -> subprocess.CompletedProcess[str]:
    """What ``make`` says, as if it was not this test's own ``make`` that asks."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    own = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "TEST")
    env = {key: value for key, value in os.environ.items() if key not in own}
    return subprocess.run(["make", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def made(*words: str) -> list[str]:
    """The commands that ``make`` would run, whichever environment they come from."""
    run = make("--dry-run", "--no-print-directory", *words)
    assert run.returncode == 0, run.stderr
    return [line.removeprefix(".venv/bin/") for line in run.stdout.splitlines()]


def test_no_block_has_escaped():
    assert TEXT.count("\n```") == 2 * len(BLOCKS)
    assert [language for language, _, _ in BLOCKS].count("python") >= 3
    assert {language for language, _, _ in BLOCKS} == {"python", "bash", "yaml"}
    assert {"relative_cutoff.py", "recipe.yaml"} == TITLES
    assert max(len(line) for _, _, code in BLOCKS for line in code.splitlines()) <= 80


def test_the_policy_decides_what_a_full_svd_says(session):
    policy = session["RelativeCutoff"]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 40))
    plan = lp.make_plan(lp.find_targets(model), policy(0.6), lp.SVD())
    expected = {}
    for name in ("0", "2", "4"):
        weight = model[int(name)].weight.detach().double()
        values = torch.linalg.svdvals(weight)
        rank, (m, n) = int((values >= 0.6 * values[0]).sum()), weight.shape
        expected[name] = rank if rank * (m + n) < m * n else None
    assert plan.ranks == expected
    assert len(set(expected.values())) > 1
    assert set(lp.make_plan(lp.find_targets(model), policy(1.0, min_rank=3), lp.SVD()).ranks.values()) == {3}
    flat = LayerChoices("flat", 8, 8, torch.ones(8, dtype=torch.float64), (1, 2, 3), dense=False)
    assert policy(0.5)([flat]) == {"flat": 3}
    with pytest.raises(ArgumentError, match=r"got 1\.5"):
        policy(1.5)


@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("settings", [(0.5,), (0.9, 2)])
def test_the_policy_passes_the_tests_of_its_shelf(session, settings, layout, monkeypatch):
    """As if its file lay on the shelf and its name stood in ``__init__``."""
    kind = session["RelativeCutoff"]
    monkeypatch.setattr(rank_policies, kind.__name__, kind, raising=False)
    policy = kind(*settings)
    shelf.test_conformance(policy, layout)
    shelf.test_overridden_ranks_are_kept(policy, layout)
    for value in (0.0, 1e-170):
        shelf.test_a_layer_of_zeros_does_not_disturb(policy, value, layout)


def test_the_policy_passes_the_checks_before_a_commit(session, tmp_path):
    for words in (["format", "--check"], ["check"]):
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        run = subprocess.run(
            [*command, str(tmp_path / "relative_cutoff.py")], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr


def test_the_site_counts_and_changes_nothing_else(session):
    kind, batches = session["CountingSite"], [torch.randn(64, 16) for _ in range(2)]
    counted = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12))
    plain = copy.deepcopy(counted)
    site = kind(ProcessSite(counted, batches, evaluate=batches[:1]))
    torch.manual_seed(2)
    report = operate(lp.Recipe(policy=lp.ProbeBudget(0.5)), site)
    torch.manual_seed(2)
    expected = lp.compress_(plain, policy=lp.ProbeBudget(0.5), batches=batches)
    assert report.ranks == expected.ranks
    assert any(report.ranks.values())
    states = counted.state_dict(), plain.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert report.scores is not None
    order = [
        "find",
        "score",
        "blocks",
        "observe",
        "decompose",
        "decide",
        "probe",
        "factors",
        "release",
        "effect",
        "swap",
    ]
    assert list(site.calls) == order
    assert site.calls == {**dict.fromkeys(order, 1), "decide": 2, "score": 2}


def test_commands_are_there():
    lines = [line for language, _, code in BLOCKS if language == "bash" for line in code.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line, comments=True)
        while re.match(r"[A-Z_]+=", words[0]):  # set for this command
            assert any(words[0].split("=")[0] in path.read_text() for path in (ROOT / "tests").rglob("*.py")), line
            words.pop(0)
        if words[0] == "make":
            assert words[1] in TARGETS, line
            assert made(*words[1:])
        elif words == [".", ".venv/bin/activate"]:
            assert any("venv .venv" in command for command in made("setup"))
        else:
            assert words[0] == "pytest", line
        for word in words[1:]:
            path, *test = word.removeprefix("TEST=").split("::")
            if path.startswith("tests/"):
                assert (ROOT / path).exists(), line
                assert all(f"def {name}(" in (ROOT / path).read_text() for name in test), line
    for word in re.findall(r"`make ([a-z-]+)`", TEXT):
        assert word in TARGETS


def test_everything_that_is_named_is_there():
    prose = BLOCK.sub("", TEXT)
    paths = {word for word in re.findall(r"`([^`\s]+)`", prose) if re.search(r"/|\.(py|md|toml|ya?ml)$", word)}
    assert len(paths) > 30
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    for name, path in (
        ("SHELF", "tests/factorizations/test_factorizations.py"),
        ("CASES", "tests/regularizers/test_penalties.py"),
        ("test_the_shelf_is_complete", "tests/regularizers/test_shrinkages.py"),
        ("STEPS", "tests/test_architecture.py"),
        ("_kinds", "lightning_prehab/kinds/__init__.py"),
        ("together", "lightning_prehab/callbacks/_distributed.py"),
        ("ddp", "pyproject.toml"),
        ("slow", "pyproject.toml"),
    ):
        assert f"`{name}`" in TEXT
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), name


def test_make_lists_its_words():
    listed = re.findall(r"^make ([a-z-]+)  +\S", make().stdout, flags=re.MULTILINE)
    assert set(listed) == TARGETS - {"format-check"}
    assert {"check", "test", "fast", "one", "docs", "format", "setup", "gate", "help"} <= TARGETS
    assert set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[1].split()) >= TARGETS
    alone = make("one")
    assert alone.returncode != 0
    assert "make one TEST=" in alone.stderr


def test_make_checks_what_the_gate_and_the_hooks_check():
    gate = re.findall(r'^"\$work/venv/bin/((?:ruff|mypy).*?)"?(.*)$', (ROOT / ".ci" / "run").read_text(), flags=re.M)
    gate = [(name + rest).replace('"', "").strip() for name, rest in gate]
    *checks, fast = made("check")
    assert checks == gate == ["ruff format --check .", "ruff check .", "mypy"]
    assert fast == 'python -m pytest -m "not slow and not ddp"'
    assert made("test") == ["python -m pytest"]
    assert made("gate") == ["bash .ci/run"]
    assert any(command.startswith("python -m mkdocs build") and "--strict" in command for command in made("docs"))

    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    entries = [re.search(r"exec (.*)'$", hook["entry"])[1] for hook in repo["hooks"]]
    assert entries == [check.replace(" --check", "") for check in checks]  # a hook repairs what it can
    assert not any(hook["pass_filenames"] for hook in repo["hooks"])


def test_the_source_distribution_has_what_is_named():
    settings = (ROOT / "pyproject.toml").read_text()
    included = settings.split("[tool.hatch.build.targets.sdist]")[1].split("]\n")[0]
    for name in ("CONTRIBUTING.md", "Makefile", ".pre-commit-config.yaml", ".ci"):
        assert f'"{name}"' in included
    assert '"pre-commit>=' in settings.split("\ndev = [")[1].split("\n]")[0]


FOLDERS = ["examples", "benchmarks"]
RESULTS = (".json", ".jsonl")


def rows_of(folder: str) -> list[tuple[str, ...]]:
    """Lines of the tables that name a file: the file, its question and time if it is no file of results, a command."""
    lines = (ROOT / folder / "README.md").read_text().splitlines()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| `")]
    return [(row[0].strip("`"), *row[1:]) for row in rows]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_has_one_line(folder):
    kept = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = {path.relative_to(ROOT / folder).as_posix() for path in kept}
    rows = rows_of(folder)
    assert sorted(row[0] for row in rows) == sorted(files - {"README.md"})
    for name, *cells in rows:
        assert len(cells) == (1 if name.endswith(RESULTS) else 3), name
        assert all(cells), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_command_is_one(folder):
    sources = "".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))
    for name, *cells in rows_of(folder):
        if name.endswith(".ipynb"):
            assert cells[-1] == f"`jupyter lab {folder}/{name}`"
            continue
        words = shlex.split(re.search(r"`(python .*?)`", cells[-1])[1])
        script = ROOT / words[1]
        assert script.is_relative_to(ROOT / folder), name
        source = script.read_text()
        if name.endswith(RESULTS):
            assert name.startswith(script.stem), name
            assert any(f'("{part}")' in source for part in (name, name.removeprefix(script.stem))), name
        if "LightningCLI(" in source:  # which makes its options by itself
            continue
        for option in (word for word in words if word.startswith("--") and word != "--help"):
            assert f'"{option}"' in sources, f"{name}: {option}"


def test_a_benchmark_is_listed_with_its_question():
    for name, question, *_ in rows_of("benchmarks"):
        script = ROOT / "benchmarks" / name
        first = script.read_text().splitlines()[0].removeprefix('"""') if name.endswith(".py") else ""
        if "?" in first:
            asked = first.partition("?")[0] + "?"
            assert question.startswith(asked.replace("``", "`")), name
            assert f"python benchmarks/{name}" in script.read_text().split('"""')[1], name
