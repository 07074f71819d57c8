"""What the pages under docs/ say, runs; and they leave out nothing that is public.

A page is a session: its blocks share one folder and one namespace, from top to bottom. A block with a title is a file
that a later command uses. Other YAML blocks are configurations, which are instantiated.
"""

import ast
import dataclasses
import difflib
import inspect
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_prehab as lp
from lightning_prehab.cli import main
from lightning_prehab.factorizations import Factorization
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.regularizers import Penalty, Shrinkage

#: What the documentation shows has enough calibration data.
pytestmark = pytest.mark.filterwarnings("error:.*fewer calibration tokens")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
_SECTION = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
EXTRAS = set(re.findall(r"^(\w+) = \[", _SECTION, flags=re.MULTILINE))
PAGES = {
    str(path.relative_to(DOCS)): blocks
    for path in sorted(DOCS.rglob("*.md"))
    if (blocks := BLOCK.findall(path.read_text()))
}
CARDS = "\n".join((DOCS / "methods" / f"{name}.md").read_text() for name in ("regularizers", "factorizations"))
CARDS += (DOCS / "methods" / "rank-policies.md").read_text() + (DOCS / "methods" / "index.md").read_text()
METHODS = [
    name
    for name in lp.__all__
    if inspect.isclass(found := getattr(lp, name))
    and issubclass(found, Penalty | Shrinkage | Factorization | RankPolicy | lp.PaperPrehab)
]


def run_command(line: str, monkeypatch) -> None:
    """Runs a line of a shell, in this process: starting Python anew takes longer than most of them."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "lightning-prehab":
        assert main(words[1:]) == 0, line
    elif words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")
    elif words[:2] == ["pip", "install"]:  # the gate installs; here the names of the extras are checked
        assert {extra for word in words[2:] for extra in re.findall(r"\w+", word)} <= EXTRAS, line
    else:
        raise AssertionError(f"not a command that this test knows: {line}")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "tutorial.md"])  # test_tutorial.py runs that
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets it; undone after the test
    namespace = {"__name__": "docs"}
    for index, (language, title, code) in enumerate(PAGES[page]):
        if title:
            assert any(title in later for kind, _, later in PAGES[page][index:] if kind == "bash"), title
            Path(title).write_text(code)
        elif language == "python":
            exec(compile(code, f"{page}, block {index}", "exec"), namespace)
        elif language == "yaml":
            Path("block.yaml").write_text(code)
            monkeypatch.setattr(sys, "argv", ["main.py"])
            LightningCLI(BoringModel, run=False, args=["--config", "block.yaml"], save_config_callback=None)
        elif language == "bash":
            for line in filter(None, re.sub(r" \\\n +", " ", code).splitlines()):
                run_command(line, monkeypatch)
        else:
            assert language == "text"


def test_most_pages_have_blocks():
    languages = {page: {language for language, *_ in blocks} for page, blocks in PAGES.items()}
    assert sum("python" in found for found in languages.values()) >= 6
    assert any("bash" in found for found in languages.values())
    assert any("yaml" in found for found in languages.values())
    fences = sum(path.read_text().count("\n```") for path in DOCS.rglob("*.md"))
    assert fences == 2 * sum(map(len, PAGES.values()))  # no block has escaped


@pytest.mark.parametrize("page", PAGES)
def test_code_fits_a_screen(page):
    typed = [code for language, _, code in PAGES[page] if language != "text"]  # what is printed may be wider
    assert [line for code in typed for line in code.splitlines() if len(line) > 80] == []


def test_the_reference_has_every_public_name():
    text = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    public = {f"lightning_prehab.{name}" for name in lp.__all__}
    assert public <= set(listed), public - set(listed)
    for path in set(listed) - public:
        assert inspect.getdoc(pkgutil.resolve_name(path)), path


def test_all_options_are_on_one_page():
    sheet = runpy.run_path(str(ROOT / ".ci" / "cheat_sheet.py"))
    written, made = ((DOCS / "cheat-sheet.md").read_text(), sheet["page"]())
    lines = difflib.unified_diff(written.splitlines(), made.splitlines(), "docs/cheat-sheet.md", "as it should be", n=0)
    assert written == made, "\n".join(["run python .ci/cheat_sheet.py", *lines])
    public = [name for name in lp.__all__ if f"[{name}]" in made or f"| `{name}`<br>" in made]
    layers = {name for name in lp.__all__ if name.startswith(("LowRank", "Pivot"))} - {"LowRankPlusSparse"}
    results = {"CompressionPlan", "CompressionReport", "LayerPlan", "LayerStatistics", "PrehabError"}
    assert {*public} == {*lp.__all__} - layers - results - {"EffectiveRankMetric", "StableRankMetric"}
    keys = set(re.findall(r"^(\w+):", made.split("## A recipe as a file")[1], flags=re.MULTILINE)) - {"trainer"}
    assert keys == {field.name for field in dataclasses.fields(lp.Recipe)}


def test_every_extra_is_explained():
    table = (DOCS / "index.md").read_text().split("| extra |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table.split("\n", 1)[1])) >= EXTRAS


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_card_with_its_settings(name):
    card = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", CARDS, flags=re.MULTILINE | re.DOTALL)[1]
    if name != "PaperPrehab":
        assert all(f"**{word}**" in card for word in ("Use it", "Cost", "Source"))
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\|", card, flags=re.MULTILINE)
    written = {key: eval(value, vars(lp)) if value else inspect.Parameter.empty for key, value in rows}
    found = {key: setting.default for key, setting in inspect.signature(getattr(lp, name)).parameters.items()}
    if dataclasses.is_dataclass(getattr(lp, name)):
        for field in dataclasses.fields(getattr(lp, name)):
            if field.default_factory is not dataclasses.MISSING:
                found[field.name] = field.default_factory()
    assert written == found


@pytest.mark.parametrize("page", PAGES)
def test_every_cut_looks_at_data_or_says_that_it_does_not(page):
    """Whoever copies a line must not ruin a model with it: without data plain SVD is used."""
    for language, _, code in PAGES[page]:
        calls = ast.walk(ast.parse(code)) if language == "python" else ()
        for call in calls:
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("lp.compress_", "compress_"):
                given = {keyword.arg for keyword in call.keywords}
                assert len(call.args) >= 3 or given & {"batches", "factorization"}, ast.unparse(call)
        lines = code.replace("\\\n", " ").splitlines() if language == "bash" else ()
        for line in lines:
            assert not re.search(r"lightning_prehab (plan|compress)\b", line) or "--data" in line, line


def sentences() -> list[str]:
    """What the package may say: all text in its code, an ellipsis for what is filled in."""
    found = []
    for path in (ROOT / "lightning_prehab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(one.value if isinstance(one, ast.Constant) else "..." for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


MESSAGES = re.findall(r"^`(.*)`\n:   ", (DOCS / "messages.md").read_text(), flags=re.MULTILINE)
#: Said by others.
FOREIGN = {"Missing key(s) in state_dict"}


def test_the_messages_of_the_docs_are_those_of_the_package():
    assert len(MESSAGES) >= 30
    said = "\n".join(sentences())
    gone = [
        message
        for message in MESSAGES
        if message not in FOREIGN
        and not re.search(".*".join(re.escape(part) for part in message.split("...") if part), said)
    ]
    assert gone == [], "these are not raised any more: bring docs/messages.md up to date"
