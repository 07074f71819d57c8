"""docs/tutorial.md and examples/tutorial.ipynb are one text, it runs, and what it says of its numbers is so."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
MAKE = runpy.run_path(str(ROOT / "docs" / "make_tutorial.py"), run_name="make_tutorial")
PAGE = MAKE["PAGE"].read_text()
COMMITTED = nbformat.read(MAKE["NOTEBOOK"], as_version=4)


def outputs(notebook):
    """What each cell prints, by its words (numbers depend on the machine), and how many pictures it draws."""
    found = []
    for cell in MAKE["code_cells"](notebook):
        printed = "".join(one["text"] for one in cell["outputs"] if one["output_type"] == "stream")
        words = set(re.findall(r"[A-Za-z]{2,}", printed)) - {"dense", "None", "inf"}
        found.append((words, sum(one["output_type"] == "display_data" for one in cell["outputs"])))
    return found


def test_page_notebook_and_pictures_agree():
    nbformat.validate(COMMITTED)
    fresh = MAKE["to_notebook"](PAGE)
    assert [(c["cell_type"], c["source"]) for c in fresh["cells"]] == [
        (c["cell_type"], c["source"]) for c in COMMITTED["cells"]
    ]
    page, pictures = MAKE["to_page"](PAGE, COMMITTED)
    assert page == PAGE
    assert len(pictures) >= 3
    assert {f"docs/{name}" for name in pictures} == {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "images").glob("tutorial-*")
    }
    for name, picture in pictures.items():
        assert (ROOT / "docs" / name).read_bytes() == picture, name
        assert len(picture) <= 60_000, name


@pytest.mark.parametrize("without", ["text", "picture", "code"])
def test_what_is_missing_in_the_page_is_seen(without):
    """The test above can fail."""
    pattern, by = {
        "text": (r"\n```text\n.*?\n```\n", ""),
        "picture": (r"\n!\[.*?\]\(.*?\)\n", ""),
        "code": (r"\nimport copy", ""),
    }[without]
    page = re.sub(pattern, by, PAGE, count=1, flags=re.DOTALL)
    if without == "picture":
        with pytest.raises(AssertionError, match="1 pictures are drawn by"):
            MAKE["to_page"](page, COMMITTED)
    elif without == "code":
        assert MAKE["to_notebook"](page)["cells"] != MAKE["to_notebook"](PAGE)["cells"]
    else:
        assert MAKE["to_page"](page, COMMITTED)[0] == PAGE != page


def test_a_text_block_without_code_is_refused():
    with pytest.raises(AssertionError, match="a text block that no Python block is in front of"):
        MAKE["to_notebook"]("# Page\n\n```text\n1\n```\n\n```python\nprint(1)\n```\n")


def test_links_of_the_notebook_lead_somewhere():
    prose = "\n".join(cell["source"] for cell in COMMITTED["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((.*?)\)", prose)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / "examples" / link.split("#")[0]).exists()] == []


def test_it_runs_and_prints_what_is_committed(tmp_path):
    """After a change of what is printed: python docs/make_tutorial.py."""
    notebook = MAKE["to_notebook"](PAGE)
    MAKE["run"](notebook, tmp_path)
    assert outputs(notebook) == outputs(COMMITTED)


def test_a_cell_that_fails_is_an_error(tmp_path):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        MAKE["run"](MAKE["to_notebook"]("```python\n1 / 0\n```\n"), tmp_path)


def test_code_fits_80_columns():
    code = "\n".join(cell["source"] for cell in MAKE["code_cells"](COMMITTED))
    assert max(map(len, code.splitlines())) <= 80


def test_the_prose_is_true():
    cells = MAKE["code_cells"](COMMITTED)
    printed = "".join(output["text"] for cell in cells for output in cell["outputs"] if "text" in output)

    def numbers(row):
        return [float(one) for one in re.search(rf"^{row} +(.*)$", printed, flags=re.MULTILINE)[1].split()]

    svd, default, dense = (
        float(re.search(rf"^{name}: .*accuracy (.*) %", printed, flags=re.MULTILINE)[1])
        for name in ("plain SVD", "default", "not cut")
    )
    assert svd + 20 < default < dense - 5  # "saves a great deal. Still, a cut this deep hurts"
    before, after, _ = numbers("with prehab")
    assert abs(before - after) <= 0.2  # "the cut itself costs nothing"
    assert before < dense - 1  # "the price is paid before it"
    before, after, _ = numbers("without")
    assert after < before - 5
    assert float(re.search(r"targets: (.*)% of", printed)[1]) <= 5.0  # "twenty times smaller"
