"""nn.MultiheadAttention and torch's transformer layers through the whole package."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.layers.attention import PARTS, LowRankMultiheadAttention
from tests.same_model import assert_same_model


class Net(nn.Module):
    """An encoder and a decoder layer, and attention whose keys and values have sizes of their own."""

    def __init__(self, dropout=0.1, bias=True, norm_first=True):
        super().__init__()
        settings = {"dropout": dropout, "batch_first": True, "bias": bias, "norm_first": norm_first}
        layer = nn.TransformerEncoderLayer(16, 2, 24, **settings)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        for layer in self.encoder.layers:
            nn.init.normal_(layer.self_attn.in_proj_weight, std=0.3)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 24, **settings)
        self.pool = nn.MultiheadAttention(16, 2, dropout, bias, kdim=12, vdim=20, batch_first=True)

    def forward(self, x, padding=None):
        y = self.encoder(x, src_key_padding_mask=padding)
        y = self.decoder(x, y, memory_key_padding_mask=padding)
        return self.pool(y, y[..., :12], torch.cat([y, y[..., :4]], -1), need_weights=False)[0]


def batch(rows=6):
    x = torch.randn(rows, 5, 16)
    padding = torch.arange(5) >= torch.tensor([5, 3, 4, 5, 1, 2])[:rows, None]
    return {"x": x, "padding": padding}


def quadratic(model, given):
    return model(**given).square().mean()


def attentions(model):
    kinds = (nn.MultiheadAttention, LowRankMultiheadAttention)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def with_weights(dense, cut):
    """The dense model with the products of the factors and the biases of the one that was cut."""
    reference = copy.deepcopy(dense)
    modules = dict(cut.named_modules())
    with torch.no_grad():
        for name, module in reference.named_modules():
            if type(module) is nn.MultiheadAttention:
                attention = modules[name]
                if module.in_proj_weight is None:
                    for part in PARTS[:3]:
                        getattr(module, f"{part}_weight").copy_(getattr(attention, part).weight)
                else:
                    module.in_proj_weight.copy_(torch.cat([getattr(attention, part).weight for part in PARTS[:3]]))
                if module.in_proj_bias is not None:
                    module.in_proj_bias.copy_(attention.in_proj_bias)
                module.out_proj.weight.copy_(attention.out_proj.weight)
            if type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
                module.weight.copy_(modules[name].weight)
                if module.bias is not None:
                    module.bias.copy_(modules[name].bias)
    return reference


def test_each_projection_is_a_target_of_its_own():
    model = Net()
    targets = lp.find_targets(model)
    assert set(attentions(model)) == {name.rpartition(".")[0] for name in targets if "proj" in name}
    assert len([name for name in targets if "proj" in name]) == 4 * 5
    assert not targets.skipped
    assert list(lp.find_targets(model, "decoder.self_attn")) == [f"decoder.self_attn.{part}" for part in PARTS]
    assert list(lp.find_targets(model, "*.0.self_attn.v_proj")) == ["encoder.layers.0.self_attn.v_proj"]
    assert not any("out_proj" in name for name in lp.find_targets(model, exclude_modules="*.out_proj"))


def test_what_cannot_be_cut_is_said():
    class Mine(nn.MultiheadAttention):
        pass

    layers = {name: nn.MultiheadAttention(8, 2) for name in ("ok", "normed", "in", "pruned", "lora", "a", "b")}
    layers["mine"] = Mine(8, 2)
    parametrizations.spectral_norm(layers["normed"].out_proj)
    parametrizations.spectral_norm(layers["in"], "in_proj_weight")
    prune.l1_unstructured(layers["pruned"], "in_proj_weight", 0.5)
    layers["lora"].out_proj = nn.Sequential(layers["lora"].out_proj)
    layers["a"].in_proj_weight = layers["b"].in_proj_weight
    targets = lp.find_targets(nn.ModuleDict(layers))
    assert list(targets) == [f"ok.{part}" for part in PARTS]
    reasons = {"normed": "parametrized", "in": "parametrized", "pruned": "pruned or normalized", "lora": "a Sequential"}
    reasons |= {"mine": "Mine is not a layer kind", "mine.out_proj": "NonDynamically", "in.out_proj": "NonDynamically"}
    for name in "ab":  # a cut of the output alone would untie the inputs
        reasons |= {f"{name}.{part}": "tied to another layer" for part in PARTS}
    assert set(targets.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in targets.skipped[name]


@pytest.mark.parametrize("padded", [False, True])
def test_statistics_of_the_first_layer_by_hand(padded):
    model = Net(norm_first=False)
    given = batch()
    if not padded:
        del given["padding"]
    targets = lp.find_targets(model)
    statistics = lp.collect_statistics(model, targets, [given])
    x = given["x"][~given["padding"]] if padded else given["x"].flatten(0, 1)
    for part in PARTS[:3]:
        seen = statistics[f"encoder.layers.0.self_attn.{part}"]
        assert int(seen.tokens) == len(x)
        torch.testing.assert_close(seen.input_gram, x.mT @ x)
        assert seen.input_gram is statistics["encoder.layers.0.self_attn.q_proj"].input_gram
    assert int(statistics["encoder.layers.1.linear1"].tokens) == len(x)
    assert statistics["pool.k_proj"].input_gram.shape == (12, 12)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradient_statistics_are_those_of_autograd():
    model = Net().eval()
    given = batch()
    targets = lp.find_targets(model, [*attentions(model)])
    statistics = lp.collect_statistics(model, targets, [given], quadratic, gradients=True)
    quadratic(model, given).backward()
    assert all(float(seen.gradient_gram.trace()) > 0 for seen in statistics.values())
    # The last layer's output is the loss's argument: g = 2 y / size, times the batch size of the mean over samples.
    y = model(**given).detach().flatten(0, 1)
    g = 2 * y / y.numel() * 6
    torch.testing.assert_close(statistics["pool.out_proj"].gradient_gram, g.mT @ g)


@pytest.mark.parametrize("method", [None, lp.SVD(), lp.FisherSVD(), lp.WhitenedSVD(centered=True)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_cut_model_computes_with_the_products(method, bias):
    model = Net(dropout=0.0, bias=bias)  # without the fast path, which wants biases everywhere or nowhere
    dense, given = copy.deepcopy(model), batch()
    biases = [attention.in_proj_bias for attention in attentions(model).values()]
    before = sum(p.numel() for p in model.parameters())
    report = lp.compress_(
        model, 0.6, [given], quadratic, factorization=method, exclude_modules="decoder.self_attn.k_proj"
    )
    cut = attentions(model)
    assert all(isinstance(attention, LowRankMultiheadAttention) for attention in cut.values())
    assert type(cut["decoder.self_attn"].k_proj) is nn.Linear
    if bias:
        for attention, own in zip(cut.values(), biases, strict=True):
            assert attention.in_proj_bias is own
            assert not any(getattr(attention, part).bias is not None for part in PARTS[:3])
        torch.testing.assert_close(model(**given), with_weights(dense, model)(**given), atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < before
    assert report.keep <= 0.6
    expected = model(**given)
    assert lp.to_dense_(model)
    assert [type(attention) for attention in attentions(model).values()] == [nn.MultiheadAttention] * 5
    torch.testing.assert_close(model(**given), expected, atol=1e-5, rtol=1e-4)
    if method is None:
        assert list(model.state_dict()) == list(dense.state_dict())


def test_centered_cuts_shift_the_right_part_of_the_bias():
    model = Net(dropout=0.0)
    given = batch()
    dense = copy.deepcopy(model)
    targets = lp.find_targets(model, "*.0.self_attn.k_proj")
    statistics = lp.collect_statistics(model, targets, [given])
    plan = lp.make_plan(targets, 0.5, lp.WhitenedSVD(centered=True), statistics)
    lp.apply_plan_(model, plan, statistics)
    old, new = dense.encoder.layers[0].self_attn, model.encoder.layers[0].self_attn
    mean = (
        statistics["encoder.layers.0.self_attn.k_proj"].input_sum
        / statistics["encoder.layers.0.self_attn.k_proj"].tokens
    )
    shift = (old.in_proj_weight[16:32] - new.k_proj.weight) @ mean
    torch.testing.assert_close(new.in_proj_bias[16:32], old.in_proj_bias[16:32] + shift, atol=1e-5, rtol=1e-4)
    for rows in (slice(0, 16), slice(32, 48)):
        assert torch.equal(new.in_proj_bias[rows], old.in_proj_bias[rows])


@pytest.mark.parametrize("groups", ["flat", "decay", "shuffled"])
def test_optimizers_go_on(groups):
    model = Net(dropout=0.0)
    given = batch()
    named = list(model.named_parameters())

    def grouped(named):
        if groups == "flat":
            return [{"params": named}]
        if groups == "shuffled":  # biases far from their weights
            return [{"params": [x for x in named if x[1].dim() > 1] + [x for x in named if x[1].dim() == 1]}]
        return [{"params": [x for x in named if (x[1].dim() > 1) == matrix]} for matrix in (True, False)]

    optimizer = torch.optim.AdamW(grouped(named), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        quadratic(model, given).backward()
        optimizer.step()
    moments = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in named}
    overrides = {"encoder.*": 3, "decoder.self_attn.q_proj": 2, "decoder.multihead_attn.out_proj": 4, "pool.v_proj": 5}
    targets = lp.find_targets(model)
    plan = lp.make_plan(targets, 1.0, lp.SVD(), rank_overrides={"*": "dense", **overrides})
    kept = model.decoder.self_attn.out_proj.weight, model.pool.q_proj_weight
    lp.apply_plan_(model, plan, optimizers=[optimizer])
    fresh = grouped(list(model.named_parameters()))
    for group, expected in zip(optimizer.param_groups, fresh, strict=True):
        assert group["param_names"] == [name for name, _ in expected["params"]]
        assert all(a is b for a, (_, b) in zip(group["params"], expected["params"], strict=True))
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}

    first = model.encoder.layers[1].self_attn
    for index, part in enumerate(PARTS[:3]):
        child = getattr(first, part)
        moment = moments["encoder.layers.1.self_attn.in_proj_weight"]["exp_avg"][16 * index : 16 * index + 16]
        torch.testing.assert_close(optimizer.state[child.A.weight]["exp_avg"], child.B.weight.mT @ moment)
        torch.testing.assert_close(optimizer.state[child.B.weight]["exp_avg"], moment @ child.A.weight.mT)
    attention, moment = model.decoder.self_attn, moments["decoder.self_attn.in_proj_weight"]
    assert isinstance(attention.q_proj, lp.LowRankLinear)
    for index, part in ((1, "k_proj"), (2, "v_proj")):
        for key in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[getattr(attention, part).weight]
            assert torch.equal(state[key], moment[key][16 * index : 16 * index + 16])
    assert attention.out_proj.weight is kept[0]
    assert model.pool.q_proj.weight is kept[1]
    assert torch.equal(optimizer.state[kept[1]]["exp_avg"], moments["pool.q_proj_weight"]["exp_avg"])
    quadratic(model, given).backward()
    optimizer.step()


def test_save_and_load(tmp_path):
    model = Net().eval()
    given = batch()
    lp.compress_(model, 0.5, [given], quadratic, exclude_modules=["pool.v_proj", "decoder.self_attn.out_proj"])
    lp.save_compressed(model, tmp_path)
    loaded = lp.load_compressed(tmp_path, Net()).eval()
    assert str(loaded) == str(model)
    assert_same_model(loaded, model, **given)
    other = Net().eval()
    lp.compress_(other, 0.3)
    assert_same_model(lp.load_compressed(tmp_path, other), model, **given)
    wrong = Net()
    wrong.pool = nn.MultiheadAttention(16, 2, kdim=10, vdim=20, batch_first=True)
    with pytest.raises(lp.PrehabError, match="pool.k_proj"):
        lp.load_compressed(tmp_path, wrong)


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net(dropout=0.0)  # Lightning does not store the random state that dropout draws from

    def training_step(self, batch, batch_idx):
        x, padding, y = batch
        return nn.functional.mse_loss(self.net(x, padding), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def dataset():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 48, 5, 16, generator=generator)
    return TensorDataset(x, torch.arange(5) >= torch.randint(2, 6, (48, 1), generator=generator), y)


class SaveEachEpoch(pl.Callback):
    def __init__(self, folder):
        self.folder = folder
        self.states = {}

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")
        self.states[trainer.current_epoch] = states_by_name(trainer, pl_module)


class Look(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.states = states_by_name(trainer, pl_module)


def states_by_name(trainer, pl_module):
    states = trainer.optimizers[0].state
    return {name: copy.deepcopy(states[parameter]) for name, parameter in pl_module.named_parameters()}


def fit(make_trainer, *more, ckpt_path=None, epochs=4):
    torch.manual_seed(0)
    lit = Lit()
    callbacks = [
        lp.PrehabCallback(),
        lp.CompressionCallback(2, policy=lp.RankRatio(0.7), calibration_batches=4),
        lp.RehabSchedule(warmup_epochs=1),
    ]
    trainer = make_trainer(max_epochs=epochs, callbacks=[*callbacks, *more])
    trainer.fit(lit, DataLoader(dataset(), 12), ckpt_path=ckpt_path)
    return lit, trainer


def test_a_trainer_prepares_cuts_and_resumes(make_trainer, tmp_path):
    lit, trainer = fit(make_trainer, SaveEachEpoch(tmp_path))
    cut = attentions(lit.net)
    assert all(isinstance(attention, LowRankMultiheadAttention) for attention in cut.values())
    assert all(isinstance(getattr(a, part), lp.LowRankLinear) for a in cut.values() for part in PARTS)
    assert not any("forward" in module.__dict__ for module in lit.modules())
    (group,) = trainer.optimizers[0].param_groups
    assert all(a is b for a, b in zip(group["params"], lit.parameters(), strict=True))
    for epoch in (0, 1, 2):
        again, resumed = fit(make_trainer, ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert str(again) == str(lit)
        for name, value in lit.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        states = resumed.optimizers[0].state_dict(), trainer.optimizers[0].state_dict()
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_fit_goes_on_from_a_cut_checkpoint_without_our_callbacks(make_trainer, tmp_path):
    """Optimizer states are stored by position: a fresh optimizer has the order of the one that was edited."""
    save, look = SaveEachEpoch(tmp_path), Look()
    fit(make_trainer, save, epochs=3)
    lit = lp.load_from_checkpoint(Lit, tmp_path / "2.ckpt")
    trainer = make_trainer(max_epochs=4, callbacks=[look])
    trainer.fit(lit, DataLoader(dataset(), 12), ckpt_path=tmp_path / "2.ckpt")
    torch.testing.assert_close(look.states, save.states[2], rtol=0, atol=0)
