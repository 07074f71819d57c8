import math

import pytest
import torch
from torch import nn

from lightning_prehab.callbacks._schedules import exponential_ramp
from lightning_prehab.errors import ArgumentError, CheckpointError
from lightning_prehab.regularizers import GradientRatio, TailEnergy, strength_for_share


def feed(ratio, values):
    return [ratio.update(torch.tensor(value), torch.tensor(1.0)).item() for value in values]


def test_constant_ratio_is_met_from_the_first_step():
    assert feed(GradientRatio(0.2), [3.0] * 5) == pytest.approx([0.6] * 5)


def test_it_is_the_moving_geometric_mean():
    ratio, logs = GradientRatio(1.0, smoothing=0.5), torch.tensor([0.0, 1.0, 3.0])
    last = feed(ratio, logs.exp().tolist())[-1]
    weights = torch.tensor([0.125, 0.25, 0.5])
    assert last == pytest.approx(((weights * logs).sum() / weights.sum()).exp().item())


def test_without_smoothing_it_is_the_pure_function():
    values = [3.0, 0.1, 700.0]
    pure = [strength_for_share(0.3, torch.tensor(value), torch.tensor(1.0)).item() for value in values]
    assert feed(GradientRatio(0.3, smoothing=0.0), values) == pytest.approx(pure)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_unusable_steps_are_passed_over(bad):
    ratio = GradientRatio(0.1)
    assert feed(ratio, [bad, bad]) == [0.0, 0.0]
    assert feed(ratio, [2.0, bad, bad]) == pytest.approx([0.2, 0.2, 0.2])
    assert ratio.update(torch.tensor(1.0), torch.tensor(0.0)).item() == pytest.approx(0.2)


def test_state_goes_through_a_checkpoint(tmp_path):
    one, two = GradientRatio(), GradientRatio()
    feed(one, [1.0, 5.0, 0.3])
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert feed(one, [2.0, 9.0]) == feed(two, [2.0, 9.0])
    with pytest.raises(CheckpointError, match="lacks count"):
        two.load_state_dict({"total": torch.zeros(())})


@pytest.mark.parametrize(
    ("settings", "value"),
    [({"share": 0.0}, "0.0"), ({"share": float("nan")}, "nan"), ({"smoothing": 1.0}, "1.0"), ({"smoothing": -1}, "-1")],
)
def test_wrong_settings(settings, value):
    with pytest.raises(ArgumentError, match=f"got {value}"):
        GradientRatio(**settings)


def test_a_share_of_the_task_gradient_in_a_training_run():
    torch.manual_seed(0)
    layer, ratio, memory = nn.Linear(12, 10), GradientRatio(0.1, smoothing=0.5), {}
    x = torch.randn(64, 12)
    y = x @ torch.randn(12, 10)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(20):
        (task,) = torch.autograd.grad(nn.functional.mse_loss(layer(x), y), [layer.weight])
        (penalty,) = torch.autograd.grad(TailEnergy()(layer.weight, 3, memory), [layer.weight])
        strength = ratio.update(task.norm(), penalty.norm())
        assert not strength.requires_grad
        layer.weight.grad = task + strength * penalty
        optimizer.step()
    assert (strength * penalty.norm() / task.norm()).item() == pytest.approx(0.1, rel=0.2)


def test_the_exponential_ramp_is_that_of_the_paper():
    """``lambda_initial * exp(log(lambda_max / lambda_initial) / warmup * step)``, then ``lambda_max``."""
    for step in range(14):
        expected = 1e-4 * math.exp(math.log(10 / 1e-4) / 10 * step) if step < 10 else 10.0
        assert exponential_ramp(step, 10, 1e-4, 10.0) == pytest.approx(expected)
    assert exponential_ramp(0, 0, 0.5) == 1.0
    assert exponential_ramp(-3, 10, 0.5) == 0.5


@pytest.mark.parametrize("start", [0.0, -1.0, float("nan"), float("inf")])
def test_an_exponential_ramp_has_positive_ends(start):
    with pytest.raises(ArgumentError, match=f"got {start} and 1.0"):
        exponential_ramp(0, 10, start)
    with pytest.raises(ArgumentError, match=f"got 1.0 and {start}"):
        exponential_ramp(0, 10, 1.0, start)
