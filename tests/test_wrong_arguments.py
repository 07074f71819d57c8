"""Settings of the wrong type or out of range: one sentence with the name and the value, when the object is made."""

import inspect
import math
import types
import typing

import lightning as L
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, PlanError, TargetError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.regularizers import Penalty, Shrinkage
from lightning_prehab.report.latency import compare_latencies

#: What has no default.
REQUIRED = {"epoch": 1, "keep": 0.5, "energy": 0.9, "density": 0.1}


def all_kinds():
    """What people make with settings: callbacks, the recipe, and everything on the shelves."""
    public = [getattr(lp, name) for name in lp.__all__]
    shelves = (Factorization, RankPolicy, Penalty, Shrinkage)
    callbacks = (lp.CompressionCallback, lp.PrehabCallback, lp.RehabSchedule, lp.FactorTraining)
    return [
        kind
        for kind in public
        if isinstance(kind, type) and (issubclass(kind, shelves + callbacks) or kind is lp.Recipe)
    ]


def types_of(hint):
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return {kind for part in typing.get_args(hint) for kind in types_of(part)} if union else {hint}


def numbers():
    """Every setting that is a number, with values that it cannot have."""
    for kind in all_kinds():
        hints = typing.get_type_hints(kind.__init__)
        for name in inspect.signature(kind).parameters:
            kinds = types_of(hints.get(name, str))
            wrong = []
            if kinds & {int, float}:
                wrong = ["3", [3], -1, math.nan]
                wrong += [2.5] if float not in kinds else []
                wrong += [None] if types.NoneType not in kinds else []
            for value in wrong:
                yield pytest.param(kind, name, value, id=f"{kind.__name__}-{name}-{value}")


def test_there_are_many():
    assert len(list(numbers())) > 200


