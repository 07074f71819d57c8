import copy
import io
import json
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import PlanError, TargetError
from lightning_prehab.linalg.matrices import break_even_rank

METHODS = [lp.SVD(), lp.WhitenedSVD(centered=True, shrinkage=0.1), lp.KroneckerSVD(gradient_shrinkage=1e-5)]


def example():
    """Two layers to be cut, one that stays dense, one that is left out; every prediction is known."""
    layers = (
        lp.LayerPlan("net.fc1", 16, 12, 3, 0.25, loss_increase=1e-3),
        lp.LayerPlan("net.fc2", 14, 16, 5, 1 / 3, new_bias=14, nonzeros=7, loss_increase=2e-5),
        lp.LayerPlan("net.fc3", 6, 14, None, reason="every rank below break-even costs more than it saves"),
    )
    return lp.CompressionPlan(layers, lp.KroneckerSVD(), {"head": "no rank saves parameters (1x16)"}, 1000)


def shown(value, width=160):
    console = Console(file=io.StringIO(), record=True, width=width)
    console.print(value)
    return console.export_text()


@st.composite
def plans(draw):
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    names = draw(st.lists(texts, min_size=1, max_size=8, unique=True))
    numbers = st.none() | st.floats(0, allow_infinity=False)
    layers = []
    for name in names[: draw(st.integers(1, len(names)))]:
        m, n = draw(st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
        empty = lp.LayerPlan(
            name,
            m,
            n,
            None,
            draw(numbers),
            draw(st.none() | texts),
            draw(st.sampled_from([0, m])),
            draw(st.integers(0, m * n)),
            draw(numbers),
        )
        ranks = st.none() if empty.max_rank < 1 else st.none() | st.integers(1, empty.max_rank)
        layers.append(replace(empty, rank=draw(ranks)))
    skipped = {name: draw(texts) for name in names[len(layers) :]}
    return lp.CompressionPlan(tuple(layers), draw(st.sampled_from(METHODS)), skipped, draw(st.none() | st.integers(1)))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_form_leads_back_to_the_same_plan(plan):
    data = plan.to_dict()
    assert lp.CompressionPlan.from_dict(data) == plan
    assert lp.CompressionPlan.from_dict(json.loads(json.dumps(data))) == plan
    text = plan.to_yaml()
    assert lp.CompressionPlan.from_yaml(text) == plan
    assert lp.CompressionPlan.from_yaml(text).to_yaml() == text


def test_a_file(tmp_path):
    plan = example()
    path = tmp_path / "plan.yaml"
    text = plan.to_yaml(path)
    assert path.read_text(encoding="utf-8") == text
    for source in (path, str(path), text):
        assert lp.CompressionPlan.from_yaml(source) == plan
    assert text.startswith("# Compression plan, as written: KroneckerSVD(")
    assert "rank: 3  # at most 6\n" in text
    assert "shape: [16, 12]\n" in text
    assert "predicted: {rank: dense, relative_error: null, loss_increase: null}\n" in text
    assert "class_path: lightning_prehab.KroneckerSVD\n" in text
    assert "\n  head: no rank saves parameters (1x16)\n" in text
    assert text.endswith("\n...\n")
    assert all(len(line) <= 120 for line in text.splitlines()[1:])


def test_a_hand_edit_drops_what_no_longer_holds():
    plan = example()
    text = plan.to_yaml()
    assert text.count("rank: 3  #") == 1
    edited = lp.CompressionPlan.from_yaml(text.replace("rank: 3  #", "rank: 4  #"))
    assert edited.layers == (lp.LayerPlan("net.fc1", 16, 12, 4), *plan.layers[1:])
    assert edited.loss_increase is None
    assert edited == plan.with_ranks({"net.fc1": 4})
    assert "?" in str(edited)
    assert "?" in shown(edited)
    assert "; predicted loss increase" not in edited.summary()

    to_dense = lp.CompressionPlan.from_yaml(text.replace("rank: 3  #", "rank: dense  #"))
    assert to_dense.layers[0] == lp.LayerPlan("net.fc1", 16, 12, None, reason="chosen by hand")
    assert to_dense.loss_increase == 2e-5
    explained = text.replace("rank: 3  # at most 6\n  reason: null", "rank: dense\n  reason: it hurts")
    assert lp.CompressionPlan.from_yaml(explained).layers[0].reason == "it hurts"

    cut = lp.CompressionPlan.from_yaml(text.replace("rank: dense  #", "rank: 2  #"))
    assert cut.layers[2] == lp.LayerPlan("net.fc3", 6, 14, 2)

    back = edited.to_yaml().replace("rank: 4  #", "rank: 3  #")
    assert lp.CompressionPlan.from_yaml(back).layers[0] == lp.LayerPlan("net.fc1", 16, 12, 3)

    by_hand = plan.to_dict()
    by_hand["layers"][0] = {"name": "net.fc1", "shape": [16, 12], "rank": 3}
    assert lp.CompressionPlan.from_dict(by_hand).layers[0] == lp.LayerPlan("net.fc1", 16, 12, 3)


def test_another_factorization_drops_all_predictions():
    plan = example()
    text = plan.to_yaml()
    other = lp.CompressionPlan.from_yaml(text.replace("gradient_shrinkage: 0.0001\n", "gradient_shrinkage: 0.5\n"))
    assert other.factorization == lp.KroneckerSVD(gradient_shrinkage=0.5)
    assert other.ranks == plan.ranks
    assert {(layer.relative_error, layer.loss_increase) for layer in other.layers} == {(None, None)}
    data = plan.to_dict()
    del data["predicted_with"]
    assert lp.CompressionPlan.from_dict(data).loss_increase is None


def test_a_truncated_file_is_never_taken_for_a_plan(tmp_path):
    text = example().to_yaml()
    for end in range(len(text) - 1):
        with pytest.raises(PlanError):
            lp.CompressionPlan.from_yaml(text[:end] + "\n" * ("\n" not in text[:end]))
    path = tmp_path / "plan.yaml"
    path.write_text(text[: len(text) // 2])
    with pytest.raises(PlanError, match=f"{path}: "):
        lp.CompressionPlan.from_yaml(path)
    for garbage in (b"", b"\xff\xd8\xff", b"\0" * 100, b"just words\n...\n", b"- 1\n- 2\n...\n", b"...\n...\n"):
        path.write_bytes(garbage)
        with pytest.raises(PlanError):
            lp.CompressionPlan.from_yaml(path)
    with pytest.raises(PlanError, match="'plan.yml' cannot be read: "):
        lp.CompressionPlan.from_yaml("plan.yml")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_refused_or_harmless(data):
    """Whatever stands in the file, the answer is a valid plan or a PlanError."""
    text = example().to_yaml()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 40, len(text))))
    piece = data.draw(
        st.text(max_size=10) | st.sampled_from(["rank: 9", "[]", "{}", "null", "-1", "- ", "  ", "&a *a"])
    )
    try:
        plan = lp.CompressionPlan.from_yaml(text[:start] + piece + text[end:] + "\n")
    except PlanError:
        return
    assert lp.CompressionPlan.from_dict(plan.to_dict()) == plan
    assert all(layer.rank is None or 1 <= layer.rank <= layer.max_rank for layer in plan.layers)
    assert str(plan)


