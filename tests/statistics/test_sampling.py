import pytest
import torch

from lightning_prehab.statistics.collector import (
    EVERY,
    MANY_BATCHES,
    MIN_TOKENS,
    OWN_PASS_MIN_TOKENS,
    OWN_PASS_PRODUCTS,
    Collector,
)
from lightning_prehab.statistics.sampling import BLOCK, LOOKED_AT, gram, sample, sample_by_energy
from lightning_prehab.statistics.sums import Wanted, gradient_gram, input_sums


@pytest.mark.parametrize("size", [1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("columns", [slice(None), slice(3, None)], ids=["whole", "part of a wider tensor"])
def test_a_gram_matrix_is_that_of_one_product(size, columns):
    rows = torch.randn(40, size + 3)[:, columns][:, :size]
    found = gram(rows)
    torch.testing.assert_close(found, rows.mT @ rows, rtol=1e-5, atol=1e-4)
    if size >= 2 * BLOCK:
        assert torch.equal(found, found.mT)


def test_each_turn_looks_at_other_rows_and_all_turns_at_all_of_them():
    rows = torch.arange(240.0)[:, None]
    seen = []
    for turn in range(6):
        looked_at, factor = sample(rows, 5, turn)
        assert looked_at.shape == (5 * LOOKED_AT, 1)
        assert factor == 6.0
        seen += looked_at[:, 0].tolist()
    assert sorted(seen) == rows[:, 0].tolist()
    assert torch.equal(sample(rows, 5, 6)[0], sample(rows, 5, 0)[0])
    assert sample(rows, 60) == (rows, 1.0)
    assert sample(rows, None) == (rows, 1.0)


def test_sums_of_a_sample_are_those_of_all_rows_on_average():
    torch.manual_seed(0)
    rows = torch.randn(2400, 6) @ torch.randn(6, 6) + 1.0
    turns = range(2400 // (50 * LOOKED_AT))
    exact = input_sums(rows)
    found = [input_sums(rows, 50, turn=turn) for turn in turns]
    assert {sums.tokens for sums in found} == {2400}
    for name in ("total", "absolute"):
        mean = sum(getattr(sums, name) for sums in found) / len(found)
        torch.testing.assert_close(mean, getattr(exact, name), rtol=1e-4, atol=1e-2)
    mean = sum(sums.gram for sums in found) / len(found)
    assert float((mean - exact.gram).norm() / exact.gram.norm()) < 0.1
    torch.testing.assert_close(mean.trace(), exact.gram.trace(), rtol=1e-4, atol=0)
    mean = sum(gradient_gram(rows, 50, turn) for turn in turns) / len(found)
    torch.testing.assert_close(mean.trace(), exact.gram.trace(), rtol=1e-4, atol=0)


def taken(monkeypatch, layer, tokens, **settings):
    """How many rows the two Gram matrices of a layer are made from."""
    found = []
    monkeypatch.setattr(
        "lightning_prehab.statistics.sums.sample_by_energy",
        lambda rows, at_most: found.append(len(sample_by_energy(rows, at_most))) or rows,
    )
    collector = Collector({"layer": layer}, Wanted(True, True), **settings)
    collector.attach()
    x = torch.randn(tokens, layer.in_features)
    collector.begin_batch(x)
    layer(x).sum().backward()
    collector.end_batch()
    collector.detach()
    assert int(collector.statistics["layer"].tokens) == tokens
    return found


def test_a_pass_of_its_own_takes_what_costs_no_more_than_the_layer(monkeypatch):
    wide = torch.nn.Linear(32, 32 * 8)
    tokens = 8 * OWN_PASS_MIN_TOKENS + 800
    share = OWN_PASS_PRODUCTS / 8
    assert taken(monkeypatch, wide, tokens, own_pass=True) == [tokens, max(OWN_PASS_MIN_TOKENS, share * tokens)]
    assert taken(monkeypatch, wide, OWN_PASS_MIN_TOKENS, own_pass=True) == [OWN_PASS_MIN_TOKENS] * 2
    assert taken(monkeypatch, wide, tokens) == [tokens] * 2


@pytest.mark.parametrize("tokens", [MIN_TOKENS, MIN_TOKENS + 1, 8 * MIN_TOKENS])
@pytest.mark.parametrize("batches", [MANY_BATCHES - 2, MANY_BATCHES, MANY_BATCHES + 2, 42, 64])
def test_some_batches_stand_for_the_others_where_there_are_many(tokens, batches):
    """Counts, traces and means are as if every batch had been looked at, in both halves."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    collector = Collector({"layer": layer}, Wanted(True, True, False, True), batches=batches)
    collector.attach()
    x = torch.randn(tokens, 4) + 1.0
    looked_at, count, cycles = [], batches, batches // (2 * EVERY) * 2 * EVERY
    for index in range(count):
        before = collector.statistics["layer"].input_gram.clone()
        collector.begin_batch(x, index)
        layer(x).square().sum().backward()
        collector.end_batch()
        looked_at.append(not torch.equal(collector.statistics["layer"].input_gram, before))
    collector.detach()
    expected = Collector({"layer": layer}, Wanted(True, True))
    expected.attach()
    expected.begin_batch(x)
    layer(x).square().sum().backward()
    expected.end_batch()
    skips = tokens > MIN_TOKENS and batches >= MANY_BATCHES
    assert sum(looked_at) == (cycles // EVERY + count - cycles if skips else count)
    one = expected.statistics["layer"]
    for found, times in ((collector.statistics["layer"], count), (collector.statistics["layer"].half, count // 2)):
        assert int(found.tokens) == times * tokens
        assert int(found.samples) == times * tokens
        torch.testing.assert_close(found.input_mean(), one.input_mean(), rtol=0.2, atol=0.1)
        traces = (found.input_gram.trace() / times, one.input_gram.trace())
        torch.testing.assert_close(*traces, rtol=0.05, atol=0)
        traces = (found.gradient_gram.trace() / times, one.gradient_gram.trace())
        torch.testing.assert_close(*traces, rtol=0.05, atol=0)
