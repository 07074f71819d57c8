import dataclasses

import numpy as np
import pytest
import torch
import yaml

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, StatisticsError
from lightning_prehab.factorizations import Factorization, Factors, MetricFactorization

SHAPES = [(12, 20), (20, 12), (16, 16), (1, 8), (8, 1)]


def statistics_of(x, g):
    statistics = lp.LayerStatistics(x.shape[1], g.shape[1], gradients=True)
    statistics.update_inputs(x)
    statistics.update_gradients(g)
    statistics.add_samples(len(g))
    return statistics


def with_moments(c, g):
    """Statistics with exactly these second moments."""
    statistics = lp.LayerStatistics(c.shape[0], g.shape[0], gradients=True)
    statistics.input_gram, statistics.gradient_gram = c.clone(), g.clone()
    statistics.tokens += 1
    statistics.samples += 1
    return statistics


def sample(m, n, tokens=400):
    x = torch.randn(tokens, n) @ torch.randn(n, n) + 0.5
    return x, torch.randn(tokens, m) @ torch.randn(m, m)


def product(factors):
    return factors.B @ factors.A


def all_factorizations(kind=Factorization):
    found = []
    for sub in kind.__subclasses__():
        found += all_factorizations(sub)
        if sub.__module__.startswith("lightning_prehab") and sub is not MetricFactorization:
            found.append(sub)
    return found


def test_the_shelf_is_complete():
    assert {kind.__name__ for kind in all_factorizations()} == {"SVD", "WhitenedSVD", "KroneckerSVD"}


