"""Started by torchrun in two processes; every check runs on both. The first prints the name of each that passed."""

import logging
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.callbacks._factor_steps import FactorSteps
from lightning_prehab.callbacks._self_distillation import put_beside
from lightning_prehab.errors import PrehabError
from lightning_prehab.layers.pairs import factor_pairs
from lightning_prehab.sharded.copies import copy_of_sharded, places_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Tied weights, buffers, parameters in the root and in units."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(12)
        self.head, self.out = nn.Linear(12, 5), nn.Linear(12, 7, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(12), persistent=False)
        self.extra = nn.Parameter(torch.rand(12))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.float()).to(x.dtype) * self.scale.to(x.dtype) * self.extra.to(x.dtype)
        return self.head(x), self.out(x)


def sharded(kind, mesh):
    torch.manual_seed(0)
    net = Net()
    settings = {"mesh": mesh}
    if kind == "mixed":
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        net.norm = nn.Identity()
    if kind == "offloaded":
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if kind == "ignored":
        settings["ignored_params"] = {net.extra}
    for block in net.blocks:
        if kind == "layers":
            fully_shard(block.up, **settings)
            fully_shard([block.norm, block.down], **settings)
        fully_shard(block, **settings)
    fully_shard(net, reshard_after_forward=kind != "kept", **settings)
    return net


