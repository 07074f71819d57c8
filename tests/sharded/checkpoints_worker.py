"""Started by torchrun in two processes; every check runs on both ranks. Rank 0 prints the name of each that passed.

    torchrun --nproc_per_node=2 tests/sharded/checkpoints_worker.py FOLDER

What is left in the folder is loaded by one process afterwards.
"""

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError, PrehabError
from lightning_prehab.targets.find import count_parameters

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
EPOCHS, STEPS, SURGERY = 5, 6, 2
SHARDED = {"folder": True, "file": False}  # save_distributed_checkpoint


class Loader:
    """Goes on in the middle of an epoch, and shows each rank batches of its own."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(2 * STEPS, 8, 12, generator=generator)
        self.y = torch.tanh(self.x @ torch.randn(12, 6, generator=generator))
        self.at = 0

    def __len__(self):
        return STEPS

    def __iter__(self):
        start, self.at = self.at % STEPS, 0
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        for index in range(start, STEPS):
            self.at = index + 1
            yield [self.x[2 * index + rank % 2], self.y[2 * index + rank % 2]]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"] % STEPS


def mlp():
    return nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 15), nn.Tanh(), nn.Linear(15, 14)),
        nn.Linear(14, 6, bias=False),
    )  # fmt: skip


class Lit(pl.LightningModule):
    """Parameter groups by name: nobody may depend on how they are made."""

    def __init__(self, make=mlp, flat=False):
        super().__init__()
        self.make, self.flat, self.net, self.losses = make, flat, None, []

    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(0)
        self.net = self.make()
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for unit in (*(part for part in self.net if isinstance(part, nn.Sequential)), self.net):
                fully_shard(unit, mesh=mesh)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True, batch_size=8)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        groups = [
            {"params": [p for n, p in self.named_parameters() if n.endswith("weight")], "weight_decay": 0.1},
            {"params": [p for n, p in self.named_parameters() if not n.endswith("weight")], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(self.parameters() if self.flat else groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer_of(strategy, callbacks=(), epochs=EPOCHS, **settings):
    if strategy == "ddp":
        chosen = DDPStrategy(process_group_backend="gloo")
    else:
        chosen = ModelParallelStrategy(
            distributed.get_world_size() if distributed.is_initialized() else int(os.environ["WORLD_SIZE"]),
            1, save_distributed_checkpoint=SHARDED[strategy],
        )  # fmt: skip
    return pl.Trainer(
        accelerator="cpu", devices="auto" if strategy == "auto" else int(os.environ["WORLD_SIZE"]), strategy=chosen,
        max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks), gradient_clip_val=1.0,
        **settings,
    )  # fmt: skip


def fit(strategy, callbacks, path=None, lit=None, **settings):
    lit = Lit() if lit is None else lit
    trainer = trainer_of(strategy, callbacks, **settings)
    trainer.fit(lit, Loader(), Loader() if settings.get("limit_val_batches") else None, ckpt_path=path)
    return lit, trainer


def cut(epoch=SURGERY, keep=0.6, **settings):
    return lp.CompressionCallback(epoch, keep, calibration_batches=4, **settings)


def whole(value):
    """The same with whole tensors in the place of sharded ones."""
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [whole(one) for one in value]
    return value.full_tensor() if isinstance(value, DTensor) else value


def end_of(lit, trainer):
    lit.configure_model()
    for unit in lit.modules():
        if hasattr(unit, "reshard"):
            unit.reshard()
    return whole([lit.state_dict(), [one.state_dict() for one in trainer.optimizers]])


def assert_same_end(one, other, **tolerance):
    torch.testing.assert_close(end_of(*one), end_of(*other), **(tolerance or {"rtol": 0, "atol": 0}))
    ours, theirs = one[0].losses, other[0].losses
    torch.testing.assert_close(ours, theirs[len(theirs) - len(ours) :], **(tolerance or {"rtol": 0, "atol": 0}))


class Save(pl.Callback):
    """Before, in the middle of what the surgery learns from, right before, right after it, and later."""

    def __init__(self, folder, name):
        self.start = f"{folder}/{name}"

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moment = {(SURGERY - 1, STEPS - 3): "ride", (SURGERY, 0): "cut"}.get((trainer.current_epoch, batch_idx))
        if moment is not None:
            trainer.save_checkpoint(f"{self.start}-{moment}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{self.start}-{trainer.current_epoch}.ckpt")
        trainer.save_checkpoint(f"{self.start}-{trainer.current_epoch}-weights.ckpt", weights_only=True)


WHOLE = {}


def check_resume(folder, kind):
    cuts = {"epoch": [SURGERY, SURGERY + 2], "keep": [0.8, 0.4]}
    reference = fit(kind, [cut(**cuts), Save(folder, kind)])
    WHOLE[kind] = reference
    assert reference[1].callbacks[0].done
    for moment in ("0", "ride", str(SURGERY - 1), "cut", str(SURGERY), str(EPOCHS - 1)):
        callback = cut(**cuts)
        resumed = fit(kind, [callback, Save(folder, f"again-{kind}")], f"{folder}/{kind}-{moment}.ckpt")
        assert_same_end(resumed, reference)
        assert callback.done, moment
        assert [one.ranks for one in callback.reports] == [one.ranks for one in reference[1].callbacks[0].reports]
        assert "load_checkpoint" not in vars(resumed[1].strategy)
    # A schedule without the callback that has cut: trained on from the first cut, it begins with the same weights.
    rest = (EPOCHS - SURGERY - 1) * STEPS
    schedule = lp.RehabSchedule(warmup_steps=2)
    lit, trainer = fit(kind, [schedule], f"{folder}/{kind}-{SURGERY}.ckpt")
    assert len(lit.losses) == rest
    torch.testing.assert_close(lit.losses[0], reference[0].losses[-rest], rtol=0, atol=0)
    assert schedule.factor() == 1.0
    assert "load_checkpoint" not in vars(trainer.strategy)


def check_weights_alone(folder):
    """Of a checkpoint without the states of callbacks, the structure tells what has been done."""
    for kind in SHARDED:
        [result] = trainer_of(kind, [cut()]).validate(Lit(), Loader(), f"{folder}/{kind}-{SURGERY}.ckpt", verbose=False)
        [again] = trainer_of(kind, [cut()]).validate(
            Lit(), Loader(), f"{folder}/{kind}-{SURGERY}-weights.ckpt", verbose=False
        )
        assert result == again


def check_other_strategies(folder):
    """As Lightning does it for a dense model: files go both ways, folders are for sharded runs.

    Lightning tells states of optimizers by the order of the parameters in the model, or in the optimizer; one group has
    both the same.
    """
    written = {kind: fit(kind, [cut(), Save(folder, f"flat-{kind}")], lit=Lit(flat=True)) for kind in ("ddp", *SHARDED)}
    for kind in written:
        for other, whole_run in written.items():
            if kind == other or (kind, other) == ("ddp", "folder"):
                continue
            moment = "0" if other == "ddp" and kind == "file" else SURGERY
            resumed = fit(kind, [cut()], f"{folder}/flat-{other}-{moment}.ckpt", lit=Lit(flat=True))
            assert resumed[1].callbacks[0].done
            assert_same_end(resumed, whole_run, rtol=1e-4, atol=1e-5)


class EveryKind(nn.Module):
    """Convolutions, one of them with groups, attention, and a fused projection."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, groups=2))
        self.attention = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 6)

    def __iter__(self):
        return iter((self.conv, nn.Sequential()))

    def forward(self, x):
        tokens = self.attention(self.conv(x.view(-1, 1, 3, 4)).flatten(2).mT)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.head((torch.tanh(q * k) * v).mean(1))


