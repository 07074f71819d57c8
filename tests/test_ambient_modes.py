"""Whatever mode of torch the caller is in: the same weights, and all of them can be trained."""

import copy
from contextlib import contextmanager, nullcontext

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_prehab as lp
from lightning_prehab.errors import TargetError
from lightning_prehab.plan.probes import measure_probes
from lightning_prehab.report.latency import compare_latencies
from lightning_prehab.surgery.structure import follow_state_dict_
from tests.replaceable import CASES
from tests.same_model import assert_same_weights


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


def model_of(kind):
    torch.manual_seed(0)
    model = CASES[kind].model()
    model.frozen = nn.Linear(16, 16).requires_grad_(False)
    return model


def compress(model, case, x, folder):
    lp.compress_(model, 0.5, split_fused=case.split_fused)


def calibrate(model, case, x, folder):
    def exactly(model, batch):
        with torch.autocast("cpu", enabled=False):
            return model(batch).square().mean()

    lp.compress_(model, 0.5, [x], loss=exactly, split_fused=case.split_fused)


def by_hand(model, case, x, folder):
    targets = lp.find_targets(model, split_fused=case.split_fused)

    def exactly(model, batch):
        with torch.autocast("cpu", enabled=False):
            return model(batch)

    statistics = lp.collect_statistics(model, targets, [x], exactly)
    reached = {name: target for name, target in targets.items() if name != "frozen"}
    plan = lp.make_plan(reached, 0.5, lp.WhitenedSVD(), statistics)
    lp.apply_plan_(model, plan, statistics)


def load(model, case, x, folder):
    lp.load_compressed(folder, model)


def follow(model, case, x, folder):
    state = torch.load(folder / "state.pt")
    follow_state_dict_(model, state)
    model.load_state_dict(state)


def back(model, case, x, folder):
    lp.compress_(model, 0.5, split_fused=case.split_fused)
    lp.to_dense_(model)


CALLS = {
    "compress_": compress,
    "compress_, calibrated": calibrate,
    "by hand": by_hand,
    "load_compressed": load,
    "follow_state_dict_": follow,
    "to_dense_": back,
}


@pytest.mark.parametrize("kind", CASES)
def test_the_same_weights_in_every_mode(kind, tmp_path):
    case = CASES[kind]
    x = case.x()
    small = model_of(kind)
    lp.compress_(small, 0.5, split_fused=case.split_fused)
    lp.save_compressed(small, tmp_path)
    torch.save(small.state_dict(), tmp_path / "state.pt")
    for call in CALLS.values():
        expected = model_of(kind)
        call(expected, case, x, tmp_path)
        for name, mode in MODES.items():
            model = model_of(kind)
            with mode():
                batch = x.clone() if name == "inference_mode" else x
                call(model, case, batch, tmp_path)
            assert not any(tensor.is_inference() for tensor in model.state_dict().values()), name
            assert_same_weights(model, expected)
            flags = [p.requires_grad for p in expected.parameters()]
            assert [p.requires_grad for p in model.parameters()] == flags
            assert not any(p.requires_grad for p in model.frozen.parameters())
            model(x).square().sum().backward()
            assert all(p.grad is not None for p in model.layer.parameters())


def test_probes_and_latencies_in_every_mode(mlp):
    x = torch.randn(32, 12)
    targets = lp.find_targets(mlp)

    def factors(name, rank):
        weight = mlp.get_submodule(name).weight
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            return lp.factorizations.Factors(vh[:rank], u[:, :rank] * s[:rank], None)

    expected = measure_probes(mlp, targets, factors, [x])
    small = copy.deepcopy(mlp)
    lp.compress_(small, 0.5)
    for name, mode in MODES.items():
        with mode():
            found = measure_probes(mlp, targets, factors, [x.clone() if name == "inference_mode" else x])
            assert compare_latencies(mlp, small, [x]).batches
        for key, probe in expected.items():
            tolerance = 0.2 if name == "autocast" else 1e-9  # the model's own passes are the caller's
            assert found[key].rank == probe.rank
            assert found[key].loss_increase == pytest.approx(probe.loss_increase, rel=tolerance, abs=1e-12), name


def test_a_cut_while_the_trainer_validates(mlp, data, make_trainer):
    """Lightning validates in inference mode; the model is trained afterwards."""

    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Later(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            assert torch.is_inference_mode_enabled()
            lp.compress_(pl_module, 0.5, list(DataLoader(data, 48)), loss=lambda module, b: module.training_step(b, 0))

    lit, loader = Lit(), DataLoader(data, 16)
    make_trainer(callbacks=[Later()]).validate(lit, loader, verbose=False)
    assert isinstance(mlp[0], lp.LowRankLinear)
    before = copy.deepcopy(mlp)
    make_trainer().fit(lit, loader)
    assert not any(torch.equal(old, new) for old, new in zip(before.parameters(), mlp.parameters(), strict=True))


def test_a_model_that_was_made_in_inference_mode(tmp_path):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    for inside in (nullcontext(), torch.inference_mode()):
        with inside, pytest.raises(TargetError, match="made inside torch.inference_mode"):
            lp.compress_(model, 0.5)
    small = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    lp.compress_(small, 0.5)
    lp.save_compressed(small, tmp_path)
    with torch.inference_mode():  # to use it, not to train it
        lp.load_compressed(tmp_path, model)
        assert_same_weights(model, small)
