import pytest
import torch

from lightning_prehab.surgery.moments import entry_state, factor_states

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_moments_equal_those_of_an_optimizer_on_the_factors(name):
    """With the factors held fixed, their gradients are linear in the gradient of W: the averages move exactly."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    weight = torch.nn.Parameter(b @ a)
    pair = [torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())]
    dense, low = OPTIMIZERS[name]([weight]), OPTIMIZERS[name](pair)
    for _ in range(4):
        gradient = torch.randn(4, 5, dtype=torch.float64)
        weight.grad, pair[0].grad, pair[1].grad = gradient, b.mT @ gradient, gradient @ a.mT
        dense.step()
        low.step()
    for moved, parameter in zip(factor_states(dense.state[weight], a, b), pair, strict=True):
        assert set(moved) == set(low.state[parameter])
        for key in ("exp_avg", "momentum_buffer"):
            if key in moved:
                torch.testing.assert_close(moved[key], low.state[parameter][key], rtol=1e-6, atol=1e-9)
        if "step" in moved:
            assert float(moved["step"]) == 4.0


def test_the_next_adam_step_is_bounded():
    """Without correlations and floor, a gradient that is the same in every row would make the next step too large."""
    weight = torch.nn.Parameter(torch.randn(64, 5))
    adam = torch.optim.Adam([weight], lr=0.1)
    for _ in range(50):
        weight.grad = torch.ones(64, 1) @ torch.randn(1, 5).abs()
        adam.step()
    a, b = torch.randn(2, 5), torch.ones(64, 2)
    for state in factor_states(adam.state[weight], a, b):
        first, second = state["exp_avg"] / (1 - 0.9**50), state["exp_avg_sq"] / (1 - 0.999**50)  # as Adam takes them
        assert (first.abs() <= 1.5 * second.sqrt()).all()
    weight.grad = None
    known = {**adam.state[weight], "exp_avg_sq": torch.zeros(64, 5)}  # the worst that can be
    for state in factor_states(known, a, b):
        assert (state["exp_avg"].abs() <= 4 * state["exp_avg_sq"].sqrt() * (1 + 1e-5)).all()


def test_states_of_unknown_meaning_start_afresh():
    state = {"step": torch.tensor(1.0), "mystery": torch.ones(4, 5)}
    assert factor_states(state, torch.ones(2, 5), torch.ones(4, 2)) == ({}, {})


def test_states_are_copies_in_their_own_dtype():
    state = {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 5, dtype=torch.bfloat16)}
    for_a, for_b = factor_states(state, torch.ones(2, 5), torch.ones(4, 2))
    assert for_a["exp_avg"].dtype == torch.bfloat16
    for_a["step"] += 1
    assert float(state["step"]) == float(for_b["step"]) == 1.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_entries_are_those_of_an_optimizer_on_them(name):
    """All moments, first and second: each entry is stepped for itself."""
    torch.manual_seed(0)
    indices = torch.tensor([1, 6, 19], dtype=torch.int32)
    weight = torch.nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    entries = torch.nn.Parameter(weight.detach().flatten()[indices].clone())
    dense, alone = OPTIMIZERS[name]([weight]), OPTIMIZERS[name]([entries])
    for _ in range(4):
        weight.grad = torch.randn(4, 5, dtype=torch.float64)
        entries.grad = weight.grad.flatten()[indices]
        dense.step()
        alone.step()
    moved = entry_state(dense.state[weight], indices, weight.shape, entries)
    assert set(moved) == set(alone.state[entries])
    for key, value in alone.state[entries].items():
        torch.testing.assert_close(moved[key], value)
    assert entry_state({"step": torch.tensor(1.0), "mystery": torch.ones(4, 5)}, indices, weight.shape, entries) == {}


def test_second_moments_know_that_gradients_are_correlated():
    """Gradients along one matrix: row sums of A's second moment and column sums of B's are those of Adam itself."""
    torch.manual_seed(0)
    a, b, direction = torch.randn(2, 9), torch.randn(7, 2), torch.randn(7, 1) @ torch.randn(1, 9) + torch.ones(7, 9)
    weight, pair = torch.nn.Parameter(b @ a), [torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())]
    dense, low = torch.optim.Adam([weight], lr=0.0, amsgrad=True), torch.optim.Adam(pair, lr=0.0, amsgrad=True)
    for step in range(31):  # of changing sign: nothing has to be raised
        gradient = direction if step % 2 else -direction
        weight.grad, pair[0].grad, pair[1].grad = gradient, b.mT @ gradient, gradient @ a.mT
        dense.step()
        low.step()
    for side, (moved, parameter) in enumerate(zip(factor_states(dense.state[weight], a, b), pair, strict=True)):
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            ours, theirs = moved[key].sum(1 - side), low.state[parameter][key].sum(1 - side)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_without_a_first_moment_nothing_is_known_of_correlations():
    squares = torch.rand(4, 5)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 5), "exp_avg_sq": squares}
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    for_a, for_b = factor_states(state, a, b)
    torch.testing.assert_close(for_a["exp_avg_sq"], b.square().mT @ squares)
    torch.testing.assert_close(for_b["exp_avg_sq"], squares @ a.square().mT)