CUTS = {
    "factors": (EveryKind, {}),
    "parts": (EveryKind, {"split_fused": True}),
    "pivot": (EveryKind, {"layout": "pivot"}),
    "a new bias": (mlp, {"factorization": lp.WhitenedSVD(centered=True)}),
    "sparse": (mlp, {"factorization": lp.LowRankPlusSparse(0.1, lp.WhitenedSVD(centered=True))}),
}


def check_every_kind_of_layer(folder):
    """What another run has cut is put in place from its names and shapes alone, before anything is filled."""
    for name, (make, settings) in CUTS.items():
        file = f"{folder}/kinds-{name}.ckpt"
        lit, trainer = fit("ddp", [cut(1, **settings)], epochs=2, lit=Lit(make))
        trainer.save_checkpoint(file)
        [expected] = trainer.validate(lit, Loader(), verbose=False)
        followed = Lit(make)
        [found] = trainer_of("file", [cut(1)]).validate(followed, Loader(), file, verbose=False)
        assert found["val"] == pytest.approx(expected["val"], rel=1e-5), name
        assert count_parameters(followed) == count_parameters(lit), name


def check_evaluation(folder):
    """Into a dense module, and back and forth in a module that has been cut."""
    for kind in SHARDED:
        lit, trainer = Lit(), trainer_of(kind, [cut()])
        results = {}
        for moment in ("0", str(SURGERY), "0", str(EPOCHS - 1), str(SURGERY)):
            path = f"{folder}/{kind}-{moment}.ckpt"
            [found] = trainer.validate(lit, Loader(), path, verbose=False)
            assert results.setdefault(moment, found) == found
            [fresh] = trainer_of(kind, [cut()]).test(Lit(), Loader(), path, verbose=False)
            assert fresh == found
        predicted = trainer_of(kind, [cut()]).predict(Lit(), Loader(), ckpt_path=f"{folder}/{kind}-{SURGERY}.ckpt")
        again = trainer.predict(lit, Loader())
        torch.testing.assert_close(predicted, again, rtol=0, atol=0)
        assert len(set(map(str, results.values()))) == 3


