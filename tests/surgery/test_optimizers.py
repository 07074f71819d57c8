"""Whatever an optimizer keeps of a weight: over a cut nothing breaks, nothing is shared, nothing is left behind."""

import copy
import inspect
import pickle
import weakref
from fnmatch import fnmatch

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.surgery.meanings import ITERATES
from lightning_prehab.surgery.rehearsal import rehearse
from lightning_prehab.surgery.wrapped import family
from tests.taught import Training

try:
    from timm import optim as timm_optim
except ImportError:  # the oldest versions are tried without it
    timm_optim = None

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
    if timm_optim is not None:
        bases = [f"lookahead_{base}" for base in ("adam", "lion", "sgd")]
        found |= {f"timm.{name}": of_timm(name) for name in (*timm_optim.list_optimizers(), *bases)}
    return found


def of_torch(kind, settings):
    def make(model):
        return kind([p for p in model.parameters() if p.dim() == 2 or kind.__name__ != "Muon"], lr=3e-4, **settings)

    return make


def of_timm(name):
    return lambda model: timm_optim.create_optimizer_v2(model, opt=name, lr=3e-4, weight_decay=0.01)


OFFERED = offered()
RUN = {name: make for name, make in OFFERED.items() if not any(fnmatch(name, pattern) for pattern in CANNOT)}


@pytest.fixture(autouse=True)
def _uncompiled():
    """Some compile their step: minutes for each shape, and nothing of it is ours."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.skipif(timm_optim is None, reason="timm is not installed")
def test_the_hand_list_names_what_there_is():
    for pattern in CANNOT:
        assert any(fnmatch(name, pattern) for name in OFFERED), pattern
    assert len(RUN) > 100


@pytest.mark.parametrize("name", RUN)
def test_training_goes_on_over_a_cut(name):
    make = RUN[name]
    training = Training(make)
    training.walk(20)
    before, of_matrices = training.steps(10)
    past = [weakref.ref(weight) for weight in training.matrices()]
    training.cut()
    assert [reference() for reference in past] == [None] * 3
    training.parameters_keep_to_themselves()
    after, of_products = training.steps(10)
    training.walk(40)  # until what was carried is forgotten
    _, later = training.steps(3)
    assert max(after) < 5 * max(before)
    for matrix, product, in_the_end in zip(of_matrices, of_products, later, strict=True):
        assert product < 6 * matrix
        assert in_the_end > matrix / 30
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
        torch.testing.assert_close(
            own, other, rtol=0, atol=0.05 * max(after)
        )  # torch stores bfloat16 states as float32


class Plain(torch.optim.Optimizer):
    """Descent, and whatever else a subclass keeps of a parameter."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.direction(parameter, self.state[parameter]), alpha=group["lr"])


class Lists(Plain):
    """The shape of SOAP: a list with a matrix for each side."""

    def direction(self, parameter, state):
        if not state:
            state.update(
                step=0, exp_avg=torch.zeros_like(parameter), sides=[torch.zeros(n, n) for n in parameter.shape]
            )
        state["step"] += 1
        for axis, side in enumerate(state["sides"]):
            unfolded = parameter.grad.movedim(axis, 0).flatten(1) if parameter.dim() > 1 else parameter.grad[:, None]
            side.lerp_(unfolded @ unfolded.mT, 0.1)
        return state["exp_avg"].lerp_(parameter.grad, 0.1)


class Flagged(Plain):
    """The shape of several Muons: a flag for each parameter, set when the optimizer is made."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["use_muon"] = False

    def direction(self, parameter, state):
        assert not state["use_muon"]
        if "own_moment" not in state:
            state.update(count=0, own_moment=torch.zeros_like(parameter))
        state["count"] += 1
        return state["own_moment"].lerp_(parameter.grad, 0.1) / (1 - 0.9 ** state["count"])


class CompleteIfAny(Plain):
    """One that takes a state that is not empty for one that is complete, flags among it."""

    def direction(self, parameter, state):
        if not state:
            state.update(warm=True, own_moment=torch.zeros_like(parameter))
        return state["own_moment"].lerp_(parameter.grad, 0.1)


class Codes(Plain):
    """The shape of 8-bit optimizers: codes, a table of what they stand for, a scale for each block."""

    def direction(self, parameter, state):
        if not state:
            state["state1"] = torch.zeros(parameter.shape, dtype=torch.uint8)
            state["qmap1"], state["absmax1"] = torch.linspace(-1, 1, 256), torch.zeros(4)
        assert state["state1"].shape == parameter.shape
        return parameter.grad


class Prepared(Plain):
    """One that makes its tensors when it is made, and cannot make them later."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["own_moment"] = torch.zeros_like(parameter)

    def direction(self, parameter, state):
        return state["own_moment"].lerp_(parameter.grad, 0.1)


