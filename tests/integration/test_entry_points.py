"""The callbacks and ``compress_`` are two ways into the same code: the same ranks and weights on the same batches."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_prehab as lp


class AtOnce(pl.Callback):
    """A copy of the network right after the cut."""

    def on_surgery(self, trainer, pl_module, report):
        self.net, self.report = copy.deepcopy(pl_module.net), report


@pytest.mark.parametrize("factorization", [lp.SVD(), lp.WhitenedSVD(), lp.KroneckerSVD(), lp.FisherSVD()], ids=repr)
def test_callbacks_and_compress_agree(factorization, mlp, loader, make_trainer, lit_class):
    batches, dense, watch = list(loader), copy.deepcopy(mlp), AtOnce()
    cut = lp.CompressionCallback(0, 0.5, factorization=factorization, calibration_batches=len(batches))
    make_trainer(max_epochs=1, callbacks=[cut, watch]).fit(lit_class(mlp), loader)

    report = lp.compress_(
        dense,
        0.5,
        batches,
        factorization=factorization,
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
    )
    ranks = [{layer.name.removeprefix("net."): layer.rank for layer in r.plan.layers} for r in (watch.report, report)]
    assert ranks[0] == ranks[1]
    assert any(ranks[0].values())
    one, two = watch.net.state_dict(), dense.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
