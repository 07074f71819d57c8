import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.callbacks._self_distillation import SelfDistillation
from lightning_prehab.callbacks._trainer import find_callback
from lightning_prehab.errors import ArgumentError
from tests.same_model import assert_same_weights


class Lit(pl.LightningModule):
    def __init__(self, by_hand=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 5))
        self.by_hand, self.dense, self.seen = by_hand, [], []

    def training_step(self, batch, batch_idx):
        answer = self.net(batch[0])
        loss = nn.functional.cross_entropy(answer, batch[1])
        if self.by_hand and self.trainer.current_epoch in (1, 2):
            self.dense = self.dense or [copy.deepcopy(self.net).eval()]
            with torch.no_grad():
                p = self.dense[0](batch[0]).log_softmax(-1)
            loss = loss + self.by_hand * (p.exp() * (p - answer.log_softmax(-1))).sum(-1).mean()
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.seen.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


@pytest.fixture
def rows():
    return DataLoader(TensorDataset(torch.randn(64, 12), torch.randint(5, (64,))), 16)


def run(rows, make_trainer, by_hand, strength, regularizer=None, path=None, epochs=4, **settings):
    torch.manual_seed(1)
    lit = Lit(by_hand)
    prehab = lp.PrehabCallback(regularizer, start_epoch=1, update_steps=2, self_distillation=strength)
    callbacks = [prehab, lp.CompressionCallback(3, 0.4, calibration_batches=4), *settings.pop("extra", ())]
    trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, **settings)
    trainer.fit(lit, rows, ckpt_path=path)
    return lit, trainer


@pytest.mark.parametrize("regularizer", [None, lp.StableRank()], ids=["shrinkage", "penalty"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=str)
def test_gradients_are_those_of_a_hand_written_step(regularizer, settings, rows, make_trainer):
    hand, _ = run(rows, make_trainer, 0.6, 0.0, regularizer, **settings)
    ours, trainer = run(rows, make_trainer, 0.0, 0.6, regularizer, **settings)
    for one, other in zip(hand.seen, ours.seen, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)
    assert trainer.callback_metrics["prehab/distillation"] > 0
    helper = find_callback(trainer, SelfDistillation)
    assert helper._distiller.teacher is None  # let go of at the cut


@pytest.mark.parametrize("last", [2, 3, 4])
def test_resumed_bit_by_bit(last, rows, make_trainer, tmp_path):
    """Before prehab, in the middle of it, after the cut."""

    def saved():
        return [ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)]

    whole, _ = run(rows, make_trainer, 0.0, 0.6, epochs=5, extra=saved(), enable_checkpointing=True)
    path = tmp_path / f"epoch={last - 1}.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["SelfDistillation"]
    assert (state["teacher"] is not None) == (last in (2, 3))
    resumed, _ = run(rows, make_trainer, 0.0, 0.6, epochs=5, path=path)
    assert_same_weights(resumed, whole)


def test_without_it_nothing_is_added(rows, make_trainer):
    _, trainer = run(rows, make_trainer, 0.0, 0.0)
    assert find_callback(trainer, SelfDistillation) is None


@pytest.mark.parametrize("strength", [0.0, 0.6])
def test_the_teacher_goes_on_after_the_cut(strength, rows, make_trainer):
    """Beside a teacher of prehab the model from before that, else the one before the cut, whose tail is off."""

    class Keep(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                early.update(copy.deepcopy(pl_module.state_dict()))

        def on_before_surgery(self, trainer, pl_module):
            late.update(copy.deepcopy(pl_module.state_dict()))

    early, late = {}, {}
    rehab = lp.RehabDistillation()
    _, trainer = run(rows, make_trainer, 0.0, strength, extra=[Keep(), rehab])
    assert trainer.callback_metrics["rehab/distillation"] > 0
    teacher = rehab.state_dict()["teacher"]
    expected, other = (early, late) if strength else (late, early)
    assert all(torch.equal(teacher[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(teacher["net.0.weight"], other["net.0.weight"])


def test_a_cut_that_no_prehab_has_come_before_is_waited_out(rows, make_trainer):
    """The first of two cuts is at the first epoch: the model from before prehab is the one that it leaves."""
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            taught = "prehab/distillation" in trainer.callback_metrics
            seen.setdefault(trainer.current_epoch, set()).add(taught)
            if trainer.current_epoch == 1:
                teacher = find_callback(trainer, SelfDistillation).teacher
                assert any(isinstance(one, lp.LowRankLinear) for one in teacher.module.modules())

    torch.manual_seed(1)
    prehab = lp.PrehabCallback(start_epoch=1, update_steps=2, self_distillation=0.6)
    surgery = lp.CompressionCallback([0, 3], [0.7, 0.4], calibration_batches=4, factorization=lp.SVD())
    trainer = make_trainer(max_epochs=4, callbacks=[prehab, surgery, Look()])
    trainer.fit(Lit(), rows)
    assert seen == {0: {False}, 1: {True}, 2: {True}, 3: {True}}  # metrics stay
    assert find_callback(trainer, SelfDistillation)._done


def test_a_wrong_strength():
    with pytest.raises(ArgumentError, match="self_distillation must be finite and not negative, got -1"):
        lp.PrehabCallback(self_distillation=-1)
