import dataclasses

import numpy as np
import pytest
import torch
import yaml

import lightning_prehab as lp
from lightning_prehab.documents.settings import build, describe
from lightning_prehab.errors import ArgumentError, StatisticsError
from lightning_prehab.factorizations import Factorization, Factors, MetricFactorization

SHAPES = [(12, 20), (20, 12), (16, 16), (1, 8), (8, 1)]


def statistics_of(x, g):
    statistics = lp.LayerStatistics(x.shape[1], g.shape[1], gradients=True, weight_gradients=True)
    statistics.update_inputs(x)
    statistics.update_gradients(g)
    for part in range(3):
        statistics.update_weight_gradient(g[part::3].mT @ x[part::3] / len(g[part::3]), len(g[part::3]))
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


def all_factorizations(kind=Factorization):
    found = []
    for sub in kind.__subclasses__():
        found += all_factorizations(sub)
        if sub.__module__.startswith("lightning_prehab") and sub is not MetricFactorization:
            found.append(sub)
    return found


SHELF = {"SVD", "FisherSVD", "ActivationSVD", "WhitenedSVD", "KroneckerSVD", "LowRankPlusSparse"}


def test_the_shelf_is_complete():
    assert {kind.__name__ for kind in all_factorizations()} == SHELF


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
        torch.testing.assert_close(factors.product().float(), weight.float(), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_full_rank_with_fewer_tokens_than_features(self, kind, shape):
        m, n = shape
        weight = torch.randn(m, n)
        factors = kind()(weight, min(m, n), statistics_of(*sample(m, n, tokens=3)))
        torch.testing.assert_close(factors.product().float(), weight, atol=1e-5, rtol=1e-5)

    def test_spectrum_is_descending_and_tells_the_error(self, kind):
        if kind is lp.LowRankPlusSparse:
            pytest.skip("its spectrum is that of one sparse part for all ranks; see test_low_rank_plus_sparse.py")
        weight, (x, g) = torch.randn(12, 20), sample(12, 20)
        statistics = statistics_of(x, g)
        spectrum = kind().spectrum(weight, statistics)
        assert spectrum.shape == (12,)
        assert (spectrum.diff() <= 0).all()
        left, right = torch.eye(12), torch.eye(20)
        if kind in (lp.WhitenedSVD, lp.KroneckerSVD):
            right = statistics.input_second_moment()
        if kind is lp.KroneckerSVD:
            left = statistics.gradient_second_moment()
        if kind is lp.FisherSVD:
            left = torch.diag(statistics.fisher_rows)
        if kind is lp.ActivationSVD:
            right = torch.diag(x.abs().mean(0))
        error = (weight - kind()(weight, 5, statistics).product()).double()
        measured = torch.trace(left.double() @ error @ right.double() @ error.mT)
        assert measured.item() == pytest.approx(spectrum[5:].square().sum().item(), rel=2e-3)  # shrinkage 1e-4

    def test_decomposes_once_for_all_ranks_and_many_at_once(self, kind):
        items = [(torch.randn(m, n), statistics_of(*sample(m, n))) for m, n in (*SHAPES, (12, 20))]
        for (weight, statistics), found in zip(items, kind().decompose(items), strict=True):
            torch.testing.assert_close(found.singular_values, kind().spectrum(weight, statistics), atol=1e-7, rtol=1e-6)
            for rank in {1, min(weight.shape)}:
                torch.testing.assert_close(
                    found.factors(rank).product(), kind()(weight, rank, statistics).product(), atol=1e-6, rtol=1e-5
                )

    def test_is_a_frozen_dataclass(self, kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().anything = 1
        assert eval(repr(kind()), vars(lp)) == kind()
        assert build(yaml.safe_load(yaml.safe_dump(describe(kind()))), Factorization, "A method") == kind()

    def test_says_which_statistics_are_missing(self, kind):
        needy = type(getattr(kind(), "base", kind()))
        if kind().needs_statistics:
            with pytest.raises(StatisticsError, match=f"{needy.__name__} needs calibration statistics"):
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
        torch.testing.assert_close(ours.product(), theirs.product(), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_identity_everywhere_is_plain_svd(shape):
    m, n = shape
    weight, statistics = torch.randn(m, n), with_moments(torch.eye(n), torch.eye(m))
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    for rank in (1, 4, 12):
        expected = torch.from_numpy(u[:, :rank] * s[:rank] @ vt[:rank])
        for factorization in (lp.SVD(), lp.WhitenedSVD(), lp.KroneckerSVD()):
            torch.testing.assert_close(
                factorization(weight, rank, statistics).product(), expected, atol=1e-7, rtol=1e-7
            )


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_whitening_error_is_the_closed_form_and_beats_svd(shape):
    m, n = shape
    x, g = sample(m, n)
    weight = torch.randn(m, n, dtype=torch.float64)
    statistics = statistics_of(x, g)
    s = np.linalg.svd((weight.numpy() @ x.double().mT.numpy()), compute_uv=False) / np.sqrt(len(x))
    for rank in (1, 3, 7):

        def output_error(factorization, rank=rank):
            return ((weight - factorization(weight, rank, statistics).product()) @ x.double().mT).norm().item() / len(
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
    error = (target - x.double() @ factors.product().mT - factors.bias_shift).square().sum().item()
    assert error == pytest.approx((s[2:] ** 2).sum(), rel=1e-4)  # reduced-rank regression with an intercept
    plain = lp.WhitenedSVD()(weight, 2, statistics)
    assert error < (target - x.double() @ plain.product().mT).square().sum().item()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: lp.WhitenedSVD(shrinkage=-0.1),
        lambda: lp.KroneckerSVD(gradient_shrinkage=2),
        lambda: lp.KroneckerSVD(input_shrinkage=float("nan")),
        lambda: lp.KroneckerSVD(input_shrinkage="much"),
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
            model[0].weight.copy_(lp.KroneckerSVD()(weight, rank, statistics["0"]).product())
        assert loss(model, (x, y)).item() - before == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("axis", ["rows", "columns", "both"])
def test_fisher_is_the_weighted_least_squares_optimum(shape, axis):
    """Against alternating weighted least squares, for weights that are an outer product of rows and columns."""
    torch.manual_seed(6)
    m, n = shape
    weight, statistics = torch.randn(m, n, dtype=torch.float64), statistics_of(*sample(m, n))
    rows = statistics.fisher_rows.double() if axis != "columns" else torch.ones(m).double()
    columns = statistics.fisher_columns.double() if axis != "rows" else torch.ones(n).double()
    weights = rows[:, None] * columns / (rows.mean() * columns.mean())

    def cost(matrix):
        return float((weights * (weight - matrix).square()).sum())

    rank, best = 2, float("inf")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(rank, n, generator=generator, dtype=torch.float64)
        for _ in range(300):
            b = torch.linalg.solve((a * weights[:, None]) @ a.mT, (a @ (weights * weight).mT).mT[..., None])[..., 0]
            a = torch.linalg.solve((b.mT * weights.mT[:, None]) @ b, (weights * weight).mT @ b)[..., None]
            a = a[..., 0].mT
        best = min(best, cost(b @ a))
    assert cost(lp.FisherSVD(axis)(weight, rank, statistics).product()) == pytest.approx(best, rel=1e-6)


def test_fisher_rows_are_those_of_the_paper():
    x, g = sample(5, 7)
    statistics, weight = statistics_of(x, g), torch.randn(5, 7, dtype=torch.float64)
    fisher = sum((g[part::3].mT @ x[part::3] / len(g[part::3])).double().square() for part in range(3))
    d = fisher.sum(1).sqrt()
    u, s, vt = torch.linalg.svd(d[:, None] * weight, full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ vt[:3] / d[:, None]
    torch.testing.assert_close(lp.FisherSVD()(weight, 3, statistics).product(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_activation_scales_the_columns(alpha):
    x, g = sample(5, 7)
    weight = torch.randn(5, 7, dtype=torch.float64)
    scale = x.double().abs().mean(0) ** alpha
    u, s, vt = np.linalg.svd((weight * scale).numpy(), full_matrices=False)
    expected = torch.from_numpy(u[:, :2] * s[:2] @ vt[:2]) / scale
    factors = lp.ActivationSVD(alpha)(weight, 2, statistics_of(x, g))
    torch.testing.assert_close(factors.product(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_kronecker_is_the_formula_with_both_roots(shape):
    m, n = shape
    weight, (x, g) = torch.randn(m, n, dtype=torch.float64), sample(m, n)
    statistics, method = statistics_of(x, g), lp.KroneckerSVD(gradient_shrinkage=0.01, input_shrinkage=0.02)
    left, right = (part.double().numpy() for part in method.metric(statistics))
    lg, lx = np.linalg.cholesky(left), np.linalg.cholesky(right)
    u, s, vt = np.linalg.svd(lg.T @ weight.numpy() @ lx, full_matrices=False)
    for rank in (1, 4, 10):
        expected = np.linalg.inv(lg.T) @ (u[:, :rank] * s[:rank] @ vt[:rank]) @ np.linalg.inv(lx)
        torch.testing.assert_close(
            method(weight, rank, statistics).product(), torch.from_numpy(expected), atol=1e-6, rtol=1e-6
        )


def test_wrong_fisher_and_activation_settings():
    with pytest.raises(ArgumentError, match="axis must be 'rows', 'columns' or 'both', got 'row'"):
        lp.FisherSVD("row")
    for alpha in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ArgumentError, match="alpha must be finite"):
            lp.ActivationSVD(alpha)


class TestAutomaticShrinkage:
    @staticmethod
    def statistics(tokens, batches=8, seed=8):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(16, 12))
        data = [torch.randn(tokens // batches, 16) * torch.linspace(2, 0.3, 16) for _ in range(batches)]
        method = lp.KroneckerSVD("auto", "auto")
        return lp.collect_statistics(model, lp.find_targets(model), data, wanted=method.wanted)["0"]

    def test_it_falls_with_the_number_of_tokens(self):
        def shrunk(tokens):
            statistics = self.statistics(tokens)
            raw = lp.KroneckerSVD(0.0, 0.0).metric(statistics)
            auto = lp.KroneckerSVD("auto", "auto").metric(statistics)
            return [float((a - r).norm() / r.norm()) for a, r in zip(auto, raw, strict=True)]

        few, many = shrunk(32), shrunk(4096)
        assert all(a > 5 * b > 0 for a, b in zip(few, many, strict=True))

    def test_it_helps_on_unseen_tokens(self):
        """Few tokens: on average the cut with shrinkage has the smaller error under the true second moment."""
        truth = torch.diag(torch.linspace(2, 0.3, 16).double() ** 2)

        def error(shrinkage, seed):
            statistics, weight = self.statistics(24, seed=seed), torch.randn(12, 16, dtype=torch.float64)
            difference = weight - lp.KroneckerSVD(1.0, shrinkage)(weight, 4, statistics).product()
            return float(torch.trace(difference @ truth @ difference.mT))

        mean = {shrinkage: np.mean([error(shrinkage, seed) for seed in range(12)]) for shrinkage in ("auto", 0.0)}
        assert mean["auto"] < 0.97 * mean[0.0]

    def test_the_gradient_metric_never_goes_without_the_default_shrinkage(self):
        statistics = self.statistics(64)
        statistics.half.gradient_gram = statistics.gradient_gram / 2  # no noise between the halves
        statistics.half.samples = statistics.samples // 2
        ours, default = (lp.KroneckerSVD(amount).metric(statistics)[0] for amount in ("auto", 1e-4))
        torch.testing.assert_close(ours, default)

    def test_says_what_is_missing(self):
        with pytest.raises(StatisticsError, match="wanted=factorization.wanted"):
            lp.KroneckerSVD("auto")(torch.randn(4, 4), 2, statistics_of(*sample(4, 4)))
        with pytest.raises(StatisticsError, match="it needs two or more"):
            lp.KroneckerSVD("auto")(torch.randn(12, 16), 2, self.statistics(8, batches=1))


def test_a_user_method_with_one_call_is_enough():
    @dataclasses.dataclass(frozen=True)
    class FirstRows(Factorization):
        def __call__(self, weight, rank, statistics=None):
            return Factors(weight[:rank].clone(), torch.eye(weight.shape[0])[:, :rank])

    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    report = lp.compress_(model, keep=0.5, factorization=FirstRows())
    assert report.ranks == {"0": 2}
    assert torch.equal(model[0].weight[2:], torch.zeros(6, 8))


@pytest.mark.parametrize("parent", [lp.SVD, lp.WhitenedSVD, lp.KroneckerSVD])
def test_a_subclass_of_ours_with_a_call_of_its_own_is_heard(parent):
    class Halved(parent):
        def __call__(self, weight, rank, statistics=None):
            factors = super().__call__(weight, rank, statistics)
            return factors._replace(B=factors.B / 2)

    weight, statistics = torch.randn(8, 8), statistics_of(*sample(8, 8))
    ours, theirs = (kind().decompose([(weight, statistics)])[0] for kind in (Halved, parent))
    torch.testing.assert_close(ours.factors(2).product(), theirs.factors(2).product() / 2)
    torch.testing.assert_close(ours.singular_values, theirs.singular_values)
