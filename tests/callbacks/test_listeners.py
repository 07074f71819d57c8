import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_prehab as lp
from lightning_prehab.callbacks import _announcement, _distributed
from lightning_prehab.errors import PrehabError
from lightning_prehab.layers import LowRankLayer


class Diary(pl.Callback):
    """Writes down each call, and how many low-rank layers there were."""

    def __init__(self):
        self.calls = []

    def on_before_surgery(self, trainer, pl_module):
        self.calls.append(("before", trainer.current_epoch, cuts(pl_module)))

    def on_surgery(self, trainer, pl_module, report):
        self.calls.append(("after", trainer.current_epoch, cuts(pl_module)))


def cuts(module):
    return sum(isinstance(part, LowRankLayer) for part in module.modules())


@pytest.mark.parametrize("epoch", [0, 1])
def test_callbacks_and_the_module_are_told_before_and_after(epoch, mlp, loader, make_trainer, lit_class):
    class Module(lit_class):
        def on_before_surgery(self, trainer, pl_module):
            assert pl_module is self
            diary.calls.append(("module before", trainer.current_epoch, cuts(self)))

    diary, compression = Diary(), lp.CompressionCallback(epoch=epoch, keep=0.5)
    make_trainer(max_epochs=2, callbacks=[diary, compression]).fit(Module(mlp), loader)
    assert cuts(mlp) > 0
    assert diary.calls == [("before", epoch, 0), ("module before", epoch, 0), ("after", epoch, cuts(mlp))]


def test_a_listener_that_fails_leaves_the_module_as_it_was(mlp, loader, make_trainer, lit_class):
    class Refuses(pl.Callback):
        def on_before_surgery(self, trainer, pl_module):
            self.weights = [weight.clone() for weight in pl_module.parameters()]
            raise RuntimeError("not yet")

    refuses, lit = Refuses(), lit_class(mlp)
    trainer = make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(epoch=1, keep=0.5), refuses])
    with pytest.raises(RuntimeError, match="not yet"):
        trainer.fit(lit, loader)
    assert cuts(lit) == 0
    assert all(torch.equal(*pair) for pair in zip(lit.parameters(), refuses.weights, strict=True))


def test_a_listener_that_fails_after_the_cut_is_an_error_on_all_processes(monkeypatch):
    class Fails(pl.Callback):
        def on_surgery(self, trainer, pl_module, report):
            raise OSError("disk full")

    def announced(callbacks, answer):
        monkeypatch.setattr(_distributed, "gather", lambda trainer, value: said.append(value) or answer(value))
        trainer = SimpleNamespace(world_size=2, callbacks=callbacks)
        module = SimpleNamespace(log_dict=lambda *_, **__: None)
        _announcement.announce(trainer, module, SimpleNamespace(keep=0.5, model_keep=0.5), 1)

    for part in ("show", "log_report"):
        monkeypatch.setattr(_announcement, part, lambda *_: None)
    said = []
    with pytest.raises(OSError, match="disk full"):
        announced([Fails()], lambda own: [None, own])
    assert said == ["disk full"]
    with pytest.raises(PrehabError, match="Rank 1 failed: disk full"):
        announced([], lambda own: [own, "disk full"])


def test_nobody_is_told_of_a_surgery_that_a_resumed_run_repeats(mlp, loader, make_trainer, lit_class, tmp_path):
    def run(epochs, ckpt_path=None):
        diary, saved = Diary(), ModelCheckpoint(tmp_path, save_last=True)
        callbacks = [lp.CompressionCallback(epoch=1, keep=0.5), diary, saved]
        make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True).fit(
            lit_class(copy.deepcopy(mlp)), loader, ckpt_path=ckpt_path
        )
        return [when for when, _, _ in diary.calls]

    assert run(2) == ["before", "after"]
    assert run(3, tmp_path / "last.ckpt") == []
