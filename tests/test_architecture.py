"""The map of the house: floors, rooms, and what may be found where. Read it from the bottom of FLOORS upwards.

An import points to the same floor or to a lower one. Rooms are folders, or files directly under the package.
"""

import ast
import re
import sys
from pathlib import Path

import lightning_prehab

PACKAGE = Path(lightning_prehab.__file__).parent
FLOORS = [
    {
        "errors": "the errors that are raised on purpose",
        "progress": "what long work says of itself, to whoever listens, and how it is shown",
        "linalg": "matrices in, matrices out",
        "documents": "settings as data, and tables",
        "__about__": "the version",
    },
    {
        "layers": "modules that take the place of dense layers",
        "regularizers": "shelf: penalties and shrinkages before the cut",
        "rank_policies": "shelf: from spectra to ranks",
    },
    {
        "kinds": "shelf: how each kind of layer shows its matrices",
        "targets": "which layers of a model can be cut, in which forms",
    },
    {
        "statistics": "what calibration sees of a layer",
        "factorizations": "shelf: from a matrix and its statistics to factors",
    },
    {"plan": "from the recipe to a rank for each layer"},
    {
        "report": "what happened: numbers, figures, pages",
        "surgery": "the change of a model and its optimizers",
        "refinement": "training of a cut model toward the dense one",
        "distillation": "the dense model as teacher beside the steps of a training",
    },
    {"sharded": "a model whose parameters lie in shards on several processes"},
    {
        "sites": "where a model can live",
        "offload": "a model in a folder, one block in memory at a time",
        "files": "compressed models on disk",
    },
    {"road": "the one way from a recipe to a report"},
    {
        "compress": "the way without a Trainer",
        "larger_than_memory": "the way from a folder to a folder",
        "callbacks": "the way inside a Lightning Trainer",
        "integrations": "transformers and torchmetrics",
        "model_latency": "a public name of report.latency",
    },
    {
        "cli": "the command line",
        "public_names": "what a user of the package imports",
        "__init__": "the same names, imported when the first is asked for",
        "__main__": "python -m lightning_prehab",
    },
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
#: The only rooms that import lightning.
KNOW_LIGHTNING = {"callbacks", "cli"}
#: Other packages than torch, lightning, torchmetrics, each where it is used, with an error that names the extra. rich
#: and yaml need none: lightning brings yaml, and whoever prints with rich has it.
EXTRAS = {
    ("callbacks/_printing.py", "rich"),
    ("cli/inputs.py", "safetensors"),
    ("cli/inputs.py", "transformers"),
    ("cli/outputs.py", "rich"),
    ("cli/outputs.py", "transformers"),
    ("documents/settings.py", "yaml"),
    ("documents/tables.py", "rich"),
    ("files/folders.py", "safetensors"),
    ("files/statistics.py", "safetensors"),
    ("integrations/huggingface.py", "transformers"),
    ("integrations/own_samples.py", "transformers"),
    ("layers/blocks.py", "transformers"),
    ("offload/skeleton.py", "transformers"),
    ("progress/faces.py", "rich"),
    ("progress/display.py", "rich"),
    ("report/compression_report.py", "matplotlib"),
    ("report/drawing.py", "matplotlib"),
    ("report/figures.py", "matplotlib"),
    ("report/panels.py", "matplotlib"),
}
CORE = {"torch", "lightning", "torchmetrics", "lightning_prehab"}
LONGEST = 450
#: The steps of the road, by what does them. Each has one caller, in this order: the road, a site, or a room of its own.
STEPS = {
    "check_recipe": {"road.py", "callbacks/_ready.py"},  # the callback asks before it trains too
    "usable_targets": {"road.py"},
    "choose_forms": {"road.py", "plan/ranks.py"},
    "plan_ranks": {"road.py"},
    "collect_statistics": {"sites/process.py"},
    "decompose_targets": {"plan/spectra.py"},
    "measure_probes": {"sites/process.py", "callbacks/_own_pass.py"},
    "compute_factors": {"sites/process.py", "callbacks/_site.py", "callbacks/_sharded_site.py", "offload/site.py"},
    "prepare_sharded_swap": {"callbacks/_sharded_site.py"},
    "effect_of_cuts": {"sites/process.py"},
    "CutsInTraining": {"callbacks/_site.py"},
    "prepare_swap": {"surgery/swap.py", "callbacks/_site.py"},
    "swap_": {"sites/process.py", "offload/writer.py"},
    "refine_with_": {"sites/process.py", "refinement/refine.py"},
    "refine_block_": {"refinement/block_scope.py", "offload/refining.py"},
}
FILES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, types: bool = True) -> list[str]:
    """Modules that a file imports, wherever it does; without those for the type checker alone, if asked."""
    tree = FILES[path]
    hidden = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            hidden.update(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if node in hidden and not types:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found.append(node.module)
    return found


def called(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(FILES[path]):
        if isinstance(node, ast.Call):
            names.add(getattr(node.func, "id", getattr(node.func, "attr", None)))
    return names


def edges_between(key) -> dict[str, set[str]]:
    """Who imports whom, by what ``key`` makes of a file."""
    modules = {
        ".".join(("lightning_prehab", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in FILES
    }
    edges: dict[str, set[str]] = {}
    for path in FILES:
        targets = {key(modules[module]) for module in imports(path) if module in modules}
        edges.setdefault(key(path), set()).update(targets - {key(path)})
    return edges


def loop_in(edges: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        for target in () if name in done else edges.get(name, ()):
            found = visit(target, (*trail, name))
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in edges if (found := visit(name, ()))), [])


def test_every_room_is_on_the_map_and_every_room_of_the_map_is_there():
    assert {room_of(path) for path in FILES} == set(FLOOR)


def test_imports_never_point_upwards():
    for path in FILES:
        for module in imports(path):
            if module.startswith("lightning_prehab."):
                target = module.split(".")[1]
                assert FLOOR[target] <= FLOOR[room_of(path)], f"{name_of(path)} imports {module}"


def test_there_are_no_loops_between_files_or_rooms():
    assert loop_in(edges_between(name_of)) == []
    rooms = edges_between(room_of)
    assert loop_in(rooms) == []
    assert loop_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_lightning_is_known_in_the_rooms_of_its_own_only():
    knowing = {
        room_of(path) for path in FILES for module in imports(path, types=False) if module.split(".")[0] == "lightning"
    }
    assert knowing == KNOW_LIGHTNING


def test_only_core_dependencies_and_named_extras_are_imported():
    seen = set()
    for path in FILES:
        for module in imports(path):
            root = module.split(".")[0]
            if (name_of(path), root) in EXTRAS:
                seen.add((name_of(path), root))
                continue
            assert root in CORE or root in sys.stdlib_module_names, f"{name_of(path)} imports {module}"
    assert seen == EXTRAS


def test_files_are_short_and_few_stand_in_the_hall():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
    assert sum("/" not in name for name in lines) <= 12


def test_every_file_says_what_it_is():
    assert [name_of(path) for path, tree in FILES.items() if not ast.get_docstring(tree)] == []


def test_every_private_function_is_mentioned_somewhere():
    """One that nobody calls is dead, or overrides what the class above it no longer has."""
    nodes = [node for tree in FILES.values() for node in ast.walk(tree)]
    mentioned = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    mentioned |= {node.id for node in nodes if isinstance(node, ast.Name)}
    private = {node.name for node in nodes if isinstance(node, ast.FunctionDef) and re.match("_[^_].*", node.name)}
    called_by_transformers = {"_process_model_before_weight_loading"}
    assert private - mentioned == called_by_transformers


def test_nothing_is_left_to_be_implemented():
    """What a class cannot do is no part of it, or is refused by an error of ours that says what to do."""
    raising = [
        name_of(path)
        for path, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplemented" in ast.unparse(node.exc)
    ]
    assert raising == []


def test_no_names_in_a_room_differ_by_an_ending_only():
    for room in {path.parent for path in FILES}:
        names = sorted(path.stem.lstrip("_") for path in room.glob("*.py") if path.stem != "__init__")
        for one in names:
            alike = [other for other in names if other != one and other.startswith(one)]
            assert not alike, f"{room.name}: {one} and {alike}"


def test_each_step_of_the_road_is_taken_in_one_place():
    for step, places in STEPS.items():
        callers = {name_of(path) for path in FILES if step in called(path)}
        assert callers == places, step


def test_one_file_changes_models_and_one_changes_optimizers():
    def assigns(tree: ast.AST, attribute: str, key: str | None = None) -> bool:
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                inner = target.value if isinstance(target, ast.Subscript) else None
                if isinstance(inner, ast.Attribute) and inner.attr == attribute:
                    return True
                if (
                    key is not None
                    and isinstance(inner, ast.Subscript)
                    and isinstance(inner.slice, ast.Constant)
                    and inner.slice.value == key
                ):
                    return True
        return False

    assert [name_of(path) for path, tree in FILES.items() if assigns(tree, "_modules")] == ["surgery/swap.py"]
    assert [name_of(path) for path, tree in FILES.items() if assigns(tree, "", "params")] == ["surgery/optimizers.py"]


def test_tests_mirror_the_rooms():
    tests = Path(__file__).parent
    for room in FLOOR:
        if (PACKAGE / room).is_dir():
            assert list((tests / room).glob("test_*.py")), f"tests/{room} has no tests"
