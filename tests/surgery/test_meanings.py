"""What is read out of an optimizer's state, for the cases that no step of an enumerated optimizer tells apart."""

import pytest
import torch

from lightning_prehab.surgery.meanings import counts_in_group, flags, readable_state
from lightning_prehab.surgery.rehearsal import fresh_states

WEIGHT = torch.nn.Parameter(torch.randn(4, 3))
SGD = torch.optim.SGD([WEIGHT], 0.1)


def moment():
    return torch.randn(4, 3)


def test_squares_of_orthogonal_steps_are_no_second_moment():
    """AdaMuon; the same names mean the usual thing where its flag is off."""
    state = {"use_muon": True, "exp_avg": moment(), "exp_avg_sq": moment()}
    assert readable_state(SGD, WEIGHT, state) is None
    assert readable_state(SGD, WEIGHT, {**state, "use_muon": False}) is not None


def test_a_sum_of_steps_starts_again_at_the_weight_of_now():
    """MADGRAD: x0 is where the sum of steps began."""
    read = readable_state(SGD, WEIGHT, {"s": moment(), "grad_sum_sq": moment(), "x0": moment()})
    assert not read["s"].any()
    assert torch.equal(read["x0"], WEIGHT)


@pytest.mark.parametrize("unknown", [[moment()], {"a": 1}, torch.randn(3), torch.randn(4, 3, 2)])
def test_what_is_not_known_is_not_read(unknown):
    assert readable_state(SGD, WEIGHT, {"exp_avg": moment(), "GG": unknown}) is None


def test_flags_are_no_counters():
    assert flags({"use_muon": False, "name": "w", "step": 3, "exp_avg": moment()}) == {"use_muon": False, "name": "w"}
    assert counts_in_group({"k": 3}, {"z": moment()})
    assert not counts_in_group({"k": 3}, {"z": moment(), "step": torch.tensor(3.0)})


class Dithering(torch.optim.Optimizer):
    """Draws random numbers in each step, and keeps a list."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for one in group["params"]:
                self.state[one].setdefault("noises", []).append(torch.rand_like(one))


def test_a_rehearsal_moves_no_random_numbers_and_calls_no_hooks():
    weight, factor = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(2, 3))
    optimizer, steps = Dithering([weight]), []
    optimizer.register_step_pre_hook(lambda *args: steps.append(1))
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    before = torch.get_rng_state()
    assert fresh_states(optimizer, optimizer.param_groups[0], weight, optimizer.state[weight], [factor]) == {}
    assert torch.equal(torch.get_rng_state(), before)
    assert len(steps) == 1
    assert len(optimizer.state[weight]["noises"]) == 1
