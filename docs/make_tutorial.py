"""Runs the tutorial and puts what it prints and draws into place: python docs/make_tutorial.py (extra dev).

docs/tutorial.md is written by hand, but for the text blocks and pictures that follow its Python blocks. This script
makes a notebook of it, examples/tutorial.ipynb, runs that, and writes its outputs into both. What cells write to stderr
(progress, warnings) is left out of them and printed here.
"""

import base64
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
#: A Python block with what was put behind it: a text block; a picture, whose alternative text is written by hand.
CELL = re.compile(
    r"^```python\n(?P<code>.*?)\n```\n(?:\n```text\n.*?\n```\n)?(?:\n(?P<picture>!\[[^\]]*\]\((?P<file>.*?)\))\n)?",
    flags=re.MULTILINE | re.DOTALL,
)


def to_notebook(page: str) -> nbformat.NotebookNode:
    """The page as a notebook that has not been run; links are those of its folder."""
    cells, end = [], 0
    for found in [*CELL.finditer(page), None]:
        prose = page[end : found.start() if found else None].strip()
        assert "```text" not in prose, (
            f"a text block that no Python block is in front of:\n{prose}"
        )
        if prose:
            cells.append(
                nbformat.v4.new_markdown_cell(
                    re.sub(r"\]\((?=[\w/.-]+\.md\b)", "](../docs/", prose)
                )
            )
        if found:
            cells.append(nbformat.v4.new_code_cell(found["code"]))
            end = found.end()
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {
        "kernelspec": {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs all cells in ``folder``; outputs are what is printed and drawn, without times and addresses."""
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=where
    ).execute()
    notebook["metadata"].pop("language_info")  # the version of Python
    for number, cell in enumerate(code_cells(notebook), start=1):
        printed, drawn = "", []
        for output in cell["outputs"]:
            if output.get("name") == "stderr":
                print(output["text"], file=sys.stderr)
            elif output["output_type"] == "stream":
                printed += output["text"]
            else:
                picture = {"image/png": output["data"]["image/png"].strip()}
                drawn.append(nbformat.v4.new_output("display_data", picture))
        cell["outputs"] = (
            [nbformat.v4.new_output("stream", name="stdout", text=printed)]
            if printed
            else []
        )
        cell["outputs"] += drawn
        cell["execution_count"], cell["metadata"] = number, {}


def to_page(
    page: str, notebook: nbformat.NotebookNode
) -> tuple[str, dict[str, bytes]]:
    """The page with the outputs of its notebook, and its pictures by the file names that the page gives them."""
    pictures, cells = {}, iter(code_cells(notebook))

    def filled(found: re.Match[str]) -> str:
        cell = next(cells)
        text = "".join(
            output["text"]
            for output in cell["outputs"]
            if output["output_type"] == "stream"
        )
        drawn = [
            output["data"]["image/png"]
            for output in cell["outputs"]
            if output["output_type"] == "display_data"
        ]
        assert len(drawn) == bool(found["picture"]), (
            f"{len(drawn)} pictures are drawn by\n{cell['source']}"
        )
        parts = [f"```python\n{found['code']}\n```\n"]
        parts += (
            [f"```text\n{text.strip(chr(10))}\n```\n"] if text.strip() else []
        )
        if drawn:
            pictures[found["file"]] = base64.b64decode(drawn[0])
            parts.append(f"{found['picture']}\n")
        return "\n".join(parts)

    return CELL.sub(filled, page), pictures


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Those that are run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def main(folder: Path) -> None:
    """Makes both anew; files that the tutorial itself writes go to ``folder``."""
    page = PAGE.read_text()
    notebook = to_notebook(page)
    run(notebook, folder)
    page, pictures = to_page(page, notebook)
    PAGE.write_text(page)
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n")
    for name, picture in pictures.items():
        (PAGE.parent / name).parent.mkdir(exist_ok=True)
        (PAGE.parent / name).write_bytes(picture)
        print(f"docs/{name}: {len(picture) / 1000:.0f} KB")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
