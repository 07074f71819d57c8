"""What is done to output gradients before they are summed; numpy says what it should be."""

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.documents.settings import describe
from lightning_prehab.errors import ArgumentError
from lightning_prehab.statistics.batches import position_ids
from lightning_prehab.statistics.collector import Collector
from lightning_prehab.statistics.hygiene import clipped, inner
from lightning_prehab.statistics.sums import Wanted

TRIM = 0.125


def left(lengths, trim=TRIM):
    """Which of some sequences' tokens, one sequence after the other, are left."""
    parts = []
    for length in lengths:
        off = int(np.floor(trim * length))
        parts.append([off <= place < length - off for place in range(length)])
    return parts


def row(lengths):
    return [kept for part in left(lengths) for kept in part]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_a_sequence(side):
    lengths, width = [16, 9, 1, 5], 16
    present, expected = np.zeros((4, width), bool), np.zeros((4, width), bool)
    for number, (length, kept) in enumerate(zip(lengths, left(lengths), strict=True)):
        places = slice(0, length) if side == "right" else slice(width - length, width)
        present[number, places], expected[number, places] = True, kept
    found = inner(torch.tensor(present), TRIM)
    assert np.array_equal(found.numpy(), expected)
    assert found.any(1).all()  # no sequence is lost


def test_packed_rows_count_anew_in_each_sequence():
    positions = torch.tensor([[*range(16), *range(8)], [*range(3), *range(20), 0]])
    expected = [row([16, 8]), row([3, 20, 1])]
    assert inner(torch.ones(2, 24, dtype=torch.bool), TRIM, positions).tolist() == expected
    one_row = inner(torch.ones(2, 24, dtype=torch.bool), TRIM, torch.arange(24)[None])
    assert one_row.tolist() == [left([24])[0]] * 2


def test_a_share_that_misses_a_whole_number_by_rounding_counts_as_it():
    assert inner(torch.ones(1, 10, dtype=torch.bool), 0.3).sum() == 4
    assert not inner(torch.zeros(2, 4, dtype=torch.bool), TRIM).any()


