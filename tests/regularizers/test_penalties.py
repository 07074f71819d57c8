import dataclasses

import pytest
import torch
import yaml

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, NumericalError
from lightning_prehab.regularizers import Penalty

SHAPES = [(6, 9), (9, 6), (7, 7)]


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


CASES = [(lp.StableRank(first_steps=200), exact_stable_rank), (lp.TailEnergy(), exact_tail_energy)]


@pytest.mark.parametrize(("penalty", "exact"), CASES, ids=lambda case: type(case).__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_equal_autograd_through_an_exact_svd(penalty, exact, shape):
    ours = matrix(shape).requires_grad_()
    theirs = matrix(shape).requires_grad_()
    value, expected = penalty(ours, rank=2), exact(theirs, 2)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=0)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("penalty", [lp.StableRank(), lp.TailEnergy(refresh=1)], ids=lambda p: type(p).__name__)
def test_warm_start_follows_a_moving_matrix(penalty):
    exact = exact_stable_rank if isinstance(penalty, lp.StableRank) else exact_tail_energy
    memory, start, end = {}, matrix((8, 10), 1), matrix((8, 10), 2)
    for step in range(40):
        moving = torch.lerp(start, end, step / 400)
        value = penalty(moving, 3, memory)
    assert value.item() == pytest.approx(exact(moving, 3).item(), rel=0.01)


def test_one_cold_iteration_is_not_enough():
    """Why the first call is longer: from a cold start one iteration is far off."""
    m = torch.randn(64, 96)
    exact = exact_stable_rank(m, 0).item()
    assert abs(lp.StableRank(first_steps=1)(m).item() / exact - 1) > 0.2
    assert lp.StableRank()(m).item() == pytest.approx(exact, rel=0.03)


def test_tail_energy_refreshes_its_projector_every_so_often():
    penalty, memory = lp.TailEnergy(refresh=3), {}
    first, other = matrix((5, 6), 1), matrix((5, 6), 2)
    values = [penalty(m, 2, memory).item() for m in (first, other, other, other)]
    fresh = exact_tail_energy(other, 2).item()
    assert values[1] == values[2] > fresh + 0.01
    assert values[3] == pytest.approx(fresh)


def test_tail_energy_at_and_above_the_full_rank_is_zero():
    m = matrix((5, 6)).requires_grad_()
    for rank in (5, 9):
        assert lp.TailEnergy()(m, rank).item() == pytest.approx(0, abs=1e-12)


def test_tail_energy_needs_a_rank():
    assert lp.TailEnergy(rank=2)(matrix((5, 6))).item() == pytest.approx(exact_tail_energy(matrix((5, 6)), 2).item())
    with pytest.raises(ArgumentError, match="no target rank"):
        lp.TailEnergy()(matrix((5, 6)))


def all_penalties():
    return [kind for kind in Penalty.__subclasses__() if kind.__module__.startswith("lightning_prehab")]


def test_the_shelf_is_complete():
    assert {kind.__name__ for kind in all_penalties()} == {"StableRank", "TailEnergy"}


@pytest.mark.parametrize("kind", all_penalties())
class TestConformance:
    def test_is_a_frozen_dataclass_with_a_docstring(self, kind):
        assert dataclasses.is_dataclass(kind)
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().anything = 1
        assert kind() == kind()
        assert eval(repr(kind()), vars(lp)) == kind()
        assert "Args:" in kind.__doc__

    def test_survives_yaml(self, kind):
        settings = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(kind())))
        assert kind(**settings) == kind()

    @pytest.mark.parametrize("shape", [(1, 5), (5, 1), (4, 4)])
    def test_zero_and_thin_matrices_are_finite(self, kind, shape):
        for m in (torch.zeros(shape), torch.ones(shape)):
            m.requires_grad_()
            value = kind()(m, 1, {})
            value.backward()
            assert value.dim() == 0
            assert torch.isfinite(value)
            assert torch.isfinite(m.grad).all()

    def test_scale_free(self, kind):
        m = matrix((6, 8))
        assert kind()(m, 2).item() == pytest.approx(kind()(m * 1e3, 2).item(), rel=1e-6)

    def test_leaves_the_global_random_state_alone(self, kind):
        state = torch.get_rng_state()
        kind()(torch.eye(4), 2, {})
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_step_along_the_gradient_lowers_it(self, kind):
        m = matrix((6, 8)).requires_grad_()
        value = kind()(m, 2)
        value.backward()
        assert kind()(m.detach() - 1e-3 * m.grad, 2) < value


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: lp.StableRank(first_steps=0),
        lambda: lp.StableRank(steps=0),
        lambda: lp.TailEnergy(rank=0),
        lambda: lp.TailEnergy(refresh=0),
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ArgumentError, match="at least 1, got"):
        wrong()


def test_tail_energy_of_nan_is_an_error():
    with pytest.raises(NumericalError, match="NaN or Inf"):
        lp.TailEnergy()(torch.full((3, 3), float("nan")), 1)
