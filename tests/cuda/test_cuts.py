"""Models on a GPU are cut there, as they are on a CPU."""

import copy

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import PrehabError
from lightning_prehab.plan.probes import measure_probes
from lightning_prehab.surgery.structure import follow_state_dict_
from tests.cuda.device import (
    DEVICE,
    assert_here,
    assert_near,
    decisive_,
    labelled,
    loss,
    matrices,
    mlp,
    needs_device,
    states_here,
)
from tests.replaceable import CASES

pytestmark = needs_device

FACTORIZATIONS = {
    "svd": lp.SVD(),
    "activation": lp.ActivationSVD(),
    "fisher rows": lp.FisherSVD(),
    "fisher columns": lp.FisherSVD(axis="columns"),
    "whitened": lp.WhitenedSVD(),
    "centered": lp.WhitenedSVD(centered=True, shrinkage=0.01),
    "kronecker": lp.KroneckerSVD(),
    "kronecker, robust": lp.KroneckerSVD(gradient_trim=0.1, gradient_clip=4.0),
    "sparse": lp.LowRankPlusSparse(base=lp.WhitenedSVD()),
}
POLICIES = {
    "ratio": lp.RankRatio(0.5),
    "budget": lp.ParameterBudget(0.5),
    "energy": lp.EnergyThreshold(0.9),
    "probe": lp.ProbeBudget(0.5),
    "zero-sum": lp.ZeroSum(0.5),
    "calibrated": lp.CalibratedBudget(0.5, trials=2),
}
MEASURED = ("probe", "calibrated")
#: Relative, in the Frobenius norm: sums in float32 are taken in another order.
NEAR = {"sparse": 1e-2}  # an entry more or less


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def cut_there_and_here(**settings):
    """The same cut of the same model, with batches on the CPU: on the device, and on the CPU."""
    answers = []
    for device in (DEVICE, "cpu"):
        model = mlp().to(device)
        try:
            report = lp.compress_(model, batches=labelled(), loss=loss, progress=False, **settings)
        except PrehabError as error:
            answers.append(str(error))
        else:
            answers.append((model, report))
    return answers


@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_a_cut_is_the_same_as_on_the_cpu(factorization, policy, layout):
    chosen = {"factorization": FACTORIZATIONS[factorization], "policy": POLICIES[policy], "layout": layout}
    there, here = cut_there_and_here(**chosen)
    if isinstance(here, str):
        assert there == here
        return
    (model, report), (reference, expected) = there, here
    assert_here(model)
    assert any(rank is not None for rank in report.ranks.values())
    if policy in MEASURED and report.ranks != expected.ranks:
        return  # cuts that cost nothing are told apart by rounding
    assert report.ranks == expected.ranks
    for name, matrix in matrices(reference).items():
        assert_near(matrices(model)[name], matrix, NEAR.get(factorization, 1e-3), name)
    x = labelled(1)[0][0]
    assert_near(model(x.to(DEVICE)), reference(x), NEAR.get(factorization, 1e-3), "output")


def test_layers_are_timed_on_the_device():
    """Which ranks are fast is a property of the machine; here only that there is an answer."""
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).to(DEVICE)
    report = lp.compress_(
        model,
        factorization=lp.WhitenedSVD(),
        batches=[torch.randn(64, 512)],
        loss=_square,
        policy=lp.ParameterBudget(0.9, cost="latency", latency_tokens=4096),
        progress=False,
    )
    assert_here(model)
    assert len(report.ranks) == 2


@pytest.mark.parametrize("split", [1, 2])
def test_layers_at_a_time_and_all_at_once_are_the_same(split):
    models = [mlp().to(DEVICE) for _ in range(2)]
    for model, at_once in zip(models, (None, split), strict=True):
        lp.compress_(model, 0.5, labelled(), loss, layers_at_once=at_once, progress=False)
    for name, matrix in matrices(models[0]).items():
        assert_near(matrices(models[1])[name], matrix, 1e-5, name)


def test_labels_are_drawn_and_the_report_is_of_numbers(tmp_path):
    model = mlp().to(DEVICE)
    report = lp.compress_(model, 0.5, [batch[0] for batch in labelled()], evaluate=0.25, progress=False)
    assert_here(model)
    assert str(report)
    report.save_json(tmp_path / "report.json")
    assert "tensor" not in (tmp_path / "report.json").read_text()


def test_statistics_are_summed_where_the_model_is():
    found = []
    for device in (DEVICE, "cpu"):
        model = mlp().to(device)
        found.append(lp.collect_statistics(model, lp.find_targets(model), labelled(), loss, gradients=True))
    there, here = found
    for name, layer in there.items():
        ours, theirs = layer.snapshot(), here[name].snapshot()
        assert ours.keys() == theirs.keys()
        assert layer.input_gram.device.type == DEVICE.type
        for key, value in ours.items():
            assert_near(value, theirs[key], 1e-4, f"{name}, {key}")


