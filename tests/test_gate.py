"""Tests that are green on every machine: no bits of outputs, one thread, no limit near the time that is needed."""

import ast
import builtins
import copy
import os
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import nn

from tests.same_model import assert_same_model

ROOT = Path(__file__).parents[1]
CHECKED = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / ".ci").glob("*.py")])
#: Seconds. The slowest of what is limited takes less than a minute on two quiet cores.
LEAST_LIMIT = 600


def names_of(tree):
    """Of functions, classes and modules."""
    known = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
    return known


def runs_a_model(expression, known):
    """``model(x)``, ``lit.net(x)``, ``load(...)(x)`` or ``model.eval()(x)``."""
    called = [node.func for node in ast.walk(expression) if isinstance(node, ast.Call)]
    made = [node for node in called if isinstance(node, ast.Call)]
    functions = [node for node in made if isinstance(node.func, ast.Name) and not node.args]  # of ours: Penalty()(w)
    ours = {id(node.func) for node in functions}
    return len(made) > len(functions) or any(
        (isinstance(node, ast.Name) and node.id not in known and id(node) not in ours)
        or (isinstance(node, ast.Attribute) and node.attr in ("net", "model", "bert"))
        for node in called
    )


def outputs_compared_bit_by_bit(source):
    """Finds the usual spelling, not every one."""
    tree = ast.parse(source)
    known, found = names_of(tree), []
    negated = {id(node.operand) for node in ast.walk(tree) if isinstance(node, ast.UnaryOp)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in negated:
            exact = {keyword.arg for keyword in node.keywords if ast.unparse(keyword) in ("rtol=0", "atol=0")}
            if ast.unparse(node.func) == "torch.equal" or exact == {"rtol", "atol"}:
                found += [ast.unparse(node)] * any(runs_a_model(argument, known) for argument in node.args)
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("assert torch.equal(loaded.net(x), lit.net(x))", True),
        ("assert torch.equal(lp.load_compressed(folder, net)(x), found)", True),
        ("assert_close(again.eval()(ids).logits, expected, rtol=0, atol=0)", True),
        ("assert_close(again.eval()(ids).logits, expected)", False),
        ("assert not torch.equal(model(x), before)", False),
        ("assert torch.equal(kind()(weight, rank), kind()(weight, rank))", False),
        ("assert torch.equal(net[0].weight, other.state_dict()['0.weight'])", False),
        ("import torch\nassert torch.equal(torch.zeros(3), x)", False),
    ],
)
def test_the_search_finds_what_it_should(line, expected):
    assert bool(outputs_compared_bit_by_bit(line)) == expected


def test_no_test_wants_the_same_bits_of_two_outputs():
    found = {str(path.relative_to(ROOT)): outputs_compared_bit_by_bit(path.read_text()) for path in CHECKED}
    assert {path: lines for path, lines in found.items() if lines} == {}  # see tests/same_model.py


def test_equal_weights_elsewhere_in_memory_give_outputs_that_are_equal_to_rounding(rounded_by_address):
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    other, x = copy.deepcopy(model), torch.randn(5, 64)
    for parameter in other.parameters():  # four bytes further, as in a file that is mapped into memory
        parameter.data = torch.cat([torch.zeros(1), parameter.detach().flatten()])[1:].view_as(parameter)
    assert_same_model(other, model, x)
    assert not torch.equal(other(x), model(x))


def limits_in(tree):
    """The values of ``timeout=``, ``deadline=``, ``.wait(...)`` and ``time.monotonic() + ...``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("timeout", "deadline"):
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "wait":
            yield from node.args
        elif isinstance(node, ast.BinOp) and ast.unparse(node.left) == "time.monotonic()":
            yield from [node.right] * isinstance(node.op, ast.Add)


def test_no_time_limit_is_near_the_time_that_is_needed():
    found = []
    for path in CHECKED:
        tree = ast.parse(path.read_text())
        constants = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
        for value in limits_in(tree):
            limit = ast.literal_eval(constants.get(ast.unparse(value), value))
            found.append(limit)
            assert limit is None or limit >= LEAST_LIMIT, f"{path.relative_to(ROOT)}, line {value.lineno}: {limit}"
    assert len([limit for limit in found if limit is not None]) >= 9
    assert hypothesis.settings.default.deadline is None


def test_one_thread():
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"


def is_program(tree):
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body)


@pytest.mark.parametrize("folder", ["examples", "tests"])
def test_programs_set_one_thread(folder):
    programs = [path for path in (ROOT / folder).rglob("*.py") if is_program(ast.parse(path.read_text()))]
    assert len(programs) >= 3
    for path in programs:
        text = path.read_text()
        if "from hf_sentences import" in text:
            text = (path.parent / "hf_sentences.py").read_text()
        assert "set_num_threads(1)" in text, path.relative_to(ROOT)
