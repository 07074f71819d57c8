import dataclasses
import itertools

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prehab import regularizers
from lightning_prehab.errors import ArgumentError, NumericalError
from lightning_prehab.linalg.decomposition import weighted_low_rank
from lightning_prehab.regularizers import Metric, Shrinkage, SpectralWeightDecay, TailShrinkage

SHAPES = [(6, 9), (9, 6), (7, 7)]


def spd(size, seed, dtype=torch.float64):
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (root @ root.mT / size).to(dtype)


def weight(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def metric_of(shape, left=True, right=True):
    return Metric.from_grams(spd(shape[0], 1) if left else None, spd(shape[1], 2) if right else None)


def relative_tail(matrix, rank):
    s = torch.linalg.svdvals(matrix.double())
    return (s[rank] / s[0]).item()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
class TestTailShrinkageInAMetric:
    def test_at_progress_1_it_is_the_cut_of_that_metric(self, shape, left, right):
        w, g, c = weight(shape), spd(shape[0], 1) if left else None, spd(shape[1], 2) if right else None
        a, b = weighted_low_rank(w, 3, g, c)
        memory = {}
        for progress in (0.0, 0.0, 1.0):  # the projector of an earlier step is not the one used
            w_r = TailShrinkage()(weight(shape), 3, memory, progress, metric=Metric.from_grams(g, c))
        torch.testing.assert_close(w_r, b @ a, atol=1e-9, rtol=1e-8)

    def test_both_ways_agree(self, shape, left, right):
        """The map of the weight, and the textbook way: see, project, map back."""
        w, metric, shrinkage = weight(shape), metric_of(shape, left, right), TailShrinkage()
        seen = metric.view(w)
        side, basis = shrinkage.projector(seen, 3)
        projected = basis @ basis.mT @ seen if side == "left" else seen @ basis @ basis.mT
        share = 1 - (1 - shrinkage.eta(0.5)) ** 5
        expected = w - share * (w - metric.back(projected))
        torch.testing.assert_close(shrinkage(w, 3, {}, 0.5, metric=metric), expected, atol=1e-10, rtol=1e-9)

    def test_float32_leaves_exactly_the_rank(self, shape, left, right):
        metric = metric_of(shape, left, right)
        parts = [None if root is None else root.float() for root in (metric.left, metric.right)]
        shrunk = TailShrinkage()(weight(shape, dtype=torch.float32), 3, {}, 1.0, metric=Metric(*parts))
        assert shrunk.dtype == torch.float32
        assert relative_tail(shrunk, 3) < 1e-6
        assert relative_tail(shrunk, 2) > 1e-2


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_a_badly_conditioned_metric_in_float32(shape):
    """Roots of condition 1e5, as of output gradients: the projection is still right to rounding, and of the rank."""
    basis = torch.linalg.qr(weight((40, 40), 3)).Q
    root = (basis * torch.logspace(0, -5, 40, dtype=torch.float64)) @ basis.mT
    metric = Metric(left=root.float()) if shape[0] == 40 else Metric(right=root.float())
    w = weight(shape)
    exact = TailShrinkage()(w, 8, metric=Metric(*(r if r is None else r.double() for r in (metric.left, metric.right))))
    shrunk = TailShrinkage()(w.float(), 8, metric=metric)
    assert (shrunk - exact).norm() / exact.norm() < 1e-3
    assert relative_tail(shrunk, 8) < 1e-6


@given(st.floats(1e-4, 1), st.floats(0.05, 1), st.sampled_from(["geometric", "linear"]))
def test_eta_is_monotone_from_start_to_1(start, anneal, schedule):
    shrinkage = TailShrinkage(start, anneal, schedule=schedule)
    etas = [shrinkage.eta(step / 50) for step in range(51)]
    assert etas[0] == pytest.approx(start)
    assert all(one <= two for one, two in itertools.pairwise(etas))
    assert etas[-1] == shrinkage.eta(anneal) == shrinkage.eta(2.0) == 1.0
    assert shrinkage.eta(-1.0) == pytest.approx(start)


def train(steps=60, refresh=10, restart_at=None):
    """A little run with the shrinkage after every step, aimed at rank 4; the memory may pass through a state dict."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    x = torch.randn(256, 24)
    y = torch.tanh(x @ torch.randn(24, 16))
    metrics = [Metric(right=torch.diag(torch.linspace(1, 2, 24))), Metric(left=torch.diag(torch.linspace(2, 1, 16)))]
    memories, optimizer, kept = [{}, {}], torch.optim.Adam(net.parameters(), lr=1e-3), []
    shrinkage = TailShrinkage(refresh=refresh)
    for step in range(steps):
        if step == restart_at:
            memories = [{key: value.clone() for key, value in memory.items()} for memory in memories]
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        for layer, memory, metric in zip((net[0], net[2]), memories, metrics, strict=True):
            shrunk = shrinkage(layer.weight, 4, memory, (step + 1) / steps, metric=metric)
            with torch.no_grad():
                layer.weight.copy_(shrunk)
        kept.append(relative_tail(net[2].weight.detach(), 4))
    return net, kept


def test_a_training_run_ends_at_the_rank_whatever_the_refresh():
    for refresh in (1, 10, 1000):
        net, tails = train(refresh=refresh)
        assert tails[-1] < 1e-6
        assert relative_tail(net[0].weight.detach(), 4) < 1e-6
    assert tails[0] > 0.3
    assert tails[30] > 0.05


def test_a_run_is_deterministic_and_resumes_bit_by_bit():
    one, two, resumed = train()[0], train()[0], train(restart_at=37)[0]
    for other in (two, resumed):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_steps_between_refreshes_do_not_touch_the_metric(monkeypatch):
    metric, memory, w = metric_of((6, 9)), {}, weight((6, 9))
    TailShrinkage(refresh=3)(w, 2, memory, 0.1, metric=metric)
    monkeypatch.setattr(Metric, "view", None)
    for _ in range(2):
        TailShrinkage(refresh=3)(w, 2, memory, 0.1, metric=metric)
    with pytest.raises(TypeError):
        TailShrinkage(refresh=3)(w, 2, memory, 0.1, metric=metric)


def test_every_fifth_call_does_the_work_of_five():
    """On a weight that nothing else changes, both ways leave the same after any multiple of five calls."""
    w = weight((6, 9))
    single, rare = TailShrinkage(start=0.1, anneal=1.0, every=1), TailShrinkage(start=0.1, anneal=1.0, every=5)
    one, five, memories = w, w, ({}, {})
    changes = []
    for _ in range(15):
        one = single(one, 2, memories[0], 0.3)
        before, five = five, rare(five, 2, memories[1], 0.3)
        changes.append(five.data_ptr() != before.data_ptr())
    assert changes == [True, False, False, False, False] * 3
    torch.testing.assert_close(one, five)
    assert relative_tail(rare(five, 2, memories[1], 1.0), 2) < 1e-12


def test_shrinkages_that_come_as_rarely_as_the_subspace_steps():
    memory, w = {}, weight((6, 9))
    shrinkage = TailShrinkage(start=0.1, anneal=1.0, every=5, refresh=2)
    changes = [shrinkage(w, 2, memory, 0.0).data_ptr() != w.data_ptr() for _ in range(5)]
    assert changes == [True, False, True, False, True]
    torch.testing.assert_close(shrinkage(w, 2, {}, 0.0), TailShrinkage(0.1, 1.0, every=2)(w, 2, {}, 0.0))


def test_tail_shrinkage_needs_a_rank_and_leaves_full_ranks_alone():
    w = weight((5, 6))
    torch.testing.assert_close(TailShrinkage(rank=2)(w), TailShrinkage()(w, 2))
    with pytest.raises(ArgumentError, match="no target rank"):
        TailShrinkage()(w)
    for rank in (5, 9):
        assert torch.equal(TailShrinkage()(w, rank), w)


def test_a_new_rank_starts_anew():
    memory, w = {}, weight((6, 8))
    TailShrinkage()(w, 2, memory, 0.0)
    torch.testing.assert_close(TailShrinkage(start=1.0)(w, 4, memory, 0.0), TailShrinkage()(w, 4))


@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_weight_decay_lowers_every_singular_value_alike(shape):
    w, metric = weight(shape), metric_of(shape)
    decay = SpectralWeightDecay(decay=0.5, steps=12)
    s = torch.linalg.svdvals(w)
    torch.testing.assert_close(torch.linalg.svdvals(decay(w, lr=0.1)), (s - 0.05).abs().sort(descending=True).values)
    seen = torch.linalg.svdvals(metric.view(w))
    shrunk = torch.linalg.svdvals(metric.view(decay(w, lr=0.1, metric=metric)))
    torch.testing.assert_close(shrunk, (seen - 0.05).abs().sort(descending=True).values)


def test_spectral_weight_decay_applied_now_and_then_takes_as_much():
    decay, memory, w = SpectralWeightDecay(decay=0.1, every=5, steps=12), {}, weight((6, 9))
    steps, now = [w], w
    for step in range(12):
        now = decay(now, memory=memory, progress=(step + 1) / 12, lr=0.01 * (step + 1))
        steps.append(now)
    changed = [step for step in range(12) if not torch.equal(steps[step], steps[step + 1])]
    assert changed == [4, 9, 11]
    taken = torch.linalg.svdvals(w) - torch.linalg.svdvals(now)
    torch.testing.assert_close(taken, torch.full_like(taken, 0.1 * 0.01 * 78), rtol=1e-5, atol=1e-8)


def all_shrinkages():
    return [kind for kind in Shrinkage.__subclasses__() if kind.__module__.startswith("lightning_prehab")]


def test_the_shelf_is_complete():
    assert {kind.__name__ for kind in all_shrinkages()} == {"TailShrinkage", "SpectralWeightDecay"}


@pytest.mark.parametrize("kind", all_shrinkages())
class TestConformance:
    def test_is_a_frozen_dataclass_with_a_docstring(self, kind):
        assert dataclasses.is_dataclass(kind)
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().anything = 1
        assert kind() == kind()
        assert eval(repr(kind()), vars(regularizers)) == kind()
        assert "Args:" in kind.__doc__
        assert kind.__name__ in regularizers.__all__

    def test_survives_yaml(self, kind):
        settings = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(kind())))
        assert kind(**settings) == kind()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (4, 4)])
    def test_zero_and_thin_weights_are_finite(self, kind, shape, dtype):
        for fill in (0.0, 1.0, 1e-30):
            shrunk = kind()(torch.full(shape, fill, dtype=dtype), 1, {}, 0.5, 0.1)
            assert shrunk.shape == shape
            assert shrunk.dtype == dtype
            assert torch.isfinite(shrunk).all()
            assert fill != 0 or not shrunk.any()

    def test_pure_without_a_graph_and_the_global_random_state_left_alone(self, kind):
        state, w = torch.get_rng_state(), weight((6, 8)).requires_grad_()
        before = w.detach().clone()
        runs = []
        for _ in range(2):
            memory = {}
            runs.append([kind()(w, 2, memory, step / 10, 0.1, metric_of((6, 8))) for step in range(11)])
            assert all(not value.requires_grad for value in memory.values())
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
        assert not any(shrunk.requires_grad for shrunk in runs[0])
        assert torch.equal(w, before)
        assert all(shrunk.data_ptr() != w.data_ptr() or torch.equal(shrunk, w) for shrunk in runs[0])
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_nuclear_norm_falls(self, kind):
        w = weight((6, 8))
        assert torch.linalg.svdvals(kind()(w, 2, {}, 1.0, 0.1)).sum() < torch.linalg.svdvals(w).sum()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: TailShrinkage(start=0.0), "got 0.0"),
        (lambda: TailShrinkage(start=1.5), "got 1.5"),
        (lambda: TailShrinkage(start=float("nan")), "got nan"),
        (lambda: TailShrinkage(anneal=0.0), "got 0.0"),
        (lambda: TailShrinkage(anneal=2.0), "got 2.0"),
        (lambda: TailShrinkage(refresh=0), "refresh .*got 0"),
        (lambda: TailShrinkage(rank=-1), "rank .*got -1"),
        (lambda: TailShrinkage(schedule="cosine"), "got 'cosine'"),
        (lambda: SpectralWeightDecay(decay=0.0), "got 0.0"),
        (lambda: SpectralWeightDecay(decay=float("inf")), "got inf"),
        (lambda: TailShrinkage(every=0), "every .*got 0"),
        (lambda: SpectralWeightDecay(every=0), "every .*got 0"),
        (lambda: SpectralWeightDecay(steps=0), "steps .*got 0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ArgumentError, match=message):
        wrong()


def test_nan_is_an_error_where_directions_are_computed():
    with pytest.raises(NumericalError, match="NaN or Inf"):
        TailShrinkage()(torch.full((3, 3), float("nan")), 1)
