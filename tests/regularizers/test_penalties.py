import dataclasses

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prehab import regularizers
from lightning_prehab.errors import ArgumentError, NumericalError
from lightning_prehab.regularizers import EffectiveRank, Metric, NuclearNorm, Penalty, StableRank, TailEnergy

SHAPES = [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)]


def matrix(shape, seed=0):
    """Random singular vectors and well-separated singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return (u * torch.logspace(0.5, -0.5, min(shape), dtype=torch.float64)) @ vt


def exact_stable_rank(m, rank):
    s = torch.linalg.svdvals(m)
    return s.square().sum() / s[0].square()


def exact_tail_energy(m, rank):
    s = torch.linalg.svdvals(m)
    return s[rank:].square().sum() / s.square().sum()


def exact_nuclear_norm(m, rank):
    return torch.linalg.svdvals(m).sum()


def exact_normalized_nuclear_norm(m, rank):
    return torch.linalg.svdvals(m).sum() / (min(m.shape) ** 0.5 * m.norm())


def exact_effective_rank(m, rank):
    p = torch.linalg.svdvals(m)
    p = p / p.sum()
    return torch.exp(-(p * p.log()).sum())


#: The setting that is exact at once, the setting as it is used, the value through a full SVD.
CASES = [
    pytest.param(StableRank(first_steps=200), StableRank(), exact_stable_rank, id="StableRank"),
    pytest.param(TailEnergy(), TailEnergy(), exact_tail_energy, id="TailEnergy"),
    pytest.param(NuclearNorm(steps=12), NuclearNorm(), exact_normalized_nuclear_norm, id="NuclearNorm"),
    pytest.param(
        NuclearNorm(normalized=False, steps=12), NuclearNorm(normalized=False), exact_nuclear_norm, id="nuclear norm"
    ),
    pytest.param(EffectiveRank(), EffectiveRank(), exact_effective_rank, id="EffectiveRank"),
]


@pytest.mark.parametrize(("penalty", "used", "exact"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstAnExactSVD:
    def test_value_and_gradient(self, penalty, used, exact, shape):
        ours, theirs = matrix(shape).requires_grad_(), matrix(shape).requires_grad_()
        value, expected = penalty(ours, rank=2), exact(theirs, 2)
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-12)
        (3 * value).backward()
        (3 * expected).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("sides", ["left", "right", "both"])
    def test_value_and_gradient_in_a_metric(self, penalty, used, exact, shape, sides):
        """The gradient is that in the weight. Roots are not symmetric: a Cholesky factor is one too."""
        roots = [torch.linalg.cholesky(matrix((size, 2 * size), 5) @ matrix((size, 2 * size), 5).mT) for size in shape]
        metric = Metric(None if sides == "right" else roots[0].mT, None if sides == "left" else roots[1])
        ours, theirs = matrix(shape).requires_grad_(), matrix(shape).requires_grad_()
        seen = theirs if metric.left is None else metric.left @ theirs
        expected = exact(seen if metric.right is None else seen @ metric.right, 2)
        value = penalty.in_metric(ours, metric, rank=2, memory={})
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12)
        (3 * value).backward()
        (3 * expected).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5 * theirs.grad.norm().item() + 1e-12)

    def test_float32_with_the_settings_as_they_are_used(self, penalty, used, exact, shape):
        ours, theirs = matrix(shape).float().requires_grad_(), matrix(shape).requires_grad_()
        value, expected = used(ours, rank=2, memory={}), exact(theirs, 2)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=0.01, atol=1e-6)
        value.backward()
        expected.backward()
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=0.02, atol=0.01 * theirs.grad.norm().item() + 1e-6
        )


@pytest.mark.parametrize(("penalty", "used", "exact"), CASES)
def test_warm_started_values_follow_a_training_run(penalty, used, exact):
    """20 steps of Adam on a small network, the penalty in the loss: all its layers within 1 % at every step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    x = torch.randn(256, 24)
    y = torch.tanh(x @ torch.randn(24, 8))
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    memories = [{} for _ in layers]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(20):
        values = [used(layer.weight, 4, memory) for layer, memory in zip(layers, memories, strict=True)]
        for value, layer in zip(values, layers, strict=True):
            torch.testing.assert_close(
                value.detach().double(), exact(layer.weight.detach().double(), 4), rtol=0.01, atol=0
            )
        loss = nn.functional.mse_loss(net(x), y) + used.default_strength * sum(values) / len(values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_one_cold_iteration_is_not_enough():
    """Why the first call is longer: from a cold start one iteration is far off."""
    m = torch.randn(64, 96)
    exact = exact_stable_rank(m, 0).item()
    assert abs(StableRank(first_steps=1)(m).item() / exact - 1) > 0.2
    assert StableRank()(m).item() == pytest.approx(exact, rel=1e-5)


def exact_gradient(penalty, weight, metric, rank):
    """Through numpy's full SVD, in float64: of all penalties that start warm it is a function of s, u and v."""
    left, right = (None if root is None else root.double().numpy() for root in (metric.left, metric.right))
    m = weight.detach().double().numpy()
    m = m if left is None else left @ m
    m = m if right is None else m @ right
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    energy = (s**2).sum()
    if isinstance(penalty, StableRank):
        gradient = 2 / s[0] ** 2 * (m - energy / s[0] * np.outer(u[:, 0], vt[0]))
    elif isinstance(penalty, TailEnergy):
        tail = (u[:, rank:] * s[rank:]) @ vt[rank:]
        gradient = 2 / energy * (tail - (s[rank:] ** 2).sum() / energy * m)
    else:
        p = s / s.sum()
        entropy = -(p * np.log(p)).sum()
        gradient = (u * (np.exp(entropy) * (-np.log(p) - entropy) / s.sum())) @ vt
    gradient = gradient if left is None else left.T @ gradient
    return torch.from_numpy(gradient if right is None else gradient @ right.T)


@pytest.mark.parametrize("sides", ["none", "right", "both"])
@pytest.mark.parametrize(("size", "seed"), [(size, seed) for size in (8, 33, 96, 256) for seed in range(3)])
@pytest.mark.parametrize("penalty", [StableRank(), TailEnergy(), EffectiveRank()], ids=lambda p: type(p).__name__)
def test_the_first_gradient_is_exact_on_random_square_matrices(penalty, size, seed, sides):
    """Their leading singular values lie close together: a short power iteration is 3 % off there."""
    generator = torch.Generator().manual_seed(seed)
    roots = [torch.linalg.cholesky(torch.cov(torch.randn(size, 4 * size, generator=generator))) for _ in range(2)]
    metric = Metric(roots[0].mT if sides == "both" else None, None if sides == "none" else roots[1])
    weight = torch.randn(size, size, generator=generator).requires_grad_()
    penalty.in_metric(weight, metric, size // 3, {}).backward()
    expected = exact_gradient(penalty, weight, metric, size // 3)
    tolerance = 1e-3 if isinstance(penalty, EffectiveRank) else 1e-4  # the logarithm of the smallest value, in float32
    assert float((weight.grad.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(
    ("penalty", "exact"),
    [
        (TailEnergy(refresh=3), exact_tail_energy),
        (EffectiveRank(refresh=3), exact_effective_rank),
        (NuclearNorm(refresh=3), exact_normalized_nuclear_norm),
    ],
    ids=lambda case: type(case).__name__,
)
def test_what_is_cached_is_refreshed_every_so_often(penalty, exact):
    memory, first = {}, matrix((5, 6), 1)
    other = torch.lerp(first, matrix((5, 6), 2), 0.3)
    values = [penalty(m, 2, memory).item() for m in (first, other, other, other, other, other, other)]
    error = [abs(value - exact(other, 2).item()) for value in values]
    assert values[1] == values[2]
    assert values[4] == values[5]
    assert error[3] < 0.3 * error[1]
    assert error[6] <= error[3] + 1e-12


def test_tail_energy_is_an_upper_bound_and_the_nuclear_norm_a_lower_one_between_refreshes():
    tail, nuclear = {}, {}
    for seed in range(9):
        m = matrix((6, 8), seed)
        assert TailEnergy()(m, 3, tail) >= exact_tail_energy(m, 3) - 1e-12
        assert NuclearNorm(False, steps=9)(m, memory=nuclear) <= exact_nuclear_norm(m, 3) + 1e-9


def test_tail_energy_at_and_above_the_full_rank_is_zero():
    m = matrix((5, 6)).requires_grad_()
    for rank in (5, 9):
        assert TailEnergy()(m, rank).item() == pytest.approx(0, abs=1e-12)


def test_tail_energy_does_not_drown_in_rounding():
    """Far below the rounding of 1 - kept / all in float32."""
    u, _, vt = torch.linalg.svd(matrix((20, 30)), full_matrices=False)
    s = torch.tensor([1.0] * 4 + [1e-5] * 16, dtype=torch.float64)
    m = ((u * s) @ vt).float()
    assert TailEnergy()(m, 4).item() == pytest.approx(exact_tail_energy(m.double(), 4).item(), rel=0.05)


def test_tail_energy_starts_anew_when_the_rank_changes():
    memory, m = {}, matrix((6, 8))
    TailEnergy()(m, 2, memory)
    assert TailEnergy()(m, 4, memory).item() == pytest.approx(exact_tail_energy(m, 4).item())
    assert memory["basis"].shape == (6, 4)


def test_tail_energy_needs_a_rank():
    assert TailEnergy(rank=2)(matrix((5, 6))).item() == pytest.approx(exact_tail_energy(matrix((5, 6)), 2).item())
    with pytest.raises(ArgumentError, match="no target rank"):
        TailEnergy()(matrix((5, 6)))


class NoReadBack(TorchDispatchMode):
    """Fails where a value of a float or bool tensor is read back; integer counters live on the CPU anyway."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert not (reads and args[0].dtype not in (torch.int64,)), f"{func} of {args[0]}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "penalty", [StableRank(), NuclearNorm(refresh=2), EffectiveRank(), TailEnergy(refresh=2)], ids=repr
)
def test_no_value_is_read_back_after_the_first_call(penalty):
    """On an accelerator every such read would wait for the device; the eigendecompositions do that by themselves."""
    m, memory = matrix((6, 8)).requires_grad_(), {}
    penalty(m, 3, memory)
    with NoReadBack():
        for _ in range(3):
            penalty(m, 3, memory).backward()


def all_penalties():
    return [kind for kind in Penalty.__subclasses__() if kind.__module__.startswith("lightning_prehab")]


def test_the_shelf_is_complete():
    assert {kind.__name__ for kind in all_penalties()} == {"StableRank", "TailEnergy", "NuclearNorm", "EffectiveRank"}


@pytest.mark.parametrize("kind", all_penalties())
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
    def test_zero_and_thin_matrices_are_finite(self, kind, shape, dtype):
        for fill in (0.0, 1.0, 1e-30):
            m = torch.full(shape, fill, dtype=dtype, requires_grad=True)
            value = kind()(m, 1, {})
            value.backward()
            assert value.dim() == 0
            assert value.dtype == dtype
            assert torch.isfinite(value)
            assert torch.isfinite(m.grad).all()
            assert fill != 0 or (value == 0 and not m.grad.any())

    def test_scale_free(self, kind):
        m = matrix((6, 8))
        assert kind()(m, 2).item() == pytest.approx(kind()(m * 1e3, 2).item(), rel=1e-6)

    def test_the_same_twice_and_the_global_random_state_left_alone(self, kind):
        state = torch.get_rng_state()
        runs = []
        for _ in range(2):
            memory, m = {}, matrix((6, 8)).requires_grad_()
            runs.append([kind()(m * (1 + step), 2, memory) for step in range(3)])
            sum(runs[-1]).backward()
            runs[-1].append(m.grad)
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_step_along_the_gradient_lowers_it(self, kind):
        m = matrix((6, 8)).requires_grad_()
        value = kind()(m, 2)
        value.backward()
        assert kind()(m.detach() - 1e-3 * m.grad, 2) < value

    def test_the_memory_can_be_stored_and_taken_up(self, kind, tmp_path):
        memory = {}
        for _ in range(3):
            kind()(matrix((6, 8)), 2, memory)
        torch.save({key: value.clone() for key, value in memory.items()}, tmp_path / "memory.pt")
        restored = torch.load(tmp_path / "memory.pt", weights_only=True)
        for step in range(60):
            m = torch.lerp(matrix((6, 8)), matrix((6, 8), 1), step / 300)
            assert torch.equal(kind()(m, 2, memory), kind()(m, 2, restored))

    def test_the_graph_does_not_hold_iterations(self, kind):
        m = matrix((6, 8)).requires_grad_()
        value = kind()(m, 2)  # torch 2.6 needs it alive: its nodes do not outlive their tensor
        node, depth = value.grad_fn, 0
        while node is not None:
            node, depth = (node.next_functions[0][0] if node.next_functions else None), depth + 1
        assert depth <= 3


@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        (lambda: StableRank(first_steps=0), "first_steps .*got 0"),
        (lambda: StableRank(steps=-3), "^steps .*got -3"),
        (lambda: TailEnergy(rank=0), "rank .*got 0"),
        (lambda: TailEnergy(refresh=0), "refresh .*got 0"),
        (lambda: NuclearNorm(refresh=-1), "refresh .*got -1"),
        (lambda: NuclearNorm(steps=0), "steps .*got 0"),
        (lambda: EffectiveRank(refresh=0), "refresh .*got 0"),
    ],
)
def test_wrong_settings(wrong, value):
    with pytest.raises(ArgumentError, match=value):
        wrong()


@pytest.mark.parametrize("penalty", [TailEnergy(), EffectiveRank()], ids=repr)
def test_nan_is_an_error_where_directions_are_computed(penalty):
    with pytest.raises(NumericalError, match="NaN or Inf"):
        penalty(torch.full((3, 3), float("nan")), 1)


class Doubled(StableRank):
    """Overrides the call alone, and uses that of its parent."""

    def __call__(self, matrix, rank=None, memory=None):
        return 2 * super().__call__(matrix, rank, memory)


class Scaled:
    """A mixin in front of a penalty."""

    def __call__(self, matrix, rank=None, memory=None):
        return 3 * super().__call__(matrix, rank, memory)


class Mixed(Scaled, StableRank):
    pass


class Child(Doubled):
    """Defines neither."""


class Both(StableRank):
    """Knows of metrics itself, as its author wishes."""

    def __call__(self, matrix, rank=None, memory=None):
        return 5 * super().__call__(matrix, rank, memory)

    def in_metric(self, weight, metric, rank=None, memory=None):
        return 7 * super().in_metric(weight, metric, rank, memory)


class Inside(Doubled):
    """Overrides ``in_metric`` of a class that overrides the call."""

    def in_metric(self, weight, metric, rank=None, memory=None):
        return 11 * super().in_metric(weight, metric, rank, memory)


@pytest.mark.parametrize(
    ("kind", "call", "seen"),
    [(StableRank, 1, 1), (Doubled, 2, 2), (Mixed, 3, 3), (Child, 2, 2), (Both, 5, 7), (Inside, 2, 22)],
)
def test_a_call_that_is_overridden_is_asked_in_metrics_too(kind, call, seen):
    """Training asks in_metric; a subclass that overrides the call alone would otherwise be passed over."""
    penalty, weight, metric = kind(first_steps=200), matrix((6, 9)), Metric(None, matrix((9, 9), 3))
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    value, expected = penalty.in_metric(ours, metric), seen * exact_stable_rank(metric.view(theirs), None)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(penalty(weight), call * exact_stable_rank(weight, None), rtol=1e-7, atol=0)
