"""Plans of many layers, in few lines."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from lightning_prehab.plan.layer_groups import FEW, group_layers
from tests.large_report import BLOCKS, DENSE, SHAPES, large_report


@pytest.fixture
def plan():
    return large_report().plan


def test_a_line_for_each_group(plan):
    lines = str(plan).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("layers.*.")}
    assert list(rows) == [f"layers.*.{kind}" for kind in SHAPES]
    row = "layers.*.mlp.up_proj 30 1536x576 20 to 49 34 26.5M -> 2.2M 0.10 to 0.39 +0.03"
    assert " ".join(rows["layers.*.mlp.up_proj"]) == row
    assert rows["layers.*.self_attn.o_proj"][1] == "29/30"
    assert max(map(len, lines)) <= 100
    assert len(lines) < 24


def test_what_is_left_is_told_with_the_reason(plan):
    text = str(plan)
    assert f"1 dense: {DENSE}: layers.7.self_attn.o_proj" in text
    assert "1 left: embeddings are looked up, not multiplied: embed_tokens" in text
    assert 'All names begin with "model.", but not lm_head.' in text


def test_many_names_are_folded_too(plan):
    norms = {f"model.layers.{block}.{name}": "a vector" for block in range(BLOCKS) for name in ("norm", "bias")}
    many = replace(plan, skipped={**plan.skipped, **norms})
    assert "60 left: a vector: layers.*.norm (30), layers.*.bias (30)" in str(many)
    others = {f"{letter}{letter}": "odd" for letter in "abcdefghijklmnop"}
    text = str(replace(plan, skipped=others))
    assert "16 left: odd: aa, bb, cc, dd, ee, ff, gg, hh and 8 more" in text
    assert "All names" not in text
    assert "\nmodel.layers.*." in text
    every = str(replace(plan, skipped={**others, **norms}).table(every_layer=True))
    assert "pp" in every
    assert "model.layers.29.bias" in every.replace("\n  ", " ")


def test_every_layer_if_asked(plan):
    names = [line.split()[0] for line in str(plan.table(every_layer=True)).splitlines() if line.startswith("model.")]
    assert names == [layer.name for layer in plan.layers]


def test_few_layers_are_shown_one_by_one(plan):
    few = str(replace(plan, layers=plan.layers[:FEW]))
    assert all(layer.name in few for layer in plan.layers[:FEW])
    assert "layers.*" not in few
    assert "layers.*" in str(replace(plan, layers=plan.layers[: FEW + 1]))


def test_no_predictions(plan):
    unknown = replace(plan, layers=tuple(replace(one, relative_error=None, loss_increase=None) for one in plan.layers))
    row = next(line for line in str(unknown).splitlines() if "up_proj" in line)
    assert row.endswith(" ?")
    assert "loss" not in str(unknown)


@pytest.mark.parametrize("every_layer", [False, True])
def test_rounding_is_zero(plan, every_layer):
    """After prehab nothing is lost: not 0.000 and 1.53e-17."""
    free = [replace(one, relative_error=3e-8, loss_increase=1.53e-17) for one in plan.layers if one.rank is not None]
    text = str(replace(plan, layers=tuple(free)).table(every_layer))
    assert "predicted loss increase 0\n" in text
    assert "e-" not in text
    assert " 0.000" not in text
    rows = [line.split() for line in text.splitlines() if "up_proj" in line]
    assert all(row[-2:] == ["0", "0"] for row in rows)
    one_of_them = replace(plan, layers=(replace(free[0], relative_error=0.2, loss_increase=1e-9), *free[1:]))
    assert "predicted loss increase 1e-09\n" in str(one_of_them)  # the unit of the loss is not known: it may be much


def test_rich_at_80_columns(plan):
    console = Console(file=io.StringIO(), width=80)
    console.print(plan)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("layers.*.") and "->" in line for line in lines) == len(SHAPES)
    assert lines[0] == "Compression plan"


def test_groups_are_of_one_shape(plan):
    first, *rest = plan.layers
    wide = replace(first, out_features=577)
    names = [group.name for group in group_layers([wide, *rest])]
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert names[-1] == "model.layers.*.self_attn.q_proj"
    assert len(names) == len(SHAPES) + 1