def check_copy(kind):
    """The same answers bit by bit, without the hooks, before and after the model has gone on."""
    mesh, calls = init_device_mesh("cpu", (2,)), []
    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    net = sharded(kind, mesh)
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    inputs = torch.randint(0, 7, (8,), generator=torch.Generator().manual_seed(distributed.get_rank()))
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)

    def step():
        sum(one.float().square().mean() for one in net(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.no_grad():
        net.eval()(inputs)  # leaves the root whole
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    half = [one.up.weight for one in net.blocks] if kind == "mixed" else []
    made = copy_of_sharded(net, {id(one): torch.bfloat16 for one in half})
    own = {one.to_local().data_ptr() for one in net.parameters() if isinstance(one, DTensor)}
    parameters = dict(made.named_parameters())
    assert all(isinstance(one, DTensor) for name, one in parameters.items() if name != "extra" or kind != "ignored")
    assert isinstance(made.extra, DTensor) == (kind != "ignored")
    assert not own & {one.to_local().data_ptr() for one in parameters.values() if isinstance(one, DTensor)} - {0}
    assert type(made) is type(net)
    assert (made.blocks[0].up.weight.dtype is torch.bfloat16) == (kind == "mixed")
    made.eval().requires_grad_(False)
    calls.clear()
    with torch.no_grad():
        first, right = made(inputs), net(inputs)
    assert len(calls) == 1
    torch.testing.assert_close(first, right)
    ours = whole(made)
    for name, parameter in whole(net).items():
        assert torch.equal(ours[name], parameter.to(ours[name].dtype))
    assert made.out.weight is made.embed.weight
    net.train()
    step()
    with torch.no_grad():
        torch.testing.assert_close(made(inputs), right)
        assert not torch.allclose(net.eval()(inputs)[0], right[0])
    assert {one.name for one in places_of(net)} == {one.name for one in places_of(made)}


def full(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def whole(module):
    """All weights of a module, gathered; its units are resharded."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()
    return {name: full(parameter).clone() for name, parameter in module.named_parameters()}


def on_all_ranks(tensor):
    """The tensors of all ranks, one after the other: the batch that one process would have seen."""
    gathered = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def make_net(cut):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 5)
    )
    if cut:
        net[0] = lp.LowRankLinear.from_linear(net[0], 3)
        net[4] = lp.LowRankLinear.from_linear(net[4], 5)
    return net


class Lit(pl.LightningModule):
    """Each process notes its batches and the whole gradients that the optimizer sees."""

    def __init__(self, cut, optimizer=None, groups=False, dropout=0.0, manual=False):
        super().__init__()
        self.cut, self.optimizer, self.groups, self.dropout = cut, optimizer, groups, dropout
        self.automatic_optimization = not manual
        self.batches, self.seen, self.net = [], [], None

    def configure_model(self):
        if self.net is not None:
            return
        self.net = make_net(self.cut)
        self.net[3].p = self.dropout
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[4], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer):
        self.seen.append({name: full(one.grad) for name, one in self.net.named_parameters() if one.grad is not None})

    def configure_optimizers(self):
        parameters = [*self.net.parameters()]
        if not self.groups:
            return self.optimizer(parameters)
        return self.optimizer([{"params": parameters[:2], "name": "first"}, {"params": parameters[2:], "name": "rest"}])


def rows():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(96, 12, generator=generator)
    return DataLoader(TensorDataset(x, (x @ torch.randn(12, 5, generator=generator)).argmax(-1)), 8)


def fit(lit, callbacks, epochs, path=None, in_parts=True, **settings):
    """Six steps an epoch."""
    torch.manual_seed(5 + distributed.get_rank())
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=in_parts
        ),
        max_epochs=epochs,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        **{"logger": False, "enable_checkpointing": False, **settings},
    )
    trainer.fit(lit, rows(), ckpt_path=path)
    return trainer


def shared_folder():
    """One for both."""
    found = [tempfile.mkdtemp() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(found)
    return Path(found[0])


class Rates(pl.Callback):
    def __init__(self):
        self.used = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.used.append([group["lr"] for group in optimizer.param_groups])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.5)


def check_schedule():
    """The factor of each group, what LearningRateMonitor shows, and a resume in the middle of the warm-up."""
    folder, monitor, rates = shared_folder(), LearningRateMonitor("step"), Rates()

    def callbacks(*others):
        return [lp.RehabSchedule(10, start_factor=0.0, end_factor=0.5, group_factors={"rest": 0.5}), *others]

    logger = CSVLogger(folder)
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    lit = Lit(True, sgd, groups=True)
    settings = {"logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True}
    fit(lit, callbacks(monitor, rates, saves), 3, **settings)
    factors = [min(step / 10, 1.0) if step <= 10 else 1.0 - 0.5 * (step - 10) / 8 for step in range(18)]
    expected = torch.tensor([[0.05 * factor, 0.025 * factor] for factor in factors])
    torch.testing.assert_close(torch.tensor(rates.used), expected)
    again, other = Lit(True, sgd, groups=True), Rates()
    fit(again, callbacks(other), 3, path=folder / "epoch=0.ckpt")
    assert other.used == rates.used[6:]
    assert_same(whole(lit.net), whole(again.net), atol=0, rtol=0)
    if distributed.get_rank() == 0:
        lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        shown = [float(line.split(",")[lines[0].split(",").index("lr-SGD/first")]) for line in lines[1:]]
        torch.testing.assert_close(torch.tensor(shown), expected[:, 0])


FACTORS = {
    "decoupled": {"product_decay": 0.3},
    "gradient": {"product_decay": 0.3, "decay_form": "gradient"},
    "rebalance": {"rebalance_every": 3},
    "all": {
        "product_decay": 0.3,
        "rebalance_every": 3,
        "rate_B": 2.0,
        "alternate": 2,
        "train": "factors_norms_biases",
    },
}


def check_factor_training(name):
    """Weights and moments are those of one process without a Trainer that sees all the data."""
    settings = FACTORS[name]

    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.2)

    lit = Lit(True, optimizer)
    uneven = name == "rebalance"
    trainer = fit(lit, [*([Uneven()] if uneven else []), lp.FactorTraining(**settings)], 2)
    net = make_net(True)
    net[3].p = 0.0
    if uneven:
        uneven_(net)
    chosen = settings.get("train", "all")
    for key, parameter in net.named_parameters():
        factor = ".A." in key or key.endswith("B.weight")
        parameter.requires_grad_(chosen == "all" or factor or (chosen != "factors" and parameter.dim() < 2))
    by_hand = optimizer([*net.parameters()])
    callback = lp.FactorTraining(**settings)
    steps = FactorSteps(callback.settings, by_hand, [by_hand], factor_pairs(net), 0)
    for x, y in lit.batches:
        nn.functional.cross_entropy(net(on_all_ranks(x)), on_all_ranks(y)).backward()
        by_hand.step()
        by_hand.zero_grad()
        steps.forget()
    steps.remove()
    assert_same(whole(lit.net), {key: one.detach() for key, one in net.named_parameters()}, atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in lit.parameters())
    ours, theirs = trainer.optimizers[0].state, by_hand.state
    for mine, other in zip(lit.net.parameters(), net.parameters(), strict=True):
        assert (mine in ours) == (other in theirs)
        if mine in ours:
            assert ours[mine]["exp_avg"].placements == mine.placements
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(full(ours[mine][moment]), theirs[other][moment], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def uneven_(net):
    """Factors of very different sizes."""
    for layer in (net[0], net[4]):
        for factor, by in ((layer.A.weight, 16.0), (layer.B.weight, 1 / 16)):
            (factor.to_local() if isinstance(factor, DTensor) else factor).mul_(by)


class Uneven(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        uneven_(pl_module.net)


class Changes(lp.CompressionCallback):
    """In the place of a cut: at epoch 1 all weights become smaller. Those who listen are told as by a cut."""

    for _name, _hook in vars(pl.Callback).items():
        if not _name.startswith("__"):
            locals()[_name] = _hook
    done = property(lambda self: self.changed)

    def __init__(self):
        super().__init__(1)
        self.changed, self.before, self.after = False, {}, {}

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch != 1 or self.changed:
            return
        others = [one for one in trainer.callbacks if one is not self]
        self.before = whole(pl_module.net)
        for one in others:
            getattr(one, "on_before_surgery", lambda *_: None)(trainer, pl_module)
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.to_local().mul_(0.7)
        self.changed, self.after = True, whole(pl_module.net)
        for one in others:
            getattr(one, "on_surgery", lambda *_: None)(trainer, pl_module, None)

    def state_dict(self):
        return {"changed": self.changed}

    def load_state_dict(self, state_dict):
        self.changed = state_dict["changed"]


def with_weights(weights):
    net = make_net(False)
    net[3].p = 0.0
    net.load_state_dict(weights)
    return net


def expected_gradients(student, teacher, batches, strength, temperature=1.0, features=()):
    """Of the dense model."""
    return gradients_by_hand(with_weights(student), with_weights(teacher), batches, strength, temperature, features)


def gradients_by_hand(student, teacher, batches, strength, temperature=1.0, features=()):
    """Of the whole batches, in one process."""
    teacher.eval()
    total = 0.0
    for x, y in ([on_all_ranks(part) for part in batch] for batch in batches):
        loss = nn.functional.cross_entropy(student(x), y)
        with torch.no_grad():
            p = (teacher(x) / temperature).log_softmax(-1)
        distance = temperature**2 * (p.exp() * (p - (student(x) / temperature).log_softmax(-1))).sum(-1).mean()
        if features:
            parts = []
            for last in features:
                with torch.no_grad():
                    right = teacher[: last + 1](x)
                mine = student[: last + 1](x)
                # each process has a relative error of its own
                halves = [
                    (mine[rows] - right[rows]).square().sum() / right[rows].square().sum()
                    for rows in (slice(0, len(x) // 2), slice(len(x) // 2, None))
                ]
                parts.append(torch.stack(halves).mean())
            distance = torch.stack(parts).mean()
        total = total + (loss + strength * distance) / len(batches)
    names, parameters = zip(*student.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


def check_distillation(accumulate=1, manual=False, features=(), **settings):
    """The gradients after the change are those of a hand-written step on the whole batch, to 1e-6."""
    lit, cut = Lit(False, lambda p: torch.optim.SGD(p, lr=0.05), manual=manual), Changes()
    rehab = lp.RehabDistillation(0.8, temperature=1.0 if features else 2.0, **settings)
    trainer = fit(lit, [cut, rehab], 2, accumulate_grad_batches=accumulate)
    expected = expected_gradients(cut.after, cut.before, lit.batches[6 : 6 + accumulate], 0.8, 2.0, features)
    assert_same(lit.seen[6 // accumulate], expected, atol=1e-6, rtol=1e-5)
    assert trainer.callback_metrics["rehab/distillation"] > 0
    teacher = rehab._distiller.teacher
    kept = {name.removeprefix("net."): full(one) for name, one in teacher.tensors().items()}
    assert_same(kept, cut.before, atol=0, rtol=0)
    dense = sum(one.numel() for one in cut.before.values()) * 4
    assert dense / 2 - 64 <= teacher.bytes <= dense / 2 + 256, (dense, teacher.bytes)  # rows do not always divide
    held = [one.numel() for one in teacher.module.parameters() if not isinstance(one, DTensor)]
    assert held == []  # nothing of it is whole between the steps


def saved_run(folder, in_parts, *callbacks):
    """Its checkpoints of all epochs are in the folder."""
    lit = Lit(False, sgd)
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit(lit, [*callbacks, saves], 4, in_parts=in_parts, enable_checkpointing=True)
    return lit


def check_resume(in_parts):
    """Bit by bit, from before the change and from after it; the teacher is in the checkpoint, wherever that lies."""
    folder = shared_folder()

    def callbacks():
        return [Changes(), lp.RehabDistillation(fade_epochs=2.5, precision="half")]

    lit = saved_run(folder, in_parts, *callbacks())
    for epoch, teaches in ((0, False), (1, True), (3, False)):
        path = folder / f"epoch={epoch}.ckpt"
        assert path.is_dir() == in_parts
        assert (path / "RehabDistillation_teacher").is_dir() == (in_parts and teaches)
        meta = torch.load(path / "meta.pt" if in_parts else path, weights_only=True)
        stored = meta["callbacks"]["RehabDistillation"]["teacher"]
        assert (stored is not None) == teaches
        assert not teaches or (stored == "RehabDistillation_teacher") == in_parts
        if teaches and not in_parts:
            assert stored["net.0.weight"].shape == (16, 12)
            assert stored["net.0.weight"].dtype is torch.bfloat16
    distributed.barrier()
    moved = folder / "elsewhere.ckpt"
    if distributed.get_rank() == 0:
        (folder / "epoch=1.ckpt").rename(moved)
    distributed.barrier()
    for path in (folder / "epoch=0.ckpt", moved):
        again, rehab = Lit(False, sgd), callbacks()
        trainer = fit(again, rehab, 4, path=path, in_parts=in_parts)
        assert_same(whole(lit.net), whole(again.net), atol=0, rtol=0)
        assert "save_checkpoint" not in vars(trainer.strategy)
        assert rehab[1].is_over
        assert rehab[1]._distiller.teacher is None


def given_teacher(kind):
    """A teacher, and its weights."""
    folder = shared_folder()
    if kind in ("file", "folder"):
        lit = saved_run(folder, kind == "folder")
        return folder / "epoch=3.ckpt", whole(lit.net)
    torch.manual_seed(9)
    net = make_net(False)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    weights = whole(net)
    if kind == "sharded":
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    return net, weights


def check_given(kind):
    """Without a cut in the run it teaches from the first step on, and is in no checkpoint."""
    teacher, weights = given_teacher(kind)
    folder, lit, before = shared_folder(), Lit(False, sgd), whole(with_weights(make_net(False).state_dict()))
    rehab = lp.RehabDistillation(0.8, temperature=2.0, teacher=teacher)
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit(lit, [rehab, saves], 1, enable_checkpointing=True)
    expected = expected_gradients(before, weights, lit.batches[:1], 0.8, 2.0)
    assert_same(lit.seen[0], expected, atol=1e-6, rtol=1e-5)
    assert {one.name for one in (folder / "epoch=0.ckpt").iterdir() if one.is_dir()} == set()
    again = Lit(False, sgd)
    rehab = lp.RehabDistillation(0.8, temperature=2.0, teacher=teacher)
    fit(again, [rehab], 2, path=folder / "epoch=0.ckpt")
    if kind != "sharded":
        assert all(isinstance(one, DTensor) for one in rehab._distiller.teacher.module.parameters()) == (
            kind != "module"
        )


def check_refusals():
    """Before anything is trained, on both, with the way out."""
    cases = [
        (Lit(False, sgd), lp.RehabDistillation(device="cpu"), "Leave device out"),
        (
            Lit(True, sgd),
            lp.RehabDistillation(teacher=str(shared_folder())),
            "this one is cut already.* Give a teacher",
        ),
        (Lit(False, sgd), lp.RehabDistillation(teacher=str(shared_folder())), "cannot be read"),
    ]
    for lit, rehab, match in cases:
        with pytest.raises(PrehabError, match=match):
            fit(lit, [Changes(), rehab], 2)
        assert lit.seen == []


class Told(pl.Callback):
    """A SelfDistillation of its own: PrehabCallback puts it into the Trainer."""

    def setup(self, trainer, pl_module, stage):
        put_beside(trainer, 0.8, lambda trainer: trainer.current_epoch < 1)


def check_self_distillation():
    """Its teacher is the model from before, whose distance is first 0; then it lets go of it, and resumes."""
    folder = shared_folder()
    lit = saved_run(folder, True, Told(), Changes())
    helper = "PrehabCallback_teacher"
    plain = saved_run(shared_folder(), True, Changes())
    assert_same(lit.seen[0], plain.seen[0], atol=1e-6, rtol=1e-5)
    start = whole(with_weights(make_net(False).state_dict()))
    assert any(not torch.allclose(lit.seen[1][name], one) for name, one in plain.seen[1].items())
    by_hand = with_weights(start)
    optimizer = sgd([*by_hand.parameters()])
    for step in range(2):
        found = expected_gradients(by_hand.state_dict(), start, lit.batches[step : step + 1], 0.8)
        assert_same(lit.seen[step], found, atol=1e-6, rtol=1e-5)
        for name, parameter in by_hand.named_parameters():
            parameter.grad = found[name]
        optimizer.step()
    assert (folder / "epoch=0.ckpt" / helper).is_dir()
    assert not (folder / "epoch=1.ckpt" / helper).exists()
    again = Lit(False, sgd)
    fit(again, [Told(), Changes()], 4, path=folder / "epoch=0.ckpt")
    assert_same(whole(lit.net), whole(again.net), atol=0, rtol=0)


class Cut(pl.Callback):
    """The weights right before the cut and right after it."""

    def on_before_surgery(self, trainer, pl_module):
        self.before = whole(pl_module.net)

    def on_surgery(self, trainer, pl_module, report):
        self.after = whole(pl_module.net)


def check_cut():
    """The first gradients after a real cut, of every layer, and what is trained of it."""
    lit, cut = Lit(False, sgd), Cut()
    surgery = lp.CompressionCallback(1, 0.5, factorization=lp.SVD())
    trainer = fit(
        lit, [surgery, cut, lp.RehabDistillation(0.8, temperature=2.0), lp.FactorTraining(train="factors")], 2
    )
    student = make_net(False)
    student[3].p = 0.0
    student.load_state_dict(cut.before)
    for name, rank in surgery.report.ranks.items():
        index = int(name.removeprefix("net."))
        if rank is not None:
            student[index] = lp.LowRankLinear.from_linear(student[index], rank)
    student.load_state_dict(cut.after)
    expected = gradients_by_hand(student, with_weights(cut.before), lit.batches[6:7], 0.8, 2.0)
    trained = {name: one for name, one in expected.items() if ".A." in name or name.endswith("B.weight")}
    assert len(trained) >= 4
    assert_same(lit.seen[6], trained, atol=1e-6, rtol=1e-5)
    now = whole(lit.net)
    assert all(torch.equal(now[name], one) != (name in trained) for name, one in cut.after.items())
    assert all(isinstance(one, DTensor) for one in trainer.optimizers[0].param_groups[0]["params"])


def check_act(in_parts):
    """The whole act with two cuts goes on bit by bit, from before them, between them and after them."""
    folder = shared_folder()

    def callbacks():
        return [
            lp.CompressionCallback([1, 2], [0.7, 0.4], factorization=lp.SVD()),
            lp.RehabDistillation(0.8),
            lp.RehabSchedule(4, end_factor=0.1),
            lp.FactorTraining(product_decay=0.1, rebalance_every=4, rate_B=2.0),
        ]

    lit = saved_run(folder, in_parts, *callbacks())
    for epoch in (0, 1, 2):
        again, others = Lit(False, sgd), callbacks()
        fit(again, others, 4, path=folder / f"epoch={epoch}.ckpt", in_parts=in_parts)
        assert_same(whole(lit.net), whole(again.net), atol=0, rtol=0)
        kept = others[1]._distiller.teacher.tensors()
        assert kept["net.0.weight"].shape == (16, 12)  # of before the first


COPIES = ("plain", "kept", "mixed", "layers", "ignored", "hybrid", "offloaded")
CHECKS = {
    **{f"copy, {kind}": partial(check_copy, kind) for kind in COPIES},
    "schedule": check_schedule,
    "distillation": check_distillation,
    "distillation, accumulation": partial(check_distillation, accumulate=3),
    "distillation, manual": partial(check_distillation, manual=True),
    "distillation, features": partial(
        check_distillation, form="features", feature_modules=["net.2", "net.4"], features=(2, 4)
    ),
    "distillation, forward": partial(check_distillation, forward=lambda module, batch: module.net(batch[0])),
    "cut": check_cut,
    "act, folders": partial(check_act, True),
    "act, files": partial(check_act, False),
    "resume, folders": partial(check_resume, True),
    "resume, files": partial(check_resume, False),
    **{f"given, {kind}": partial(check_given, kind) for kind in ("module", "sharded", "file", "folder")},
    "self-distillation": check_self_distillation,
    "refusals": check_refusals,
    **{f"factors, {name}": partial(check_factor_training, name) for name in FACTORS},
}


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    wanted = sys.argv[1:]
    for name, check in CHECKS.items():
        if not wanted or any(one in name for one in wanted):
            check()
            distributed.barrier()
            if distributed.get_rank() == 0:
                print(f"passed: {name}", flush=True)
    distributed.destroy_process_group()
