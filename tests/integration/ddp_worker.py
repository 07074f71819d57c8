"""Started by torchrun in two processes; every check runs on both ranks. Rank 0 prints the name of each that passed."""

import copy
import logging
import sys
import tempfile
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.logger_connector.result import warning_cache as asked_for
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.callbacks import _distributed, _site
from lightning_prehab.errors import PrehabError
from lightning_prehab.layers import LowRankLayer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
STRENGTH = 0.3
EXACT = lp.StableRank(first_steps=3000, steps=100)


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 6))


def make_data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(192, 12, generator=generator) @ torch.diag(torch.linspace(2, 0.1, 12))
    return x, torch.tanh(x @ torch.randn(12, 6, generator=generator))


class RecordingSGD(torch.optim.SGD):
    seen: list

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        self.seen.append([None if p.grad is None else p.grad.clone() for g in self.param_groups for p in g["params"]])
        super().step()
        return loss


class Lit(pl.LightningModule):
    def __init__(self, net, optimizer, unused=False, manual=False):
        super().__init__()
        self.net = net
        self.unused = nn.Linear(5, 4) if unused else None
        self.optimizer = optimizer
        self.automatic_optimization = not manual
        self.batches, self.losses = [], []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.batches.append(batch)
        self.losses.append(loss.detach())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        optimizer.seen = []
        return optimizer


def fit(lit, callbacks, epochs, strategy=None, **settings):
    x, y = make_data()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", **(strategy or {})),
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tempfile.gettempdir(),
        **settings,
    )
    trainer.fit(lit, DataLoader(TensorDataset(x, y), 16))
    return trainer


def on_all_ranks(tensor):
    """The tensors of all ranks, stacked."""
    gathered = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, tensor.contiguous())
    return torch.stack(gathered)


def assert_ranks_identical(module):
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        first, second = on_all_ranks(tensor.detach())
        assert torch.equal(first, second), name


def exact_penalty(layers):
    values = [torch.linalg.svdvals(layer.weight) for layer in layers]
    return STRENGTH * torch.stack([s.square().sum() / s[0].square() for s in values]).mean()


def check_penalty(unused, accumulate=1, **strategy):
    """The gradient that the optimizers see is that of the task averaged over ranks, plus the penalty once."""
    lit = Lit(make_net(), lambda p: RecordingSGD(p, lr=0.0), unused)
    reference = copy.deepcopy(lit)
    prehab = lp.PrehabCallback(EXACT, STRENGTH)
    trainer = fit(lit, [prehab], 1, strategy, accumulate_grad_batches=accumulate)
    assert prehab._into_loss != bool(strategy.get("find_unused_parameters"))
    window = lit.batches[:accumulate]
    task = sum(nn.functional.mse_loss(reference.net(x), y) for x, y in window) / accumulate
    layers = [module for module in reference.modules() if type(module) is nn.Linear]
    assert len(layers) == 3 + unused
    mine = torch.autograd.grad(task, list(reference.net.parameters()))
    extra = torch.autograd.grad(exact_penalty(layers), list(reference.parameters()), allow_unused=True)
    seen = trainer.optimizers[0].seen[0]
    for index, penalty in enumerate(extra):
        expected = torch.zeros_like(list(reference.parameters())[index]) if penalty is None else penalty
        if index < len(mine):
            expected = expected + on_all_ranks(mine[index]).mean(0)
        ours = torch.zeros_like(expected) if seen[index] is None else seen[index]
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def check_surgery(manual, **strategy):
    """Ranks stay bit-identical after every epoch, the loss goes on falling, the first moments are carried exactly."""
    moments = {}

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            assert_ranks_identical(pl_module)
            assert trainer.strategy.model.module is pl_module
            if trainer.current_epoch == 1:
                for name, layer in lp.find_targets(pl_module).items():
                    moments[name] = trainer.optimizers[0].state[layer.weight]["exp_avg"].clone()

        def on_surgery(self, trainer, pl_module, report):
            assert_ranks_identical(pl_module)
            state = trainer.optimizers[0].state
            for name, rank in report.ranks.items():
                if rank is not None:
                    low = pl_module.get_submodule(name)
                    a, b = low.A.weight.detach(), low.B.weight.detach()
                    torch.testing.assert_close(
                        state[low.A.weight]["exp_avg"], b.mT @ moments[name], atol=1e-6, rtol=1e-6
                    )
                    torch.testing.assert_close(
                        state[low.B.weight]["exp_avg"], moments[name] @ a.mT, atol=1e-6, rtol=1e-6
                    )

    lit = Lit(make_net(), lambda p: torch.optim.Adam(p, lr=5e-3), manual=manual)
    compression = lp.CompressionCallback(2, keep=0.5, calibration_batches=4)
    prehab = lp.PrehabCallback(lp.TailEnergy(), 0.01, space="loss")
    fit(lit, [prehab, compression, lp.RehabSchedule(6), Watch()], 6, strategy)
    assert compression.report.keep <= 0.5
    assert any(isinstance(module, lp.LowRankLinear) for module in lit.modules())
    epochs = on_all_ranks(torch.stack(lit.losses)).mean(0).reshape(6, -1).mean(1)
    assert epochs[5] < epochs[3] < epochs[0], epochs


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=24),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 24),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
}


