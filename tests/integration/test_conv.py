"""Convolutions through the whole way: plan, surgery, prehab, resume, files, and back to dense."""

import copy
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab import kinds
from lightning_prehab.errors import CheckpointError, PlanError
from lightning_prehab.kinds.conv import ConvKind
from lightning_prehab.report.origin import Origin
from lightning_prehab.surgery.structure import follow_state_dict_
from tests.same_model import assert_same_model

STEPS, EPOCHS, SURGERY = 4, 4, 2


class Block(nn.Module):
    def __init__(self, inside, outside, stride=1, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding="same", padding_mode="circular")
        self.shortcut = nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x):
        return torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))) + self.shortcut(x))


def resnet():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        Block(8, 8),
        Block(8, 12, stride=2, groups=2),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def data(samples=64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 2, 6, 6, generator=generator)
    return x, (x.mean((2, 3)) @ torch.randn(2, 4, generator=generator)).argmax(1)


def objective(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(x, y, size=16):
    return list(zip(x.split(size), y.split(size), strict=True))


def convolutions(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, lp.LowRankConv2d)}


@pytest.fixture(params=["auto", "channel", "spatial"])
def scheme(request, monkeypatch):
    monkeypatch.setattr(kinds, "_kinds", list(kinds._kinds))
    kinds.register_kind(ConvKind(request.param))
    return request.param


@pytest.mark.parametrize("factorization", [lp.SVD(), lp.WhitenedSVD(centered=True), lp.KroneckerSVD()])
def test_a_small_resnet(factorization, scheme):
    model, (x, y) = resnet(), data()
    dense = copy.deepcopy(model)
    report = lp.compress_(model, 0.5, batches(x, y), objective, factorization=factorization)
    assert report.keep <= 0.5
    assert "no rank saves parameters" in report.plan.skipped["3"]
    cut = convolutions(model)
    assert {"1.conv1", "1.conv2", "2.conv1", "2.conv2"} <= set(cut)
    weights = sum(layer.A.weight.numel() + layer.B.weight.numel() for layer in cut.values())
    planned = {layer.name: layer for layer in report.plan.layers}
    assert weights == sum(planned[name].parameters - planned[name].new_bias for name in cut)
    assert cut["2.conv1"].groups == 2
    assert cut["2.conv1"].scheme == "channel"
    if scheme != "auto":
        assert cut["2.conv2"].scheme == scheme
    for name, layer in cut.items():  # the dense network with the products in place of the kernels is the same function
        assert layer.rank == planned[name].rank
        whole = dense.get_submodule(name)
        assert (layer.bias is None) == (whole.bias is None and not getattr(factorization, "centered", False))
        whole.weight.data, whole.bias = layer.weight.detach().clone(), getattr(layer, "B", layer).bias
    if isinstance(model[6], lp.LowRankLinear):
        dense[6].weight.data, dense[6].bias = model[6].weight.detach().clone(), model[6].bias
    model.eval(), dense.eval()
    torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=1e-5)
    back = copy.deepcopy(model)
    assert set(cut) <= set(lp.to_dense_(back))
    assert repr(back) == repr(dense)
    torch.testing.assert_close(back(x), model(x), atol=1e-5, rtol=1e-5)


class Unfolded(nn.Module):
    """The same convolution, written as patches and a linear layer."""

    def __init__(self, conv):
        super().__init__()
        self.settings = {"kernel_size": conv.kernel_size, "padding": conv.padding, "stride": conv.stride}
        self.linear = nn.Linear(conv.weight[0].numel(), conv.out_channels)
        with torch.no_grad():
            self.linear.weight.copy_(conv.weight.flatten(1))
            self.linear.bias.copy_(conv.bias)

    def forward(self, x):
        y = self.linear(nn.functional.unfold(x, **self.settings).mT)
        size = (x.shape[-1] + 2 * self.settings["padding"][0] - self.settings["kernel_size"][0]) // self.settings[
            "stride"
        ][0] + 1
        return y.mT.unflatten(2, (size, size))


