"""Started by torchrun in two processes; every check runs on both ranks. Rank 0 prints the name of each that passed."""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_prehab as lp
from lightning_prehab.callbacks import _distributed, _sharded_site, _site
from lightning_prehab.errors import PrehabError, UnsupportedError
from lightning_prehab.plan.spectra import Solver
from lightning_prehab.road import Survey
from lightning_prehab.sharded import shares
from lightning_prehab.surgery.replacement import Replacement

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
EPOCHS, CUT = 4, 2
#: Samples of a batch of all processes together.
GLOBAL_BATCH = 16


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks that become units, and layers in the group of the root; two processes do not halve the sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 11)
        self.blocks = nn.ModuleList([Block(11, 15), Block(11, 13)])
        self.last = nn.Linear(11, 6)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def make_data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 12, generator=generator) @ torch.diag(torch.linspace(2, 0.1, 12))
    return x, torch.tanh(x @ torch.randn(12, 6, generator=generator))


class Lit(pl.LightningModule):
    def __init__(self, policy=None, units=True):
        super().__init__()
        self.policy, self.units = policy, units
        self.net = None
        self.losses = []

    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(0)
        self.net = Net()
        mesh = self.device_mesh
        if mesh is None:
            return
        settings = {"mesh": mesh["data_parallel"], **({"mp_policy": self.policy} if self.policy else {})}
        if self.units:
            for block in self.net.blocks:
                fully_shard(block, **settings)
            fully_shard(self.net.last, **settings)  # a layer that is a unit itself
        fully_shard(self.net, **settings)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]).float(), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]).float(), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def strategy_of(kind):
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def fit(lit, callbacks, kind="fsdp", epochs=EPOCHS, **settings):
    """A run; ``kind`` is "ddp", "fsdp" or "one"."""
    data = TensorDataset(*make_data())
    devices = 1 if kind == "one" else 2
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="auto" if kind == "one" else strategy_of(kind),
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=tempfile.gettempdir(),
        **{"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, **settings},
    )
    # Lightning would shuffle; so the processes together have the batches of one process
    sampler = DistributedSampler(data, devices, int(os.environ.get("RANK", "0")), shuffle=False)
    loader = DataLoader(data, GLOBAL_BATCH // devices, sampler=sampler)
    trainer.fit(lit, loader, loader)
    return trainer


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def reshard(module):
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()


def end_state(trainer, lit):
    """Weights as products, and moments, of all parameters as a whole."""
    reshard(lit)
    found = {}
    for name, module in lit.named_modules():
        if isinstance(module, lp.LowRankLinear):
            found[f"{name}.product"] = whole(module.B.weight) @ whole(module.A.weight)
    state = trainer.optimizers[0].state
    for name, parameter in lit.named_parameters():
        if not name.endswith(("A.weight", "B.weight")):
            found[name] = whole(parameter)
        for key, value in state[parameter].items():
            known = whole(value)
            found[f"{name}:{key}"] = known.abs() if known.dim() else known  # factors are known up to signs
    return found


SETTINGS = {
    "default": {},
    "pivot": {"layout": "pivot"},
    "sparse": {"factorization": lp.LowRankPlusSparse(0.1, lp.WhitenedSVD())},
    "several": {"epoch": [1, 3], "keep": [0.7, 0.4]},
    "trials": {"policy": lp.CalibratedBudget(0.5, trials=2)},
}


def run(name, kind, **settings):
    compression = lp.CompressionCallback(**{"epoch": CUT, "keep": 0.5, "calibration_batches": 4, **SETTINGS[name]})
    lit = Lit()
    trainer = fit(lit, [compression], kind, **settings)
    return trainer, lit, compression


def results_of(name, kind):
    trainer, lit, compression = run(name, kind)
    report = compression.report
    return {
        "state": end_state(trainer, lit),
        "ranks": report.ranks,
        "loss_increase": report.plan.loss_increase,
        "loss": lit.losses,
    }


def on_all_ranks(value):
    gathered = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def check_like_one_process(name, kind, folder):
    """The same global batches: the parent process compares with a run of its own; here all ranks must be the same."""
    found = results_of(name, kind)
    first, second = on_all_ranks(found["state"])
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    if distributed.get_rank() == 0:
        torch.save(found, Path(folder, f"{name}_{kind}.pt"))


class CountsGathers(pl.Callback):
    """All-gathers of each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._stack = contextlib.ExitStack()
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        name = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
        gather, self.count = getattr(distributed, name), 0

        def counted(*args, **settings):
            self.count += 1
            return gather(*args, **settings)

        patch.setattr(distributed, name, counted)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._stack.close()
        self.steps.append(self.count)


def check_all_gathers_stay():
    counts = CountsGathers()
    fit(Lit(), [lp.CompressionCallback(CUT, calibration_batches=4), counts], epochs=3, accumulate_grad_batches=1)
    steps = len(counts.steps) // 3
    assert counts.steps[steps + 1 :] == [counts.steps[1]] * (2 * steps - 1), counts.steps
    assert counts.steps[1] > 0


def check_mixed_precision():
    """bf16 by the policy of FSDP2 and by Lightning's plugin: the weights stay float32, and the loss goes on falling."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for lit, settings in ((Lit(policy), {}), (Lit(), {"precision": "bf16-mixed"})):
        compression = lp.CompressionCallback(CUT, keep=0.5, calibration_batches=4)
        trainer = fit(lit, [compression], **settings)
        assert compression.report.plan.loss_increase is not None
        reshard(lit)
        assert {p.dtype for p in lit.parameters()} == {torch.float32}
        assert all(isinstance(p, DTensor) for p in trainer.optimizers[0].param_groups[0]["params"])
        epochs = torch.tensor(lit.losses).reshape(EPOCHS, -1).mean(1)
        assert epochs[-1] < epochs[0], epochs


def check_the_effect_leaves_no_trace():
    """Measured or not: the run goes on bit by bit the same, and what is measured is the increase that comes."""
    states = []
    for measured in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not measured:
                patch.setattr(_sharded_site.ShardedSite, "effect", lambda *_: None)
            trainer, lit, compression = run("default", "fsdp")
        assert (compression.report.plan.loss_increase is not None) == measured
        states.append((end_state(trainer, lit), torch.get_rng_state()))
    (first, rng), (second, other) = states
    assert torch.equal(rng, other)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def check_refusals():
    for callback, message in (
        (lp.CompressionCallback(0), "epoch 0 would calibrate"),
        (lp.CompressionCallback(1, policy=lp.ProbeBudget(0.5)), "one layer after the other"),
    ):
        lit = Lit()
        with pytest.raises(UnsupportedError, match=message):
            fit(lit, [callback])
        assert lit.losses == []
    lit, without_data = Lit(), lp.CompressionCallback(0, factorization=lp.SVD())
    fit(lit, [without_data], epochs=1)
    assert without_data.report.keep <= 0.5
    when_free = lp.CompressionCallback("auto", calibration_batches=4)  # no epoch 0, whatever stands for it until then
    fit(Lit(), [lp.PrehabCallback(space="loss"), when_free], epochs=3)
    assert when_free.done


def check_listeners_and_report():
    told = []

    class Watch(pl.Callback):
        def on_before_surgery(self, trainer, pl_module):
            told.append(sum(p.numel() for p in pl_module.parameters()))

        def on_surgery(self, trainer, pl_module, report):
            told.append(sum(p.numel() for p in pl_module.parameters()))
            assert report.spectra.keys() == report.ranks.keys()

    trainer, lit, compression = run("default", "fsdp")
    assert trainer.callback_metrics["compression/keep"] == pytest.approx(compression.report.keep)
    lit = Lit()
    fit(lit, [lp.CompressionCallback(1, keep=0.5, calibration_batches=4), Watch()], epochs=2)
    assert len(told) == 2
    assert told[1] < told[0]
    assert told[1] == sum(p.numel() for p in lit.parameters())


class Stubborn(lp.CompressionCallback):
    """Goes on as if there had been no surgery where one fails; looks at what it has left behind."""

    error = None

    def _operate(self, trainer, pl_module):
        if self.error is not None:
            return
        reshard(pl_module)
        before = snapshot(trainer, pl_module)
        try:
            super()._operate(trainer, pl_module)
        except (PrehabError, MemoryError) as error:
            self.error = error
        reshard(pl_module)
        after = snapshot(trainer, pl_module)
        assert before[0] == after[0]
        assert [id(p) for p in before[1]] == [id(p) for p in after[1]]
        for one, two in zip(before[2], after[2], strict=True):
            assert torch.equal(one, two)


def snapshot(trainer, pl_module):
    """Structure, the parameters of the optimizer, and the numbers of both."""
    parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    state = trainer.optimizers[0].state
    tensors = [*pl_module.parameters(), *(v for p in parameters for v in state[p].values())]
    return str(pl_module.net), parameters, [local(t).clone() for t in tensors]


def local(tensor):
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


#: What a process does for itself on the road: the name of the step, where it stands, and the process that fails.
STEPS = {
    "ddp": {
        "sum": (_distributed, "_rooms_for", 1),
        "decompose": (Solver, "__call__", 1),
        "decide": (Survey, "plan", 0),
        "factorize": (_site, "compute_factors", 1),
        "send": (_distributed.FactorsOfOwners, "_room_for", 1),
        "prepare": (_site, "prepare_swap", 1),
        "tell": (_site, "tell_listeners", 1),
    },
    "fsdp": {
        "sum": (_distributed, "_rooms_for", 1),
        "gather": (shares, "_even_part", 1),
        "decompose": (Solver, "__call__", 1),
        "decide": (Survey, "plan", 0),
        "factorize": (_sharded_site, "compute_factors", 1),
        "send": (_distributed.FactorsOfOwners, "_room_for", 1),
        "prepare": (Replacement, "prepare", 1),
        "tell": (_sharded_site, "tell_listeners", 1),
    },
}


def check_a_failure_at_any_step(kind):
    """It is raised everywhere, nothing has changed anywhere, and training goes on as if nothing had been planned."""
    plain = fit(Lit(), [], kind, epochs=3)
    expected = end_state(plain, plain.lightning_module)
    for step, (where, name, rank) in STEPS[kind].items():

        def broken(*_, **__):
            raise MemoryError("no memory on this rank")

        with pytest.MonkeyPatch.context() as patch:
            if distributed.get_rank() == rank:
                patch.setattr(where, name, broken)
            stubborn = Stubborn(CUT, keep=0.5, calibration_batches=4)
            trainer = fit(Lit(), [stubborn], kind, epochs=3)
        assert "no memory" in str(stubborn.error), step
        found = end_state(trainer, trainer.lightning_module)
        for key, value in expected.items():
            assert torch.equal(found[key], value), (step, key)
        assert all(not module._forward_hooks for module in trainer.lightning_module.net.first.modules())


RUNS = [
    ("default", "ddp"),
    ("trials", "ddp"),
    ("default", "fsdp"),
    ("pivot", "fsdp"),
    ("sparse", "fsdp"),
    ("several", "fsdp"),
    ("trials", "fsdp"),
]


def checks(folder):
    found = {
        f"{name}, {kind}": lambda name=name, kind=kind: check_like_one_process(name, kind, folder)
        for name, kind in RUNS
    }
    return found | {
        "all-gathers": check_all_gathers_stay,
        "mixed precision": check_mixed_precision,
        "the effect": check_the_effect_leaves_no_trace,
        "refusals": check_refusals,
        "listeners": check_listeners_and_report,
        "failures, ddp": lambda: check_a_failure_at_any_step("ddp"),
        "failures, fsdp": lambda: check_a_failure_at_any_step("fsdp"),
    }


if __name__ == "__main__":
    for title, check in checks(sys.argv[1]).items():
        if len(sys.argv) < 3 or any(word in title for word in sys.argv[2:]):
            check()
            if distributed.get_rank() == 0:
                print(f"passed: {title}", flush=True)
    distributed.destroy_process_group()
    sys.exit(0)
