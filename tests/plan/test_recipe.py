"""The wish as one object: checked, printed, kept in a file, and the same from every door."""

import copy
import inspect
import pickle
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields, replace
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, PlanError

RECIPES = [
    lp.Recipe(),
    lp.Recipe(0.25),
    lp.Recipe(1),
    lp.Recipe(policy=lp.EnergyThreshold(0.9)),
    lp.Recipe(policy=lp.ProbeBudget(0.4, probe_keep=0.8)),
    lp.Recipe(0.3, factorization=lp.WhitenedSVD(shrinkage=0.1, centered=True)),
    lp.Recipe(0.3, factorization=lp.LowRankPlusSparse(0.1, lp.SVD(), steps=2)),
    lp.Recipe(0.3, target_modules="blocks.*", exclude_modules=["head", "blocks.0.*"]),
    lp.Recipe(0.3, rank_overrides={"fc": 3, "blocks.*": 0.25, "head": "dense"}, rank_multiple_of=8, split_fused=True),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_there_and_back(recipe, tmp_path):
    assert lp.Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert lp.Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_yaml(tmp_path / "recipe.yaml") == (tmp_path / "recipe.yaml").read_text()
    assert lp.Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert lp.Recipe.from_yaml(str(tmp_path / "recipe.yaml")) == recipe
    assert eval(repr(recipe), {**vars(lp)}) == recipe


@given(
    keep=st.floats(0.001, 1.0),
    multiple=st.integers(1, 512),
    split=st.booleans(),
    target=st.none() | st.text() | st.lists(st.text(), max_size=3),
    overrides=st.none()
    | st.dictionaries(st.text(), st.integers(1) | st.floats(0.01, 0.99) | st.just("dense"), max_size=3),
)
def test_any_recipe_survives_its_file(keep, multiple, split, target, overrides):
    recipe = lp.Recipe(
        keep, rank_multiple_of=multiple, split_fused=split, target_modules=target, rank_overrides=overrides
    )
    assert lp.Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_file_says_only_what_matters():
    recipe = lp.Recipe.from_yaml("keep: 0.4\nfactorization: {class_path: lightning_prehab.WhitenedSVD}\n")
    assert recipe == lp.Recipe(0.4, factorization=lp.WhitenedSVD())


def test_it_prints_what_was_said_and_cannot_be_changed():
    recipe = lp.Recipe(0.4, exclude_modules=["a"])
    assert repr(recipe) == str(recipe) == "Recipe(keep=0.4, exclude_modules=('a',))"
    with pytest.raises(FrozenInstanceError):
        recipe.keep = 0.5
    later = lp.Recipe(rank_overrides={"*": 3, "0": 4}), lp.Recipe(rank_overrides={"0": 4, "*": 3})
    assert later[0] != later[1]  # later patterns win
    assert recipe != 0.4
    assert copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe)) == recipe
    overrides, names = {"a": 3}, ["a"]
    recipe = lp.Recipe(rank_overrides=overrides, target_modules=names)
    overrides["a"] = 4
    names.append("b")
    assert recipe == lp.Recipe(rank_overrides={"a": 3}, target_modules=("a",))
    assert hash(recipe) == hash(lp.Recipe(rank_overrides={"a": 3}, target_modules=("a",)))
    assert {recipe: 1}[replace(recipe)] == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 0}, r"keep .* \(0, 1\], got 0"),
        ({"keep": 60}, r"keep .* got 60"),
        ({"keep": float("nan")}, "got nan"),
        ({"keep": "0.5"}, "got '0.5'"),
        ({"keep": True}, "got True"),
        ({"policy": lp.RankRatio}, r"Expected a RankPolicy, .*; write RankRatio\(...\)"),
        ({"policy": 0.5}, "Expected a RankPolicy, got 0.5"),
        ({"factorization": lp.SVD}, r"write SVD\(...\)"),
        ({"factorization": "svd"}, "Expected a Factorization, got 'svd'"),
        ({"layout": "pifa"}, "layout must be one of 'factors', 'pivot', got 'pifa'"),
        ({"target_modules": 3}, "target_modules must be a name"),
        ({"exclude_modules": ["a", 3]}, "exclude_modules must be a name"),
        ({"rank_overrides": ["a"]}, "rank_overrides must be a mapping"),
        ({"rank_overrides": {3: 3}}, "rank_overrides must be a mapping"),
        ({"rank_overrides": {"a": None}}, "rank_overrides: None for 'a'"),
        ({"rank_multiple_of": 0}, "rank_multiple_of must be at least 1, got 0"),
        ({"rank_multiple_of": 8.0}, "rank_multiple_of must be at least 1, got 8.0"),
        ({"rank_multiple_of": True}, "rank_multiple_of must be at least 1, got True"),
        ({"split_fused": "yes"}, "split_fused must be True or False, got 'yes'"),
    ],
)
def test_wrong_wishes(wrong, message, mlp):
    with pytest.raises(ArgumentError, match=message):
        lp.Recipe(**wrong)
    for door in (lambda **flat: lp.compress_(mlp, **flat), lambda **flat: lp.CompressionCallback(1, **flat)):
        with pytest.raises(ArgumentError, match=message):
            door(**wrong)
    assert all(type(module) is not lp.LowRankLinear for module in mlp)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep: 2\n", "got 2"),
        ("kep: 0.5\n", "unknown key 'kep'.* Did you mean 'keep'"),
        ("keep: 0.5\nkeep: 0.4\n", "'keep' stands twice"),
        ("- keep\n", "expected keys with values"),
        ("\n", "expected keys with values"),
        ("keep: [\n", "not a YAML document"),
        ("rank_overrides: &a {b: *a}\n", "nested too deeply|neither a rank"),
        ("keep: 0.5\nfactorization: svd\n", "Expected a Factorization, got 'svd'"),
        ("factorization: {class_path: lightning_prehab.SVDD}\n", "cannot be imported.* Did you mean"),
        ("factorization: {class_path: lightning_prehab.RankRatio, init_args: {keep: 0.5}}\n", "Expected a Fact"),
        ("policy: {class_path: os.path}\n", "not a dataclass"),
        ("split_fused: 1\n", "split_fused must be bool"),
        ("rank_multiple_of: '8'\n", "rank_multiple_of must be int"),
    ],
)
def test_wrong_files(text, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        lp.Recipe.from_yaml(text)
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ArgumentError, match=r"wrong.yaml: .*" + message):
        lp.Recipe.from_yaml(tmp_path / "wrong.yaml")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ArgumentError, match="missing.yaml.* cannot be read"):
        lp.Recipe.from_yaml(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArgumentError, match=r"binary.yaml.* cannot be read"):
        lp.Recipe.from_yaml(tmp_path / "binary.yaml")


