"""A Trainer on a GPU: prehab, the cut and rehab, in every precision, resumed, accumulated, by hand."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_prehab as lp
from tests.cuda import device
from tests.cuda.device import (
    ACCELERATOR,
    DEVICE,
    Lit,
    assert_here,
    assert_near,
    labelled,
    loader,
    loss,
    make_trainer,
    matrices,
    mlp,
    needs_device,
    needs_gpu,
    not_pretended,
    states_here,
)

pytestmark = needs_device

REGULARIZERS = {
    "stable rank": lambda: lp.PrehabCallback(lp.StableRank()),
    "effective rank": lambda: lp.PrehabCallback(lp.EffectiveRank()),
    "nuclear norm": lambda: lp.PrehabCallback(lp.NuclearNorm()),
    "tail energy": lambda: lp.PrehabCallback(lp.TailEnergy(refresh=3)),
    "tail shrinkage": lambda: lp.PrehabCallback(lp.TailShrinkage(refresh=4, every=2)),
    "spectral weight decay": lambda: lp.PrehabCallback(lp.SpectralWeightDecay(every=3)),
    "activation space": lambda: lp.PrehabCallback(lp.StableRank(), space="activation"),
    "loss space": lambda: lp.PrehabCallback(lp.TailEnergy(), space="loss", update_steps=4, forecast_every_n_steps=3),
    "share": lambda: lp.PrehabCallback(lp.StableRank(), strength_share=0.1),
    "gradient": lambda: lp.PrehabCallback(lp.NuclearNorm(), injection="gradient"),
    "paper": lp.PaperPrehab,
    "paper, nuclear": lambda: lp.PaperPrehab("nuclear_norm"),
    "default": lambda: lp.PrehabCallback(forecast_every_n_steps=3),
}
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def callbacks(prehab="default", keep=0.6, **settings):
    cut = lp.CompressionCallback(2, keep, calibration_batches=3, **settings)
    return [REGULARIZERS[prehab](), cut, lp.RehabSchedule(warmup_epochs=1)]


def fit(folder, made, lit=None, ckpt_path=None, **settings):
    torch.manual_seed(0)
    lit = Lit() if lit is None else lit
    trainer = make_trainer(folder, made, **settings)
    trainer.fit(lit, loader(), ckpt_path=ckpt_path)
    return lit, trainer


def assert_trained(lit, trainer, steps=24):
    """All of it happened, on the device, and the last steps were better than the first."""
    assert {
        name for name, one in lit.named_modules() if "LowRank" in type(one).__name__ or "Pivot" in type(one).__name__
    }
    losses = torch.stack(lit.losses).float().cpu()
    assert len(losses) == steps
    assert torch.isfinite(losses).all()
    assert losses[-6:].mean() < losses[:6].mean()
    lit.net.to(DEVICE)  # Lightning has taken it off
    assert_here(lit)
    cut = next(one for one in trainer.callbacks if isinstance(one, lp.CompressionCallback))
    assert cut.report is not None
    assert str(cut.report)


class Look(pl.Callback):
    """Where things are while training goes on."""

    def __init__(self):
        self.scales = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert_here(pl_module)
        states_here(trainer.optimizers[0])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("prehab", REGULARIZERS)
def test_the_three_callbacks_train(tmp_path, prehab, precision):
    if precision == "16-mixed" and DEVICE.type != "cuda":
        pytest.skip("for GPUs")
    lit = Lit()
    if precision == "bf16-true":
        lit.make_optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    if precision == "64-true":
        lit.net.double()
    look = Look()
    lit, trainer = fit(tmp_path, [look, *callbacks(prehab)], lit, precision=precision)
    assert_trained(lit, trainer)
    assert all(scale >= 1.0 for scale in look.scales)


@pytest.mark.parametrize("prehab", REGULARIZERS)
def test_training_comes_to_what_it_comes_to_on_the_cpu(tmp_path, prehab):
    there, _ = fit(tmp_path, callbacks(prehab))
    here, _ = fit(tmp_path, callbacks(prehab), accelerator="cpu")
    for name, matrix in matrices(here).items():
        assert_near(matrices(there)[name], matrix, 0.02, name)
    assert_near(torch.stack(there.losses), torch.stack(here.losses), 0.01, "losses")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("injection", ["loss", "gradient"])
@pytest.mark.parametrize("how", ["plain", "fused", "foreach"])
def test_penalties_are_of_the_scale_of_the_gradients(tmp_path, how, injection, precision):
    """With a GradScaler, fused or not, the optimizer sees the gradient of the whole: as without one, but for fp16."""
    if DEVICE.type != "cuda" and (how == "fused" or precision == "16-mixed"):
        pytest.skip("for GPUs")

    class Gradients(pl.Callback):
        def __init__(self):
            self.found = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            inside = getattr(optimizer, "_step_supports_amp_scaling", False)
            scale = scaler.get_scale() if scaler is not None and inside else 1.0
            self.found.append([one.grad.detach().float() / scale for one in pl_module.net.parameters()])

    ways = {"plain": {}, "fused": {"fused": True}, "foreach": {"foreach": True}}
    seen = []
    for chosen in (precision, "32-true"):
        lit = Lit(lambda parameters: torch.optim.SGD(parameters, lr=0.0, **ways[how]))
        watch = Gradients()
        prehab = lp.PrehabCallback(lp.NuclearNorm(), 1.0, injection=injection)
        fit(tmp_path, [prehab, watch], lit, precision=chosen, max_epochs=1)
        seen.append(watch.found[-1])  # the first ones may have overflowed
    for ours, theirs in zip(*seen, strict=True):
        assert_near(ours, theirs, 0.02)


@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("how", ["plain", "fused", "foreach", "capturable"])
def test_optimizers_of_gpus(tmp_path, how, layout):
    if DEVICE.type != "cuda" and how in ("fused", "capturable"):
        pytest.skip("for GPUs")
    ways = {"plain": {}, "fused": {"fused": True}, "foreach": {"foreach": True}, "capturable": {"capturable": True}}
    rate = torch.tensor(1e-3, device=DEVICE) if how == "capturable" else 1e-3
    lit = Lit(lambda parameters: torch.optim.AdamW(parameters, lr=rate, **ways[how]))
    lit, trainer = fit(tmp_path, [Look(), *callbacks("spectral weight decay", layout=layout)], lit)
    assert_trained(lit, trainer)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_gradients_are_accumulated(tmp_path, precision):
    if precision == "16-mixed" and DEVICE.type != "cuda":
        pytest.skip("for GPUs")
    for prehab in ("stable rank", "gradient", "default"):
        lit, trainer = fit(tmp_path, callbacks(prehab), accumulate_grad_batches=2, precision=precision)
        assert_trained(lit, trainer)


@pytest.mark.parametrize("prehab", ["stable rank", "tail shrinkage", "spectral weight decay"])
def test_optimization_by_hand(tmp_path, prehab):
    lit, trainer = fit(tmp_path, callbacks(prehab), Lit(manual=True))
    assert_trained(lit, trainer)


@pytest.mark.parametrize(
    "cut",
    [
        {"factorization": lp.SVD()},
        {"factorization": lp.WhitenedSVD(), "layout": "pivot"},
        {"factorization": lp.LowRankPlusSparse(base=lp.WhitenedSVD())},
        {"policy": lp.ProbeBudget(0.6)},
        {"policy": lp.ZeroSum(0.6)},
        {"policy": lp.CalibratedBudget(0.6, trials=2)},
    ],
    ids=lambda cut: " ".join(type(value).__name__ for value in cut.values()),
)
@pytest.mark.parametrize("epoch", [0, 2])
def test_cuts_in_training(tmp_path, cut, epoch):
    lit, trainer = fit(tmp_path, [lp.CompressionCallback(epoch, 0.6, calibration_batches=3, **cut)])
    assert_trained(lit, trainer)


class Everywhere(pl.Callback):
    """A checkpoint in the middle and at the end of each epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            trainer.save_checkpoint(self.folder / f"within-{trainer.current_epoch}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"end-{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("prehab", ["default", "loss space", "share", "spectral weight decay", "paper"])
def test_a_resumed_run_ends_bit_by_bit_like_one_that_is_not(tmp_path, prehab, precision):
    if precision == "16-mixed" and DEVICE.type != "cuda":
        pytest.skip("for GPUs")
    settings = {"precision": precision, "deterministic": True}
    try:
        reference, _ = fit(tmp_path, [*callbacks(prehab), Everywhere(tmp_path)], **settings)
        for moment in ("end-0", "end-1", "end-2"):  # before the cut, right before it, after it
            lit, _ = fit(tmp_path, callbacks(prehab), ckpt_path=tmp_path / f"{moment}.ckpt", **settings)
            assert str(lit) == str(reference)
            for (name, ours), theirs in zip(lit.state_dict().items(), reference.state_dict().values(), strict=True):
                assert torch.equal(ours, theirs), (moment, name)
    finally:
        torch.use_deterministic_algorithms(False)


def test_checkpoints_go_from_device_to_device(tmp_path):
    """A run that began on one device goes on on the other, before the cut and after it."""
    for first, second in ((ACCELERATOR, "cpu"), ("cpu", ACCELERATOR)):
        folder = tmp_path / f"from {first} to {second} {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        fit(folder, [*callbacks(), Everywhere(folder)], accelerator=first)
        for moment in ("end-0", "end-2"):
            lit, trainer = fit(folder, callbacks(), ckpt_path=folder / f"{moment}.ckpt", accelerator=second)
            assert len(lit.losses) == {"end-0": 18, "end-2": 6}[moment]
            assert torch.isfinite(torch.stack(lit.losses)).all()
            assert trainer.callbacks[1].report is not None


def test_a_checkpoint_of_the_gpu_is_loaded_without_one(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    lit, _ = fit(tmp_path, [*callbacks(), saver], enable_checkpointing=True)
    loaded = lp.load_from_checkpoint(Lit, saver.last_model_path, map_location="cpu")
    assert_here(loaded, torch.device("cpu"))
    for (name, ours), theirs in zip(loaded.state_dict().items(), lit.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.cpu()), name
    not_pretended()
    back = lp.load_from_checkpoint(Lit, saver.last_model_path, map_location=DEVICE)
    assert_here(back)


class Waits(pl.Callback):
    """Which lines of the package wait for the device, by step: as CUDA says, or a pretended device."""

    def __init__(self):
        self.steps, self.caught = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.take()
        if DEVICE.type == "cuda":
            self.caught = warnings.catch_warnings(record=True)
            self.found = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def take(self):
        """What has been seen since the last batch began."""
        places = list(device.WAITS)
        device.WAITS.clear()
        if self.caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            self.caught = None
            named = [(one.filename.rpartition("/lightning_prehab/"), one) for one in self.found]
            places = [
                f"{path}:{one.lineno}" for (_, ours, path), one in named if ours and "synchron" in str(one.message)
            ]
        self.steps.append(places)

    def teardown(self, trainer, pl_module, stage):
        self.take()


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("prehab", REGULARIZERS)
def test_only_steps_with_spectral_work_wait_for_the_device(tmp_path, prehab, precision):
    """That is the first ones, each refresh, and those with a forecast; all others leave it to work on its own."""
    if DEVICE.type == "cpu" or (precision == "16-mixed" and DEVICE.type != "cuda"):
        pytest.skip("for GPUs")
    made = REGULARIZERS[prehab]()
    made.forecast_every_n_steps = 0
    watch = Waits()
    cut = lp.CompressionCallback(4, 0.6, calibration_batches=3)
    fit(tmp_path, [watch, made, cut], max_epochs=5, precision=precision)
    before_the_cut = watch.steps[1:24]  # the first is what comes before training
    assert any(before_the_cut)
    assert sum(not places for places in before_the_cut) >= 10, before_the_cut


@pytest.mark.parametrize("prehab", ["spectral weight decay", "tail shrinkage", "share"])
def test_a_resumed_run_does_not_wait_either(tmp_path, prehab):
    if DEVICE.type == "cpu":
        pytest.skip("for GPUs")
    cut = {"epoch": 4, "keep": 0.6, "calibration_batches": 3}
    fit(tmp_path, [REGULARIZERS[prehab](), lp.CompressionCallback(**cut), Everywhere(tmp_path)], max_epochs=5)
    made, watch = REGULARIZERS[prehab](), Waits()
    made.forecast_every_n_steps = 0
    settings = {"max_epochs": 5, "ckpt_path": tmp_path / "end-0.ckpt"}
    fit(tmp_path, [watch, made, lp.CompressionCallback(**cut)], **settings)
    assert sum(not places for places in watch.steps[1:18]) >= 8, watch.steps


@needs_gpu
def test_a_compiled_model_is_trained_and_cut(tmp_path):
    pytest.importorskip("triton")
    model = mlp().to(DEVICE)
    lp.compress_(model, 0.5, labelled(), loss, layout="pivot", progress=False)
    x = labelled(1)[0][0].to(DEVICE)
    expected = model(x).detach()
    assert_near(torch.compile(model)(x), expected, 1e-4)
    lit = Lit()
    lit.compile()
    lit, trainer = fit(tmp_path, callbacks("stable rank"), lit)
    assert_trained(lit, trainer)
