import dataclasses
import itertools

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import lightning_prehab as lp
from lightning_prehab.documents.settings import build, describe
from lightning_prehab.errors import ArgumentError, NumericalError, StatisticsError
from lightning_prehab.factorizations import Factorization, Factors, MetricFactorization
from lightning_prehab.factorizations import low_rank_plus_sparse as module


@dataclasses.dataclass(frozen=True)
class Given(MetricFactorization):
    """A metric without statistics: two Gram matrices, or their diagonals."""

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None

    def metric(self, statistics):
        return self.left, self.right

    def cost(self, error):
        left, right = (torch.diag(gram) if gram.dim() == 1 else gram for gram in (self.left, self.right))
        return float(torch.trace(left @ error @ right @ error.mT))


def statistics_for(weight):
    return lp.LayerStatistics(weight.shape[1], weight.shape[0])


def gram(size, correlation):
    """Eigenvalues that fall like a power in a random basis, features of different scale."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    scale = torch.exp(0.7 * torch.randn(size, dtype=torch.float64))
    falling = torch.arange(1, size + 1, dtype=torch.float64) ** -correlation
    return scale[:, None] * ((basis * falling) @ basis.mT) * scale


def metrics(m, n):
    yield "identity", Given(torch.ones(m).double(), torch.ones(n).double())
    yield "diagonal", Given(gram(m, 0.0).diagonal().clone(), gram(n, 0.0).diagonal().clone())
    for correlation in (0.5, 1.5, 2.5):
        yield f"correlated {correlation}", Given(gram(m, correlation), gram(n, correlation))


def planted(m, n, rank, nonzeros, scale=5.0):
    low = torch.randn(m, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)
    places = torch.randperm(m * n)[:nonzeros].sort().values
    values = scale * torch.randn(nonzeros, dtype=torch.float64).sign() * (1 + torch.rand(nonzeros, dtype=torch.float64))
    return low + torch.zeros(m * n, dtype=torch.float64).index_put((places,), values).view(m, n), places, values


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_a_planted_sum_is_found_exactly(shape):
    m, n = shape
    weight, places, values = planted(m, n, rank=2, nonzeros=60)
    for base in (lp.SVD(), Given(torch.rand(m).double() + 0.5, torch.rand(n).double() + 0.5)):
        factors = lp.LowRankPlusSparse(60 / (m * n), base, steps=40)(weight, 2, statistics_for(weight))
        torch.testing.assert_close(factors.product(), weight, atol=1e-6, rtol=1e-6)
        assert torch.equal(factors.sparse.indices, places)
        torch.testing.assert_close(factors.sparse.values, values, atol=1e-6, rtol=1e-6)
    alone = lp.SVD()(weight, 2).product()
    assert (alone - weight).norm() > 0.1 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_never_above_that_of_the_base(dtype):
    """In correlated metrics the residual itself is so bad a value that this holds only by the fit of the values."""
    for seed, (m, n) in itertools.product(range(3), [(24, 32), (32, 24), (4, 30)]):
        torch.manual_seed(seed)
        weight = torch.randn(m, n, dtype=torch.float64) @ torch.diag(torch.linspace(3, 0.1, n).double())
        for name, base in metrics(m, n):
            for rank in (1, 3, min(m, n) - 1):
                ours = lp.LowRankPlusSparse(0.05, base)(weight.to(dtype), rank, statistics_for(weight))
                theirs = base(weight.to(dtype), rank, statistics_for(weight))
                error, bound = (
                    base.cost(weight - ours.product().double()),
                    base.cost(weight - theirs.product().double()),
                )
                rounding = 1e-6 if dtype == torch.float32 else 1e-12
                assert error <= bound + rounding * base.cost(weight), (name, m, n, rank)
                if rank == 3 and "correlated" not in name:
                    assert error < 0.9 * bound, (name, m, n)


def test_alternation_beats_one_pass(monkeypatch):
    monkeypatch.setattr(module, "REFITS", 0)
    weight = torch.randn(24, 32, dtype=torch.float64) @ torch.diag(torch.linspace(3, 0.1, 32).double())
    for name, base in list(metrics(24, 32))[:3]:
        errors = [
            base.cost(weight - lp.LowRankPlusSparse(0.08, base, steps)(weight, 4, statistics_for(weight)).product())
            for steps in (1, 5)
        ]
        assert errors[1] < 0.95 * errors[0], name


def test_the_fit_of_the_values_helps(monkeypatch):
    weight, base = torch.randn(24, 32, dtype=torch.float64), Given(gram(24, 1.0), gram(32, 1.0))

    def error():
        return base.cost(weight - lp.LowRankPlusSparse(0.05, base)(weight, 4, statistics_for(weight)).product())

    fitted = error()
    monkeypatch.setattr(module, "REFITS", 0)
    assert fitted < 0.97 * error()


def test_the_places_are_the_best_ones_for_the_factors_by_brute_force(monkeypatch):
    """In a diagonal metric no other places, with their best values, have a smaller error beside the same factors."""
    monkeypatch.setattr(module, "REFITS", 0)
    weight = torch.randn(3, 4, dtype=torch.float64)
    rows, columns = torch.tensor([0.1, 1.0, 7.0]).double(), torch.tensor([2.0, 0.3, 1.0, 4.0]).double()
    base = Given(rows, columns)
    method = lp.LowRankPlusSparse(3 / 12, base, steps=1)
    seen = []

    class Spy(lp.LowRankPlusSparse):
        def _largest(self, weight, factors, scales):
            found = super()._largest(weight, factors, scales)
            seen.append((factors, found))
            return found

    Spy(method.density, method.base, method.steps)(weight, 1, statistics_for(weight))
    assert len(seen) == 2
    for factors, found in seen:
        residual = weight - factors.B @ factors.A

        def cost(places, residual=residual):
            rest = residual.flatten().clone()
            rest[list(places)] = 0.0
            return base.cost(rest.view(3, 4))

        best = min(itertools.combinations(range(12), 3), key=cost)
        assert tuple(found.indices.tolist()) == best
        torch.testing.assert_close(found.values, residual.flatten()[list(best)])


def test_one_fit_of_the_values_is_the_residual_in_a_diagonal_metric_and_a_line_search_in_others():
    weight, error = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    places = torch.tensor([0, 7, 11, 29])
    start = module.Sparse(places, torch.randn(4, dtype=torch.float64))
    for base in (lp.SVD(), Given(torch.rand(5).double() + 0.1, torch.rand(6).double() + 0.1)):
        improved = module._Metric(base, weight, statistics_for(weight)).improved(start, error)
        torch.testing.assert_close(improved.values - start.values, error.flatten()[places])
    lengths = np.linspace(0, 1, 1001)
    for correlation in (0.2, 0.5, 1.0, 2.0):
        base = Given(gram(5, correlation), gram(6, correlation))
        improved = module._Metric(base, weight, statistics_for(weight)).improved(start, error)
        scale = torch.outer(base.left.diagonal(), base.right.diagonal())
        way = ((base.left @ error @ base.right) / scale).flatten()[places]
        costs = [base.cost(error - module.Sparse(places, length * way).matrix(5, 6)) for length in lengths]
        best = lengths[int(np.argmin(costs))]
        assert best > 0
        torch.testing.assert_close(improved.values - start.values, best * way, atol=1e-3, rtol=2e-3)


def test_a_feature_that_is_never_used_gets_no_entries():
    right = torch.ones(8).double()
    right[[2, 5]] = 0.0
    weight = torch.randn(6, 8, dtype=torch.float64)
    for base in (Given(torch.eye(6).double(), torch.diag(right)), Given(torch.eye(6).double(), right)):
        factors = lp.LowRankPlusSparse(0.5, base)(weight, 2, statistics_for(weight))
        assert not {2, 5} & set((factors.sparse.indices % 8).tolist())
        assert torch.isfinite(factors.product()).all()


def test_few_tokens_do_not_blow_up_the_values():
    x, g = torch.randn(3, 12) @ torch.randn(12, 12), torch.randn(3, 20) @ torch.randn(20, 20)
    statistics = lp.LayerStatistics(12, 20, gradients=True)
    statistics.update_inputs(x)
    statistics.update_gradients(g)
    statistics.add_samples(3)
    weight = torch.randn(20, 12)
    for rank in (3, 7, 12):
        factors = lp.LowRankPlusSparse()(weight, rank, statistics)
        assert factors.sparse.values.abs().max() < 3 * module.VALUE_LIMIT * weight.abs().max()


def test_a_base_without_a_metric_is_judged_by_plain_squares():
    @dataclasses.dataclass(frozen=True)
    class FirstRows(Factorization):
        def __call__(self, weight, rank, statistics=None):
            return Factors(weight[:rank].clone(), torch.eye(weight.shape[0])[:, :rank].to(weight))

    weight = torch.randn(6, 8)
    factors = lp.LowRankPlusSparse(5 / 48, FirstRows())(weight, 2)
    expected = weight[2:].flatten().abs().topk(5).indices.sort().values + 16
    assert torch.equal(factors.sparse.indices, expected)
    torch.testing.assert_close(factors.sparse.values, weight.flatten()[expected])


def test_the_new_bias_suits_factors_and_entries():
    x = torch.randn(300, 8) @ torch.randn(8, 8) + 4
    statistics = lp.LayerStatistics(8, 6)
    statistics.update_inputs(x)
    weight = torch.randn(6, 8)
    method = lp.LowRankPlusSparse(0.1, lp.WhitenedSVD(centered=True))
    assert method.adds_bias
    factors = method(weight, 2, statistics)
    error = x @ (weight - factors.product().float()).mT - factors.bias_shift.float()
    torch.testing.assert_close(error.mean(0), torch.zeros(6), atol=1e-4, rtol=0)


def test_the_spectrum_is_that_of_the_base_without_the_entries_of_half_the_break_even_rank():
    weight = torch.randn(20, 30)
    method = lp.LowRankPlusSparse(0.1, lp.SVD())
    (found,) = method.decompose([(weight, None)])
    full = found.factors(20)  # no error is left, so the entries stay those that all ranks start from
    torch.testing.assert_close(full.product().float(), weight, atol=1e-4, rtol=1e-4)
    rest = weight - full.sparse.matrix(20, 30)
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(rest.double()), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.singular_values, method.spectrum(weight))
    assert found.singular_values.square().sum() < 0.9 * lp.SVD().spectrum(weight).square().sum()


def test_entries_are_counted_by_the_floor():
    assert lp.LowRankPlusSparse(0.05).nonzeros(10, 7) == 3
    assert lp.LowRankPlusSparse(0.3).nonzeros(10, 1) == 3  # 0.3 * 10 is a little less in binary numbers
    assert lp.LowRankPlusSparse(0.05).nonzeros(3, 4) == 0
    assert lp.SVD().nonzeros(10, 7) == 0
    weight = torch.randn(3, 4)
    factors = lp.LowRankPlusSparse(0.05, lp.SVD())(weight, 2)
    assert factors.sparse is None
    torch.testing.assert_close(factors.product(), lp.SVD()(weight, 2).product())


def test_it_speaks_for_its_base():
    for base in (lp.SVD(), lp.KroneckerSVD(), lp.KroneckerSVD("auto"), lp.WhitenedSVD(centered=True), lp.FisherSVD()):
        method = lp.LowRankPlusSparse(base=base)
        for what in ("wanted", "comparable", "adds_bias", "needs_statistics"):
            assert getattr(method, what) == getattr(base, what)
    with pytest.raises(StatisticsError, match="KroneckerSVD needs calibration statistics"):
        lp.LowRankPlusSparse()(torch.randn(6, 6), 2)


def test_it_is_deterministic_also_with_ties():
    weight = torch.ones(16, 16)
    one, other = (lp.LowRankPlusSparse(0.1, lp.SVD())(weight, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parts(), other.parts(), strict=True) if a is not None)


def test_zero_and_not_finite_weights():
    factors = lp.LowRankPlusSparse(0.1, lp.SVD())(torch.zeros(8, 8), 2)
    assert torch.equal(factors.product(), torch.zeros(8, 8).to(factors.A))
    assert factors.sparse.fits(8, 8)
    for bad in (float("nan"), float("inf")):
        weight = torch.randn(8, 8)
        weight[3, 4] = bad
        with pytest.raises(NumericalError, match="The weight has 1 NaN or Inf"):
            lp.LowRankPlusSparse(0.1, lp.SVD())(weight, 2)


@pytest.mark.parametrize("density", [0, 0.0, 1, 1.0, -0.1, 2.0, float("nan"), float("inf"), True, "0.1", None])
def test_wrong_densities(density):
    with pytest.raises(ArgumentError, match=r"density must lie in \(0, 1\), got .*use the base alone"):
        lp.LowRankPlusSparse(density)


@pytest.mark.parametrize("base", [None, lp.SVD, "SVD", lp.LowRankPlusSparse(), {"class_path": "lightning_prehab.SVD"}])
def test_wrong_bases(base):
    with pytest.raises(ArgumentError, match=r"base must be a factorization into two factors, such as SVD\(\), got"):
        lp.LowRankPlusSparse(base=base)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, float("nan"), "5"])
def test_wrong_steps(steps):
    with pytest.raises(ArgumentError, match="steps must be at least 1, got"):
        lp.LowRankPlusSparse(steps=steps)


def test_from_documents_and_yaml():
    method = lp.LowRankPlusSparse(0.1, lp.WhitenedSVD(centered=True), 3)
    text = yaml.safe_dump(describe(method))
    assert "class_path: lightning_prehab.WhitenedSVD" in text
    assert build(yaml.safe_load(text), Factorization, "A method") == method
    parser = ArgumentParser()
    parser.add_argument("--factorization", type=Factorization)
    for arguments, expected in (
        ("{class_path: lightning_prehab.LowRankPlusSparse, init_args: {density: 0.1}}", lp.LowRankPlusSparse(0.1)),
        (
            "{class_path: lightning_prehab.LowRankPlusSparse, init_args: {density: 0.1, steps: 3, base: "
            "{class_path: lightning_prehab.WhitenedSVD, init_args: {centered: true}}}}",
            method,
        ),
    ):
        parsed = parser.parse_args([f"--factorization={arguments}"])
        for config in (parsed, parser.parse_string(parser.dump(parsed))):
            made = parser.instantiate(config) if hasattr(parser, "instantiate") else parser.instantiate_classes(config)
            assert made.factorization == expected