def check_learning_rates(name):
    """The schedule goes on as without a surgery, with the factor of RehabSchedule on top."""

    class Scheduled(Lit):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = {"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    class Rates(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen.append(optimizer.param_groups[0]["lr"])

    plain, cut, warm = Rates(), Rates(), Rates()
    for watch, callbacks in (
        (plain, []),
        (cut, [lp.CompressionCallback(2, calibration_batches=4)]),
        (warm, [lp.CompressionCallback(2, calibration_batches=4), lp.RehabSchedule(5, start_factor=0.2)]),
    ):
        fit(Scheduled(make_net(), lambda p: torch.optim.Adam(p, lr=0.01)), [*callbacks, watch], 4)
    assert len(plain.seen) == 24
    assert cut.seen == plain.seen
    factors = [1.0] * 12 + [0.2 + 0.8 * min(step / 5, 1) for step in range(12)]
    assert warm.seen == pytest.approx([rate * factor for rate, factor in zip(plain.seen, factors, strict=True)])


def check_gradients_after_surgery():
    """After the surgery the wrapper averages the gradients of the new parameters over the ranks."""
    lit = Lit(make_net(), lambda p: RecordingSGD(p, lr=0.0))
    trainer = fit(lit, [lp.CompressionCallback(1, keep=0.5)], 2)
    loss = nn.functional.mse_loss(lit.net(lit.batches[-1][0]), lit.batches[-1][1])
    local = torch.autograd.grad(loss, list(lit.net.parameters()))
    for ours, mine in zip(trainer.optimizers[0].seen[-1], local, strict=True):
        torch.testing.assert_close(ours, on_all_ranks(mine).mean(0), atol=1e-7, rtol=1e-5)


def check_statistics(epoch):
    """Two ranks plan and cut as one process does that sees the data of both."""
    x, y = make_data()
    lit = Lit(make_net(), lambda p: torch.optim.SGD(p, lr=0.0))
    reference = nn.ModuleDict({"net": copy.deepcopy(lit.net)})
    compression = lp.CompressionCallback(epoch, keep=0.4)
    fit(lit, [compression], 2)
    targets = lp.find_targets(reference)
    statistics = lp.collect_statistics(
        reference, targets, [(x, y)], lambda m, b: nn.functional.mse_loss(m["net"](b[0]), b[1]), gradients=True
    )
    report = lp.apply_plan_(reference, lp.make_plan(targets, 0.4, statistics=statistics), statistics)
    assert compression.report.ranks == report.ranks
    assert compression.report.spectra.keys() >= report.spectra.keys() != set()
    for name, spectrum in report.spectra.items():
        shared = compression.report.spectra[name].values
        assert shared == pytest.approx(spectrum.values, rel=1e-3, abs=1e-3 * spectrum.values[0])
    for name, rank in report.ranks.items():
        if rank is not None:
            ours, theirs = lit.get_submodule(name).weight, reference.get_submodule(name).weight
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def check_sums_are_sent_in_buckets():
    """A few large tensors stand for many small ones, with bounded room beside them, and the sums are the same."""

    def statistics():
        torch.manual_seed(distributed.get_rank())
        layers = {str(n): lp.LayerStatistics(n, 5, gradients=True, halves=True) for n in (3, 40, 7, 8)}
        for n, layer in layers.items():
            layer.update_inputs(torch.randn(9, int(n)))
            layer.update_gradients(torch.randn(9, 5))
        layers["7"].half.update_inputs(torch.randn(2, 7))
        layers["again"] = lp.LayerStatistics(3, 5, gradients=True, halves=True)
        layers["again"].share_inputs_(layers["3"])
        return layers

    class Sums(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            tensors = {id(t): t for layer in statistics().values() for _, t in layer.tensors()}
            for room, most in ((64 * 2**20, 2), (4000, 6)):  # one of floats and one of counts; a Gram of 40 is alone
                found, sent = statistics(), []
                expected = {
                    (name, key): sum(on_all_ranks(tensor))
                    for name, one in found.items()
                    for key, tensor in one.tensors()
                }
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(_distributed, "BUCKET_BYTES", room)
                    reduce = distributed.all_reduce
                    patch.setattr(
                        distributed,
                        "all_reduce",
                        lambda t, **k: (sent.append(t.nbytes), reduce(t, **k)),  # noqa: B023
                    )
                    _distributed.sum_statistics_(trainer, found)
                for name, one in found.items():
                    for key, tensor in one.tensors():
                        torch.testing.assert_close(tensor, expected[name, key], rtol=0, atol=0)
                assert len(sent) <= most, sent
                assert sum(sent) == sum(t.nbytes for t in tensors.values())
                assert max(sent) <= max(room, 40 * 40 * 4)

    fit(Lit(make_net(), torch.optim.Adam), [Sums()], 1)


class FailsOnRankOne(lp.SVD):
    def __call__(self, weight, rank, statistics=None):
        if distributed.get_rank() == 1:
            raise MemoryError("no memory on this rank")
        return super().__call__(weight, rank, statistics)


def check_an_error_on_one_rank_reaches_all():
    """No rank hangs, and no model is changed."""
    lit = Lit(make_net(), lambda p: torch.optim.SGD(p, lr=0.0))
    before = copy.deepcopy(lit.net)
    plan_error = lp.CompressionCallback(1, keep=0.0005)
    for callback, message in (
        (lp.CompressionCallback(1, factorization=FailsOnRankOne()), "no memory"),
        (plan_error, "keep=0.0005 allows"),
    ):
        with pytest.raises((PrehabError, MemoryError), match=message):
            fit(lit, [callback], 2)
    for ours, theirs in zip(lit.net.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(not module._forward_hooks for module in lit.modules())


class CountsItems(lp.KroneckerSVD):
    items: list

    def decompose(self, items):
        CountsItems.items.append(len(items))
        return super().decompose(items)


class CountsCalls(lp.ParameterBudget):
    calls: list

    def __call__(self, layers):
        CountsCalls.calls.append(len(layers))
        return super().__call__(layers)


def check_one_rank_decides():
    CountsCalls.calls = []
    lit = Lit(make_net(), torch.optim.Adam)
    compression = lp.CompressionCallback(1, policy=CountsCalls(0.5))
    fit(lit, [compression], 2)
    assert CountsCalls.calls == ([3] if distributed.get_rank() == 0 else [])
    assert_ranks_identical(lit)


def check_each_layer_is_decomposed_by_one_rank():
    for epoch in (0, 1):
        CountsItems.items = []
        lit = Lit(make_net(), torch.optim.Adam)
        compression = lp.CompressionCallback(epoch, keep=0.5, factorization=CountsItems())
        fit(lit, [compression], epoch + 1)
        assert len(CountsItems.items) == 1  # never twice on this rank either
        both = on_all_ranks(torch.tensor(CountsItems.items))
        assert sorted(int(count) for count in both) == [1, 2]
        assert len(compression.report.spectra) == len(compression.report.ranks) == 3  # and known on every rank


def check_a_broken_step_breaks_on_all_ranks():
    """Whatever a rank does for itself on the road: no rank hangs, and no model is changed."""

    def broken(*_):
        raise MemoryError("no memory on this rank")

    for step, epoch, policy in (
        ("collect_in_own_pass", 0, None),
        ("probe_in_own_pass", 1, lp.ProbeBudget(0.5)),
        ("Trial", 1, lp.CalibratedBudget(0.5, trials=2)),
        ("compute_factors", 1, None),
        ("prepare_swap", 1, None),
    ):
        lit = Lit(make_net(), lambda p: torch.optim.SGD(p, lr=0.0))
        before = copy.deepcopy(lit.net)
        with pytest.MonkeyPatch.context() as patch:
            if distributed.is_initialized() and distributed.get_rank() == 1:
                patch.setattr(_site, step, broken)
            with pytest.raises((PrehabError, MemoryError), match="no memory"):
                fit(lit, [lp.CompressionCallback(epoch, keep=0.5, policy=policy)], epoch + 1)
        assert str(lit.net) == str(before), step
        for ours, theirs in zip(lit.net.parameters(), before.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert all(not module._forward_hooks for module in lit.modules())


def check_centered_whitening_shares_the_bias():
    lit = Lit(nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 6)), torch.optim.Adam)
    fit(lit, [lp.CompressionCallback(1, keep=0.6, factorization=lp.WhitenedSVD(centered=True))], 3)
    assert lit.net[0].bias is not None
    assert_ranks_identical(lit)


def check_sparse_parts_are_shared():
    """Each rank computes its layers; values and places then agree, and the wrapper trains the values."""
    torch.manual_seed(0)
    lit = Lit(nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 14), nn.Linear(14, 6)), torch.optim.Adam)
    method = lp.LowRankPlusSparse(0.1, lp.WhitenedSVD(centered=True))
    cut = []

    class Watch(pl.Callback):
        def on_surgery(self, trainer, pl_module, report):
            cut.extend(m.values.detach().clone() for m in pl_module.modules() if hasattr(m, "indices"))

    compression = lp.CompressionCallback(1, keep=0.7, factorization=method)
    fit(lit, [compression, Watch()], 3)
    layers = [module for module in lit.modules() if isinstance(module, lp.LowRankPlusSparseLinear)]
    assert len(layers) == len(cut) > 1
    assert_ranks_identical(lit)
    for layer, values in zip(layers, cut, strict=True):
        first, second = on_all_ranks(layer.indices)
        assert torch.equal(first, second)
        assert not torch.equal(layer.values, values)
    assert compression.report.keep <= 0.7


