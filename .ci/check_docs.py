"""What must be true of the built documentation. Usage: check_docs.py SITE, in the environment that has built it.

Every public name has its entry, no role of another markup language is left, and nothing is loaded from other hosts.
"""

import ast
import doctest
import re
import runpy
import sys
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
    print(f"{len(pages)} pages, {len(public_names())} public names, nothing loaded from other hosts")


if __name__ == "__main__":
    main(sys.argv[1])
