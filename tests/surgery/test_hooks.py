"""Whatever is hooked onto a layer is on what takes its place, and its handle takes it off there."""

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import TargetError, UnsupportedError
from lightning_prehab.surgery.hooks import HOOKS
from tests.replaceable import CASES, WAYS
from tests.replaceable import HOOK_METHODS as METHODS


def use(model, x):
    """Everything that calls hooks."""
    model.zero_grad()
    model(x.requires_grad_()).square().sum().backward()
    model.load_state_dict(model.state_dict())


def test_all_hooks_of_a_module_are_known():
    assert {name for name in vars(nn.Module()) if "hook" in name} - {"_is_full_backward_hook"} == set(HOOKS)
    assert len(METHODS) >= 10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("methods", [METHODS, ["register_backward_hook"]], ids=["all", "not full"])
def test_hooks_move(kind, way, methods, tmp_path):
    case, seen = CASES[kind], []
    model = case.model()
    old = model.layer
    handles = [getattr(old, method)(lambda *_, method=method: seen.append(method)) for method in methods]
    use(model, case.x())
    before = list(seen)
    assert set(before) == set(methods)
    WAYS[way](model, case, tmp_path)
    seen.clear()
    assert model.layer is not old
    use(model, case.x())
    assert seen == before
    assert not any(vars(old)[name] for name in HOOKS)
    for handle in handles:
        handle.remove()
    seen.clear()
    use(model, case.x())
    assert seen == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CASES)
def test_settings_of_hooks_move(kind, way, tmp_path):
    """Order, keyword arguments, hooks that are called whatever happens, outputs that they change."""
    case, seen = CASES[kind], []
    model = case.model()
    layer = model.layer
    layer.register_forward_hook(lambda module, args, kwargs, y: seen.append(("second", kwargs)), with_kwargs=True)
    layer.register_forward_hook(lambda *_: seen.append("first"), prepend=True)
    handle = layer.register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(("before", kwargs)), with_kwargs=True)
    WAYS[way](model, case, tmp_path)
    seen.clear()
    model(case.x())
    assert seen == [("before", {}), "first", ("second", {}), "always"]
    seen.clear()
    if kind.startswith("attention"):
        return
    with pytest.raises(RuntimeError):
        model.layer(torch.randn(1, 3, 7))
    assert seen == [("before", {}), "always"]
    handle.remove()
    assert not model.layer._forward_hooks_always_called


def test_hooks_may_change_what_they_see(mlp):
    mlp[0].register_forward_hook(lambda module, args, y: torch.zeros_like(y))
    expected = mlp(torch.ones(2, 12))
    lp.compress_(mlp, 0.5, target_modules=["0"])
    torch.testing.assert_close(mlp(torch.ones(2, 12)), expected)


def test_hooks_inside_of_an_attention_layer(tmp_path):
    """out_proj is a module of both; of the other projections only the new layer has one."""
    case = CASES["attention"]
    model, seen = case.model(), []
    handle = model.layer.out_proj.register_forward_hook(lambda *_: seen.append("out_proj"))
    lp.compress_(model, 0.5)
    model(case.x())
    assert seen == ["out_proj"]
    gone = model.layer.q_proj.register_forward_hook(lambda *_: seen.append("q_proj"))
    with pytest.warns(UserWarning, match=r"Hooks on attention\.q_proj had no place"):
        lp.to_dense_(model)
    assert handle.id in model.layer.out_proj._forward_hooks
    gone.remove()


def test_a_shared_layer_hands_its_hooks_over_once(mlp):
    seen = []
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    handle = shared.register_forward_hook(lambda *_: seen.append(1))
    lp.compress_(model, 0.5)
    model(torch.randn(2, 16))
    assert seen == [1, 1]
    handle.remove()
    assert not model[2]._forward_hooks


def test_calibration_leaves_no_hooks_of_its_own():
    for case in CASES.values():
        model = case.model()
        lp.compress_(model, 0.5, [case.x()], split_fused=case.split_fused)
        assert not any(vars(module)[name] for module in model.modules() for name in HOOKS)