class Listing(torch.optim.SGD):
    """One with a list of its own."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)
        self.everything = [{"masters": [p for group in self.param_groups for p in group["params"]]}]


class SAM(torch.optim.Optimizer):
    """Two steps around a base that shares the groups; the moments are the base's."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.base = torch.optim.Adam(self.param_groups, lr=lr)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
        self.base.step()


class Several(torch.optim.Optimizer):
    """Optimizers side by side, with groups of their own."""

    def __init__(self, params, lr=1e-3):
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.members = {"matrices": torch.optim.Adam([p for p in params if p.dim() == 2], lr=lr)}
        self.members["vectors"] = torch.optim.SGD([p for p in params if p.dim() < 2], lr=lr, momentum=0.9)

    def step(self, closure=None):
        for one in self.members.values():
            one.step()


@pytest.mark.parametrize("kind", [Lists, Flagged, CompleteIfAny, Codes, SAM, Several])
@pytest.mark.parametrize(
    "method", [lp.SVD(), lp.LowRankPlusSparse(base=lp.SVD())], ids=["factors", "with a sparse part"]
)
def test_shapes_of_optimizers_that_are_not_here(kind, method):
    training = Training(lambda model: kind(model.parameters()))
    training.walk(5)
    before, _ = training.steps(5)
    training.cut(method)
    training.parameters_keep_to_themselves()
    after, _ = training.steps(5)
    assert max(after) < 5 * max(before)
    training.parameters_keep_to_themselves()


def test_moments_of_a_wrapped_optimizer_are_carried():
    training = Training(lambda model: SAM(model.parameters()))
    training.walk(5)
    before = training.optimizer.base.state[training.model[0].weight]["exp_avg"].clone()
    training.cut()
    factors = training.model[0]
    moved = training.optimizer.base.state[factors.A.weight]["exp_avg"]
    torch.testing.assert_close(moved, factors.B.weight.detach().mT @ before)


def test_flags_stay_and_counters_do_not():
    training = Training(lambda model: Flagged(model.parameters()))
    training.walk(5)
    training.cut()
    for factor in (training.model[0].A.weight, training.model[0].B.weight):
        assert training.optimizer.state[factor] == {"use_muon": False}


@pytest.mark.parametrize("kind", [Prepared, Listing])
def test_what_cannot_follow_is_known_before_the_swap(kind):
    training = Training(lambda model: kind(model.parameters()))
    training.walk(3)
    model, optimizer = training.model, training.optimizer
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    numbers = torch.get_rng_state()
    message = {Prepared: "own_moment.*cannot start without", Listing: "attribute 'everything'"}[kind]
    with pytest.raises(lp.PrehabError, match=message):
        training.cut()
    assert torch.equal(torch.get_rng_state(), numbers)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    training.walk(1)


def test_a_list_of_weights_is_found_before_training(lit, loader, make_trainer):
    lit.make_optimizer = Listing
    with pytest.raises(lp.PrehabError, match="attribute 'everything'"):
        make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1, 0.5)]).fit(lit, loader)
    assert lit.losses == []


def test_a_rehearsal_leaves_an_optimizer_as_it_is():
    training = Training(lambda model: Lists(model.parameters()))
    training.walk(3)
    calls = []
    training.optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))
    before = copy.deepcopy(training.optimizer.state_dict())
    weights = copy.deepcopy(training.model.state_dict())
    start = {training.model[0].weight: {}}
    assert rehearse(training.optimizer, training.optimizer.param_groups[0], start) is None
    assert calls == []
    torch.testing.assert_close((training.optimizer.state_dict(), training.model.state_dict()), (before, weights))


def test_a_counter_in_the_group_beside_unknown_state_is_said():
    class Counting(Plain):
        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            super().step(closure)

        def direction(self, parameter, state):
            return state.setdefault("own_moment", torch.zeros_like(parameter)).add_(parameter.grad)

    training = Training(lambda model: Counting(model.parameters()))
    training.walk(3)
    with pytest.warns(UserWarning, match="Counting counts its steps for all parameters together.*own_moment"):
        training.cut()
    training.walk(1)


@pytest.mark.parametrize("name", sorted({"timm.lookahead_sgd", "timm.madgrad", "torch.ASGD"} & RUN.keys()))
def test_other_values_of_a_bias_move_with_it(name):
    """A method with a mean moves the biases; what an optimizer keeps of their past values moves as far."""
    training = Training(RUN[name])
    training.walk(12)
    bias = training.model[0].bias
    keeper = next(one for one in family(training.optimizer) if bias in one.state)
    key = next(key for key in keeper.state[bias] if key in ITERATES)
    before, kept = bias.detach().clone(), keeper.state[bias][key].clone()
    training.cut(lp.WhitenedSVD(centered=True))
    assert training.model[0].bias is bias
    assert not torch.equal(bias, before)
    torch.testing.assert_close(keeper.state[bias][key] - kept, bias.detach() - before)
