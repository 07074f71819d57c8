"""The pivot layout from the cut to the file and back: what is true of two factors is true of it."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError
from lightning_prehab.kinds import view_of
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.surgery.pretrained import describe_layers
from lightning_prehab.surgery.structure import follow_state_dict_

EPOCHS = 4


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=1, n_head=4, n_positions=16, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 12, bias=False)), (4, 24), {}),
    "conv": (lambda: nn.Sequential(nn.Conv2d(8, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 1)), (2, 8, 6, 6), {}),
    "attention": (lambda: nn.Sequential(Attending(), nn.Linear(16, 16)), (3, 5, 16), {}),
    "gpt2": (gpt2, None, {"split_fused": True}),
}


def run(model, x):
    if x is None:
        return model(input_ids=torch.arange(10).view(2, 5)).logits
    return model(x)


def pivots(model):
    return [layer for layer in model.modules() if isinstance(layer, PivotLayer)]


@pytest.fixture(params=MODELS)
def cut(request):
    """A cut model, its dense twin, an input and the settings of the cut."""
    make, shape, settings = MODELS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = make().eval()
        x = None if shape is None else torch.randn(shape)
    model = copy.deepcopy(dense)
    report = lp.compress_(model, keep=0.6, layout="pivot", factorization=lp.SVD(), **settings)
    assert pivots(model)
    assert not any(isinstance(layer, lp.LowRankLinear) for layer in model.modules())
    return model, dense, x, report, settings


def test_the_cut_is_that_of_two_factors_and_is_counted_as_stored(cut):
    model, _, _, report, _ = cut
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert all(layer.count_dense() >= sum(p.numel() for p in layer.parameters()) for layer in pivots(model))
    for layer in report.plan.layers:
        if layer.rank is not None:
            values = torch.linalg.svdvals(model.get_submodule(layer.name).weight.detach().flatten(1))
            assert (values[layer.rank :] < 1e-5 * values[0]).all()
            assert values[layer.rank - 1] > 1e-3 * values[0]


def test_folders_state_dicts_and_dense_models(cut, tmp_path):
    model, dense, x, report, _ = cut
    expected = run(model, x)
    lp.save_compressed(model, tmp_path, report=report)
    loaded = lp.load_compressed(tmp_path, copy.deepcopy(dense))
    assert torch.equal(run(loaded, x), expected)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    again = lp.load_compressed(tmp_path, loaded)
    assert torch.equal(run(again, x), expected)

    factors = copy.deepcopy(model)
    lp.to_factors_(factors)
    names = follow_state_dict_(factors, model.state_dict())  # from two factors to pivot rows
    factors.load_state_dict(model.state_dict())
    assert names
    assert torch.equal(run(factors, x), expected)
    back = copy.deepcopy(model)
    lp.to_factors_(factors)
    follow_state_dict_(back, factors.state_dict())  # and the other way
    back.load_state_dict(factors.state_dict())
    assert not pivots(back)
    follow_state_dict_(back, dense.state_dict())
    back.load_state_dict(dense.state_dict())
    assert torch.equal(run(back, x), run(dense, x))


def test_damaged_orders_are_named(cut):
    model, dense, _, _, _ = cut
    state = model.state_dict()
    key = next(key for key in state if key.endswith(".order"))
    for damaged in (torch.zeros_like(state[key]), state[key][1:], state[key] + 1):
        with pytest.raises(CheckpointError, match=f"Layer '{key.removesuffix('.order')}'.*do not belong together"):
            follow_state_dict_(copy.deepcopy(dense), {**state, key: damaged})


def test_saved_and_loaded_by_transformers(tmp_path):
    model = gpt2().eval()
    lp.compress_(model, keep=0.6, layout="pivot", split_fused=True, factorization=lp.SVD())
    assert model.config.quantization_config["format_version"] == 2
    assert {layer["layout"] for layer in describe_layers(model).values()} == {"pivot"}
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(run(loaded, None), run(model, None))
    lp.to_factors_(loaded)
    assert loaded.config.quantization_config["format_version"] == 1


@pytest.mark.parametrize("name", MODELS)
def test_moments_of_a_dense_weight_become_those_of_its_parts(name):
    """Where nothing is lost, a first moment that is the gradient is the gradient of what takes its place."""
    make, shape, settings = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval().double()
        x = None if shape is None else torch.randn(shape, dtype=torch.float64)
    targets = lp.find_targets(model, **settings)
    plan = lp.make_plan(targets, 0.5, lp.SVD(), layout="pivot")
    with torch.no_grad():  # now every matrix has the rank that it is cut to
        for layer in plan.layers:
            view = view_of(targets[layer.name])
            u, s, vh = torch.linalg.svd(view.weight)
            view.write_(u[:, : layer.rank] * s[: layer.rank] @ vh[: layer.rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    run(model, x).square().sum().backward()
    optimizer.step()
    lp.apply_plan_(model, plan, optimizers=[optimizer])
    optimizer.zero_grad()
    run(model, x).square().sum().backward()
    for layer in pivots(model):
        for part in (layer.D.weight, layer.C.weight):
            torch.testing.assert_close(optimizer.state[part]["momentum_buffer"], part.grad)


class Lit(pl.LightningModule):
    def __init__(self, bias=True):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(12, 16, bias=bias), nn.Tanh(), nn.Linear(16, 14), nn.Linear(14, 6))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(folder, lit, ckpt_path=None, epochs=EPOCHS, **settings):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(64, 12, generator=generator), torch.randn(64, 6, generator=generator))
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        enable_checkpointing=False, max_epochs=epochs,
        callbacks=[lp.CompressionCallback(2, 0.6, layout="pivot", **settings)],
    )  # fmt: skip
    trainer.fit(lit, DataLoader(data, 16), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return lit, trainer


@pytest.mark.parametrize("settings", [{}, {"factorization": lp.WhitenedSVD(centered=True)}], ids=["plain", "new bias"])
def test_a_run_that_is_resumed_after_the_cut_ends_like_one_that_is_not(settings, tmp_path):
    torch.manual_seed(5)
    start = Lit(bias=not settings)
    whole, trainer = fit(tmp_path, copy.deepcopy(start), **settings)
    assert len(pivots(whole)) == 3
    fit(tmp_path, copy.deepcopy(start), epochs=3, **settings)
    resumed, other = fit(tmp_path, copy.deepcopy(start), tmp_path / "3.ckpt", **settings)
    for one in (trainer, other):
        report = next(callback for callback in one.callbacks if isinstance(callback, lp.CompressionCallback)).report
        assert {layer.layout for layer in report.plan.layers} == {"pivot"}
        assert report.parameters_after == sum(p.numel() for p in one.lightning_module.parameters())
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    for one, two in zip(trainer.optimizers[0].state.values(), other.optimizers[0].state.values(), strict=True):
        for key, value in one.items():
            assert torch.equal(two[key], value), key
    loaded = lp.load_from_checkpoint(Lit, tmp_path / f"{EPOCHS}.ckpt", map_location="cpu")
    for key, value in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
