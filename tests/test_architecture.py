"""Imports go to the same or a lower floor, and floors 0 to 2 never see lightning."""

import ast
from pathlib import Path

import lightning_prehab

PACKAGE = Path(lightning_prehab.__file__).parent
FLOORS = {
    "errors": 0,
    "linalg": 0,
    "decomposition": 0,
    "allocation": 0,
    "sparse": 0,
    "tables": 0,
    "__about__": 0,
    "layers": 1,
    "conv_layers": 1,
    "attention_layers": 1,
    "kinds": 1,
    "block_layers": 1,
    "pretrained": 1,
    "statistics": 1,
    "schedules": 1,
    "moments": 1,
    "regularizers": 1,
    "factorizations": 1,
    "rank_policies": 1,
    "targets": 2,
    "batches": 2,
    "collector": 2,
    "calibration": 2,
    "forms": 2,
    "choices": 2,
    "plan": 2,
    "layer_plan": 2,
    "documents": 1,
    "planning": 2,
    "stored": 2,
    "surgery": 2,
    "report": 2,
    "report_html": 2,
    "figures": 2,
    "compress": 2,
    "spectra": 2,
    "probes": 2,
    "latency": 2,
    "model_latency": 2,
    "layer_spectrum": 2,
    "serialization": 2,
    "spectral_metrics": 2,
    "callbacks": 3,
    "loading": 3,
    "cli_inputs": 3,
    "cli": 4,
    "__main__": 4,
    "integrations": 3,
    "__init__": 4,
}
#: rich and yaml: lightning brings yaml, and whoever prints with rich has it.
EXTRAS = {
    ("serialization.py", "safetensors"),
    ("plan.py", "rich"),
    ("report.py", "rich"),
    ("tables.py", "rich"),
    ("model_latency.py", "rich"),
    ("documents.py", "yaml"),
    ("report.py", "matplotlib"),
    ("figures.py", "matplotlib"),
    ("cli.py", "rich"),
    ("cli.py", "jsonargparse"),
    ("cli_inputs.py", "safetensors"),
    ("cli_inputs.py", "transformers"),
    ("huggingface.py", "transformers"),
    ("block_layers.py", "transformers"),
}
CORE = {"torch", "lightning", "torchmetrics", "lightning_prehab"}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module)
    return found


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_file_has_a_floor():
    assert {place(path) for path in PACKAGE.rglob("*.py")} == set(FLOORS)


def test_imports_never_point_upwards():
    for path in PACKAGE.rglob("*.py"):
        for module in imports(path):
            if module.startswith("lightning_prehab."):
                target = module.split(".")[1]
                assert FLOORS[target] <= FLOORS[place(path)], f"{path.name} imports {module}"


def test_floors_below_the_callbacks_do_not_import_lightning():
    for path in PACKAGE.rglob("*.py"):
        if FLOORS[place(path)] <= 2:
            assert not any(module.split(".")[0] == "lightning" for module in imports(path)), path


def test_only_core_dependencies_are_imported():
    import sys

    for path in PACKAGE.rglob("*.py"):
        for module in imports(path):
            root = module.split(".")[0]
            if (path.name, root) in EXTRAS:
                continue  # imported where it is used, with an error that names the extra
            assert root in CORE or root in sys.stdlib_module_names, f"{path.name} imports {module}"


def test_no_import_loops():
    edges = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(("lightning_prehab", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        edges[name] = {module for module in imports(path) if module.startswith("lightning_prehab.")}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in edges.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())
