"""Whatever an optimizer keeps of a weight: over a cut nothing breaks, nothing is shared, nothing is left behind."""

import copy
import inspect
import pickle
import weakref
from fnmatch import fnmatch

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.layers import LowRankLayer
from lightning_prehab.surgery.holdings import family

timm_optim = pytest.importorskip("timm.optim")

#: The only hand list: what cannot take a plain step here, each with the reason.
CANNOT = {
    "torch.LBFGS*": "needs a closure, and is refused",
    "torch.SparseAdam*": "sparse gradients alone",
    "torch.*.capturable*": "needs an accelerator",
    "torch.*.differentiable*": "steps no leaves",
    "torch.SGD.nesterov": "needs momentum",
    "torch.Rprop.maximize": "steps of thousands before the cut, too",
    "timm.adahessian": "needs gradients of gradients",
    "timm.bnb*": "needs bitsandbytes and an accelerator",
    "timm.fused*": "needs apex",
}


def switches(kind):
    """Settings of an optimizer that switch something on or off: none, and each alone; with momentum where that is 0."""
    defaults = {name: one.default for name, one in inspect.signature(kind).parameters.items()}
    flags = {name: {name: not value} for name, value in defaults.items() if isinstance(value, bool)}
    found = {"": {}, **flags}
    if defaults.get("momentum", 1) == 0:
        found |= {f"{name}+momentum".strip("+"): {**one, "momentum": 0.9} for name, one in found.items()}
    return found


def offered():
    """``{name: parameters -> optimizer}``: all of torch.optim with all of their switches, and all of timm."""
    found = {}
    for name, kind in vars(torch.optim).items():
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            for switch, settings in switches(kind).items():
                found[f"torch.{name}.{switch}".rstrip(".")] = of_torch(kind, settings)
    for name in timm_optim.list_optimizers():
        found[f"timm.{name}"] = of_timm(name)
    for base in ("adam", "lion", "sgd"):
        found[f"timm.lookahead_{base}"] = of_timm(f"lookahead_{base}")
    return found


def of_torch(kind, settings):
    def make(model):
        return kind([p for p in model.parameters() if p.dim() == 2 or kind.__name__ != "Muon"], lr=1e-3, **settings)

    return make


def of_timm(name):
    return lambda model: timm_optim.create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.01)


OFFERED = offered()
RUN = {name: make for name, make in OFFERED.items() if not any(fnmatch(name, pattern) for pattern in CANNOT)}


@pytest.fixture(autouse=True)
def _uncompiled():
    """Some compile their step: minutes for each shape, and nothing of it is ours."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Training:
    """A small network that is taught by another one, and how far it goes."""

    def __init__(self, make, seed=0, bias=True):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            *(nn.Linear(24, 32, bias=bias), nn.Tanh(), nn.Linear(32, 24, bias=bias), nn.Tanh(), nn.Linear(24, 8))
        )
        self.teacher = torch.randn(24, 8)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = make(self.model)

    def backward(self):
        x = torch.randn(32, 24, generator=self.generator)
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.model(x), torch.tanh(x @ self.teacher)).backward()

    def steps(self, count):
        """The largest change of an entry, of any parameter and of any matrix, in any step."""
        largest = 0.0
        for _ in range(count):
            self.backward()
            old = [one.detach().clone() for one in (*self.model.parameters(), *self.matrices())]
            self.optimizer.step()
            new = [one.detach() for one in (*self.model.parameters(), *self.matrices())]
            largest = max([largest, *(float((a - b).abs().max()) for a, b in zip(old, new, strict=True))])
        return largest

    def matrices(self):
        return [module.weight for module in self.model if isinstance(module, nn.Linear | LowRankLayer)]

    def cut(self, method=None, keep=0.9):
        plan = lp.make_plan(lp.find_targets(self.model), keep, method or lp.SVD())
        assert sum(rank is not None for rank in plan.ranks.values()) == 3
        lp.apply_plan_(self.model, plan, optimizers=[self.optimizer])

    def parameters_keep_to_themselves(self):
        """No tensor or container of a state belongs to two parameters, and no parameter is one of the past."""
        live = {id(parameter) for parameter in self.model.parameters()}
        for one in family(self.optimizer):
            assert {id(p) for group in one.param_groups for p in group["params"]} <= live
            keyed = [one.state, *(value for value in vars(one).values() if isinstance(value, dict))]
            assert {id(key) for found in keyed for key in found if isinstance(key, torch.Tensor)} <= live
            owned = [address for state in one.state.values() for address in addresses(state)]
            assert len(owned) == len(set(owned))

    def next_steps(self, model, optimizer):
        """The parameters after a step, of this training and of a twin that is given the same gradients."""
        self.backward()
        for own, other in zip(self.model.parameters(), model.parameters(), strict=True):
            other.grad = own.grad.clone()
        for one in (self.optimizer, optimizer):
            torch.manual_seed(0)  # some draw numbers
            one.step()
        return list(self.model.parameters()), list(model.parameters())


def addresses(value):
    """Where the tensors and containers within a value lie."""
    if isinstance(value, torch.Tensor):
        return [value.data_ptr()] if value.numel() else []
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [id(value), *(address for one in inner for address in addresses(one))]
    return []


def test_the_hand_list_names_what_there_is():
    for pattern in CANNOT:
        assert any(fnmatch(name, pattern) for name in OFFERED), pattern
    assert len(RUN) > 100


@pytest.mark.parametrize("name", RUN)
def test_training_goes_on_over_a_cut(name):
    make = RUN[name]
    training = Training(make)
    training.steps(20)
    before = training.steps(10)
    past = [weakref.ref(weight) for weight in training.matrices()]
    training.cut()
    assert [reference() for reference in past] == [None] * 3
    training.parameters_keep_to_themselves()
    after = training.steps(10)
    assert before / 100 < after < 5 * before
    training.parameters_keep_to_themselves()

    pickle.loads(pickle.dumps(training.optimizer))
    if "lookahead" not in name:  # any copy that is made of timm's has lost its base
        twin, same = copy.deepcopy((training.model, training.optimizer))
        for own, other in zip(*training.next_steps(twin, same), strict=True):
            assert torch.equal(own, other)
    resumed = copy.deepcopy(training.model)
    restored = make(resumed)
    restored.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    for own, other in zip(*training.next_steps(resumed, restored), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0.05 * after)  # torch stores bfloat16 states as float32