def test_norms_are_clipped_to_so_many_times_the_median():
    g = np.random.default_rng(0).normal(size=(41, 6)) * np.geomspace(1e-3, 1e3, 41)[:, None]
    g[7] = 0.0
    norms = np.linalg.norm(g, axis=1)
    limit = 2.0 * np.sort(norms[norms > 0])[(40 - 1) // 2]  # torch takes the lower of two middle ones
    expected = g * np.minimum(1.0, limit / np.maximum(norms, 1e-30))[:, None]
    torch.testing.assert_close(clipped(torch.tensor(g), 2.0), torch.tensor(expected), rtol=1e-5, atol=0.0)
    assert torch.equal(clipped(torch.zeros(3, 2), 2.0), torch.zeros(3, 2))


class Overflow(torch.autograd.Function):
    """One gradient is infinite, as loss scaling makes it."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_put((torch.tensor(0), torch.tensor(4)), torch.tensor(torch.inf))


class Tokens(nn.Module):
    """A layer of sequences and one of pooled rows."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x, attention_mask=None, position_ids=None, keep=None, overflow=False):
        y = self.first(x)
        if keep is not None:
            y.retain_grad()
            keep.append(y)
        y = Overflow.apply(y) if overflow else y
        return self.last(y.tanh().mean(1)).square().sum(1).mean()


def collected(batch, wanted, **settings):
    model, keep = Tokens(), []
    collector = Collector(lp.find_targets(model), wanted, **settings)
    collector.attach()
    collector.begin_batch(batch, 0)
    model(**batch, keep=keep, overflow=settings.get("drop_overflow", False)).backward()
    collector.end_batch()
    collector.detach()
    return collector.statistics, keep[0].grad.numpy().astype(np.float64), model


@pytest.mark.parametrize("drop_overflow", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_sums_are_those_of_the_gradients_that_are_left(packed, drop_overflow):
    lengths = [24, 17, 9]
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    batch = {"x": torch.randn(3, 24, 5) * torch.rand(3, 24, 1) ** 4, "attention_mask": mask.long()}
    kept = np.zeros((3, 24), bool)
    if packed:
        batch["position_ids"] = torch.cat([torch.arange(8), torch.arange(16)]).expand(3, 24)
        lengths = [(8, 16), (8, 9), (8, 1)]
    for number, length in enumerate(lengths):
        flat = row(length if packed else [length])
        kept[number, : len(flat)] = flat
    wanted = Wanted(inputs=True, gradients=True, gradient_trim=TRIM, gradient_clip=1.1)
    found, g, _ = collected(batch, wanted, drop_overflow=drop_overflow)
    seen = mask.numpy().copy()
    if drop_overflow:
        assert kept[0, 4]
        kept[0, 4] = seen[0, 4] = False
    rows = g[kept]
    norms = np.linalg.norm(rows, axis=1)
    rows = rows * np.minimum(1.0, 1.1 * np.sort(norms)[(len(norms) - 1) // 2] / norms)[:, None]
    expected = rows.T @ rows * 3**2 * seen.sum() / kept.sum()
    assert (norms > 1.1 * np.median(norms)).any()
    torch.testing.assert_close(found["first"].gradient_gram.double(), torch.tensor(expected), rtol=1e-4, atol=1e-9)
    assert int(found["first"].tokens) == seen.sum()  # inputs are all counted
    plain, _, model = collected(batch, Wanted(inputs=True, gradients=True))
    assert model is not None
    assert plain["last"].gradient_gram.shape == (3, 3)


def test_what_has_no_positions_is_not_trimmed():
    torch.manual_seed(0)
    batch = {"x": torch.randn(3, 24, 5)}
    model = Tokens()
    sums = [
        lp.collect_statistics(model, lp.find_targets(model), [batch], wanted=lp.KroneckerSVD(gradient_trim=trim).wanted)
        for trim in (0.0, TRIM)
    ]
    assert torch.equal(sums[0]["last"].gradient_gram, sums[1]["last"].gradient_gram)
    assert torch.equal(sums[0]["first"].input_gram, sums[1]["first"].input_gram)
    assert not torch.equal(sums[0]["first"].gradient_gram, sums[1]["first"].gradient_gram)
    conv = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 4))
    images = [torch.randn(3, 2, 8, 8)]
    plain, trimmed = (
        lp.collect_statistics(conv, lp.find_targets(conv), images, wanted=lp.KroneckerSVD(gradient_trim=trim).wanted)
        for trim in (0.0, TRIM)
    )
    assert all(torch.equal(plain[name].gradient_gram, trimmed[name].gradient_gram) for name in plain)


def test_the_settings_travel_from_the_method_to_the_collector_and_through_files(tmp_path):
    method = lp.KroneckerSVD(gradient_trim=0.25, gradient_clip=4.0)
    recipe = lp.Recipe(0.5, factorization=method)
    assert recipe.wanted.gradient_trim == 0.25
    assert recipe.wanted.gradient_clip == 4.0
    assert lp.LowRankPlusSparse(base=method).wanted == method.wanted
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert lp.Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert Wanted(*list(method.wanted)) == method.wanted  # as in a checkpoint
    model = Tokens()
    report = lp.compress_(model, recipe, [{"x": torch.randn(64, 24, 5)}])
    report.plan.to_yaml(tmp_path / "plan.yaml")
    assert lp.CompressionPlan.from_yaml(tmp_path / "plan.yaml").factorization == method
    assert Wanted(gradients=True).union(method.wanted) == method.wanted


def test_settings_that_came_later_are_written_and_shown_where_they_are_set():
    assert repr(lp.KroneckerSVD()) == "KroneckerSVD(gradient_shrinkage=0.0001, input_shrinkage=0.0)"
    assert set(describe(lp.KroneckerSVD())["init_args"]) == {"gradient_shrinkage", "input_shrinkage"}
    method = lp.KroneckerSVD(gradient_clip=3.0)
    assert eval(repr(method), vars(lp)) == method
    assert describe(method)["init_args"]["gradient_clip"] == 3.0


def test_positions_are_found_where_masks_are():
    numbers = torch.arange(3)[None]
    assert position_ids([{"x": torch.zeros(1)}, {"position_ids": numbers}]) is numbers
    assert position_ids({"position_ids": torch.arange(3)}) is None
    assert position_ids(torch.zeros(2)) is None


@pytest.mark.parametrize("settings", [{"gradient_trim": 0.5}, {"gradient_trim": -0.1}, {"gradient_clip": 0.0}])
def test_values_that_cannot_be(settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        lp.KroneckerSVD(**settings)
