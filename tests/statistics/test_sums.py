import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_prehab as lp
from lightning_prehab.errors import StatisticsError
from lightning_prehab.statistics.sums import Wanted, sample_by_energy, statistics_bytes


def filled(x, g, samples):
    statistics = lp.LayerStatistics(x.shape[1], g.shape[1], gradients=True)
    statistics.update_inputs(x)
    statistics.update_gradients(g)
    statistics.add_samples(samples)
    return statistics


def test_moments_equal_their_definition():
    x, g = torch.randn(40, 5) + 1, torch.randn(40, 3)
    statistics = filled(x, g, samples=10)
    torch.testing.assert_close(
        statistics.input_second_moment(), torch.cov(x.mT, correction=0) + torch.outer(x.mean(0), x.mean(0))
    )
    torch.testing.assert_close(statistics.input_mean(), x.mean(0))
    torch.testing.assert_close(statistics.gradient_second_moment(), torch.einsum("ti,tj->ij", g, g) / 10)


def test_merging_parts_in_any_order_equals_the_whole():
    x, g = torch.randn(60, 5), torch.randn(60, 3)
    whole = filled(x, g, 60)
    for order in ([0, 1, 2], [2, 0, 1]):
        parts = [filled(x[i * 20 : i * 20 + 20], g[i * 20 : i * 20 + 20], 20) for i in order]
        merged = parts[0].merge_(parts[1]).merge_(parts[2])
        for (_, ours), (_, theirs) in zip(merged.tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_half_types_are_summed_in_float32():
    statistics = lp.LayerStatistics(1, 1)
    statistics.update_inputs(torch.full((4096, 1), 1.0, dtype=torch.bfloat16))
    statistics.update_inputs(torch.full((1, 1), 1.0, dtype=torch.bfloat16))
    assert statistics.input_gram.item() == 4097.0


def test_empty_and_incomplete_statistics_say_so():
    empty = lp.LayerStatistics(4, 3, gradients=True)
    with pytest.raises(StatisticsError, match="No input was seen"):
        empty.input_second_moment()
    with pytest.raises(StatisticsError, match="without output gradients"):
        lp.LayerStatistics(4, 3).update_gradients(torch.zeros(1, 3))
    with pytest.raises(StatisticsError, match="gradients=True"):
        lp.LayerStatistics(4, 3).gradient_second_moment()
    with pytest.raises(StatisticsError, match="different layers"):
        empty.merge_(lp.LayerStatistics(4, 4, gradients=True))
    with pytest.raises(StatisticsError, match="different layers"):
        empty.merge_(lp.LayerStatistics(4, 3))


def test_missing_names_what_is_missing():
    statistics = lp.LayerStatistics(4, 3, gradients=True)
    assert "no input" in statistics.missing(Wanted(inputs=True))
    statistics.update_inputs(torch.zeros(5, 4))
    assert "was zero" in statistics.missing(Wanted(inputs=True))
    statistics.update_inputs(torch.ones(5, 4))
    assert statistics.missing(Wanted(inputs=True)) is None
    assert "no output gradient" in statistics.missing(Wanted(inputs=True, gradients=True))
    statistics.update_gradients(torch.ones(5, 3))
    assert statistics.missing(Wanted(inputs=True, gradients=True)) is None


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 1000))
def test_sampling_by_energy_keeps_the_trace(tokens, at_most, seed):
    rows = torch.randn(tokens, 7, generator=torch.Generator().manual_seed(seed))
    sample = sample_by_energy(rows, at_most)
    assert sample.shape == (min(tokens, at_most), 7)
    torch.testing.assert_close(sample.square().sum(), rows.square().sum(), rtol=1e-4, atol=0)


def test_sampling_by_energy_approaches_the_gram_matrix_and_finds_rare_rows():
    torch.manual_seed(0)
    rows = torch.randn(20_000, 6) @ torch.randn(6, 6)
    exact, sample = rows.mT @ rows, sample_by_energy(rows, 4000)
    assert (sample.mT @ sample - exact).norm() / exact.norm() < 0.03
    rare = torch.zeros(5000, 6)
    rare[::500] = torch.randn(10, 6)
    sample = sample_by_energy(rare, 256)
    torch.testing.assert_close(sample.mT @ sample, rare.mT @ rare, rtol=0.1, atol=0.1 * float(rare.square().sum()))
    assert len(torch.unique(sample.sign(), dim=0)) == len(torch.unique(rare[::500].sign(), dim=0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rows_of_any_type_are_sampled(dtype):
    rows = torch.randn(64, 5).to(dtype)
    taken = sample_by_energy(rows, 16)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert taken.dtype == wide
    torch.testing.assert_close(taken.square().sum(), rows.to(wide).square().sum())


def test_sampling_leaves_the_random_state_alone_and_is_repeatable():
    rows, state = torch.randn(400, 5), torch.get_rng_state()
    assert torch.equal(sample_by_energy(rows, 50), sample_by_energy(rows, 50))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.isfinite(sample_by_energy(torch.full((10, 2), float("nan")), 3)).any()
    assert torch.equal(sample_by_energy(torch.zeros(10, 2), 3), torch.zeros(3, 2))


def test_shared_inputs_merge_like_separate_ones():
    x, y = torch.randn(5, 3), torch.randn(4, 3)

    def pair(shared):
        leader, follower = (lp.LayerStatistics(3, 2, halves=True) for _ in range(2))
        if shared:
            follower.share_inputs_(leader)
        for statistics in (leader,) if shared else (leader, follower):
            statistics.update_inputs(x)
            statistics.half.update_inputs(y)
        return leader, follower

    assert pair(False)[0].same_inputs(pair(False)[1])
    assert not pair(False)[0].same_inputs(lp.LayerStatistics(3, 2, halves=True))
    assert not pair(False)[0].same_inputs(lp.LayerStatistics(3, 2))
    mine, theirs = pair(True), pair(True)
    for one, other in zip(mine, theirs, strict=True):
        one.merge_(other)
    for one in mine:
        assert int(one.tokens) == 10
        torch.testing.assert_close(one.input_gram, 2 * x.mT @ x)
        torch.testing.assert_close(one.half.input_gram, 2 * y.mT @ y)


def test_bytes_are_those_of_the_tensors():
    for flags in itertools.product((False, True), repeat=4):
        wanted = Wanted(True, *flags)
        statistics = lp.LayerStatistics(
            5,
            7,
            gradients=wanted.gradients,
            weight_gradients=wanted.weight_gradients,
            halves=wanted.halves,
            magnitudes=wanted.magnitudes,
        )
        held = sum(tensor.numel() * 4 for _, tensor in statistics.tensors() if tensor.dim() > 0)
        assert statistics_bytes([(7, 5)], wanted) == held
