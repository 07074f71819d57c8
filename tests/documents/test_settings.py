import dataclasses
import sys
import textwrap

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import lightning_prehab as lp
from lightning_prehab.documents.settings import build, describe, format_yaml, parse_yaml, read_file, read_mapping, show
from lightning_prehab.errors import PlanError
from lightning_prehab.factorizations import Factorization


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """A module of a user, on disk."""
    (tmp_path / "their_methods.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass, field
            from typing import Any
            from lightning_prehab import SVD

            @dataclass(frozen=True)
            class Scale:
                power: float = 0.5

            @dataclass(frozen=True)
            class Mine(SVD):
                scale: Scale = Scale()
                steps: int | None = None
                sizes: tuple[float, ...] = (1.0, 2.0)
                inner: SVD = SVD()
                table: dict[str, Any] = field(default_factory=dict)
                cache: int = field(default=0, init=False)

            class Careless(SVD):
                pass

            class NotDecorated:
                pass

            @dataclass(frozen=True)
            class Picky(SVD):
                size: int = 1
                mode: Any = None
                required: Any = None
                def __post_init__(self):
                    if self.mode == "bad":
                        raise ValueError("no such mode")

            def local():
                @dataclass(frozen=True)
                class Local(SVD):
                    pass
                return Local()
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("their_methods")
    del sys.modules["their_methods"]


def test_our_classes_have_their_short_path():
    assert describe(lp.KroneckerSVD(gradient_shrinkage=0.25)) == {
        "class_path": "lightning_prehab.KroneckerSVD",
        "init_args": describe(lp.KroneckerSVD(gradient_shrinkage=0.25))["init_args"] | {"gradient_shrinkage": 0.25},
    }
    for method in (lp.SVD(), lp.WhitenedSVD(centered=True, shrinkage=0.125), lp.KroneckerSVD()):
        assert build(describe(method), Factorization, "factorization") == method


def test_a_class_of_the_user_with_nested_arguments(methods):
    mine = methods.Mine(methods.Scale(0.1), 3, (4.0, 0.3), lp.WhitenedSVD(True), {"a": [1, {"b": None}]})
    data = describe(mine)
    assert data["class_path"] == "their_methods.Mine"
    assert data["init_args"]["scale"] == {"class_path": "their_methods.Scale", "init_args": {"power": 0.1}}
    assert data["init_args"]["inner"]["class_path"] == "lightning_prehab.WhitenedSVD"
    assert "cache" not in data["init_args"]
    assert build(yaml.safe_load(yaml.safe_dump(data)), Factorization, "factorization") == mine
    assert build({"class_path": "their_methods.Mine"}, Factorization, "f") == methods.Mine()


def test_what_cannot_be_written_down(methods):
    for value, message in (
        (methods.Careless.__base__, "ABCMeta cannot be written down: it is not a dataclass"),
        (methods.NotDecorated(), "NotDecorated cannot be written down: it is not a dataclass. Decorate it"),
        (methods.local(), "Local cannot be written down: it is defined inside a function. Move it to a module"),
        (methods.Picky(mode={1, 2}), "Picky: mode = {1, 2} cannot be written down: use numbers, text"),
        (methods.Picky(mode={1: 2}), "mode = {1: 2} cannot be written down"),
    ):
        with pytest.raises(PlanError, match=message):
            describe(value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "method: expected keys with values, got 3"),
        ({}, "method: the key 'class_path' is missing"),
        ({"clas_path": "x"}, "method: unknown key 'clas_path'. Did you mean 'class_path'"),
        ({"class_path": 4}, "method: class_path must be text, got 4"),
        ({"class_path": ""}, "cannot be imported"),
        ({"class_path": "lightning_prehab.KronekerSVD"}, "cannot be imported .*Did you mean 'KroneckerSVD'"),
        ({"class_path": "nowhere.to_be.Found"}, "cannot be imported .ModuleNotFoundError: No module named 'nowhere'"),
        ({"class_path": "os.path.join"}, "is <function join.*not a Factorization that is a dataclass"),
        ({"class_path": "lightning_prehab.RankRatio"}, "RankRatio.*not a Factorization that is a dataclass"),
        ({"class_path": "their_methods.NotDecorated"}, "not a Factorization that is a dataclass"),
        (
            {"class_path": "lightning_prehab.factorizations.MetricFactorization"},
            "does not accept {}: Can't instantiate",
        ),
        ({"class_path": "lightning_prehab.SVD", "init_args": [1]}, "SVD: expected keys with values, got .1."),
        (
            {"class_path": "lightning_prehab.WhitenedSVD", "init_args": {"centred": True}},
            "WhitenedSVD: unknown key 'centred'. Did you mean 'centered'",
        ),
        (
            {"class_path": "lightning_prehab.WhitenedSVD", "init_args": {"shrinkage": 7}},
            "does not accept .*: shrinkage must lie in .0, 1., got 7",
        ),
        (
            {"class_path": "lightning_prehab.WhitenedSVD", "init_args": {"centered": 1}},
            "WhitenedSVD: centered must be bool, got 1",
        ),
        (
            {"class_path": "lightning_prehab.WhitenedSVD", "init_args": {"shrinkage": True}},
            "shrinkage must be float, got True.$",
        ),
        (
            {"class_path": "lightning_prehab.WhitenedSVD", "init_args": {"shrinkage": "1e-4"}},
            "shrinkage must be float, got '1e-4'. In YAML .* a dot and a sign: 1.0e-4.",
        ),
        (
            {"class_path": "lightning_prehab.WhitenedSVD", "init_args": {"shrinkage": "much"}},
            "shrinkage must be float, got 'much'.$",
        ),
        ({"class_path": "their_methods.Mine", "init_args": {"steps": "2"}}, "steps must be int or null, got '2'"),
        (
            {"class_path": "their_methods.Mine", "init_args": {"scale": {"class_path": "their_methods.Skale"}}},
            "Mine: scale their_methods.Skale cannot be imported.*Did you mean 'Scale'",
        ),
        ({"class_path": "their_methods.Picky", "init_args": {"mode": "bad"}}, "Picky does not accept .*no such mode"),
    ],
)
def test_wrong_descriptions(methods, data, message):
    with pytest.raises(PlanError, match=message):
        build(data, Factorization, "method")


