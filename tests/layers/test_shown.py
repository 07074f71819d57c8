"""What a layer shows as its weight or bias can be read like a tensor; a write to it works, or says why not."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import lightning_prehab as lp
from tests.layers.every_layer import Case, every_case, name_of

CASES = pytest.mark.parametrize(("kind", "number"), every_case(), ids=name_of)


@pytest.fixture
def case(kind, number):
    return Case(kind, number)


def numbers(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


#: Writes as people write them: to the tensor ``w``, with a tensor ``x`` of its shape.
WRITES = {
    "+=": lambda w, x: w.__iadd__(x),
    "[0] = 0": lambda w, x: w.__setitem__(0, 0.0),
    "[0].zero_": lambda w, x: w[0].zero_(),
    "T": lambda w, x: w.permute(*reversed(range(w.dim()))).fill_(1.0),
    "view": lambda w, x: w.reshape(-1).fill_(1.0),
    "chunk": lambda w, x: w.chunk(2)[1].zero_(),
    "data = ": lambda w, x: setattr(w, "data", x),
    "data +=": lambda w, x: w.data.__iadd__(x),
    "data.copy_": lambda w, x: w.data.copy_(x),
    "detach().mul_": lambda w, x: w.detach().mul_(2.0),
    "out": lambda w, x: torch.add(x, x, out=w.detach()),
    "relu_": lambda w, x: torch.relu_(w),
    "inplace": lambda w, x: nn.functional.relu(w, inplace=True),
    "foreach": lambda w, x: torch._foreach_add_([w], [x]),
    "constant_": lambda w, x: nn.init.constant_(w, 0.3),
    "normal_": lambda w, x: nn.init.normal_(w),
    "uniform_": lambda w, x: nn.init.uniform_(w),
    "trunc_normal_": lambda w, x: nn.init.trunc_normal_(w),
    "eye_": lambda w, x: nn.init.eye_(w) if w.dim() == 2 else w.zero_(),
    "xavier_uniform_": lambda w, x: nn.init.xavier_uniform_(w) if w.dim() > 1 else w.zero_(),
    "orthogonal_": lambda w, x: nn.init.orthogonal_(w) if w.dim() > 1 else w.zero_(),
    "vector_to_parameters": lambda w, x: nn.utils.vector_to_parameters(x.flatten(), [w]),
}


@CASES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_works_or_says_what_to_do(case, mode, write):
    for name, shown in case.shown().items():
        before, x = numbers(case.layer), torch.randn(shown.shape)
        with mode():
            try:
                WRITES[write](getattr(case.layer, name), x)
            except lp.PrehabError as error:
                sentence = str(error)
                assert f" {type(case.layer).__name__} " in sentence or "LowRank" in sentence
                assert "named_parameters()" in sentence
                assert "to_dense_" in sentence
                assert same(numbers(case.layer), before)
            else:
                assert not same(numbers(case.layer), before), f"{write} on {name} was lost"


@CASES
def test_no_method_of_a_tensor_writes_into_the_void(case, kind, number):
    for name, shown in case.shown().items():
        refused = 0
        for method in dir(Tensor):
            if not method.endswith("_") or method.startswith("_"):
                continue
            for more in ((), (0.5,), (torch.randn(shown.shape),), (0.5, torch.randn(shown.shape)), (0, 1)):
                case = Case(kind, number)  # anew: some change sizes
                before, fresh = numbers(case.layer), getattr(case.layer, name)
                old, flags = fresh.detach().clone(), [p.requires_grad for p in case.layer.parameters()]
                with torch.no_grad():
                    try:
                        getattr(fresh, method)(*more)
                    except lp.PrehabError:
                        refused += 1
                    except (TypeError, RuntimeError, IndexError, ValueError):
                        continue  # these are no arguments for it
                if same(numbers(case.layer), before) and flags == [p.requires_grad for p in case.layer.parameters()]:
                    assert torch.equal(fresh.detach(), old), f"{method} on {name} was lost"
        assert refused > 40 or getattr(case.layer, name).is_leaf


@CASES
def test_what_is_shown_is_not_assigned_nor_deleted(case):
    before = numbers(case.layer)
    for name, shown in case.shown().items():
        for value in (nn.Parameter(torch.zeros(shown.shape)), torch.zeros(shown.shape), None):
            with pytest.raises(
                AttributeError, match=f"The {name} of a {type(case.layer).__name__} .*to_dense_"
            ) as info:
                setattr(case.layer, name, value)
            assert isinstance(info.value, lp.PrehabError)
        with pytest.raises(AttributeError, match=r"cannot be written to \(del\)"):
            delattr(case.layer, name)
    assert same(numbers(case.layer), before)


@CASES
def test_flags_and_hooks_are_refused_or_reach_the_parameter(case):
    for name in case.shown():
        if getattr(case.layer, name).is_leaf:  # a parameter of a part
            getattr(case.layer, name).requires_grad_(False)
            assert not getattr(case.layer, name).requires_grad
            continue
        for write in (
            lambda w: w.requires_grad_(False),
            lambda w: setattr(w, "requires_grad", False),
            lambda w: setattr(w, "grad", torch.zeros(w.shape)),
            lambda w: w.register_hook(print),
            nn.Parameter,
        ):
            with pytest.raises(lp.PrehabError, match="The .* of a (LowRank|Pivot)"):
                write(getattr(case.layer, name))


@CASES
def test_reading_gives_ordinary_tensors_in_the_graph(case):
    for name, shown in case.shown().items():
        for result in (shown.norm(), shown + 1, shown.clone(), shown.double(), torch.cat([shown, shown])):
            assert type(result) is Tensor
        gradients = torch.autograd.grad(shown.square().sum(), list(case.layer.parameters()), allow_unused=True)
        assert any(gradient is not None and gradient.any() for gradient in gradients)
        parameter = nn.Parameter(shown.clone())
        torch.testing.assert_close(getattr(case.layer, name), parameter)  # as with any tensor
        assert shown.detach().numpy().shape == tuple(shown.shape)
        assert shown.tolist() == parameter.tolist()
        assert repr(shown.detach().clone()) == repr(case.shown()[name].detach())
        assert not torch.overrides.has_torch_function((shown,))  # nn.TransformerEncoder goes other ways if so
        other = torch.zeros(shown.shape)
        assert type(other.copy_(shown)) is Tensor  # writing it elsewhere is reading
        assert type(other.mul_(shown.detach())) is Tensor


@CASES
def test_files_know_nothing_of_it(case):
    for shown in case.shown().values():
        for tensor in (copy.deepcopy(shown.detach()), pickle.loads(pickle.dumps(shown.detach()))):
            assert type(tensor) is Tensor
            assert torch.equal(tensor, shown)
        file = io.BytesIO()
        torch.save({"w": shown.detach()}, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True)["w"], shown)


def test_the_bias_is_that_of_the_second_factor():
    layer = lp.LowRankLinear(6, 5, 2)
    assert layer.bias is layer.B.bias
    assert [name for name, _ in layer.named_parameters()] == ["A.weight", "B.weight", "B.bias"]
    assert lp.LowRankLinear(6, 5, 2, bias=False).bias is None


def test_a_subclass_may_have_a_property_that_can_be_set():
    class Own(lp.LowRankLinear):
        scale = property(lambda self: self._scale, lambda self, value: setattr(self, "_scale", value))

    layer = Own(6, 5, 2)
    layer.scale = 3.0
    assert layer.scale == 3.0
