"""int8 on the factors, by torchao."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp

pytest.importorskip("torchao")
from torchao import optim as torchao_optim
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_


def wide(layer, name):
    """Not a factor of rank 1, at which torchao 0.18 stops, and not the projection inside nn.MultiheadAttention."""
    return type(layer) is nn.Linear and layer.in_features > 1


@pytest.fixture
def compressed():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    lp.compress_(model, keep=0.5)
    return model


def rounded(rows):
    """To 255 steps between minus and plus the largest magnitude of each row, in numpy."""
    scale = np.abs(rows).max(axis=-1, keepdims=True) / 127
    return np.round(rows / scale) * scale


def reference(model, x, of_inputs):
    """What the compressed model makes of ``x`` if every factor (and input of one, if asked) is rounded."""
    for layer in model:
        if isinstance(layer, nn.ReLU):
            x = np.maximum(x, 0)
            continue
        for factor in (layer.A, layer.B):
            x = (rounded(x) if of_inputs else x) @ rounded(factor.weight.detach().double().numpy()).T
        x = x + layer.bias.detach().double().numpy()
    return x


def error(found, exact):
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("config", "of_inputs"), [(Int8WeightOnlyConfig(), False), (Int8DynamicActivationInt8WeightConfig(), True)]
)
def test_the_error_is_that_of_rounding_to_int8(config, of_inputs, compressed):
    x = torch.randn(200, 64)
    model = copy.deepcopy(compressed)
    quantize_(model, config)
    with torch.no_grad():
        exact, found = compressed(x).double().numpy(), model(x).double().numpy()
    expected = error(reference(compressed, x.double().numpy(), of_inputs), exact)
    assert 0.003 < expected < 0.03
    assert expected / 2 < error(found, exact) < expected * 2

    for name, factor in model.named_modules():
        if not name.endswith((".A", ".B")):
            continue
        weight = compressed.get_submodule(name).weight.detach()
        assert factor.weight.qdata.dtype == torch.int8
        assert factor.weight.qdata.shape == weight.shape
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((factor.weight.dequantize() - weight).abs() <= step / 2 * 1.01).all()


def test_what_reads_the_weight_gets_an_ordinary_one(compressed):
    quantize_(compressed, Int8WeightOnlyConfig())
    layer = compressed[0]
    product = layer.B.weight.dequantize() @ layer.A.weight.dequantize()
    torch.testing.assert_close(layer.weight, product)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = compressed(x)
        assert lp.to_dense_(compressed) == ["0", "2"]
        torch.testing.assert_close(compressed(x), expected, atol=1e-5, rtol=1e-5)
    assert type(compressed[0].weight) is nn.Parameter


def t5():
    config = transformers.T5Config(
        vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    ids = torch.arange(10).view(2, 5)
    model = transformers.T5ForConditionalGeneration(config)
    return model, lambda: model(input_ids=ids, decoder_input_ids=ids).logits


def bert():
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    config.initializer_range = 0.3
    ids = torch.arange(10).view(2, 5)
    model = transformers.BertForSequenceClassification(config)
    return model, lambda: model(ids).logits


def encoder_layer():
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True))
    x = torch.randn(2, 5, 32)
    return model, lambda: model(x)


@pytest.mark.parametrize("make", [bert, t5, encoder_layer])
def test_whole_models(make):
    model, run = make()
    model.eval()
    lp.compress_(model, keep=0.5)
    with torch.no_grad():
        exact = run().numpy()
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=wide)
        found = run().numpy()
    factors = [
        part
        for layer in model.modules()
        if isinstance(layer, lp.LowRankLinear) and layer.rank > 1
        for part in (layer.A, layer.B)
    ]
    assert len(factors) >= 4
    assert all(factor.weight.qdata.dtype == torch.int8 for factor in factors)
    assert 1e-4 < error(found, exact) < 0.1


def test_quantized_layers_are_left_alone(compressed):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda layer, name: name == "0")
    report = lp.compress_(model, keep=0.5)
    assert report.plan.skipped["0"].startswith("its weight is quantized; compress the model first")
    assert isinstance(model[2], lp.LowRankLinear)
    with pytest.raises(lp.PrehabError, match="is compressed already"):
        lp.compress_(model, keep=0.5)


def test_a_quantized_model_is_not_saved_but_says_how(compressed, tmp_path):
    quantize_(compressed, Int8WeightOnlyConfig())
    with pytest.raises(lp.PrehabError, match=r"'0.A.weight' is quantized \(Int8Tensor\).*before it is quantized"):
        lp.save_compressed(compressed, tmp_path / "model")
    assert not (tmp_path / "model").exists()


class TestOptimizers:
    """Moments in 8 or 4 bits cannot be carried: the factors start afresh, with the bias correction of a fresh start."""

    KINDS = ("AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit", "Adam4bit", "AdamFp8")

    @pytest.fixture(autouse=True)
    def uncompiled(self):
        with torch.compiler.set_stance("force_eager"):
            yield

    @pytest.fixture
    def lit(self, lit_class):
        def make(kind):
            torch.manual_seed(1)
            net = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
            return lit_class(net, lambda params: getattr(torchao_optim, kind)(params, lr=1e-3))

        return make

    @pytest.fixture
    def batches(self):
        return DataLoader(TensorDataset(torch.randn(64, 128), torch.randn(64, 128)), 16)

    @pytest.mark.parametrize("kind", KINDS)
    def test_training_goes_on(self, lit, batches, make_trainer, kind):
        module, steps = lit(kind), []

        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                self.old = [p.detach().clone() for p in pl_module.parameters()]

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                pairs = zip(pl_module.parameters(), self.old, strict=True)
                steps.append(max(float((p - old).detach().abs().max()) for p, old in pairs))

        make_trainer(max_epochs=4, callbacks=[lp.CompressionCallback(2, 0.6, factorization=lp.SVD()), Watch()]).fit(
            module, batches
        )
        assert all(isinstance(layer, lp.LowRankLinear) for layer in module.net[::2])
        assert max(steps[8:]) < 3 * max(steps[4:8])

    @pytest.mark.parametrize("kind", KINDS)
    def test_state_is_stored_and_loaded_after_a_cut(self, kind, tmp_path):
        """By hand: Lightning cannot load these states, with a cut or without, where torch.load maps no subclasses."""
        model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
        optimizer = getattr(torchao_optim, kind)(model.parameters(), lr=1e-3)
        x, y = torch.randn(32, 128), torch.randn(32, 128)

        def step(model, optimizer):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

        step(model, optimizer)
        lp.apply_plan_(model, lp.make_plan(lp.find_targets(model), 0.6, lp.SVD()), optimizers=[optimizer])
        step(model, optimizer)
        other = copy.deepcopy(model)
        restored = getattr(torchao_optim, kind)(other.parameters(), lr=1e-3)
        torch.save(optimizer.state_dict(), tmp_path / "state")
        restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        step(model, optimizer)
        step(other, restored)
        for one, same in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, same)