@pytest.mark.parametrize(("kind", "name", "value"), list(numbers()))
def test_a_number_that_cannot_be_used_is_named(kind, name, value):
    needed = {
        one: REQUIRED[one]
        for one, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    with pytest.raises(ArgumentError) as caught:
        kind(**{**needed, name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


def model():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def batches():
    return [torch.randn(40, 16) for _ in range(2)]


def used_up():
    found = iter(batches())
    list(found)
    return found


def cut(**wrong):
    return lp.compress_(**{"model": model(), "keep": 0.5, "batches": batches(), **wrong})


def refined():
    return {"model": low_rank(), "teacher": model(), "batches": batches(), "refinement": 1, "progress": False}


def low_rank(layout="factors"):
    net = model()
    lp.compress_(net, 0.5, batches(), layout=layout)
    return net


#: Every public function with arguments that it takes, but for those that need transformers or a Trainer.
CALLS = {
    "apply_plan_": lambda path: {
        "model": (net := model()),
        "plan": lp.make_plan(lp.find_targets(net), 0.5, lp.SVD()),
    },
    "collect_statistics": lambda path: {
        "model": (net := model()),
        "targets": lp.find_targets(net),
        "batches": batches(),
    },
    "compress_": lambda path: {"model": model(), "batches": batches()},
    "find_targets": lambda path: {"model": model()},
    "load_compressed": lambda path: {"folder": lp.save_compressed(model(), path / "saved"), "model": model()},
    "make_plan": lambda path: {"targets": lp.find_targets(model()), "policy_or_keep": 0.5, "factorization": lp.SVD()},
    "print_compression": lambda path: {"model": model()},
    "refine_": lambda path: refined(),
    "save_compressed": lambda path: {"model": low_rank(), "folder": path / "new"},
    "to_dense_": lambda path: {"model": low_rank()},
    "to_factors_": lambda path: {"model": low_rank("pivot")},
    "to_pivot_": lambda path: {"model": low_rank()},
}
#: Arguments that the message calls otherwise.
NAMED = {"policy_or_keep": "keep", "forward": "loss", "refinement": "refine", "folder": ""}
ELSEWHERE = {"compress_folder", "load_from_checkpoint", "own_samples"}


def things():
    """Every argument of every public function, with things that it cannot be."""
    for function in CALLS:
        hints = typing.get_type_hints(inspect.unwrap(getattr(lp, function)))
        for name in inspect.signature(getattr(lp, function)).parameters:
            kinds = types_of(hints[name])
            if bool in kinds and len(kinds) == 1:
                continue  # whatever is true
            wrong = [object()] + [5] * (int not in kinds) + [None] * (types.NoneType not in kinds) + [[3]]
            wrong = [one for one in wrong if one != [3] or name not in ("batches", "evaluate")]  # told of when used
            for value in wrong:
                kind = type(value).__name__
                yield pytest.param(function, name, value, id=f"{function}-{name}-{kind}")


def test_every_public_function_is_called():
    functions = {name for name in lp.__all__ if inspect.isfunction(getattr(lp, name))}
    assert functions == {*CALLS, *ELSEWHERE}
    assert len(list(things())) > 120


@pytest.mark.parametrize("function", CALLS)
def test_the_arguments_that_are_right(function, tmp_path):
    getattr(lp, function)(**CALLS[function](tmp_path))


@pytest.mark.parametrize(("function", "name", "value"), list(things()))
def test_something_else_for_an_argument(function, name, value, tmp_path):
    arguments = CALLS[function](tmp_path)
    net = arguments.get("model")
    before = None if net is None else {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(lp.PrehabError) as caught:
        getattr(lp, function)(**{**arguments, name: value})
    assert NAMED.get(name, name) in str(caught.value).lower()
    assert len(str(caught.value)) < 420
    assert "\n" not in str(caught.value)
    if net is not None:
        assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert not (tmp_path / "new").exists()


def test_what_is_loaded_is_a_path():
    class Lit(L.LightningModule):
        pass

    for load in (lp.CompressionPlan.from_yaml, lp.Recipe.from_yaml, lp.CompressionReport.load_json):
        for value in (None, 5, [3]):
            with pytest.raises(lp.PrehabError, match="must be a path, got"):
                load(value)
    for value in (None, 5, [3]):
        with pytest.raises(lp.PrehabError, match=r"path must be the path of a \.ckpt file, or an open one, got"):
            lp.load_from_checkpoint(Lit, value)
    report = cut()
    for save in (report.save_json, report.plan.to_yaml, lp.Recipe(0.5).to_yaml):
        with pytest.raises(lp.PrehabError, match="path must be a path, got 5"):
            save(5)


def test_callbacks_refuse_them_when_they_are_made():
    with pytest.raises(ArgumentError, match="module must be the dotted name of a module, or None, got 5"):
        lp.RehabDistillation(module=5)
    with pytest.raises(ArgumentError, match="device must be one that torch knows"):
        lp.RehabDistillation(device=[3])
    with pytest.raises(ArgumentError, match="objective must be"):
        lp.PaperPrehab([3])


def test_models_to_compare_or_to_look_at():
    for wrong in (5, None):
        with pytest.raises(ArgumentError, match="dense must be an nn.Module"):
            compare_latencies(wrong, model(), batches())
        with pytest.raises(ArgumentError, match="compressed must be an nn.Module"):
            compare_latencies(model(), wrong, batches())
    with pytest.raises(ArgumentError, match="There are no batches"):
        compare_latencies(model(), model(), None)
    with pytest.raises(ArgumentError, match="batches is one tensor"):
        compare_latencies(model(), model(), torch.ones(2, 16))
    with pytest.raises(ArgumentError, match="ReLU has no parameters"):
        lp.collect_statistics(nn.ReLU(), {}, batches())


@pytest.mark.parametrize("name", ["source", "output"])
@pytest.mark.parametrize("value", [None, 5, nn.Linear(2, 2)])
def test_a_model_is_no_folder(name, value, tmp_path):
    with pytest.raises(ArgumentError, match=f"{name} must be a path, got"):
        lp.compress_folder(**{"source": tmp_path, "output": tmp_path / "new", name: value})


OTHER_BATCHES = [
    (torch.ones(40, 3), r"Tensor with \d+x3 \(RuntimeError: mat1 and mat2 shapes"),
    ({"inputs": torch.ones(40, 16)}, r"dict with inputs \d+x16 \(TypeError: .*unexpected keyword argument 'inputs'"),
    ([torch.ones(40, 16, dtype=torch.int64)], r"list with \d+x16 \(RuntimeError: "),
]


@pytest.mark.parametrize(("batch", "said"), OTHER_BATCHES)
@pytest.mark.parametrize("policy", [None, lp.ProbeBudget(0.5), lp.CalibratedBudget(0.5, trials=2)], ids=str)
@pytest.mark.parametrize("where", [0, 2])
def test_a_batch_of_something_else_is_told(batch, said, policy, where):
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    data = batches()
    data.insert(where, batch)
    with pytest.raises(ArgumentError, match=f"The model cannot be called on a batch of type {said}.*; give data that"):
        lp.compress_(net, 0.5, data, policy=policy)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ArgumentError, match=f"The model cannot be called on a batch of type {said}"):
        lp.compress_(net, 0.5, batches(), evaluate=[batch])
    with pytest.raises(ArgumentError, match=f"The model cannot be called on a batch of type {said}"):
        compare_latencies(net, model(), [batch])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_token_beyond_the_vocabulary():
    net = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16))
    data = [torch.randint(9, (4, 5)) for _ in range(3)]
    with pytest.raises(ArgumentError, match=r"of type Tensor with 6x5 \(IndexError: index out of range.*give data"):
        lp.compress_(net, 0.5, [*data, torch.full((6, 5), 9)])
    assert type(net[1]) is nn.Linear


class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("none is left"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        TimeoutError("of the user's"),
        UserWarning("made an error"),
        KeyboardInterrupt(),
        type("Stop", (Exception,), {})("control flow of the user's"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_is_no_fault_of_the_batch_comes_as_it_is(error):
    with pytest.raises(type(error)) as caught:
        lp.compress_(nn.Sequential(nn.Linear(16, 16), Raises(error)), 0.5, batches())
    assert caught.value is error


#: What people write, and what they are told.
WRONG = {
    "percent": (lambda: cut(keep=60), "must lie in (0, 1], got 60. For 60 % write 0.6."),
    "text": (lambda: cut(keep="0.5"), "got '0.5'. Give a Python number."),
    "a policy for keep": (lambda: cut(keep=lp.RankRatio(0.5)), "A policy is given by its name: policy=..."),
    "batches for keep": (lambda: cut(keep=batches()), "Batches come after it: compress_(model, 0.5, batches)."),
    "one batch": (lambda: cut(batches={"x": torch.ones(2, 16)}), "batches is one mapping; give an iterable"),
    "one tensor": (lambda: cut(batches=torch.ones(2, 16)), "batches is one tensor; give an iterable"),
    "a function": (lambda: cut(batches=batches), "batches must be a list, a DataLoader or another iterable"),
    "a number of batches": (lambda: cut(batches=5), "batches must be a list, a DataLoader or another iterable"),
    "a path of batches": (lambda: cut(batches="data.txt"), "batches must be a list, a DataLoader or another iterable"),
    "no batches": (lambda: cut(batches=[]), "needs at least one batch"),
    "used up": (lambda: cut(batches=used_up()), "A generator can be gone through once only"),
    "a criterion": (lambda: cut(loss=nn.MSELoss()), "lambda model, batch: criterion(model(batch[0]), batch[1])"),
    "a loss by name": (lambda: cut(loss="mse"), "The loss must be a function (model, batch) -> scalar, got 'mse'"),
    "a loss without a graph": (lambda: cut(loss=lambda m, b: m(b).mean().detach()), "The loss has no gradient"),
    "a class": (lambda: cut(factorization=lp.SVD), "; write SVD(...)"),
    "a name": (lambda: cut(factorization="whitened_svd"), "got 'whitened_svd'; write WhitenedSVD(...)"),
    "an unknown name": (lambda: cut(policy="best"), "got 'best'; give an object of one of "),  # and of yours
    "one optimizer": (
        lambda: cut(optimizers=torch.optim.SGD(model().parameters())),
        "optimizers is one optimizer; give a list",
    ),
    "a path": (lambda: cut(model="model.pt"), "The model must be an nn.Module, got 'model.pt'; build or load"),
    "a state dict": (lambda: cut(model=model().state_dict()), "The model must be an nn.Module, got OrderedDict"),
    "a class of models": (lambda: cut(model=nn.Linear), "make one first: Linear(...)"),
    "no targets": (lambda: cut(target_modules="blocks.*.fc"), "matches no layer. There are 2: 0, 2."),
    "a model for targets": (lambda: lp.make_plan(model(), 0.5), "write make_plan(find_targets(model), ...)"),
    "a path for a plan": (lambda: lp.apply_plan_(model(), "plan.yaml"), "CompressionPlan.from_yaml(path) reads one"),
    "a strength first": (lambda: lp.PrehabCallback(0.1), "a strength comes second: PrehabCallback(StableRank(), 0.1)"),
    "a regularizer by name": (lambda: lp.PrehabCallback("stable_rank"), "write StableRank()"),
    "a negative epoch": (lambda: lp.CompressionCallback(-1), "epoch is a whole number that counts from 0, or 'auto'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_people_write_and_are_told(what):
    wrong, text = WRONG[what]
    with pytest.raises(lp.PrehabError) as caught:
        wrong()
    assert text in str(caught.value)
    assert len(str(caught.value)) < 420


@pytest.mark.parametrize("whole", [True, False])
def test_a_second_cut(whole):
    """Deeper than the first, or refused; another one by way of the dense layers."""
    net = model()
    lp.compress_(net, 0.6, batches(), target_modules=None if whole else ["0"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(TargetError, match=r"is compressed already \(low-rank layers: .*to_dense_\(model\) first"):
        lp.compress_(net, 0.9, batches())
    with pytest.raises(TargetError, match=r"is compressed already \(low-rank layers: 1, the first '0'\)"):
        lp.compress_(net, 0.6, batches(), target_modules=["0"])
    if whole:
        with pytest.raises(TargetError, match="cut_again=True takes low-rank layers too, for a deeper cut"):
            lp.find_targets(net)
    with pytest.raises(TargetError, match="Layer '0' .LowRankLinear. cannot be cut: it is low-rank already; to_dense_"):
        lp.find_targets(net, ["0"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    if not whole:
        assert "low-rank already" in lp.make_plan(lp.find_targets(net), lp.RankRatio(0.5), lp.SVD()).skipped["0"]
        assert lp.compress_(net, 0.5, batches(), target_modules=["2"]).ranks["2"] is not None
    assert lp.compress_(net, 0.2, batches()).keep <= 0.2
    lp.to_dense_(net)
    report = lp.compress_(net, 0.3, batches())
    assert report.keep <= 0.3
    assert isinstance(net[0], lp.LowRankLinear)


def test_a_plan_that_was_carried_out_says_what_it_has_found():
    net = model()
    plan = lp.make_plan(lp.find_targets(net), 0.5, lp.SVD())
    lp.apply_plan_(net, plan)
    with pytest.raises(PlanError, match=r"expects a 16x16 weight, the model has a LowRankLinear\(.*before any surgery"):
        lp.apply_plan_(net, plan)


def test_ranks_that_can_be_no_multiple_are_said_so():
    targets = lp.find_targets(model())  # break-even at 7 and 5
    plan = lp.make_plan(targets, lp.RankRatio(0.9), lp.SVD(), rank_multiple_of=6)
    assert [layer.reason for layer in plan.layers] == [None, "not a multiple of 6: ranks above 5 save nothing"]
    assert "not a multiple of 6: ranks above 5 save nothing: 2" in str(plan)
    assert lp.CompressionPlan.from_yaml(plan.to_yaml()) == plan
    assert plan.with_ranks({"2": "dense"}).layers[1].reason == "chosen by hand"
    by_hand = lp.make_plan(targets, lp.RankRatio(0.9), lp.SVD(), None, {"2": 3}, 6)
    assert by_hand.layers[1].reason is None