@pytest.mark.parametrize("kind", all_factorizations())
class TestConformance:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_shapes_and_full_rank(self, kind, shape, dtype):
        m, n = shape
        weight, statistics = torch.randn(m, n).to(dtype), statistics_of(*sample(m, n))
        for rank in sorted({1, min(m, n)}):
            factors = kind()(weight, rank, statistics)
            assert isinstance(factors, Factors)
            assert factors.A.shape == (rank, n)
            assert factors.B.shape == (m, rank)
        torch.testing.assert_close(product(factors).float(), weight.float(), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_full_rank_with_fewer_tokens_than_features(self, kind, shape):
        m, n = shape
        weight = torch.randn(m, n)
        factors = kind()(weight, min(m, n), statistics_of(*sample(m, n, tokens=3)))
        torch.testing.assert_close(product(factors).float(), weight, atol=1e-5, rtol=1e-5)

    def test_spectrum_is_descending_and_tells_the_error(self, kind):
        weight, (x, g) = torch.randn(12, 20), sample(12, 20)
        statistics = statistics_of(x, g)
        spectrum = kind().spectrum(weight, statistics)
        assert spectrum.shape == (12,)
        assert (spectrum.diff() <= 0).all()
        left, right = torch.eye(12), torch.eye(20)
        if kind().needs_inputs:
            right = statistics.input_second_moment()
        if kind().needs_gradients:
            left = statistics.gradient_second_moment()
        error = (weight - product(kind()(weight, 5, statistics))).double()
        measured = torch.trace(left.double() @ error @ right.double() @ error.mT)
        assert measured.item() == pytest.approx(spectrum[5:].square().sum().item(), rel=2e-3)  # shrinkage 1e-4

    def test_is_a_frozen_dataclass(self, kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().anything = 1
        assert eval(repr(kind()), vars(lp)) == kind()
        assert kind(**yaml.safe_load(yaml.safe_dump(dataclasses.asdict(kind())))) == kind()

    def test_says_which_statistics_are_missing(self, kind):
        if kind().needs_statistics:
            with pytest.raises(StatisticsError, match=f"{kind.__name__} needs calibration statistics"):
                kind()(torch.randn(4, 4), 2, None)
            with pytest.raises(StatisticsError, match="does not belong"):
                kind()(torch.randn(4, 5), 2, statistics_of(*sample(4, 4)))

    def test_leaves_its_input_and_the_random_state_alone(self, kind):
        weight, statistics = torch.randn(6, 8), statistics_of(*sample(6, 8))
        before, sums = weight.clone(), {name: value.clone() for name, value in statistics.tensors()}
        state = torch.get_rng_state()
        kind()(weight, 3, statistics)
        assert torch.equal(weight, before)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in statistics.tensors():
            assert torch.equal(value, sums[name])


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_kronecker_with_identity_gradients_is_whitening(shape):
    m, n = shape
    weight, c = torch.randn(m, n), statistics_of(*sample(m, n)).input_second_moment()
    statistics = with_moments(c, torch.eye(m))
    for rank in (1, 4, 12):
        ours, theirs = lp.KroneckerSVD()(weight, rank, statistics), lp.WhitenedSVD()(weight, rank, statistics)
        torch.testing.assert_close(product(ours), product(theirs), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_identity_everywhere_is_plain_svd(shape):
    m, n = shape
    weight, statistics = torch.randn(m, n), with_moments(torch.eye(n), torch.eye(m))
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    for rank in (1, 4, 12):
        expected = torch.from_numpy(u[:, :rank] * s[:rank] @ vt[:rank])
        for factorization in (lp.SVD(), lp.WhitenedSVD(), lp.KroneckerSVD()):
            torch.testing.assert_close(product(factorization(weight, rank, statistics)), expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_whitening_error_is_the_closed_form_and_beats_svd(shape):
    m, n = shape
    x, g = sample(m, n)
    weight = torch.randn(m, n, dtype=torch.float64)
    statistics = statistics_of(x, g)
    s = np.linalg.svd((weight.numpy() @ x.double().mT.numpy()), compute_uv=False) / np.sqrt(len(x))
    for rank in (1, 3, 7):

        def output_error(factorization, rank=rank):
            return ((weight - product(factorization(weight, rank, statistics))) @ x.double().mT).norm().item() / len(
                x
            ) ** 0.5

        assert output_error(lp.WhitenedSVD()) == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), rel=1e-5)
        assert output_error(lp.WhitenedSVD()) < output_error(lp.SVD())


def test_kronecker_is_the_minimum_that_generic_optimization_finds():
    torch.manual_seed(3)
    weight, (x, g) = torch.randn(5, 6, dtype=torch.float64), sample(5, 6)
    statistics = statistics_of(x, g)
    left, right = (part.double() for part in lp.KroneckerSVD().metric(statistics))
    left, right = left / left.trace(), right / right.trace()

    def cost(b, a):
        error = weight - b @ a
        return torch.trace(left @ error @ right @ error.mT)

    best = float("inf")
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        b, a = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((5, 2), (2, 6)))
        solver = torch.optim.LBFGS(
            [b, a], max_iter=2000, line_search_fn="strong_wolfe", tolerance_grad=1e-14, tolerance_change=1e-16
        )

        def closure(b=b, a=a, solver=solver):
            solver.zero_grad()
            value = cost(b, a)
            value.backward()
            return value

        solver.step(closure)
        best = min(best, cost(b, a).item())
    factors = lp.KroneckerSVD()(weight, 2, statistics)
    assert cost(factors.B, factors.A).item() == pytest.approx(best, rel=1e-6)


def test_centered_whitening_is_the_affine_optimum():
    torch.manual_seed(4)
    x, g = sample(6, 8)
    x = x + 5
    weight, statistics = torch.randn(6, 8, dtype=torch.float64), statistics_of(x, g)
    factors = lp.WhitenedSVD(centered=True)(weight, 2, statistics)
    target = x.double() @ weight.mT
    centered = target - target.mean(0)
    s = np.linalg.svd(centered.numpy(), compute_uv=False)
    error = (target - x.double() @ product(factors).mT - factors.bias_shift).square().sum().item()
    assert error == pytest.approx((s[2:] ** 2).sum(), rel=1e-4)  # reduced-rank regression with an intercept
    plain = lp.WhitenedSVD()(weight, 2, statistics)
    assert error < (target - x.double() @ product(plain).mT).square().sum().item()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: lp.WhitenedSVD(shrinkage=-0.1),
        lambda: lp.KroneckerSVD(gradient_shrinkage=2),
        lambda: lp.KroneckerSVD(input_shrinkage=float("nan")),
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ArgumentError, match=r"must lie in \[0, 1\]"):
        wrong()


def test_half_the_dropped_squares_predict_the_loss_increase():
    """For a linear model with Gaussian noise, the curvature is exactly G (x) C, and so is the prediction."""
    torch.manual_seed(5)
    x = torch.randn(40000, 6) @ torch.randn(6, 6)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    y = model(x).detach() + torch.randn(40000, 5)
    targets = lp.find_targets(model)

    def loss(module, batch):
        return 0.5 * (module(batch[0]) - batch[1]).square().sum(-1).mean()

    statistics = lp.collect_statistics(model, targets, [(x, y)], forward=loss, gradients=True)
    before = loss(model, (x, y)).item()
    weight = model[0].weight.detach().clone()
    for rank in (1, 3):
        predicted = 0.5 * lp.KroneckerSVD().spectrum(weight, statistics["0"])[rank:].square().sum().item()
        with torch.no_grad():
            model[0].weight.copy_(product(lp.KroneckerSVD()(weight, rank, statistics["0"])))
        assert loss(model, (x, y)).item() - before == pytest.approx(predicted, rel=0.1)