def at(*path):
    """A function that puts a value at a place of the plan's dictionary, or takes it away."""

    def edit(data, value):
        for key in path[:-1]:
            data = data[key]
        if value is ...:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "value", "message"),
    [
        (at("version"), 2, "A plan of version 2 cannot be read, only version 1; update lightning_prehab"),
        (at("version"), "1", "A plan of version '1' cannot be read"),
        (at("version"), ..., "Plan: the key 'version' is missing"),
        (at("layerz"), [], "Plan: unknown key 'layerz'. Did you mean 'layers'. The keys are version, "),
        (at("layers"), ..., "Plan: the key 'layers' is missing"),
        (at("layers"), [], "layers must be a list of layers, got .."),
        (at("layers"), {"net.fc1": 4}, "layers must be a list of layers, got {'net.fc1': 4}"),
        (at("layers", 1), "net.fc2", "A layer: expected keys with values, got 'net.fc2'"),
        (at("factorization"), "SVD", "factorization: expected keys with values, got 'SVD'"),
        (at("factorization", "class_path"), "lightning_prehab.KronekerSVD", "Did you mean 'KroneckerSVD'"),
        (at("factorization", "init_args", "gradient_shrinkage"), 2.0, "must lie in .0, 1., got 2.0"),
        (at("skipped"), ["head"], "skipped must map names to reasons, got .'head'."),
        (at("skipped", 7), "why", "a name in skipped must be text, got 7; put it in quotes"),
        (at("skipped", "head"), 7, "the reason of 'head' in skipped must be text, got 7"),
        (at("skipped", "net.fc1"), "why", "Layer 'net.fc1' stands twice in the plan; leave one of the two"),
        (at("layers", 1, "name"), "net.fc1", "Layer 'net.fc1' stands twice in the plan"),
        (at("model_parameters"), "many", "model_parameters must be a whole number of at least 1, got 'many'"),
        (at("layers", 0, "rnk"), 4, "Layer 'net.fc1': unknown key 'rnk'. Did you mean 'rank'"),
        (at("layers", 0, "rank"), ..., "Layer 'net.fc1': the key 'rank' is missing"),
        (at("layers", 0, "rank"), None, "Layer 'net.fc1': rank is empty; give a rank from 1 to 6, or 'dense'"),
        (at("layers", 0, "rank"), 0, "'net.fc1' .16x12.: the rank 0 cannot be used; give a rank from 1 to 6 .above"),
        (at("layers", 0, "rank"), 7, "'net.fc1' .16x12.: the rank 7 cannot be used; give a rank from 1 to 6"),
        (at("layers", 1, "rank"), 7, "'net.fc2' .14x16.: the rank 7 cannot be used; give a rank from 1 to 6"),
        (at("layers", 0, "rank"), 10**400, "cannot be used; give a rank from 1 to 6"),
        (at("layers", 0, "rank"), 3.0, "the rank 3.0 cannot be used"),
        (at("layers", 0, "rank"), True, "the rank True cannot be used"),
        (at("layers", 0, "rank"), "Dense", "the rank 'Dense' cannot be used; give a rank from 1 to 6.* or 'dense'"),
        (at("layers", 0, "rank"), [3], "the rank .3. cannot be used"),
        (at("layers", 0, "name"), 0, "Layer 0: name must be text, got 0; put it in quotes"),
        (at("layers", 0, "name"), ..., "A layer: the key 'name' is missing"),
        (at("layers", 0, "shape"), "16x12", "Layer 'net.fc1': shape must be .out_features, in_features., got '16x12'"),
        (at("layers", 0, "shape"), [16], "shape must be .out_features, in_features., got .16."),
        (at("layers", 0, "shape"), [16, 0], "Layer 'net.fc1': shape must be a whole number of at least 1, got 0"),
        (at("layers", 0, "shape"), [16, True], "shape must be a whole number of at least 1, got True"),
        (at("layers", 0, "reason"), 3, "Layer 'net.fc1': reason must be text, got 3"),
        (at("layers", 1, "new_bias"), 15, "Layer 'net.fc2': new_bias must be a whole number from 0 to 14, got 15"),
        (at("layers", 1, "nonzeros"), -1, "Layer 'net.fc2': nonzeros must be a whole number from 0 to 224, got -1"),
        (at("layers", 0, "predicted"), 3, "Layer 'net.fc1': predicted: expected keys with values, got 3"),
        (at("layers", 0, "predicted", "rank"), "x", "Layer 'net.fc1': predicted rank must be a whole number"),
        (at("layers", 0, "predicted", "los_increase"), 1, "unknown key 'los_increase'. Did you mean 'loss_increase'"),
        (at("layers", 0, "predicted", "loss_increase"), "1e-4", "loss_increase must be a number or null, got '1e-4'"),
        (
            at("layers", 0, "predicted", "relative_error"),
            float("nan"),
            "relative_error must be a number or null, got nan",
        ),
    ],
)
def test_every_mistake_is_named(edit, value, message):
    data = copy.deepcopy(example().to_dict())
    edit(data, value)
    with pytest.raises(PlanError, match=message):
        lp.CompressionPlan.from_dict(data)
    if value is not None and not isinstance(value, float):
        with pytest.raises(PlanError, match=message):
            lp.CompressionPlan.from_yaml(f"{yaml.safe_dump(data)}\n...\n")