@pytest.mark.parametrize("scheme", ["channel"], indirect=True)
@pytest.mark.parametrize("factorization", [lp.WhitenedSVD(centered=True), lp.KroneckerSVD(), lp.FisherSVD()])
def test_a_convolution_is_cut_as_the_linear_layer_on_its_patches(factorization, scheme):
    first, second = nn.Conv2d(2, 8, 3, padding=1, stride=2), nn.Conv2d(8, 6, 3)
    tail = [nn.Flatten(), nn.Linear(6, 4)]
    model = nn.Sequential(first, nn.Tanh(), second, *tail)
    other = nn.Sequential(Unfolded(first), nn.Tanh(), Unfolded(second), *copy.deepcopy(tail))
    x, y = data()
    settings = {"factorization": factorization, "exclude_modules": "4"}
    report = lp.compress_(model, 0.5, batches(x, y), objective, **settings)
    reference = lp.compress_(other, 0.5, batches(x, y), objective, **settings)
    assert [layer.rank for layer in report.plan.layers] == [layer.rank for layer in reference.plan.layers]
    for mine, theirs in ((model[0], other[0].linear), (model[2], other[2].linear)):
        torch.testing.assert_close(mine.weight.flatten(1), theirs.weight, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(mine.bias, theirs.bias, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scheme", ["channel"], indirect=True)
def test_each_group_is_cut_by_itself(scheme):
    grouped = nn.Conv2d(8, 8, 3, groups=2)
    halves = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]
    for half, weight, bias in zip(halves, grouped.weight.chunk(2), grouped.bias.chunk(2), strict=True):
        half.load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(32, 8, 5, 5)

    def squares(model, batch):
        return model(batch).square().mean(0).sum()

    model = nn.Sequential(grouped)
    plan = {"keep": 0.5, "batches": x.split(8), "loss": squares, "policy": lp.RankRatio(0.5)}
    report = lp.compress_(model, **plan)
    assert report.plan.layers[0].parameters == model[0].A.weight.numel() + model[0].B.weight.numel()
    for number, half in enumerate(halves):
        alone = nn.Sequential(half)
        lp.compress_(alone, **{**plan, "batches": x.chunk(2, 1)[number].split(8)})
        assert alone[0].rank == model[0].rank
        torch.testing.assert_close(model[0].weight.chunk(2)[number], alone[0].weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"factorization": lp.ActivationSVD()},
        {"factorization": lp.FisherSVD()},
        {"policy": lp.ZeroSum(0.5)},
        {"policy": lp.ProbeBudget(0.5)},
        {"policy": lp.EnergyThreshold(0.9)},
        {"policy": lp.ParameterBudget(0.5, cost="flops")},
        {"layers_at_once": 1},
    ],
    ids=str,
)
def test_every_method_and_policy(settings, scheme):
    model, (x, y) = resnet(), data(32)
    report = lp.compress_(model, 0.5, batches(x, y), objective, **settings)
    cut = convolutions(model)
    assert cut
    assert all(report.ranks[name] == layer.rank for name, layer in cut.items())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.parameters_after < report.parameters_before
    assert torch.isfinite(model(x)).all()


def test_biases_that_centering_added_come_and_go_with_what_is_loaded(scheme):
    model, fresh, (x, y) = resnet(), resnet(), data()
    lp.compress_(model, 0.5, batches(x, y), objective, factorization=lp.WhitenedSVD(centered=True))
    assert model[1].conv1.bias is not None
    compressed = {name: value.clone() for name, value in model.state_dict().items()}
    for target, state in ((model, fresh.state_dict()), (fresh, compressed)):
        follow_state_dict_(target, state)
        assert list(target.state_dict()) == list(state)
        target.load_state_dict(state)
    assert model[1].conv1.bias is None
    assert fresh[1].conv1.bias.shape == (8,)