class EveryKind(nn.Module):
    """Convolutions, one of them with groups, attention, and a fused projection."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, groups=2))
        self.attention = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 6)

    def forward(self, x):
        tokens = self.attention(self.conv(x.view(-1, 1, 3, 4)).flatten(2).mT)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.head((torch.tanh(q * k) * v).mean(1))


def check_every_kind_of_layer(layout):
    """Also factors of rank 1, whose strides DDP compares between the processes. All that is cut goes on learning."""
    torch.manual_seed(0)
    lit = Lit(EveryKind(), torch.optim.Adam)
    cut = {}

    class Watch(pl.Callback):
        def on_surgery(self, trainer, pl_module, report):
            assert_ranks_identical(pl_module)
            parts = [m for m in pl_module.modules() if isinstance(m, LowRankLayer)]
            cut.update({p: p.detach().clone() for part in parts for p in part.parameters() if p.dim() > 1})

    compression = lp.CompressionCallback(
        1,
        keep=0.6,
        split_fused=True,
        rank_overrides={"*.k": 1, "*linear1": 1, "*.out_proj": 1, "conv.2": 3},
        layout=layout,
    )
    fit(lit, [lp.PrehabCallback(), compression, Watch()], 3)
    assert_ranks_identical(lit)
    kinds = {type(module).__name__ for module in lit.modules()}
    linear = "PivotLinear" if layout == "pivot" else "LowRankLinear"
    assert {"LowRankConv2d", "LowRankMultiheadAttention", "LowRankBlocks", linear} <= kinds
    orders = [name for name, _ in lit.named_buffers() if name.endswith(".order")]
    assert bool(orders) == (layout == "pivot")
    assert cut
    assert not any(torch.equal(parameter, before) for parameter, before in cut.items())
    assert compression.report.keep <= 0.6


def check_several_cuts(layout, regularizer):
    """Layers of all kinds are cut again; between the cuts the regularizer goes on, and the ranks agree bit by bit."""
    torch.manual_seed(0)
    lit, reports = Lit(EveryKind(), torch.optim.Adam), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx % 3 == 2:
                assert_ranks_identical(pl_module)

        def on_surgery(self, trainer, pl_module, report):
            reports.append(report.keep)

    compression = lp.CompressionCallback([1, 2, 3], [0.7, 0.5, 0.3], split_fused=True, layout=layout)
    prehab = lp.PrehabCallback(regularizer, space="loss", update_steps=4)
    fit(lit, [prehab, compression, lp.RehabSchedule(warmup_steps=3), Watch()], 4)
    assert_ranks_identical(lit)
    assert torch.equal(*on_all_ranks(torch.tensor(reports)))
    assert [keep <= asked for keep, asked in zip(reports, (0.7, 0.5, 0.3), strict=True)] == [True] * 3
    assert sum(layer.was is not None for layer in compression.report.plan.layers) > 5


def check_shrinkage():
    """Statistics are summed, the ranks agree on metrics, plans and weights, and the cut comes when it is free."""
    lit = Lit(make_net(), torch.optim.Adam)
    forecasts = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert_ranks_identical(pl_module)
            forecasts.append(prehab.forecast)

        def on_surgery(self, trainer, pl_module, report):
            forecasts.append("surgery")

    prehab = lp.PrehabCallback(lp.TailShrinkage(refresh=3), space="loss", update_steps=8, forecast_every_n_steps=4)
    compression = lp.CompressionCallback("auto", 0.5, calibration_batches=3, forecast_below=1e-3)
    fit(lit, [prehab, compression, Watch()], 6)
    seen = on_all_ranks(torch.tensor([0.0 if f is None or f == "surgery" else f for f in forecasts]))
    assert torch.equal(*seen)
    assert forecasts[forecasts.index("surgery") - 1] < 1e-5


def check_spectral_work_is_shared():
    """Each rank brings its own layers up to date alone; what comes out is what one process computes by itself."""
    prepared, whole, alone = [], [], lp.TailShrinkage.prepare_

    def counted(self, weight, rank, memory, progress, metric):
        prepared.append(tuple(weight.shape))
        reference = {key: value.clone() for key, value in memory.items()}
        alone(self, weight, rank, memory, progress, metric)
        alone(self, weight, rank, reference, progress, metric)
        whole.append(all(torch.equal(memory[key], reference[key]) for key in memory))

    lit = Lit(make_net(), torch.optim.Adam)
    lp.TailShrinkage.prepare_ = counted
    try:
        fit(lit, [lp.PrehabCallback(lp.TailShrinkage(rank=2, refresh=100), stop_epoch=2)], 2)
    finally:
        lp.TailShrinkage.prepare_ = alone
    assert all(whole)
    assert_ranks_identical(lit)
    ranks = [int(torch.linalg.matrix_rank(layer.weight, rtol=1e-5)) for layer in lit.net if type(layer) is nn.Linear]
    assert ranks == [2, 2, 2]
    owned = {0: {(14, 16)}, 1: {(16, 12), (6, 14)}}[distributed.get_rank()]  # by what they cost
    assert set(prepared) == owned
    assert prepared[0] in owned
    calls = on_all_ranks(torch.tensor([len(prepared)]))
    assert int(calls[1]) == 2 * int(calls[0]) > 2

    prehab = lp.PrehabCallback(lp.StableRank())
    fit(Lit(make_net(), torch.optim.Adam), [Saved(prehab), prehab], 1)


class Saved(pl.Callback):
    """The state for a checkpoint holds the warm starts of all layers, and is the same on every rank."""

    def __init__(self, prehab):
        self.prehab = prehab

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        own = [layer.name for layer in self.prehab._layers if "v" in layer.memory]
        if batch_idx == 0:
            assert own == [["net.2"], ["net.0", "net.4"]][trainer.global_rank]
        for layer in self.prehab.state_dict()["layers"].values():
            first, second = on_all_ranks(layer["memory"]["v"])
            assert torch.equal(first, second)


def check_strength_share():
    lit = Lit(make_net(), torch.optim.Adam)
    fit(lit, [lp.PrehabCallback(lp.NuclearNorm(), strength_share=0.3)], 2)
    assert_ranks_identical(lit)


def check_policies_that_measure():
    """Probes and first-order effects are measured by each rank for its own layers or data, and merged."""
    for policy in (lp.ProbeBudget(0.5), lp.ZeroSum(0.5), lp.CalibratedBudget(0.5, trials=4)):
        lit = Lit(make_net(), torch.optim.Adam)
        compression = lp.CompressionCallback(1, policy=policy, factorization=lp.KroneckerSVD("auto", "auto"))
        fit(lit, [compression], 2)
        assert compression.report.keep <= 0.5
        assert_ranks_identical(lit)
        notes = [None, None]
        distributed.all_gather_object(notes, (compression.report.plan.note, compression.report.plan.loss_increase))
        assert notes[0] == notes[1]


def check_logs_ask_for_nothing():
    """What our callbacks log is equal on all processes: Lightning does not ask to send it, and does not send it."""

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.log("mine", 1.0)  # what Lightning complains of

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            metas = [result.meta for result in trainer._results.values()]
            sent.update(meta.name for meta in metas if meta.sync.should and not meta.sync.rank_zero_only)

    settings = {"keep": 0.5, "calibration_batches": 3}
    for prehab, sums in (
        (lp.PrehabCallback(update_steps=4, forecast_every_n_steps=2), set()),
        (lp.PrehabCallback(lp.StableRank(), injection="gradient"), set()),
        (lp.PrehabCallback(lp.StableRank(), injection="loss"), {"prehab/penalty"}),  # each has a part of the layers
        (lp.PaperPrehab(), None),
    ):
        asked_for.clear()
        sent, lit = set(), Lit(make_net(), torch.optim.Adam)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callbacks = [prehab, lp.CompressionCallback(2, **settings), lp.RehabSchedule(warmup_steps=3), Watch()]
            trainer = fit(lit, callbacks, 4)
        about = [str(warning.message) for warning in caught if "sync_dist" in str(warning.message)]
        if distributed.get_rank() == 0:
            assert len(about) == 1, about
            assert "'mine'" in about[0]
        assert {"compression/keep", "prehab/stable_rank"} <= set(trainer.callback_metrics)
        assert sums is None or sent == sums, sent


class Logits(nn.Module):
    """Says that its outputs are logits; its running statistics are those of each rank's own batches."""

    def __init__(self):
        super().__init__()
        self.inner = make_net()
        self.inner.insert(1, nn.BatchNorm1d(16))

    def forward(self, x):
        return {"logits": self.inner(x)}