def test_a_plan_of_the_cpu_is_carried_out_on_the_device_and_the_other_way_round():
    plans, statistics = [], []
    for device in (DEVICE, "cpu"):
        model = mlp().to(device)
        targets = lp.find_targets(model)
        statistics.append(lp.collect_statistics(model, targets, labelled(), loss, gradients=True))
        plans.append(lp.make_plan(targets, 0.5, statistics=statistics[-1]))
    assert plans[0].ranks == plans[1].ranks
    for plan, seen, device in zip(plans, statistics, ("cpu", DEVICE), strict=True):
        model = mlp().to(device)
        lp.apply_plan_(model, plan, seen)  # statistics of the other device
        assert_here(model, torch.device(device))


def test_probes_are_those_of_the_cpu():
    found = []
    for device in (DEVICE, "cpu"):
        model = mlp().to(device)
        targets = lp.find_targets(model)

        def factors_of(name, rank, targets=targets):
            return lp.SVD()(targets[name].weight, rank)

        found.append(measure_probes(model, targets, factors_of, labelled(2), 0.9, forward=loss))
    for name, probe in found[0].items():
        assert probe.loss_increase == pytest.approx(found[1][name].loss_increase, rel=0.05, abs=1e-4)


@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_stay_what_they_are(dtype, layout):
    model = mlp().to(DEVICE, dtype)
    batches = [[x.to(dtype), y] for x, y in labelled()]
    report = lp.compress_(model, 0.5, batches, loss, layout=layout, progress=False)
    assert_here(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    reference = mlp()
    expected = lp.compress_(reference, 0.5, labelled(), loss, layout=layout, progress=False)
    assert sum(filter(None, report.ranks.values())) == pytest.approx(
        sum(filter(None, expected.ranks.values())), rel=0.3
    )
    x = labelled(1)[0][0]
    assert_near(model(x.to(DEVICE, dtype)), reference(x), 0.3 if dtype != torch.float64 else 1e-2, "output")


@pytest.mark.parametrize("data", [False, True], ids=["svd", "whitened"])
@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("kind", CASES)
def test_every_kind_of_layer_is_cut(kind, layout, data):
    case = CASES[kind]
    torch.manual_seed(0)
    original = decisive_(case.model()).eval()
    x = case.x()
    models = [copy.deepcopy(original).to(device) for device in (DEVICE, "cpu")]
    settings = {"layout": layout, "split_fused": case.split_fused, "progress": False}
    settings |= {"factorization": lp.WhitenedSVD(), "batches": [x], "loss": _square} if data else {}
    reports = [lp.compress_(model, 0.5, **settings) for model in models]
    model, reference = models
    assert_here(model)
    assert reports[0].ranks == reports[1].ranks
    assert_near(model(x.to(DEVICE)), reference(x), 2e-3, "output")
    _there_and_back(model, x.to(DEVICE))


def _square(model, batch):
    return model(batch).square().mean()


def _there_and_back(model, x):
    """All changes of layout, with an optimizer that has seen a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(x).square().mean().backward()
    optimizer.step()
    expected = model(x).detach()
    for change in (lp.to_pivot_, lp.to_factors_):
        change(model, optimizers=[optimizer])
        assert_here(model)
        states_here(optimizer)
        assert_near(model(x), expected, 1e-4, change.__name__)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    lp.to_dense_(model)
    assert_here(model)
    assert_near(model(x), expected, 1e-4, "dense")


@pytest.mark.parametrize("layout", ["factors", "pivot"])
def test_a_saved_model_is_loaded_on_any_device(tmp_path, layout):
    pytest.importorskip("safetensors")
    model = mlp().to(DEVICE)
    report = lp.compress_(model, 0.5, labelled(), loss, layout=layout, progress=False)
    folder = lp.save_compressed(model, tmp_path / "small", report)
    state = model.state_dict()
    for device in (DEVICE, "cpu"):
        loaded = lp.load_compressed(folder, mlp(1).to(device))
        assert_here(loaded, torch.device(device))
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor.cpu(), state[name].cpu()), name
        followed = mlp(1).to(device)
        follow_state_dict_(followed, state)
        followed.load_state_dict(state)
        assert_here(followed, torch.device(device))


@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("how", ["plain", "foreach", "fused", "capturable", "momentum"])
def test_optimizers_go_on_over_the_cut(how, layout):
    if how in ("fused", "capturable") and DEVICE.type != "cuda":
        pytest.skip("for GPUs")
    makers = {
        "plain": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
        "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3, device=DEVICE), capturable=True),
        "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    }
    model = mlp().to(DEVICE)
    optimizer = makers[how](model.parameters())
    batches = [[part.to(DEVICE) for part in batch] for batch in labelled()]
    losses = []

    def step(batch):
        optimizer.zero_grad()
        found = loss(model, batch)
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))

    for batch in batches:
        step(batch)
    lp.compress_(model, 0.7, labelled(), loss, layout=layout, optimizers=[optimizer], progress=False)
    assert_here(model)
    states_here(optimizer)
    parameters = list(model.parameters())
    assert all(optimizer.state[parameter] for parameter in parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    for batch in batches:
        step(batch)
    assert all(bool((one != other).any()) for one, other in zip(before, parameters, strict=True))
    assert losses[-1] < losses[0] + 1.0
    restored = makers[how](model.parameters())
    restored.load_state_dict(optimizer.state_dict())
