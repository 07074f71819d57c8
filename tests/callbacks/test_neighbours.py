"""Every callback of Lightning beside a surgery: it works, or it is refused before training with the way out."""

import gc
import inspect
import weakref

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import UnsupportedError

SURGERY, EPOCHS = 1, 3


class Finetuning(lightning_callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class Writer(lightning_callbacks.BasePredictionWriter):
    def write_on_epoch_end(self, *_):
        raise AssertionError("nothing is predicted in fit")


class Bar(lightning_callbacks.ProgressBar):
    is_enabled = False

    def disable(self):
        """Shows nothing."""

    def enable(self):
        """Shows nothing either."""


class AllBatches(lightning_callbacks.SpikeDetection):
    """Never says that a loss is a spike."""

    def _is_spike(self, *_):
        return False


WORKS = {
    "BackboneFinetuning": lambda: lightning_callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=2),
    "BaseFinetuning": Finetuning,
    "BasePredictionWriter": lambda: Writer("epoch"),
    "BatchSizeFinder": lambda: lightning_callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=8),
    "Callback": lightning_callbacks.Callback,
    "Checkpoint": lightning_callbacks.Checkpoint,
    "DeviceStatsMonitor": lambda: lightning_callbacks.DeviceStatsMonitor(cpu_stats=False),
    "EarlyStopping": lambda: lightning_callbacks.EarlyStopping("train_loss", patience=9),
    "GradientAccumulationScheduler": lambda: lightning_callbacks.GradientAccumulationScheduler({SURGERY: 2}),
    "LambdaCallback": lambda: lightning_callbacks.LambdaCallback(on_train_start=lambda *_: None),
    "LearningRateFinder": lambda: lightning_callbacks.LearningRateFinder(num_training_steps=3),
    "LearningRateMonitor": lightning_callbacks.LearningRateMonitor,
    "ModelCheckpoint": lambda: lightning_callbacks.ModelCheckpoint(monitor="train_loss", save_last=True),
    "ModelSummary": lightning_callbacks.ModelSummary,
    "OnExceptionCheckpoint": lambda: lightning_callbacks.OnExceptionCheckpoint("."),
    "ProgressBar": Bar,
    "RichModelSummary": lightning_callbacks.RichModelSummary,
    "RichProgressBar": lightning_callbacks.RichProgressBar,
    "SpikeDetection": AllBatches,
    "ThroughputMonitor": lambda: lightning_callbacks.ThroughputMonitor(lambda batch: len(batch[0]), window_size=2),
    "Timer": lightning_callbacks.Timer,
    "TQDMProgressBar": lightning_callbacks.TQDMProgressBar,
}
REFUSED = {
    "EMAWeightAveraging": lambda: lightning_callbacks.EMAWeightAveraging(),  # noqa: PLW0108 (not everywhere)
    "ModelPruning": lambda: lightning_callbacks.ModelPruning("l1_unstructured"),
    "StochasticWeightAveraging": lambda: lightning_callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=2),
    "WeightAveraging": lambda: lightning_callbacks.WeightAveraging(),  # noqa: PLW0108 (not everywhere)
}
#: By name: older versions of Lightning lack some.
ALL = sorted(
    name
    for name, kind in vars(lightning_callbacks).items()
    if inspect.isclass(kind) and issubclass(kind, pl.Callback) and name in lightning_callbacks.__all__
)
OWN = {
    "PrehabCallback": lp.PrehabCallback,
    "PaperPrehab": lp.PaperPrehab,
    "RehabSchedule": lp.RehabSchedule,
    "FactorTraining": lambda: lp.FactorTraining(0.01, alternate=2),
}


def test_every_callback_is_here():
    assert set(ALL) <= {*WORKS, *REFUSED}
    holds_the_dense_model = {"CompressionCallback", "RehabDistillation"}  # until the cut, and as the teacher
    own = set(lp.callbacks.__all__) - holds_the_dense_model
    assert own == set(OWN)


@pytest.fixture
def module(logging_class):
    class Module(logging_class):
        def __init__(self):
            super().__init__(
                nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 6))
            )
            self.backbone, self.lr, self.batch_size = self.net[0], 0.05, 8

        def configure_optimizers(self):
            return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=self.lr, momentum=0.9)

    return Module()


class Data(pl.LightningDataModule):
    def __init__(self, data):
        super().__init__()
        self.data, self.batch_size = data, 16

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.data, self.batch_size)