class Labelled(Lit):
    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])["logits"]
        self.batches.append(batch)
        loss = nn.functional.cross_entropy(logits, batch[1].argmax(-1))
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None


def check_distillation(manual=False, accumulate=1, **strategy):
    """The gradients are the mean over the ranks of those of a hand-written step; the teacher is the same everywhere."""
    dense, factor = [], 0.7

    class Keep(pl.Callback):
        def on_before_surgery(self, trainer, pl_module):
            dense.append(copy.deepcopy(pl_module.net).eval())

    lit = Labelled(Logits(), lambda p: RecordingSGD(p, lr=0.0), manual=manual)
    rehab = lp.RehabDistillation(factor, temperature=2.0)
    callbacks = [lp.CompressionCallback(1, keep=0.5, calibration_batches=3), Keep(), rehab]
    trainer = fit(lit, callbacks, 2, strategy, accumulate_grad_batches=accumulate)
    teacher = rehab.state_dict()["teacher"]
    for tensor in teacher.values():
        first, second = on_all_ranks(tensor)
        assert torch.equal(first, second)
    assert {name.removeprefix("net."): tensor.shape for name, tensor in teacher.items()} == {
        name: tensor.shape for name, tensor in dense[0].state_dict().items()
    }
    for buffer in dense[0].buffers():
        distributed.broadcast(buffer, src=0)
    expected = [torch.zeros_like(parameter) for parameter in lit.parameters()]
    reference = copy.deepcopy(lit.net).train()
    for x, y in lit.batches[6 : 6 + accumulate]:
        answer = reference(x)["logits"]
        with torch.no_grad():
            p = (dense[0](x)["logits"] / 2).log_softmax(-1)
        distance = 4.0 * (p.exp() * (p - (answer / 2).log_softmax(-1))).sum(-1).mean()
        loss = nn.functional.cross_entropy(answer, y.argmax(-1)) + factor * distance
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        expected = [total + gradient / accumulate for total, gradient in zip(expected, gradients, strict=True)]
    seen = trainer.optimizers[0].seen[6 // accumulate]
    for ours, mine in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, on_all_ranks(mine).mean(0), atol=1e-6, rtol=1e-5)