def test_a_plan_is_made_of_keys_and_values():
    for wrong in (None, 3, "plan", [1]):
        with pytest.raises(PlanError, match="Plan: expected keys with values, got"):
            lp.CompressionPlan.from_dict(wrong)


def test_max_rank_is_the_last_that_saves():
    for m, n, new_bias, nonzeros in ((16, 12, 0, 0), (16, 12, 16, 0), (16, 12, 16, 9), (3, 2, 3, 0), (5, 1, 0, 0)):
        layer = lp.LayerPlan("x", m, n, None, new_bias=new_bias, nonzeros=nonzeros)
        last = layer.max_rank
        assert last <= break_even_rank(m, n)
        assert last == 0 or replace(layer, rank=last).parameters < m * n
        assert replace(layer, rank=last + 1).parameters >= m * n
    with pytest.raises(PlanError, match="'x' .5x1.: the rank 1 cannot be used; no rank saves parameters here"):
        lp.LayerPlan("x", 5, 1, None).with_rank(1)


def test_with_ranks():
    plan = example()
    assert plan.with_ranks({}) == plan
    assert plan.with_ranks(plan.ranks) == plan
    assert plan.with_ranks({"net.*": 2}).ranks == {"net.fc1": 2, "net.fc2": 2, "net.fc3": 2}
    assert plan.with_ranks({"*": "dense", "fc2": 5}).ranks == {"net.fc1": None, "net.fc2": 5, "net.fc3": None}
    assert plan.with_ranks({"*": "dense"}).keep == 1.0
    assert plan.with_ranks({"*": "dense"}).loss_increase == 0.0
    kept = plan.with_ranks({"net.fc?": 3})
    assert kept.layers[0] == plan.layers[0]
    assert kept.layers[1] == replace(plan.layers[1], rank=3, relative_error=None, loss_increase=None)
    assert plan == example()
    with pytest.raises(PlanError, match="Layer 'net.fc3' .6x14.: the rank 5 cannot be used"):
        plan.with_ranks({"*": 5})
    with pytest.raises(TargetError, match="with_ranks: 'net.fc4' matches no layer. Near names: net.fc"):
        plan.with_ranks({"net.fc4": 5})
    with pytest.raises(PlanError, match="Layer 'head' has no rank, it is left out: no rank saves parameters .1x16"):
        plan.with_ranks({"head": 1})