def check_the_last_one(folder):
    """A run that is started again with the same command goes on with what it has written last."""
    for kind in SHARDED:
        where = f"{folder}/last-{kind}"

        def again(epochs, kind=kind, where=where):
            saves = ModelCheckpoint(where, save_last=True, save_top_k=1, monitor="val", every_n_epochs=1)
            return fit(
                kind, [cut(), saves], "last", epochs=epochs, limit_val_batches=2, default_root_dir=where
            )  # fmt: skip

        again(SURGERY + 2)
        lit, trainer = again(EPOCHS)
        assert trainer.callbacks[0].done
        assert len(lit.losses) == (EPOCHS - SURGERY - 2) * STEPS
        shutil.rmtree(where, ignore_errors=True) if trainer.is_global_zero else None
        trainer.strategy.barrier()
        assert_same_end((lit, trainer), fit(kind, [cut()]))
        dense = trainer.validate(lit, Loader(), f"{folder}/{kind}-0.ckpt", verbose=False)  # after fit, with optimizers
        fresh = trainer_of(kind, [cut()], limit_val_batches=2)
        assert dense == fresh.validate(Lit(), Loader(), f"{folder}/{kind}-0.ckpt", verbose=False)


def damages(folder):
    good = Path(f"{folder}/folder-{SURGERY}.ckpt")
    piece = next(path.name for path in sorted(good.iterdir()) if path.suffix == ".distcp")

    def without(name):
        return lambda path: (path / name).unlink()

    def half(name):
        return lambda path: (path / name).write_bytes((path / name).read_bytes()[: (path / name).stat().st_size // 2])

    for name in (".metadata", "meta.pt", piece):
        yield good, f"{name} is missing", without(name)
        yield good, f"{name} (cannot be read|is cut short|has [0-9,]+ bytes)", half(name)
    yield good, "is a folder, and no checkpoint", lambda path: [one.unlink() for one in path.iterdir()]
    yield Path(f"{folder}/file-{SURGERY}.ckpt"), "cannot be read", lambda path: path.write_bytes(b"PK" * 100)


def check_damage(folder):
    """Is told in one sentence, with the name of the folder, on all ranks, and before anything is changed."""
    for index, (good, message, damage) in enumerate(damages(folder)):
        bad = Path(f"{folder}/bad-{index}.ckpt")
        if int(os.environ["RANK"]) == 0:
            (shutil.copytree if good.is_dir() else shutil.copy)(good, bad)
            damage(bad)
        distributed.barrier()
        lit = Lit()
        with pytest.raises(PrehabError, match=message) as caught:
            fit("folder", [cut()], bad, lit=lit)
        assert isinstance(caught.value, CheckpointError) or distributed.get_rank() > 0
        assert str(bad) in str(caught.value)
        assert str(caught.value).count("\n") == 0
        assert not any(isinstance(part, lp.LowRankLinear) for part in lit.modules())
    small = Lit(lambda: nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 6)))
    with pytest.raises(CheckpointError, match="Layer 'net.0': the checkpoint holds factors"):
        fit("folder", [cut()], f"{folder}/folder-{EPOCHS - 1}.ckpt", lit=small)
    small = Lit(lambda: nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 6)))
    with pytest.raises(CheckpointError, match="could not be loaded: ValueError: Size mismatch .*net.0.weight"):
        fit("folder", [cut()], f"{folder}/folder-0.ckpt", lit=small)
    with pytest.raises(CheckpointError, match="could not be loaded: .*optimizer_0"):  # Lightning wants their states
        fit("folder", [cut()], f"{folder}/folder-0-weights.ckpt")
    bare = Path(folder, "bare.ckpt")  # as a consolidated one
    if int(os.environ["RANK"]) == 0:
        content = torch.load(f"{folder}/file-{EPOCHS - 1}.ckpt", weights_only=True)
        del content["optimizer_states"], content["lr_schedulers"]
        torch.save(content, bare)
    distributed.barrier()
    with pytest.raises(CheckpointError, match="bare.ckpt' holds no optimizer_states, so fit cannot go on"):
        fit("file", [cut()], bare)


CHECKS = {
    "resume from folders": lambda folder: check_resume(folder, "folder"),
    "resume from files": lambda folder: check_resume(folder, "file"),
    "weights alone": check_weights_alone,
    "other strategies": check_other_strategies,
    "every kind of layer": check_every_kind_of_layer,
    "evaluation": check_evaluation,
    "the last one": check_the_last_one,
    "damage": check_damage,
}


class Start(pl.Callback):
    """What a run begins with; it is saved at once."""

    def __init__(self, file):
        self.file = file

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not Path(self.file).exists():
            state = end_of(pl_module, trainer)
            trainer.save_checkpoint(self.file)
            if trainer.is_global_zero:
                torch.save(state, f"{self.file}.start")
        trainer.should_stop = True


def check_spread(folder):
    """Another number of processes begins with the same numbers."""
    processes = int(os.environ["WORLD_SIZE"])
    came = f"{folder}/flat-folder-{SURGERY}.ckpt" if processes == 4 else f"{folder}/on-4.ckpt"
    fit("folder", [cut(), Start(f"{folder}/on-{processes}.ckpt")], came, lit=Lit(flat=True))


#: Started by themselves, on other numbers of processes.
SPREAD = {"spread": check_spread}


if __name__ == "__main__":
    for name in sys.argv[2:] or CHECKS:
        {**CHECKS, **SPREAD}[name](Path(sys.argv[1]))
        if int(os.environ["RANK"]) == 0:
            print(f"passed: {name}", flush=True)