def check_factor_training(**strategy):
    """Frozen parameters make nobody wait, and the factors are those of one process that sees all the data."""

    def cut_net():
        net = make_net()
        return nn.Sequential(lp.LowRankLinear.from_linear(net[0], 3), nn.Tanh(), *net[2:])

    lit = Lit(cut_net(), lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5))
    setting = {"product_decay": 0.1, "rate_B": 2.0, "alternate": 2, "train": "factors"}
    fit(lit, [lp.FactorTraining(**setting)], 2, strategy)
    assert_ranks_identical(lit)
    assert all(parameter.requires_grad for parameter in lit.parameters())
    reference = cut_net()
    a, b = reference[0].A.weight, reference[0].B.weight
    for step, batch in enumerate(lit.batches):
        inputs, targets = (on_all_ranks(part).flatten(0, 1) for part in batch)
        loss = nn.functional.mse_loss(reference(inputs), targets) + 0.05 * (b @ a).square().sum()
        gradients = torch.autograd.grad(loss, (a, b))
        with torch.no_grad():
            trained = step // 2 % 2  # B first
            (b, a)[trained].sub_(gradients[1 - trained], alpha=(0.2, 0.1)[trained])
    torch.testing.assert_close(lit.net[0].weight, b @ a, rtol=1e-4, atol=1e-5)
    for name, parameter in lit.net.named_parameters():
        if name not in ("0.A.weight", "0.B.weight"):
            assert torch.equal(parameter, reference.get_parameter(name)), name
    callbacks = [lp.CompressionCallback(1, 0.5, calibration_batches=3), lp.FactorTraining(rebalance_every=3, **setting)]
    lit = Lit(make_net(), torch.optim.Adam)
    fit(lit, callbacks, 3, strategy)
    assert_ranks_identical(lit)
    assert all(parameter.requires_grad for parameter in lit.parameters())