def test_a_module_that_fails_when_imported(tmp_path, monkeypatch):
    (tmp_path / "their_broken_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PlanError, match="cannot be imported .ZeroDivisionError: division by zero"):
        build({"class_path": "their_broken_module.Method"}, Factorization, "method")


def test_a_hint_that_cannot_be_resolved_is_not_checked(methods, monkeypatch):
    monkeypatch.setitem(methods.Picky.__annotations__, "size", "Unknown")
    made = build({"class_path": "their_methods.Picky", "init_args": {"size": "x"}}, Factorization, "method")
    assert made == dataclasses.replace(methods.Picky(), size="x")


_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
_keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(_keys, st.one_of(_scalars, st.lists(_scalars), st.dictionaries(_keys, _scalars)), st.booleans())
def test_yaml_round_trip_is_exact(key, value, one_line):
    text = f"# first\n{format_yaml(key, value, one_line)}...\n"
    assert parse_yaml(text) == {key: value}
    assert repr(parse_yaml(text)) == repr({key: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\n...\n", "not a YAML document .ParserError"),
        ("a: \x00\n...\n", "not a YAML document .ReaderError"),
        ("[" * 1500 + "\n...\n", "not a YAML document"),
        ("a: 2001-99-99\n...\n", "not a YAML document .ValueError"),
        ("a: 1\n--- \nb: 2\n...\n", "not a YAML document .ComposerError"),
        ("a: !!python/object/apply:os.system ['true']\n...\n", "not a YAML document .ConstructorError"),
        ("a: 1\nb: 2\n", "The last line is not '...', which ends such a document: it is cut off"),
        ("", "cut off"),
        ("a: 1\nb:\n- {c: 1, d: 2}\n- c: 1\n  d: 2\n  c: 3\n...\n", "Line 6: the key 'c' stands twice"),
    ],
)
def test_wrong_yaml(text, message):
    with pytest.raises(PlanError, match=message):
        parse_yaml(text)


def test_yaml_that_refers_to_itself_or_explodes_ends_quickly():
    recursive = parse_yaml("&a [*a]\n...\n")
    assert recursive[0] is recursive
    levels = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20))
    bomb = parse_yaml(f"a: &a [x]\n{levels}...\n")
    assert len(show(bomb)) < 2000


def test_files(tmp_path):
    path = tmp_path / "text"
    path.write_text("größer", encoding="utf-8")
    assert read_file(path) == "größer"
    path.write_bytes(b"\xff\xfe")
    for wrong in (path, tmp_path, tmp_path / "nothing", "x" * 10000, "a\0b"):
        with pytest.raises(PlanError, match="cannot be read: "):
            read_file(wrong)


def test_missing_and_unknown_keys():
    assert read_mapping({"a": 1}, "Here", ["a"], ["b"]) == {"a": 1}
    with pytest.raises(PlanError, match="Here: unknown key 4. The keys are a, b."):
        read_mapping({"a": 1, 4: 2}, "Here", ["a"], ["b"])
    with pytest.raises(PlanError, match="Here: the key 'a' is missing"):
        read_mapping({}, "Here", ["a"], ["b"])
