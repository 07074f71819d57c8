"""Layers that are frozen at first and unfrozen on the way, beside a surgery, in runs that are stopped and resumed."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError
from tests.same_model import assert_same_weights

UNFREEZE, EPOCHS = 2, 5


class Unfreeze(BaseFinetuning):
    """One layer at UNFREEZE, another an epoch later."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.net[0], pl_module.net[2]])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch in (UNFREEZE, UNFREEZE + 1):
            self.unfreeze_and_add_param_group(pl_module.net[2 * (epoch - UNFREEZE)], optimizer)


class Backbone(BackboneFinetuning):
    def __init__(self):
        super().__init__(unfreeze_backbone_at_epoch=UNFREEZE)

    def finetune_function(self, pl_module, epoch, optimizer):
        super().finetune_function(pl_module, epoch, optimizer)


def trainable(parameters):
    return torch.optim.AdamW([one for one in parameters if one.requires_grad], lr=0.01)


@pytest.fixture
def run(make_trainer, lit_class, loader, tmp_path):
    def run(kind, surgery, ckpt_path=None, save=False, first=True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 6))
        lit = lit_class(net, trainable)
        lit.backbone = net[0]
        callbacks = [kind(), lp.CompressionCallback(surgery, 0.5, factorization=lp.SVD())]
        callbacks = callbacks if first else callbacks[::-1]
        trainer = make_trainer(max_epochs=EPOCHS, callbacks=callbacks)

        class Save(pl.Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                trainer.save_checkpoint(tmp_path / f"start-{trainer.current_epoch}.ckpt")

            def on_train_epoch_end(self, trainer, pl_module):
                trainer.save_checkpoint(tmp_path / f"end-{trainer.current_epoch}.ckpt")

        if save:
            trainer.callbacks.append(Save())
        trainer.fit(lit, loader, ckpt_path=ckpt_path)
        return lit, trainer, callbacks[0 if first else 1]

    return run


def all_states(optimizer):
    return [(group["lr"], [dict(optimizer.state[one]) for one in group["params"]]) for group in optimizer.param_groups]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("surgery", [0, 1, UNFREEZE, UNFREEZE + 1, 4])
@pytest.mark.parametrize("kind", [Unfreeze, Backbone])
def test_it_resumes_bit_by_bit_from_every_epoch(kind, surgery, first, run, tmp_path):
    """Lightning alone leaves frozen what was unfrozen before a checkpoint; beside a surgery it goes on as it was."""
    reference, trainer, _ = run(kind, surgery, save=True, first=first)
    assert any(isinstance(part, lp.LowRankLinear) for part in reference.modules())
    assert all(one.requires_grad for one in reference.parameters())
    for moment in [f"end-{epoch}" for epoch in range(EPOCHS - 1)]:
        resumed, other, _ = run(kind, surgery, tmp_path / f"{moment}.ckpt", first=first)
        assert_same_weights(resumed, reference)
        assert [one.requires_grad for one in resumed.parameters()] == [True] * len([*reference.parameters()])
        torch.testing.assert_close(
            all_states(other.optimizers[0]), all_states(trainer.optimizers[0]), rtol=0, atol=0, msg=moment
        )


def test_stored_names_are_those_of_the_structure_that_is_there(run, tmp_path):
    lit, trainer, finetuning = run(Unfreeze, UNFREEZE + 1)
    names = {id(one): name for name, one in lit.named_parameters()}
    live = [[names[id(one)] for one in group["params"]] for group in trainer.optimizers[0].param_groups]
    stored = finetuning.state_dict()["internal_optimizer_metadata"][0]
    assert [group["params"] for group in stored] == live
    assert any(name.endswith(".A.weight") for group in live for name in group)


@pytest.mark.parametrize("surgery", [1, UNFREEZE, 3])
def test_a_checkpoint_with_names_of_the_dense_model_is_understood(surgery, run, tmp_path, monkeypatch):
    """As an older version has written it: groups from before the surgery keep the names of that time."""
    monkeypatch.setattr("lightning_prehab.callbacks.compression.rename_groups_", lambda *_: None)
    reference, _, finetuning = run(Unfreeze, surgery, save=True)
    stored = finetuning.state_dict()["internal_optimizer_metadata"][0]
    assert "net.4.weight" in stored[0]["params"]
    resumed, _, _ = run(Unfreeze, surgery, tmp_path / "end-3.ckpt")
    assert_same_weights(resumed, reference)


def test_a_group_of_another_model_is_named(run, tmp_path):
    run(Unfreeze, 1, save=True)
    checkpoint = torch.load(tmp_path / "end-3.ckpt")
    (state,) = (state for key, state in checkpoint["callbacks"].items() if "Unfreeze" in key)
    state["internal_optimizer_metadata"][0][1]["params"][0] = "net.9.weight"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"net\.9\.weight"):
        run(Unfreeze, 1, tmp_path / "other.ckpt")


def test_without_such_a_callback_nothing_is_written_and_nothing_unfrozen(make_trainer, lit, loader, tmp_path):
    lit.net[2].weight.requires_grad_(False)
    trainer = make_trainer(max_epochs=2, callbacks=[lp.CompressionCallback(1, 0.5, factorization=lp.SVD())])
    trainer.fit(lit, loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert not [key for key in torch.load(tmp_path / "end.ckpt") if "prehab" in key]
