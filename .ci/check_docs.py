"""What must be true of the built documentation. Usage: check_docs.py SITE, in the environment that has built it.

Every public name has its entry, no role of another markup language is left, nothing is loaded from other hosts, and
the search works in pages that are opened as files (typed in a headless Chromium, where there is one).
"""

import ast
import doctest
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: What a browser fetches by itself; links that a reader follows are not among them.
LOADED = re.compile(r"<(?:link|script|img|iframe|source|video|audio|embed|object)\b[^>]*(?:https?:)?//[^>]*>")


def public_names() -> list[str]:
    """``lightning_prehab.__all__``, read without importing it: torch is not needed to build the pages."""
    for node in ast.parse((ROOT / "lightning_prehab" / "public_names.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError("there is no __all__")


def check_search(site: Path, pages: dict[Path, str]) -> str:
    """What makes the search work without a server; and where there is a browser, that it does."""
    index = site / "search" / "search_index.js"
    assert index.read_text().startswith("var __index = {"), "mkdocs.yml lacks the plugin offline"
    worker = re.compile(r'<script src="[./]*javascripts/iframe-worker\.js"')
    assert not (lacking := [str(path) for path, page in pages.items() if not worker.search(page)]), lacking
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return "the search was not tried, there is no Chromium"
    with tempfile.TemporaryDirectory() as folder:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}"]
        page = (site / "howto" / "trainer.html").resolve().as_uri() + "?q=whitened"
        command = [browser, *options, "--virtual-time-budget=20000", "--dump-dom", page]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    found = re.search(r'md-search-result__meta">(\d+) matching', shown)
    assert found, "a search in a page that was opened as a file found nothing"
    return f"a search finds {found[1]} pages"


def main(site: str) -> None:
    """All checks."""
    pages = {path: path.read_text() for path in Path(site).rglob("*.html")}
    assert len(pages) > 10, pages.keys()
    text = "\n".join(pages.values())
    missing = [name for name in public_names() if f'id="lightning_prehab.{name}"' not in text]
    assert not missing, f"no entry in the reference: {missing}"
    for path, page in pages.items():
        assert not (found := LOADED.search(page)), f"{path} loads {found[0]}"
        assert not (found := re.search(r":(?:class|func|meth|attr|mod):|<autoref", page)), f"{path}: {found[0]}"
    failed = sum(
        doctest.DocTestRunner().run(test).failed
        for function in [runpy.run_path(str(ROOT / "docs" / "docstrings.py"))["to_markdown"]]
        for test in doctest.DocTestFinder().find(function, "to_markdown", globs=function.__globals__)
    )
    assert failed == 0
    searched = check_search(Path(site), pages)
    print(f"{len(pages)} pages, {len(public_names())} public names, nothing loaded from other hosts, {searched}")


if __name__ == "__main__":
    main(sys.argv[1])
