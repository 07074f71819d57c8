"""Low-rank layers whose parts carry more than their weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lightning_prehab as lp
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.linalg.matrices import is_quantized
from tests.refinement.models import cut


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def adapter(model, parts):
    peft = pytest.importorskip("peft")
    found = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[f"0.{part}" for part in parts]), model)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return found


def parametrization(model, parts):
    parametrize.register_parametrization(getattr(model[0], parts[0]), "weight", Halved())
    return model


def hook(model, parts):
    getattr(model[0], parts[1]).register_forward_hook(lambda module, args, output: 0.5 * output)
    return model


def wrapped(model, parts):
    part = getattr(model[0], parts[0])
    inner = part.forward
    part.forward = lambda x: 0.5 * inner(x)
    return model


WITH = [adapter, parametrization, hook, wrapped]


@torch.no_grad()
def far(model, dense, x):
    return float((model(x) - dense(x)).square().sum() / dense(x).square().sum())


@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("attach", WITH)
def test_what_is_measured_is_what_the_model_does(attach, layout):
    model, dense, batches = cut("mlp", layout)
    model = attach(model, ("D", "C") if layout == "pivot" else ("A", "B"))
    before = far(model, dense, batches[4])
    wish = lp.Refinement(12, lr=3e-3, rows=128, patience=9, precision="full")
    found = lp.refine_(model, dense, batches, wish, progress=False)
    assert found.kept
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(far(model, dense, batches[4]), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize(
    "watch",
    [
        lambda part, see: part.register_forward_pre_hook(see),
        lambda part, see: part.register_full_backward_pre_hook(see),
        lambda part, see: part.register_full_backward_hook(see),
        lambda part, see: part.weight.register_hook(see),
        lambda part, see: part.weight.register_post_accumulate_grad_hook(see),
    ],
)
def test_hooks_of_the_parts_see_the_training(watch, layout):
    model, dense, batches = cut("mlp", layout)
    for name in ("D", "C") if layout == "pivot" else ("A", "B"):
        seen = []
        handle = watch(getattr(model[0], name), lambda *_, seen=seen: seen.append(1) and None)
        lp.refine_(model, dense, batches, 3, progress=False)
        assert len(seen) >= 3
        handle.remove()


@pytest.mark.parametrize("change", [lp.to_pivot_, lp.to_factors_])
def test_a_parametrization_is_not_lost(change):
    layout, parts = ("factors", ("A", "B")) if change is lp.to_pivot_ else ("pivot", ("D", "C"))
    model, _, batches = cut("mlp", layout)
    parametrization(model, parts)
    before = model(batches[0])
    with pytest.raises(UnsupportedError, match="parametrization is on its parts"):
        change(model, ["0"])
    torch.testing.assert_close(model(batches[0]), before)


@pytest.mark.parametrize("layout", ["factors", "pivot"])
def test_quantized_layers_are_refused_before_anything_is_changed(layout):
    quantization = pytest.importorskip("torchao.quantization")
    model, dense, batches = cut("mlp", layout)
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model[0], config)
    assert any(map(is_quantized, model.parameters()))
    before = copy.deepcopy(model)(batches[0])
    with pytest.raises(UnsupportedError, match="refine first, quantize afterwards"):
        lp.refine_(model, dense, batches, 2, progress=False)
    torch.testing.assert_close(model(batches[0]), before)