def test_a_method_that_cannot_be_written_down(tmp_path):
    class Mine(lp.SVD):
        pass

    with pytest.raises(PlanError, match="defined inside a function"):
        lp.Recipe(factorization=Mine()).to_yaml(tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


def test_defaults_follow_the_method_and_the_data():
    assert lp.Recipe(0.3).factorization_or_default == lp.KroneckerSVD()
    assert lp.Recipe(0.3).policy_or_default == lp.ParameterBudget(0.3)
    without = lp.Recipe(0.3).where_calibrated(False)
    assert (without.factorization_or_default, without.policy_or_default) == (lp.SVD(), lp.RankRatio(0.3))
    chosen = lp.Recipe(0.3, factorization=lp.WhitenedSVD(), policy=lp.EnergyThreshold(0.5))
    assert chosen.where_calibrated(False) is chosen
    assert chosen.where_calibrated(True) is chosen
    for cost, inputs in (("parameters", False), ("flops", True)):  # operations are counted by the tokens that are seen
        assert lp.Recipe(policy=lp.ParameterBudget(0.4, cost=cost), factorization=lp.SVD()).wanted.inputs == inputs
    probing = lp.Recipe(policy=lp.ProbeBudget(0.4, min_rank=3))
    assert probing.without_probes() == lp.Recipe(policy=lp.ParameterBudget(0.4, min_rank=3))
    assert chosen.without_probes() is chosen


def test_a_keep_without_effect_is_not_looked_at():
    assert lp.Recipe(None, policy=lp.RankRatio(0.5)).policy_or_default == lp.RankRatio(0.5)
    assert lp.CompressionCallback(1, None, policy=lp.RankRatio(0.5)).policy == lp.RankRatio(0.5)


def test_the_settings_of_a_callback_are_those_of_its_recipe(mlp):
    callback = lp.CompressionCallback(1, 0.4, exclude_modules="2")
    for field in fields(lp.Recipe):
        if field.name not in ("keep", "policy", "factorization"):
            assert getattr(callback, field.name) == getattr(callback.recipe, field.name), field.name
    assert (callback.policy, callback.factorization) == (lp.ParameterBudget(0.4), lp.KroneckerSVD())
    callback.target_modules, callback.rank_overrides, callback.factorization = ["0"], {"0": 3}, lp.SVD()
    assert callback.recipe == lp.Recipe(
        0.4, exclude_modules="2", target_modules=["0"], rank_overrides={"0": 3}, factorization=lp.SVD()
    )
    assert callback.policy == lp.RankRatio(0.4)
    with pytest.raises(ArgumentError, match="rank_multiple_of"):
        callback.rank_multiple_of = 0


def test_every_door_takes_the_same_settings():
    """A setting that a recipe has cannot be missing at one of the doors, or be called or default otherwise there."""
    wished = {field.name: field.default for field in fields(lp.Recipe)}
    for door in (lp.compress_, lp.CompressionCallback):
        parameters = inspect.signature(door).parameters
        assert {name: parameters[name].default for name in wished} == wished
        hints = get_type_hints(door.__init__ if inspect.isclass(door) else door)
        own = get_type_hints(lp.Recipe)
        assert all(hints[name] == own[name] for name in wished if name != "keep")
        several = Sequence[float] | Sequence[lp.Recipe] if door is lp.CompressionCallback else float
        assert hints["keep"] == float | lp.Recipe | several


@pytest.mark.parametrize("beside", [{"policy": lp.RankRatio(0.4)}, {"split_fused": True}, {"target_modules": "0"}])
def test_a_recipe_and_something_beside_it(beside, mlp):
    for door in (
        lambda **flat: lp.compress_(mlp, lp.Recipe(), **flat),
        lambda **flat: lp.CompressionCallback(1, lp.Recipe(), **flat),
    ):
        with pytest.raises(ArgumentError, match=f"{next(iter(beside))} cannot be given beside a whole recipe"):
            door(**beside)


def test_a_plan_from_a_recipe(mlp, data):
    targets = lp.find_targets(mlp)
    statistics = lp.collect_statistics(mlp, targets, [data.tensors[0]], gradients=True)
    flat = lp.make_plan(targets, 0.6, lp.WhitenedSVD(), statistics, {"0": 2}, 2)
    recipe = lp.Recipe(0.6, factorization=lp.WhitenedSVD(), rank_overrides={"0": 2}, rank_multiple_of=2)
    assert lp.make_plan(targets, recipe, statistics=statistics) == flat
    with pytest.raises(ArgumentError, match="rank_multiple_of cannot be given beside"):
        lp.make_plan(targets, recipe, statistics=statistics, rank_multiple_of=4)
