"""Options of the command line, and the recipe that they mean."""

import json
from dataclasses import fields
from typing import get_args

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.cli import arguments, main
from lightning_prehab.cli.arguments import parse
from lightning_prehab.cli.recipes import METHODS, POLICIES, read_recipe
from lightning_prehab.errors import ArgumentError
from lightning_prehab.linalg.storage import Layout
from tests.before_the_house.make import Lit, Loader, batches, trainer_of

MODEL = "transformer"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A checkpoint and its batches, as words of the command line."""
    folder = tmp_path_factory.mktemp("inputs")
    trainer = trainer_of(folder, max_epochs=0)
    trainer.fit(Lit(MODEL), Loader(MODEL))
    trainer.save_checkpoint(folder / "dense.ckpt")
    torch.save([x for x, _ in batches(MODEL)], folder / "batches.pt")
    return [str(folder / "dense.ckpt"), "--model", f"{Lit.__module__}.Lit", "--data", str(folder / "batches.pt")]


def recipe_of(*options, command="plan", keep=None):
    more = [] if command == "plan" else ["--output", "small"]
    return read_recipe(parse([command, "model", *map(str, options), *more]), keep)


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ([], lp.Recipe()),
        (["--method", "whitened"], lp.Recipe(factorization=lp.WhitenedSVD())),
        (["--policy", "ratio"], lp.Recipe(policy=lp.RankRatio(0.5))),
        (["--target-modules", "a.*", "b"], lp.Recipe(target_modules=["a.*", "b"])),
        (["--exclude-modules", "a"], lp.Recipe(exclude_modules=["a"])),
        (
            ["--rank-override", "a=3", "b.*=25e-2", "c=d=dense"],
            lp.Recipe(rank_overrides={"a": 3, "b.*": 0.25, "c=d": "dense"}),
        ),
        (["--rank-multiple-of", "8"], lp.Recipe(rank_multiple_of=8)),
        (["--split-fused"], lp.Recipe(split_fused=True)),
        (["--layout", "pivot"], lp.Recipe(layout="pivot")),
    ],
)
def test_an_option_for_every_field(command, options, recipe):
    assert recipe_of(*options, command=command) == recipe


def test_no_field_is_forgotten():
    """What a recipe can say has an option, in the word of the field or in one of these."""
    options = {"factorization": "method", "rank_overrides": "rank_override"}
    for command in ("plan", "compress"):
        known = vars(parse([command, "m", "--output", "o.yaml"]))
        for field in fields(lp.Recipe):
            assert options.get(field.name, field.name) in known, field.name


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_by_name(policy):
    assert set(POLICIES) == set(arguments.POLICIES)
    assert recipe_of("--policy", policy, keep=0.3) == lp.Recipe(0.3, policy=POLICIES[policy](0.3))
    assert recipe_of("--policy", policy) == lp.Recipe(policy=POLICIES[policy](0.5))


def test_the_layouts_are_those_of_recipes():
    assert get_args(Layout) == arguments.LAYOUTS


@pytest.mark.parametrize("method", METHODS)
def test_methods_by_name(method):
    assert set(METHODS) == set(arguments.METHODS)
    assert recipe_of("--method", method).factorization == METHODS[method]()


def test_options_beside_a_file_win(tmp_path):
    path = tmp_path / "recipe.yaml"
    stored = lp.Recipe(0.3, factorization=lp.WhitenedSVD(shrinkage=0.1), rank_multiple_of=2, split_fused=True)
    stored.to_yaml(path)
    assert recipe_of("--recipe", path) == stored
    assert recipe_of("--recipe", path, "--rank-multiple-of", "4", keep=0.6) == lp.Recipe(
        0.6, factorization=lp.WhitenedSVD(shrinkage=0.1), rank_multiple_of=4, split_fused=True
    )
    lp.Recipe(policy=lp.ParameterBudget(0.3, min_rank=2)).to_yaml(path)
    assert recipe_of("--recipe", path).policy == lp.ParameterBudget(0.3, min_rank=2)
    assert recipe_of("--recipe", path, keep=0.6).policy == lp.ParameterBudget(0.6, min_rank=2)
    assert recipe_of("--recipe", path, "--policy", "ratio").policy == lp.RankRatio(0.3)
    assert recipe_of("--recipe", path, "--policy", "ratio", keep=0.6).policy == lp.RankRatio(0.6)
    lp.Recipe(policy=lp.EnergyThreshold(0.9)).to_yaml(path)
    with pytest.raises(ArgumentError, match=r"--keep has no effect on EnergyThreshold\(energy=0.9"):
        recipe_of("--recipe", path, keep=0.6)


def test_a_recipe_gives_what_compress_gives(words, tmp_path, capsys):
    recipe = lp.Recipe(
        0.6,
        policy=lp.ParameterBudget(0.6, min_rank=2),
        exclude_modules="head",
        rank_overrides={"mlp.0": 4},
        rank_multiple_of=2,
        split_fused=True,
    )
    recipe.to_yaml(tmp_path / "recipe.yaml")
    reference = Lit(MODEL)
    report = lp.compress_(reference, recipe, [x for x, _ in batches(MODEL)])
    assert {"net.qkv.q", "net.qkv.k", "net.mlp.0"} <= report.ranks.keys()

    by_file = ["--recipe", str(tmp_path / "recipe.yaml")]
    assert (
        main(
            ["compress", *words, "--evaluate", "0", *by_file, "--output", str(tmp_path / "a"), "--layers-at-once", "3"]
        )
        == 0
    )
    assert same(lp.load_compressed(tmp_path / "a", Lit(MODEL)), reference)

    flat = ["--keep", "0.6", "--exclude-modules", "head", "--rank-override", "mlp.0=4", "--rank-multiple-of", "2"]
    lp.Recipe(policy=lp.ParameterBudget(0.9, min_rank=2)).to_yaml(tmp_path / "policy.yaml")
    flat += ["--split-fused", "--recipe", str(tmp_path / "policy.yaml")]
    assert main(["compress", *words, "--evaluate", "0", *flat, "--output", str(tmp_path / "b")]) == 0
    assert same(lp.load_compressed(tmp_path / "b", Lit(MODEL)), reference)

    capsys.readouterr()
    assert main(["plan", *words, *by_file, "--keep", "0.6", "0.8", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    ranks = {layer["name"]: layer["rank"] for layer in plans[0]["layers"]}
    assert ranks == {name: "dense" if rank is None else rank for name, rank in report.ranks.items()}
    assert plans[1]["keep"] > plans[0]["keep"]


@pytest.mark.parametrize("policy", ["probe", "zero-sum"])
def test_policies_that_ask_for_more(words, tmp_path, policy, capsys):
    """They need probes or weight gradients; the road sees to it."""
    reference = Lit(MODEL)
    report = lp.compress_(reference, 0.5, [x for x, _ in batches(MODEL)], policy=POLICIES[policy](0.5))
    assert (
        main(
            [
                "compress",
                *words,
                "--evaluate",
                "0",
                "--keep",
                "0.5",
                "--policy",
                policy,
                "--output",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    assert same(lp.load_compressed(tmp_path / "a", Lit(MODEL)), reference)
    capsys.readouterr()
    assert main(["plan", *words, "--evaluate", "0", "--keep", "0.5", "--policy", policy, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["keep"] == report.keep


def test_wrong_numbers_are_refused_before_the_work(words, capsys):
    for options, message in (
        (["--rank-override", "mlp.0=99"], "--rank-override: 99 does not suit layer 'net.mlp.0'"),
        (["--rank-override", "nowhere=3"], "'nowhere' matches no layer"),
    ):
        assert main(["plan", *words, *options]) == 1
        assert message in capsys.readouterr().err