def test_channels_last_changes_nothing(scheme):
    plain, (x, y) = resnet(), data()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    given = x.to(memory_format=torch.channels_last)
    ranks = lp.compress_(plain, 0.5, batches(x, y), objective).ranks
    assert lp.compress_(last, 0.5, batches(given, y), objective).ranks == ranks
    for name, layer in convolutions(plain).items():
        torch.testing.assert_close(convolutions(last)[name].weight, layer.weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_first_moments_are_carried_exactly(groups, scheme):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=groups, bias=False), nn.Flatten())
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(8, 2, 6, 6)
    model(x).square().sum().backward()
    optimizer.step()
    old = model[2]
    moment = optimizer.state[old.weight]["exp_avg"].clone()
    lp.compress_(model, 0.5, policy=lp.RankRatio(0.5), optimizers=[optimizer])
    low = model[2]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    # The gradient in the factors is linear in that in the kernel: what autograd makes of the moment.
    expected = torch.autograd.grad(low.weight, [low.A.weight, low.B.weight], moment)
    for factor, carried in zip((low.A.weight, low.B.weight), expected, strict=True):
        torch.testing.assert_close(optimizer.state[factor]["exp_avg"], carried)
    model(x).square().sum().backward()
    optimizer.step()


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = resnet()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = objective(self.net, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


class Save(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.current_epoch}.ckpt")


def acts(space="loss"):
    return [
        lp.PrehabCallback(lp.TailEnergy(refresh=2), 0.1, space=space),
        lp.CompressionCallback(SURGERY, 0.5, calibration_batches=STEPS),
        lp.RehabSchedule(warmup_epochs=1),
    ]


def fit(folder, callbacks, ckpt_path=None, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    lit = Lit().to(memory_format=memory_format)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, max_epochs=EPOCHS, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(lit, DataLoader(TensorDataset(*data()), 64 // STEPS), ckpt_path=ckpt_path)
    return lit, trainer


def facts(report):
    """Without what belongs to a run: the time of day, and what prehab took as far as the run has seen it."""
    return replace(report, origin=Origin(), prehab=None).to_dict()


@pytest.mark.parametrize(
    ("space", "scheme"),
    [("loss", "channel"), ("loss", "auto"), ("activation", "spatial"), ("weight", "spatial")],
    indirect=["scheme"],
)
def test_prehab_surgery_rehab_and_resume(space, scheme, tmp_path, monkeypatch):
    lit, trainer = fit(tmp_path, [*acts(space), Save(tmp_path)])
    assert len(lit.losses) == EPOCHS * STEPS
    assert ("spatial" if scheme == "auto" else scheme) in {layer.scheme for layer in convolutions(lit.net).values()}
    expected = lit.state_dict()
    for epoch in range(EPOCHS - 1):
        again, resumed = fit(tmp_path, acts(space), tmp_path / f"epoch-{epoch}.ckpt")
        assert len(again.losses) == (EPOCHS - 1 - epoch) * STEPS
        assert str(again) == str(lit)
        assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
        states = resumed.optimizers[0].state_dict(), trainer.optimizers[0].state_dict()
        torch.testing.assert_close(*states, rtol=0, atol=0)
        assert facts(resumed.callbacks[1].report) == facts(trainer.callbacks[1].report)

    # What is stored says in which scheme it was cut, whatever would be chosen now.
    other = ConvKind("channel" if scheme == "spatial" else "spatial")
    monkeypatch.setattr(kinds, "_kinds", [other, *kinds._kinds])
    assert str(fit(tmp_path, acts(space), tmp_path / f"epoch-{EPOCHS - 2}.ckpt")[0]) == str(lit)
    x = data()[0]
    loaded = lp.load_from_checkpoint(Lit, tmp_path / f"epoch-{EPOCHS - 1}.ckpt")
    assert_same_model(loaded.net.eval(), lit.net.eval(), x)
    lp.save_compressed(lit.net, tmp_path / "files")
    assert_same_model(lp.load_compressed(tmp_path / "files", resnet()).eval(), lit.net, x)
    damaged = resnet()
    damaged[1].conv2 = nn.Conv2d(8, 8, 5, padding="same", padding_mode="circular")
    with pytest.raises(CheckpointError, match=r"Layer '1.conv2'|1.conv2"):
        lp.load_compressed(tmp_path / "files", damaged)


def test_a_plan_says_by_its_shapes_in_which_scheme(monkeypatch):
    model, (x, y) = resnet(), data()
    settings = {"forward": objective, "gradients": True}
    plans = {}
    for name in ("channel", "spatial"):
        monkeypatch.setattr(kinds, "_kinds", [ConvKind(name), *kinds._kinds])
        targets = lp.find_targets(model)
        statistics = lp.collect_statistics(model, targets, batches(x, y), **settings)
        plans[name] = lp.make_plan(targets, 0.5, lp.SVD()), statistics
    lp.apply_plan_(model, lp.CompressionPlan.from_dict(plans["channel"][0].to_dict()))  # while "spatial" is preferred
    assert {layer.scheme for layer in convolutions(model).values()} == {"channel"}
    with pytest.raises(PlanError, match="Make the plan for this very model"):
        lp.apply_plan_(model, plans["spatial"][0])


@pytest.mark.parametrize("scheme", ["channel"], indirect=True)
@pytest.mark.parametrize("regularizer", [lp.TailEnergy(), lp.TailShrinkage()], ids=["penalty", "shrinkage"])
def test_prehab_lowers_the_tail_of_kernels(regularizer, scheme, tmp_path):
    """Regularizers act on the matrices of kernels, of any memory format, as they do on those of linear layers."""

    tails = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == SURGERY - 1:
                s = torch.linalg.svdvals(pl_module.net[1].conv2.weight.detach().flatten(1)).square()
                tails.append(float(s[3:].sum() / s.sum()))

    compression = lp.CompressionCallback(SURGERY, 0.4, policy=lp.RankRatio(0.4))
    strength = {"strength": 10.0} if isinstance(regularizer, lp.TailEnergy) else {}
    prehab = lp.PrehabCallback(regularizer, space="weight", **strength)
    fit(tmp_path, [prehab, compression, Look()], memory_format=torch.channels_last)
    fit(tmp_path, [Look()], memory_format=torch.channels_last)
    assert tails[0] < 0.8 * tails[1]


def test_signals():
    model = nn.Sequential(nn.Conv1d(6, 12, 5, padding="same"), nn.ReLU(), nn.Conv1d(12, 8, 3, stride=2), nn.Flatten())
    x = torch.randn(32, 6, 9)
    whole = copy.deepcopy(model)
    lp.compress_(model, 0.5, x.split(8), lambda net, batch: (net(batch) - 1).square().mean(0).sum())
    assert any(isinstance(layer, lp.LowRankConv1d) for layer in model)
    assert model(x).shape == whole(x).shape
    assert lp.find_targets(nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3))).skipped["1"] == (
        "ConvTranspose1d is not a layer kind that can be cut"
    )