def test_attributes_go_along():
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].scale, model[0].rank = 3.0, "mine"
    lp.compress_(model, 0.5)
    assert model[0].scale == 3.0
    assert model[0].rank == 4
    lp.to_dense_(model)
    assert not hasattr(model[0], "rank")


def hooked_gradient(weight):
    weight.register_hook(lambda gradient: gradient)


def hooked_accumulation(weight):
    weight.register_post_accumulate_grad_hook(lambda parameter: None)


def stepped_inside(weight):
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, [weight], {"lr": 0.1})


@pytest.mark.parametrize("hook", [hooked_gradient, hooked_accumulation, stepped_inside])
@pytest.mark.parametrize("kind", CASES)
def test_a_weight_with_hooks_of_its_own_is_left(kind, hook):
    case = CASES[kind]
    names = [name for name, p in case.model().layer.named_parameters() if p.dim() > 1]
    for name in names:
        model = case.model()
        model.other = nn.Linear(16, 16)
        hook(model.layer.get_parameter(name))
        assert "hooks of its own" in lp.find_targets(model).skipped[model.name]
        with pytest.raises(TargetError, match="hooks of its own"):
            lp.compress_(model, 0.5, target_modules=[model.name])
        report = lp.compress_(model, 0.5, split_fused=case.split_fused)
        assert list(report.ranks) == ["other"]
        assert "hooks of its own" in report.plan.skipped[model.name]
        assert isinstance(model.layer, type(case.make_layer()))


def test_an_optimizer_that_steps_inside_backward_goes_on():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model[0].parameters()}
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    lp.compress_(model, 0.5, optimizers=optimizers.values())
    assert isinstance(model[2], lp.LowRankLinear)
    before = [p.clone() for p in model[0].parameters()]
    model(torch.randn(8, 16)).square().mean().backward()
    assert not any(torch.equal(old, new) for old, new in zip(before, model[0].parameters(), strict=True))


def test_a_hook_that_was_taken_off_is_no_hook(mlp):
    for parameter in mlp.parameters():
        parameter.register_hook(lambda gradient: gradient).remove()
        parameter.register_post_accumulate_grad_hook(lambda parameter: None).remove()
    assert "0" in lp.find_targets(mlp)


def test_a_hook_that_comes_after_the_plan(mlp):
    plan = lp.make_plan(lp.find_targets(mlp), 0.5, lp.SVD())
    mlp[2].weight.register_hook(lambda gradient: gradient)
    before = list(mlp)
    with pytest.raises(UnsupportedError, match=r"Layer '2': its weight has hooks"):
        lp.apply_plan_(mlp, plan)
    assert list(mlp) == before


@pytest.mark.parametrize(
    "kind", [kind for kind, case in CASES.items() if case.make_layer()._parameters.get("bias") is not None]
)
def test_hooks_of_a_bias_stay_with_it(kind):
    case, seen = CASES[kind], []
    model = case.model()
    model.layer.bias.register_hook(lambda gradient: seen.append("gradient"))
    model.layer.bias.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    lp.compress_(model, 0.5, [case.x()], split_fused=case.split_fused)
    assert isinstance(model.layer, lp.layers.LowRankLayer)
    seen.clear()
    model(case.x()).sum().backward()
    assert seen == ["gradient", "accumulated"]
    with pytest.warns(UserWarning, match="had no place"):  # the dense layer has a copy of the bias
        lp.to_dense_(model)


def test_a_forward_pass_of_the_instance_is_not_known(mlp):
    mlp[2].forward = lambda x: 2 * type(mlp[2]).forward(mlp[2], x)
    assert "replaced on the instance" in lp.find_targets(mlp).skipped["2"]


@pytest.mark.filterwarnings("ignore:.*without data")
def test_features_of_timm_survive():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "efficientnet_b0", features_only=True, feature_location="expansion", out_indices=(1, 2, 3)
    ).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        lp.compress_(model, 0.5, target_modules=["blocks.*"])
        after = model(x)
    assert [f.shape for f in after] == [f.shape for f in before]
    assert len(after) == 3