def strings(value):
    """All texts in a state, keys as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from strings(pair)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from strings(part)


@pytest.mark.filterwarnings("ignore")  # of Lightning, about what it finds missing
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", [*(name for name in ALL if name in WORKS), *OWN])
def test_it_works_and_holds_nothing_of_the_dense_model(name, first, module, data, make_trainer, tmp_path):
    callback = {**WORKS, **OWN}[name]()
    callbacks = [callback, lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD())]
    gone, names, moved = [], [], []

    class Watch(pl.Callback):
        def on_surgery(self, trainer, pl_module, report):
            moved.extend((one, one.detach().clone()) for one in pl_module.parameters())

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch < SURGERY:
                layers = [(key, layer) for key, layer in pl_module.net.named_children() if isinstance(layer, nn.Linear)]
                gone.extend(weakref.ref(held) for _, layer in layers for held in (layer, layer.weight))
                names.extend(f"net.{key}.weight" for key, _ in layers)

    logger = CSVLogger(tmp_path)
    bar = name in ("ProgressBar", "RichProgressBar", "TQDMProgressBar")
    settings = {"logger": logger, "enable_progress_bar": bar, "log_every_n_steps": 1, "inference_mode": False}
    if name in ("ModelCheckpoint", "Checkpoint", "OnExceptionCheckpoint"):
        settings["enable_checkpointing"] = True
    if name in ("ModelSummary", "RichModelSummary"):
        settings["enable_model_summary"] = True
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=[*callbacks[:: 1 if first else -1], Watch()], **settings)
    trainer.fit(module, datamodule=Data(data))
    assert [type(layer) for layer in module.net[::2]] == [lp.LowRankLinear] * 3
    assert sum(not torch.equal(one, before) for one, before in moved) >= 4  # training has gone on
    assert not {*strings(callback.state_dict())} & {*names}
    gc.collect()
    assert len(gone) == 6
    assert [found for reference in gone if (found := reference()) is not None] == []


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", [name for name in ALL if name in REFUSED])
def test_it_is_refused_before_training(name, first, module, data, make_trainer):
    callbacks = [REFUSED[name](), lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD())]
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=callbacks[:: 1 if first else -1])
    with pytest.raises(UnsupportedError, match=f"{name}.* in a second run"):
        trainer.fit(module, datamodule=Data(data))
    assert module.losses == []
    assert not any(isinstance(part, lp.LowRankLinear) for part in module.modules())


class TestPruning:
    def prune(self, module, **settings):
        pairs = settings.pop("pairs", ())
        return lightning_callbacks.ModelPruning(
            "l1_unstructured", pairs, ["weight"], use_lottery_ticket_hypothesis=False, **settings
        )

    def test_of_layers_that_are_left_alone(self, module, data, make_trainer):
        prune = self.prune(module, pairs=[(module.net[4], "weight")])
        compression = lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD(), exclude_modules="net.4")
        make_trainer(max_epochs=EPOCHS, callbacks=[compression, prune]).fit(module, datamodule=Data(data))
        assert isinstance(module.net[2], lp.LowRankLinear)
        assert float((module.net[4].weight == 0).float().mean()) > 0.4

    def test_of_layers_that_a_checkpoint_has_cut(self, module, data, make_trainer, tmp_path):
        compression = lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD())
        trainer = make_trainer(max_epochs=2, callbacks=[compression])
        trainer.fit(module, datamodule=Data(data))
        trainer.save_checkpoint(tmp_path / "cut.ckpt")
        fresh = type(module)()
        callbacks = [lp.CompressionCallback(SURGERY, 0.5, factorization=lp.SVD()), self.prune(fresh)]
        with pytest.raises(UnsupportedError, match="layers that have been replaced"):
            make_trainer(max_epochs=EPOCHS, callbacks=callbacks).fit(
                fresh, datamodule=Data(data), ckpt_path=tmp_path / "cut.ckpt"
            )

    def test_in_a_second_run(self, module, data, make_trainer):
        compression = lp.CompressionCallback(0, 0.5, factorization=lp.SVD())
        make_trainer(callbacks=[compression]).fit(module, datamodule=Data(data))
        make_trainer(callbacks=[compression, self.prune(module)]).fit(module, datamodule=Data(data))
        weights = [part.weight for layer in module.net[::2] for part in (layer.A, layer.B)]
        assert sum(int((one == 0).sum()) for one in weights) == pytest.approx(sum(map(torch.numel, weights)) / 2, abs=1)