def test_loss_increase_is_the_sum_over_the_cuts():
    plan = example()
    assert plan.loss_increase == pytest.approx(1.02e-3)
    assert plan.summary().endswith("; predicted loss increase 0.00102")
    without = replace(plan, layers=(replace(plan.layers[0], loss_increase=None), *plan.layers[1:]))
    assert without.loss_increase is None


def test_the_column_of_the_loss_is_there_only_if_something_is_known():
    plan = example()
    header = " ".join(str(plan).split("\n---")[0].split())
    assert header.endswith("predicted predicted loss layer shape rank before after error increase")
    unknown = replace(plan, layers=tuple(replace(layer, loss_increase=None) for layer in plan.layers))
    assert "loss increase" not in str(unknown)
    row = next(line for line in str(unknown).splitlines() if line.startswith("net.fc1"))
    assert row.split() == ["net.fc1", "16x12", "3", "192", "84", "0.250"]


@pytest.mark.parametrize("width", [100, 160])
def test_rich(width):
    text = shown(example(), width)
    squeezed = "".join(text.split())
    for piece in (
        "net.fc1",
        "net.fc2",
        "net.fc3",
        "head",
        "16x12",
        "dense",
        "left",
        "0.250",
        "0.333",
        "0.001",
        "2e-05",
    ):
        assert piece in text
    for piece in ("500", "339", "0.00102"):  # totals
        assert piece in text
    assert "[/]" in shown(replace(example(), skipped={"a[b]": "[/] is no markup"}), width)
    if width == 160:
        assert "every rank below break-even costs more than it saves" in text
        assert f"keep {example().keep:.3f}" in text
    assert "KroneckerSVD(gradient_shrinkage=" in squeezed