CHECKS = {
    "logs ask for nothing": check_logs_ask_for_nothing,
    "spectral work is shared": check_spectral_work_is_shared,
    "shrinkage": check_shrinkage,
    "strength share": check_strength_share,
    "policies that measure": check_policies_that_measure,
    "penalty": lambda: check_penalty(False),
    "penalty, accumulation": lambda: check_penalty(False, accumulate=3),
    "penalty, gradients as bucket views": lambda: check_penalty(False, gradient_as_bucket_view=True),
    "penalty, find_unused_parameters": lambda: check_penalty(False, find_unused_parameters=True),
    "penalty, unused layer": lambda: check_penalty(True, find_unused_parameters=True),
    "penalty, unused layer, bucket views": lambda: check_penalty(
        True, find_unused_parameters=True, gradient_as_bucket_view=True
    ),
    "surgery": lambda: check_surgery(manual=False),
    "surgery, manual": lambda: check_surgery(manual=True),
    "surgery, manual, static graph": lambda: check_surgery(manual=True, static_graph=True),
    "surgery, find_unused_parameters": lambda: check_surgery(manual=False, find_unused_parameters=True),
    "StepLR": lambda: check_learning_rates("StepLR"),
    "OneCycleLR": lambda: check_learning_rates("OneCycleLR"),
    "CosineAnnealingLR": lambda: check_learning_rates("CosineAnnealingLR"),
    "LambdaLR": lambda: check_learning_rates("LambdaLR"),
    "gradients after surgery": check_gradients_after_surgery,
    "statistics of ordinary steps": lambda: check_statistics(1),
    "statistics of an own pass": lambda: check_statistics(0),
    "statistics in buckets": check_sums_are_sent_in_buckets,
    "error on one rank": check_an_error_on_one_rank_reaches_all,
    "one rank decides": check_one_rank_decides,
    "each layer on one rank": check_each_layer_is_decomposed_by_one_rank,
    "a broken step": check_a_broken_step_breaks_on_all_ranks,
    "bias shift": check_centered_whitening_shares_the_bias,
    "sparse parts": check_sparse_parts_are_shared,
    "every kind of layer": lambda: check_every_kind_of_layer("factors"),
    "every kind of layer, pivot layout": lambda: check_every_kind_of_layer("pivot"),
    "several cuts": lambda: check_several_cuts("factors", lp.TailShrinkage(refresh=3)),
    "several cuts, pivot": lambda: check_several_cuts("pivot", lp.TailEnergy(refresh=3)),
    "distillation": check_distillation,
    "distillation, accumulation": lambda: check_distillation(accumulate=3),
    "distillation, manual": lambda: check_distillation(manual=True),
    "distillation, find_unused_parameters": lambda: check_distillation(find_unused_parameters=True),
    "distillation, static graph": lambda: check_distillation(static_graph=True),
    "factor training": check_factor_training,
    "factor training, bucket views": lambda: check_factor_training(gradient_as_bucket_view=True),
}

if __name__ == "__main__":
    for name, check in CHECKS.items():
        check()
        if distributed.get_rank() == 0:
            print(f"passed: {name}", flush=True)
    distributed.destroy_process_group()
    sys.exit(0)
