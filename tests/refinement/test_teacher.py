"""The dense model that is kept, and models in half precision."""

import copy

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.layers import LowRankLayer
from lightning_prehab.refinement.teacher import keep_teacher
from lightning_prehab.refinement.trained import parameters_to_train
from tests.layers.every_layer import Case, every_case, name_of
from tests.refinement.models import MODELS


def images():
    net = [nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)]
    model = nn.Sequential(*net, nn.Flatten(), nn.Linear(16 * 36, 5)).eval()
    return model, [torch.randn(4, 8, 10, 10) for _ in range(8)]


def without_vectors():
    net = nn.Sequential(nn.Linear(24, 32, bias=False), nn.Tanh(), nn.Linear(32, 24, bias=False))
    return net, [torch.randn(128, 24) for _ in range(8)]


EVERY = {**MODELS, "images": images, "without vectors": without_vectors}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["full", "half"])
@pytest.mark.parametrize("name", EVERY)
def test_a_model_of_any_dtype_is_refined_in_any_precision(name, precision, dtype):
    model, batches = EVERY[name]()
    model.to(dtype)
    batches = [one.to(dtype) if isinstance(one, torch.Tensor) else one for one in batches]
    buffers = {key: value.dtype for key, value in model.named_buffers()}
    for scope in ("model", "blocks") if name in ("language", "encoder", "vision") else ("model",):
        cut = copy.deepcopy(model)
        wish = lp.Refinement(2, scope=scope, precision=precision, rows=16)
        report = lp.compress_(
            cut, 0.4, batches[:4], factorization=lp.SVD(), layout="pivot", refine=wish, progress=False
        )
        assert report.refinement is not None  # and no warning
        assert {one.dtype for one in cut.parameters()} == {dtype}
        assert {key: value.dtype for key, value in cut.named_buffers() if "order" not in key} == buffers


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("kind", "number"), every_case(), ids=name_of)
def test_the_teacher_answers_the_same_whatever_is_trained(kind, number, half):
    case = Case(kind, number)
    teacher = keep_teacher(case.layer, half)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        before = case.run(teacher)
        for parameter in parameters_to_train(case.layer):
            parameter.add_(1.0)
        assert torch.equal(case.run(teacher), before)


@pytest.mark.parametrize(("kind", "number"), every_case(), ids=name_of)
def test_what_is_trained_is_factors_and_vectors(kind, number):
    layer = Case(kind, number).layer
    dense = {
        id(inner.weight)
        for inner in layer.children()
        if any(isinstance(part, LowRankLayer) for part in layer.children()) and not isinstance(inner, LowRankLayer)
    }
    trained = {id(one) for one in parameters_to_train(layer)}
    assert trained
    assert not trained & dense