def test_rich_is_not_needed_for_text(monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "net.fc1" in str(example())


def counted(model, plan):
    """Weight parameters of the targets, with the biases that the surgery added."""
    modules = [model.get_submodule(layer.name) for layer in plan.layers]
    weights = [p for module in modules for name, p in module.named_parameters() if name.endswith("weight")]
    return sum(p.numel() for p in weights)


@pytest.mark.parametrize("factorization", [lp.SVD(), lp.KroneckerSVD()])
def test_an_edited_file_is_applied(mlp, data, tmp_path, factorization):
    targets = lp.find_targets(mlp)
    statistics = lp.collect_statistics(mlp, targets, [data.tensors[0]], gradients=True)
    plan = lp.make_plan(targets, 0.5, factorization, statistics)
    path = tmp_path / "plan.yaml"
    plan.to_yaml(path)
    assert lp.CompressionPlan.from_yaml(path) == plan

    document = yaml.safe_load(path.read_text())
    ranks = {"0": 1, "2": "dense", "4": 4}
    for layer in document["layers"]:
        layer["rank"] = ranks[layer["name"]]
    edited = lp.CompressionPlan.from_yaml(f"{yaml.safe_dump(document)}\n...\n")
    before = sum(p.numel() for p in mlp.parameters())
    report = lp.apply_plan_(mlp, edited, statistics)
    assert report.ranks == {"0": 1, "2": None, "4": 4}
    assert (mlp[0].rank, type(mlp[2]), mlp[4].rank) == (1, nn.Linear, 4)
    assert edited.parameters == counted(mlp, edited)
    assert before - sum(p.numel() for p in mlp.parameters()) == edited.dense_parameters - edited.parameters
    assert torch.isfinite(mlp(data.tensors[0])).all()


def test_parameters_of_a_new_bias_are_counted(data):
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 14))
    targets = lp.find_targets(model)
    statistics = lp.collect_statistics(model, targets, [data.tensors[0]])
    plan = lp.make_plan(targets, 0.6, lp.WhitenedSVD(centered=True), statistics).with_ranks({"0": 2, "2": 3})
    plan = lp.CompressionPlan.from_yaml(plan.to_yaml())
    before = sum(p.numel() for p in model.parameters())
    lp.apply_plan_(model, plan, statistics)
    assert plan.parameters == counted(model, plan) + 16
    assert before - sum(p.numel() for p in model.parameters()) == plan.dense_parameters - plan.parameters


def test_a_plan_for_another_model_is_refused(mlp):
    plan = lp.make_plan(lp.find_targets(mlp), 0.5, lp.SVD())
    text = plan.to_yaml().replace("shape: [16, 12]", "shape: [16, 13]")
    with pytest.raises(PlanError, match="Layer '0': the plan expects a 16x13 weight"):
        lp.apply_plan_(mlp, lp.CompressionPlan.from_yaml(text))
