import itertools
import weakref

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prehab.errors import ArgumentError, NumericalError
from lightning_prehab.linalg import decomposition, matrices
from lightning_prehab.linalg.decomposition import decompose, decompose_many, weighted_low_rank

SHAPES = [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)]


def spd(size: int, seed: int = 0) -> torch.Tensor:
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT / size


def loss(weight, factors, g=None, c=None):
    a, b = (part.double() for part in factors)
    error = weight.double() - b @ a
    left = error if g is None else g.double() @ error
    right = error if c is None else error @ c.double()
    return float((left * right).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_weighted_low_rank_is_the_truncated_svd_in_the_metric(shape, left, right):
    m, n = shape
    weight = torch.randn(m, n, dtype=torch.float64)
    g = spd(m, 1) if left else None
    c = spd(n, 2) if right else None
    lt = np.linalg.cholesky(g.numpy()).T if left else np.eye(m)
    r = np.linalg.cholesky(c.numpy()) if right else np.eye(n)
    u, s, vt = np.linalg.svd(lt @ weight.numpy() @ r, full_matrices=False)
    values = decompose(weight, g, c).singular_values
    torch.testing.assert_close(values, torch.from_numpy(s), atol=1e-7, rtol=1e-7)
    for rank in range(1, min(m, n) + 1):
        a, b = weighted_low_rank(weight, rank, g, c)
        expected = np.linalg.inv(lt) @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(r)
        torch.testing.assert_close(b @ a, torch.from_numpy(expected), atol=1e-9, rtol=1e-8)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces_the_matrix_under_rank_deficient_metrics(shape):
    m, n = shape
    weight = torch.randn(m, n)
    thin_left, thin_right = torch.randn(m, max(m // 2, 1)), torch.randn(n, max(n // 2, 1))
    a, b = weighted_low_rank(weight, min(m, n), thin_left @ thin_left.mT, thin_right @ thin_right.mT)
    torch.testing.assert_close((b @ a).float(), weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.ones(4, 6), torch.zeros(6, 4)])
def test_degenerate_weights_give_finite_factors(weight):
    for rank in (1, 4):
        a, b = weighted_low_rank(weight, rank)
        assert torch.isfinite(a).all()
        assert torch.isfinite(b).all()
        torch.testing.assert_close((b @ a).float(), weight, atol=1e-6, rtol=0)


def test_ill_conditioned_metric():
    scales = torch.logspace(0, -8, 12, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    gram = (basis * scales) @ basis.mT
    weight = torch.randn(8, 12, dtype=torch.float64)
    a, b = weighted_low_rank(weight, 3, None, gram)
    error = weight - b @ a
    expected = np.linalg.svd((weight @ (basis * scales.sqrt())).numpy(), compute_uv=False)
    torch.testing.assert_close(
        (error @ gram * error).sum().sqrt().item(), float(np.sqrt((expected[3:] ** 2).sum())), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(bad):
    weight = torch.randn(4, 5)
    weight[1, 2] = bad
    with pytest.raises(NumericalError, match="1 NaN or Inf entries out of 20"):
        weighted_low_rank(weight, 2)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        weighted_low_rank(torch.randn(4, 5), 2, None, torch.full((5, 5), bad))


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_rank_out_of_range(rank):
    with pytest.raises(ArgumentError, match=rf"Rank {rank} is outside \[1, 4\]"):
        weighted_low_rank(torch.randn(4, 5), rank)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 1000))
def test_error_falls_as_the_rank_grows(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    g, c = spd(m, seed), spd(n, seed + 1)
    errors = []
    for rank in range(1, min(m, n) + 1):
        a, b = weighted_low_rank(weight, rank, g, c)
        error = weight - b @ a
        errors.append(float(torch.trace(g @ error @ c @ error.mT)))
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))


def graded(m, n, decay, seed=0, dtype=torch.float32):
    """A weight and a metric of inputs whose spectra fall like powers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) / n**0.5
    scales = torch.arange(1, n + 1).double() ** -decay
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q
    return weight.to(dtype), (basis * scales) @ basis.mT


@pytest.mark.parametrize("shape", [(300, 300), (300, 700), (700, 300)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_large_layers_lose_nothing_by_float32(shape, decay):
    """Where float32 is used, and where its estimate sends the layer to float64."""
    weight, c = graded(*shape, decay)
    fast = decompose(weight, None, c)
    gram = weight.double() @ c.double() @ weight.double().mT if shape[0] <= shape[1] else None
    if gram is None:
        root = matrices.gram_root(c)[0]
        gram = root @ weight.double().mT @ weight.double() @ root
    values = np.linalg.eigvalsh(gram.numpy())[::-1]
    for rank in (1, 20, 100, 149):
        exact = float(values[rank:].sum())
        assert loss(weight, fast.low_rank(rank), None, c) == pytest.approx(exact, rel=1e-5)
        assert float(fast.singular_values[rank:].square().sum()) == pytest.approx(exact, rel=1e-5)


def test_float32_is_used_where_it_is_safe_and_only_there():
    dtypes = {
        decay: decompose(*graded(300, 300, decay)[:1], None, graded(300, 300, decay)[1]).low_rank(5)[0].dtype
        for decay in (0.0, 4.0)
    }
    assert dtypes == {0.0: torch.float32, 4.0: torch.float64}
    weight, c = graded(300, 300, 0.0)
    assert decompose(weight.double(), None, c).low_rank(5)[0].dtype == torch.float64
    assert decompose(weight[:200], None, c).low_rank(5)[0].dtype == torch.float64


def test_large_layers_in_a_metric_of_both_sides():
    weight, c = graded(300, 400, 0.5)
    g = graded(10, 300, 0.5, seed=1)[1]
    lt, r = np.linalg.cholesky(g.double().numpy()).T, np.linalg.cholesky(c.double().numpy())
    values = np.linalg.svd(lt @ weight.double().numpy() @ r, compute_uv=False)
    fast = decompose(weight, g, c)
    assert fast.low_rank(5)[0].dtype == torch.float32
    for rank in (1, 50, 150):
        assert loss(weight, fast.low_rank(rank), g, c) == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-5)


def test_many_equals_one_by_one():
    generator = torch.Generator().manual_seed(0)
    items = []
    for m, n in [(6, 9), (9, 6), (6, 6), (1, 4), (6, 9), (300, 280), (280, 300)]:
        weight = torch.randn(m, n, generator=generator)
        items.append((weight, spd(m, m), spd(n, n) if n != 4 else None))
    for many, item in zip(decompose_many(items), items, strict=True):
        one = decompose(*item)
        torch.testing.assert_close(many.singular_values, one.singular_values, atol=1e-6, rtol=1e-6)
        for ours, theirs in zip(many.low_rank(1), one.low_rank(1), strict=True):
            torch.testing.assert_close((ours.mT @ ours), (theirs.mT @ theirs), atol=1e-5, rtol=1e-4)


def test_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(decomposition, "BATCH_ENTRIES", 50)
    sizes, real = [], decomposition.symmetric_eigh

    def watch(gram, dtype):
        sizes.append(tuple(gram.shape))
        return real(gram, dtype)

    monkeypatch.setattr(decomposition, "symmetric_eigh", watch)
    decompose_many([(torch.randn(4, 6), None, None) for _ in range(7)] + [(torch.randn(8, 8), None, None)])
    assert sizes == [(3, 4, 4), (3, 4, 4), (1, 4, 4), (1, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_vector_stands_for_a_diagonal(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    rows, columns = torch.rand(shape[0], dtype=torch.float64) + 0.1, torch.rand(shape[1], dtype=torch.float64) + 0.1
    for left, right in itertools.product((None, rows), (None, columns)):
        full = decompose(weight, *(None if d is None else torch.diag(d) for d in (left, right)))
        diagonal = decompose(weight, left, right)
        torch.testing.assert_close(diagonal.singular_values, full.singular_values, atol=1e-9, rtol=1e-9)
        (a, b), (c, d) = diagonal.low_rank(1), full.low_rank(1)
        torch.testing.assert_close(b @ a, d @ c, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("metric", ["rank one", "zero", "duplicate columns", "fewer tokens", "zero row"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hostile_metrics_stay_within_the_optimum(metric, shape, dtype):
    torch.manual_seed(2)
    m, n = shape
    x = torch.randn(50, n)
    if metric == "rank one":
        x = torch.randn(50, 1) * torch.randn(1, n)
    elif metric == "zero":
        x = torch.zeros(50, n)
    elif metric == "duplicate columns":
        x[:, 1] = x[:, 0]
    elif metric == "fewer tokens":
        x = x[:3]
    elif metric == "zero row":
        x[:, 2] = 0
    weight = torch.randn(m, n).to(dtype)
    c, g = x.mT @ x, torch.ones(m, m)
    values = np.linalg.svd(weight.double().numpy() @ x.double().mT.numpy(), compute_uv=False)
    for rank in range(1, min(m, n) + 1):
        a, b = weighted_low_rank(weight, rank, None, c)
        assert torch.isfinite(a).all()
        assert torch.isfinite(b).all()
        best = float((values[rank:] ** 2).sum())
        assert loss(weight, (a, b), None, c) == pytest.approx(
            best, rel=1e-5, abs=1e-5 * float((values**2).sum() + 1e-9)
        )
        assert torch.isfinite(weighted_low_rank(weight, rank, g, c)[0]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_condition_1e8_against_mpmath(transposed):
    """50 digits: the eigenvalues of W C W^T, with C of condition 1e8."""
    torch.manual_seed(4)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    c = (basis * torch.logspace(0, -8, 6, dtype=torch.float64)) @ basis.mT
    c = (c + c.mT) / 2
    weight = torch.randn(5, 6, dtype=torch.float64)
    svd = decompose(weight.mT, c) if transposed else decompose(weight, None, c)
    with mpmath.workdps(50):
        w, gram = mpmath.matrix(weight.tolist()), mpmath.matrix(c.tolist())
        exact = sorted((float(value) for value in mpmath.eigsy(w * gram * w.T, eigvals_only=True)), reverse=True)
        for rank in (1, 2, 3):
            a, b = (mpmath.matrix(part.tolist()) for part in svd.low_rank(rank))
            error = (w.T if transposed else w) - b * a
            product = error.T * gram * error if transposed else error * gram * error.T
            measured = float(sum(product[i, i] for i in range(product.rows)))
            assert measured == pytest.approx(sum(exact[rank:]), rel=1e-6)


def test_cholesky_gives_way_to_a_symmetric_root(monkeypatch):
    """A metric that is indefinite by rounding has no Cholesky factor."""
    gram = torch.diag(torch.tensor([1.0, 0.5, -1e-9]))
    a, b = weighted_low_rank(torch.eye(3), 3, gram)
    torch.testing.assert_close(b @ a, torch.eye(3).double(), atol=1e-6, rtol=0)


def test_products_of_lower_precision_are_not_trusted(monkeypatch):
    problem = decomposition._Problem(torch.randn(300, 300), None, None)
    assert problem.may_use_float32()
    for precision in ("high", "medium"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert not problem.may_use_float32()


@pytest.mark.parametrize("decades", [4, 6, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_balances_its_metric(decades, transposed):
    """M is flat, but made of products that are not: its eigenvalues alone do not show the rounding."""
    torch.manual_seed(1)
    scales = torch.logspace(0, -decades, 300, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64)).Q
    metric = ((basis * scales) @ basis.mT).float()
    root = (basis / scales.sqrt()) @ basis.mT
    spread = torch.linalg.qr(torch.randn(400, 300, dtype=torch.float64)).Q * torch.linspace(2, 0.5, 300).double()
    weight = (root @ spread.mT).float()
    svd = decompose(weight.mT, None, metric) if transposed else decompose(weight, metric)
    lt = matrices.gram_root(metric)[0]
    values = torch.linalg.svdvals(lt @ weight.double())
    for rank in (50, 150):
        best = float(values[rank:].square().sum())
        a, b = svd.low_rank(rank)
        error = (weight.mT if transposed else weight).double() - b.double() @ a.double()
        measured = float((lt @ (error.mT if transposed else error)).square().sum())
        assert measured == pytest.approx(best, rel=1e-5)


def test_compact_keeps_the_leading_factors_alone():
    weight, c = graded(40, 60, 0.5)
    svd = decompose(weight, None, c)
    a, b = svd.low_rank(20)
    svd.compact_(20, torch.float64)
    for rank in (1, 7, 20):
        torch.testing.assert_close(svd.low_rank(rank), (a[:rank], b[:, :rank]))
    assert svd._basis.numel() == 0
    alive = weakref.ref(weight.untyped_storage())
    del weight
    assert alive() is None
    with pytest.raises(ArgumentError, match="Only ranks up to 20 were kept, not 21"):
        svd.low_rank(21)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
@pytest.mark.parametrize("at_once", [1, 7 * 40, 40 * 40])
def test_a_large_metric_is_never_converted_whole(shape, at_once, monkeypatch):
    """It is what fills the memory when a layer is decomposed; its other copies are counted beforehand."""
    monkeypatch.setattr(decomposition, "AT_ONCE", at_once)
    m, n = shape
    weight, g, c = torch.randn(m, n), spd(m, 1).float(), spd(n, 2).float()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
                sizes.append(found.numel())
            return found

    with Sizes():
        values = decompose(weight, g, c).singular_values
    lt, r = np.linalg.cholesky(g.double().numpy()).T, np.linalg.cholesky(c.double().numpy())
    expected = np.linalg.svd(lt @ weight.double().numpy() @ r, compute_uv=False)
    torch.testing.assert_close(values, torch.from_numpy(expected), atol=1e-7, rtol=1e-7)
    assert max(sizes) <= max(at_once, m * n)
