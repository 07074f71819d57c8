"""Every low-rank layer, as others treat modules: pruners, parametrizations, compilers, copies, files, adapters."""

import copy
import io
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import lightning_prehab as lp
from lightning_prehab.errors import ReadOnlyError
from lightning_prehab.layers import LowRankMultiheadAttention
from tests.layers.every_layer import CASES, Case, every_case, every_class, name_of

pytestmark = pytest.mark.parametrize(("kind", "number"), every_case(), ids=name_of)


@pytest.fixture
def case(kind, number):
    return Case(kind, number)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def leaves(layer):
    """The dense modules inside that hold a weight."""
    return [part for part in layer.modules() if "weight" in part._parameters]


class Reading(nn.Module):
    """A module that reads what a layer shows."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor):
        return nn.functional.linear(x.to(self.layer.weight.dtype), self.layer.weight.flatten(1))


def reading(case):
    """Such a module for the layer and an input, if the layer shows a weight."""
    if not hasattr(case.layer, "weight"):
        pytest.skip("it shows no weight")
    return Reading(case.layer), torch.randn(3, case.layer.weight.flatten(1).shape[1])


def test_there_is_a_case_of_it(kind, number):
    assert set(CASES) == every_class()
    assert {getattr(lp, name) for name in lp.__all__ if name.startswith("LowRank") and name != "LowRankPlusSparse"} - {
        lp.LowRankCheckpointMixin
    } <= every_class()


def test_a_parameter_is_found_where_it_is_and_nowhere_else(case):
    """Under the names that people look for, and but for containers, which whoever looks leaves out."""
    for part in case.layer.modules():
        for name in () if isinstance(part, nn.Sequential) else ModelPruning.PARAMETER_NAMES:
            value = getattr(part, name, None)
            if isinstance(value, nn.Parameter):
                assert part._parameters.get(name) is value, f"{type(part).__name__}.{name}"


@pytest.mark.parametrize("names", [None, ["weight"]])
def test_a_pruner_takes_the_parameters_of_the_factors(case, names):
    pairs = ModelPruning.sanitize_parameters_to_prune(case.layer, parameter_names=names or ())
    assert {id(module) for module, name in pairs if name == "weight"} == {id(module) for module in leaves(case.layer)}
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.5)
    case.run().sum().backward()
    zeros = sum(int((getattr(module, name) == 0).sum()) for module, name in pairs)
    assert zeros >= sum(getattr(module, name).numel() for module, name in pairs) // 2
    for module, name in pairs:
        prune.remove(module, name)
    case.run()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_no_parameter_cannot_be_pruned_or_parametrized(case, name):
    if name not in case.shown():
        pytest.skip("it shows none")
    before = {key: value.clone() for key, value in case.layer.state_dict().items()}
    with pytest.raises(ReadOnlyError, match="cannot be written to"):
        prune.l1_unstructured(case.layer, name, 0.5)
    with pytest.raises(ValueError, match="does not have a parameter"):
        parametrize.register_parametrization(case.layer, name, nn.Identity())
    after = case.layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_factors_can_be_parametrized(case):
    expected = case.run()
    for module in leaves(case.layer):
        parametrizations.weight_norm(module)
    close(case.run(), expected)
    for value in case.shown().values():
        assert value.isfinite().all()
    for module in leaves(case.layer):
        parametrize.remove_parametrizations(module, "weight")
        parametrizations.spectral_norm(module)
    case.run().sum().backward()


def test_it_scripts(case):
    close(case.run(torch.jit.script(case.layer)), case.run())
    if len(case.inputs) == 1:
        close(case.run(torch.jit.script(nn.Sequential(case.layer, nn.ReLU()))), case.run().relu())


def test_what_it_shows_scripts(case):
    module, x = reading(case)
    close(torch.jit.script(module)(x), module(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_it_traces_exports_and_compiles(case):
    if isinstance(case.layer, LowRankMultiheadAttention):
        close(torch.jit.trace(case.layer, tuple(case.inputs))(*case.inputs)[0], case.run())
    else:
        close(torch.jit.trace(case.layer, tuple(case.inputs))(*case.inputs), case.run())
    close(case.run(torch.export.export(case.layer, tuple(case.inputs)).module()), case.run())
    torch._dynamo.reset()
    close(case.run(torch.compile(case.layer, backend="aot_eager", fullgraph=True)), case.run())


def test_what_it_shows_exports_and_compiles(case):
    module, x = reading(case)
    expected = module(x)
    close(torch.export.export(module, (x,)).module()(x), expected)
    torch._dynamo.reset()
    close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)
    torch._dynamo.reset()
    close(torch.compile(lambda w: w.sum() * 2, backend="aot_eager")(case.layer.weight), case.layer.weight.sum() * 2)


def test_copies_and_files_do_the_same(case):
    file = io.BytesIO()
    torch.save(case.layer, file)
    file.seek(0)
    made = [copy.deepcopy(case.layer), copy.copy(case.layer), pickle.loads(pickle.dumps(case.layer))]
    for other in [*made, torch.load(file, weights_only=False)]:
        assert type(other) is type(case.layer)
        assert torch.equal(case.run(other), case.run())
        assert {name: value.shape for name, value in case.shown().items()} == {
            name: getattr(other, name).shape for name in case.shown()
        }


def test_states_and_devices(case):
    expected, state = case.run(), case.layer.state_dict()
    fresh = copy.deepcopy(case.layer).to("meta").to_empty(device="cpu")
    fresh.load_state_dict(state)
    assert torch.equal(case.run(fresh), expected)
    double = copy.deepcopy(case.layer).double()
    close(case.run(double, [x.double() for x in case.inputs]).float(), expected)
    for name, value in case.shown().items():
        assert getattr(double, name).dtype == torch.float64
        assert getattr(copy.deepcopy(case.layer).to("meta"), name).device.type == "meta"
        assert value.dtype == torch.float32


def test_functional_calls(case):
    parameters = dict(case.layer.named_parameters())
    buffers = dict(case.layer.named_buffers())

    def loss(given):
        return case.run(lambda *x: torch.func.functional_call(case.layer, (given, buffers), x)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(case.run().square().sum(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, expected, strict=True):
        close(gradients[name], torch.zeros_like(gradients[name]) if gradient is None else gradient)
    together, _ = torch.func.stack_module_state([case.layer, copy.deepcopy(case.layer)])
    close(torch.func.vmap(loss)(together), loss(parameters).expand(2))


def test_what_it_shows_in_functional_calls(case):
    module, x = reading(case)
    parameters = dict(module.named_parameters())

    def loss(given):
        return torch.func.functional_call(module, given, (x,)).square().sum()

    assert any(gradient.any() for gradient in torch.func.grad(loss)(parameters).values())
    together, _ = torch.func.stack_module_state([module, copy.deepcopy(module)])
    close(torch.func.vmap(loss)(together), loss(parameters).expand(2))


def test_checkpointed_gradients(case):
    parameters = list(case.layer.parameters())
    expected = torch.autograd.grad(case.run().square().sum(), parameters, allow_unused=True)
    output = case.run(lambda *x: checkpoint(case.layer, *x, use_reentrant=False))
    for found, gradient in zip(
        torch.autograd.grad(output.square().sum(), parameters, allow_unused=True), expected, strict=True
    ):
        assert (found is None) == (gradient is None)
        if found is not None:
            close(found, gradient)


def test_adapters_on_the_factors_are_merged(case):
    peft = pytest.importorskip("peft")
    names = [name for name, part in case.layer.named_modules() if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)]
    parts = {name: case.layer.get_submodule(name) for name in names}
    adapted = [name for name, part in parts.items() if getattr(part, "groups", 1) == 1]
    if not adapted or any(getattr(part, "padding_mode", "zeros") != "zeros" for part in parts.values()):
        pytest.skip("peft adapts no groups, and pads with zeros")
    config = peft.LoraConfig(r=2, target_modules=adapted, init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": case.layer})).eval()
    expected = case.run(model["layer"])
    with pytest.raises(lp.PrehabError, match="'layer' has an adapter of peft on its factors"):
        lp.to_dense_(model)
    for part in list(model.modules()):
        if isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer):
            part.merge()
    close(case.run(model["layer"]), expected)


def test_a_dense_weight_is_trained_if_any_part_of_it_is(case):
    def trained():
        return [name for name, parameter in case.layer.to_dense().named_parameters() if parameter.requires_grad]

    case.layer.requires_grad_(False)
    assert trained() == []
    for name, parameter in case.layer.named_parameters():
        parameter.requires_grad_(True)
        assert len(trained()) == 1, name
        assert ("bias" in trained()[0]) == ("bias" in name), name
        parameter.requires_grad_(False)
