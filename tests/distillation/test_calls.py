import copy

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.distillation.calls import Calls
from lightning_prehab.errors import TargetError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        return self.net(x)


def seen(model, work, **settings):
    calls = Calls(model, **{key: value for key, value in settings.items() if key != "wrapped"})
    calls.attach()
    calls.begin(wrapped=settings.get("wrapped", False))
    work()
    found = calls.take()
    calls.detach()
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    return found


@pytest.mark.parametrize(
    ("work", "names"),
    [
        (lambda m, x: m(x), [""]),
        (lambda m, x: m.net(x), ["net"]),
        (lambda m, x: m.net[2](m.net[1](x)), ["net.1", "net.2"]),
        (lambda m, x: m.net[1][0](x), []),  # deeper than a step calls by itself, unless it is named
        (lambda m, x: m.layers[1](m.layers[0](x)), ["layers.0", "layers.1"]),
        (lambda m, x: m.layers[1][0](x), ["layers.1.0"]),  # a list of modules is no level
        (lambda m, x: (m(x), m.net(x)), ["", "net"]),
    ],
)
def test_the_outermost_calls_are_seen(work, names):
    model, x = Model(), torch.randn(2, 4)
    found = seen(model, lambda: work(model, x))
    assert [call.name for call in found] == names
    assert all(call.args[0] is x for call in found[:1])


def test_calls_without_gradients_are_left_out():
    model, x = Model(), torch.randn(2, 4)
    with torch.no_grad():
        assert seen(model, lambda: model(x)) == []


def test_a_module_that_is_named_is_seen_wherever_it_is():
    model, x = Model(), torch.randn(2, 4)
    (call,) = seen(model, lambda: model(x), module="net.1.0")
    assert call.name == "net.1.0"
    with pytest.raises(TargetError, match=r"no module 'net.7' in Model"):
        Calls(model, module="net.7")


def test_the_step_may_run_as_a_call_of_the_model():
    """As DistributedDataParallel makes it run."""

    class Wrapped(Model):
        def forward(self, x, inner=True):
            return self(x, inner=False) if inner else self.net(x)

    model, x = Wrapped(), torch.randn(2, 4)
    (call,) = seen(model, lambda: model(x), wrapped=True)
    assert call.kwargs == {"inner": False}


def test_copies_and_backward_passes_are_not_seen():
    model, x = Model(), torch.randn(2, 4)
    calls = Calls(model)
    calls.attach()
    calls.begin(wrapped=False)
    copy.deepcopy(model)(x)
    assert calls.take() == []
    calls.listening = False
    model(x)
    assert calls.take() == []


def test_features_are_noted_with_the_call_that_they_are_made_in():
    model, x = Model(), torch.randn(2, 4)
    (call,) = seen(model, lambda: model(x), features=["net.0", "net.1"])
    torch.testing.assert_close(call.features["net.1"][0], model.net[1](model.net[0](x)))


@pytest.mark.parametrize("how", ["inner", "in place"])
def test_compiled_modules_are_seen_from_outside(how):
    model, x = Model(), torch.randn(2, 4)
    expected = model(x)
    if how == "inner":
        model.net = torch.compile(model.net, backend="eager")
    else:
        model.net.compile(backend="eager")
    for _ in range(2):
        (call,) = seen(model, lambda: model.net(x))
        assert call.name == "net"
        torch.testing.assert_close(call.output, expected)


def test_a_shared_module_is_one_door():
    model = Model()
    model.again = model.net
    x = torch.randn(2, 4)
    assert len(seen(model, lambda: (model.net(x), model.again(x)))) == 2


def test_low_rank_layers_are_no_containers():
    model, x = Model(), torch.randn(2, 4)
    model.layer = lp.LowRankLinear(4, 4, rank=1)
    assert [call.name for call in seen(model, lambda: model.layer(x))] == ["layer"]
