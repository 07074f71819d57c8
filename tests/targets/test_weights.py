"""Weights and layers out of the ordinary, anywhere in a model: nothing breaks, and each is left with the reason."""

import copy

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.errors import TargetError, UnsupportedError
from lightning_prehab.targets.weights import why_not_tensor

#: Each kind of layer, by the path of a weight of it.
LAYERS = {
    "linear: weight": lambda: nn.Linear(8, 8),
    "conv1d: weight": lambda: nn.Conv1d(8, 8, 3),
    "conv2d: weight": lambda: nn.Conv2d(8, 8, 3),
    "gpt2: weight": lambda: transformers.pytorch_utils.Conv1D(8, 8),
    "attention: in_proj_weight": lambda: nn.MultiheadAttention(8, 2),
    "attention: out_proj.weight": lambda: nn.MultiheadAttention(8, 2),
    "attention: k_proj_weight": lambda: nn.MultiheadAttention(8, 2, kdim=6),
    "embedding: weight": lambda: nn.Embedding(8, 8),
    "transposed: weight": lambda: nn.ConvTranspose2d(8, 8, 3),
    "recurrent: weight_ih_l0": lambda: nn.LSTM(8, 8),
}
#: Those that can be cut if nothing is odd.
CUT = [name for name in LAYERS if name.split(":")[0] not in ("embedding", "transposed", "recurrent")]
#: All number types of torch. A new one has to be put into one of the two by somebody who has tried it.
TRAINED = {"float16", "bfloat16", "float32", "float64"}
LEFT = {
    *("complex32", "complex64", "complex128", "bcomplex32", "bool"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("qint8", "qint32", "quint8", "quint4x2", "quint2x4", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
}
DTYPES = sorted({str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)})


class Tagged(torch.Tensor):
    """A tensor that does something of its own in every operation."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Named(nn.Parameter):
    """A parameter that differs by its name alone."""


def nested(weight):
    return nn.Parameter(torch.nested.nested_tensor([weight.detach(), weight.detach()]))


def jagged(weight):
    return nn.Parameter(torch.nested.nested_tensor([weight.detach()] * 2, layout=torch.jagged))


#: What can stand in the place of a weight, and a part of the reason.
ODD = {
    "complex": (lambda w: nn.Parameter(w.detach().to(torch.complex64)), "complex"),
    "float8": (lambda w: nn.Parameter(w.detach().to(torch.float8_e4m3fn), requires_grad=False), "float8"),
    "integers": (lambda w: nn.Parameter(w.detach().to(torch.int8), requires_grad=False), "int8"),
    "quantized": (
        lambda w: nn.Parameter(torch.quantize_per_tensor(w.detach(), 0.1, 0, torch.qint8), requires_grad=False),
        "quantized",
    ),
    "coo": (lambda w: nn.Parameter(w.detach().to_sparse()), "sparse_coo"),
    "csr": (lambda w: nn.Parameter(w.detach().flatten(1).to_sparse_csr()), "sparse_csr"),
    "bsr": (lambda w: nn.Parameter(w.detach().new_ones(8, 8).to_sparse_bsr((2, 2))), "sparse_bsr"),
    "nested": (nested, "nested"),
    "jagged": (jagged, "NestedTensor"),
    "subclass": (lambda w: nn.Parameter(w.detach().as_subclass(Tagged)), "Tagged"),
    "lazy": (lambda w: nn.UninitializedParameter(), "not initialized"),
    "flat": (lambda w: nn.Parameter(w.detach().flatten()), "shape"),
    "scalar": (lambda w: nn.Parameter(torch.tensor(1.0)), "shape"),
    "let go of": (lambda w: nn.Parameter(w.detach().new_zeros(0)), "shape 0"),
    "transposed": (lambda w: nn.Parameter(torch.zeros(5, *w.shape[1:])), "shape"),
    "missing": (lambda w: None, "no parameter"),
    "buffer": ("buffer", "no parameter"),
    "plain tensor": ("attribute", "no parameter"),
}


def holder_of(layer, path):
    holder, _, name = path.rpartition(".")
    return layer.get_submodule(holder), name


def make_odd(case, odd):
    """A layer whose weight has been exchanged for something odd."""
    layer, path = LAYERS[case](), case.split(": ")[1]
    holder, name = holder_of(layer, path)
    weight, make = holder._parameters[name], ODD[odd][0]
    del holder._parameters[name]
    if make == "buffer":
        holder.register_buffer(name, weight.detach())
    elif make == "attribute":
        object.__setattr__(holder, name, weight.detach())
    else:
        holder._parameters[name] = make(weight)
    return layer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("case", LAYERS)
def test_an_odd_weight_is_left_with_the_reason_and_the_rest_is_cut(case, odd):
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "odd": make_odd(case, odd), "last": nn.Linear(8, 8)})
    kept = dict(model["odd"].named_parameters())
    targets = lp.find_targets(model, split_fused=True)
    assert list(targets) == ["first", "last"]
    if case in CUT:
        expected = ODD[odd][1]
        if case.startswith("attention") and odd in ("missing", "buffer", "plain tensor"):
            expected = "parameter|pruned"
        assert len([reason for name, reason in targets.skipped.items() if name.startswith("odd")]) == 1
        with pytest.raises(TargetError, match=expected):
            lp.find_targets(model, "odd")
    report = lp.compress_(
        model,
        0.5,
        [torch.randn(64, 8)],
        loss=lambda model, x: model["last"](model["first"](x)).square().mean(),
    )
    assert set(report.ranks) == {"first", "last"}
    assert all(kept[name] is parameter for name, parameter in model["odd"].named_parameters())


@pytest.mark.parametrize("case", CUT)
def test_the_same_layers_are_cut_if_nothing_is_odd(case):
    model = nn.ModuleDict({"odd": LAYERS[case]()})
    path = case.split(": ")[1]
    holder, name = holder_of(model["odd"], path)
    holder._parameters[name] = Named(holder._parameters[name].detach())
    assert {name.split(".")[0] for name in lp.find_targets(model)} == {"odd"}


def test_every_number_type_has_been_decided_on():
    names = {name.removeprefix("torch.") for name in DTYPES}
    assert names - TRAINED - LEFT == set(), "try these, then put them into TRAINED or LEFT"
    assert names >= TRAINED


@pytest.mark.parametrize("name", DTYPES)
def test_number_types(name):
    weight = torch.empty(8, 8, dtype=getattr(torch, name.removeprefix("torch.")))
    reason = why_not_tensor(weight, "its weight")
    assert (reason is None) == (name.removeprefix("torch.") in TRAINED)
    assert reason is None or name in reason or "quantized" in reason
    layer = nn.Linear(8, 8, bias=False)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    targets = lp.find_targets(nn.ModuleDict({"odd": layer, "fine": nn.Linear(8, 8)}))
    assert targets.skipped.get("odd") == reason


@pytest.mark.filterwarnings("ignore")  # TorchScript is called deprecated
@pytest.mark.parametrize(
    "script",
    [
        lambda layer, x: torch.jit.script(layer),
        torch.jit.trace,
        lambda layer, x: torch.jit.freeze(torch.jit.script(layer.eval()), optimize_numerics=False),
    ],
    ids=["script", "trace", "freeze"],
)
def test_torchscript_anywhere(script, tmp_path):
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    model = nn.Sequential(nn.Linear(8, 8), script(inner, torch.randn(2, 8)), nn.Linear(8, 8))
    targets = lp.find_targets(model)
    assert list(targets) == ["0", "2"]
    assert all("TorchScript" in reason for reason in targets.skipped.values())
    x = torch.randn(64, 8)
    middle = model[1](x)
    before = copy.deepcopy(model)
    lp.compress_(model, 0.5, [x])
    assert torch.equal(model[1](x), middle)
    lp.save_compressed(model, tmp_path)
    torch.testing.assert_close(lp.load_compressed(tmp_path, before)(x), model(x))
    assert lp.to_dense_(model) == ["0", "2"]


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_module_tells_which_of_its_layers_are_left():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict(
        {"shared": shared, "scripted": torch.jit.script(nn.Sequential(shared)), "fine": nn.Linear(8, 8)}
    )
    skipped = lp.find_targets(model).skipped
    assert skipped["shared"] == "its weight is tied to another layer"
    assert "TorchScript" in skipped["scripted.0"]


def test_odd_biases():
    pruned, buffered = nn.Linear(8, 8), nn.Conv2d(8, 8, 3)
    prune.l1_unstructured(pruned, "bias", 0.5)
    del buffered.bias
    buffered.register_buffer("bias", torch.zeros(8))
    mixed = nn.Linear(8, 8)
    mixed.bias = nn.Parameter(torch.zeros(8, dtype=torch.complex64))
    model = nn.ModuleDict({"pruned": pruned, "buffered": buffered, "mixed": mixed, "fine": nn.Linear(8, 8)})
    assert lp.find_targets(model).skipped == {
        "pruned": "its bias is no parameter",
        "buffered": "its bias is no parameter",
        "mixed": "its bias is complex (torch.complex64)",
    }


@pytest.mark.filterwarnings("ignore")  # torch warns of layers without weights
def test_empty_layers():
    model = nn.ModuleDict(
        {
            "rows": nn.Linear(8, 0),
            "columns": nn.Linear(0, 8),
            "conv": nn.Conv2d(8, 0, 3),
            "channels": nn.Conv1d(0, 8, 3),
            "fine": nn.Linear(8, 8),
        }
    )
    targets = lp.find_targets(model)
    assert list(targets) == ["fine"]
    assert "0x8" in targets.skipped["rows"]
    assert targets.skipped["conv"] == "its weight is empty (0x8x3x3)"


def test_weights_without_values_are_refused_before_the_work():
    model = nn.ModuleDict({"fine": nn.Linear(8, 8), "moved": nn.Linear(8, 8, device="meta")})
    seen = []

    def watch(model, batch):
        seen.append(batch)
        return model["fine"](batch).square().mean()

    with pytest.raises(UnsupportedError, match="Layer 'moved': its weight has no values"):
        lp.compress_(model, 0.5, [torch.randn(64, 8)], loss=watch)
    assert seen == []
    assert lp.compress_(model, 0.5, exclude_modules="moved").ranks == {"fine": 2}


class WithOddLayers(Callback):
    """Puts odd layers into a module before the others look at it."""

    def setup(self, trainer, pl_module, stage):
        pl_module.odd = nn.ModuleList(make_odd(case, odd) for case in LAYERS for odd in ("complex", "csr", "missing"))


@pytest.mark.filterwarnings("ignore")
def test_training_goes_by_odd_layers(lit, data, make_trainer):
    lit.scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8)))
    lit.make_optimizer = lambda _: torch.optim.SGD(lit.net.parameters(), lr=0.05)
    compression = lp.CompressionCallback(1, 0.5)
    callbacks = [WithOddLayers(), lp.PrehabCallback(), compression]
    make_trainer(max_epochs=2, callbacks=callbacks).fit(lit, DataLoader(TensorDataset(*data.tensors), 16))
    assert {name.split(".")[0] for name in compression.report.ranks} == {"net"}


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(8, 8, 3), lambda: nn.Conv1d(8, 8, 3)])
@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("gain", lambda layer: setattr(layer, "gain", nn.Parameter(torch.ones(1)))),
        ("mask", lambda layer: (layer.register_buffer("mask", torch.ones(1)), layer.register_forward_hook(print))),
        ("extra", lambda layer: layer.add_module("extra", nn.Linear(8, 8))),
    ],
)
def test_a_layer_with_more_than_a_weight_and_a_bias_is_left(make, name, put):
    layer = make()
    put(layer)
    targets = lp.find_targets(nn.ModuleList([layer, nn.Linear(8, 8)]))
    assert "0" not in targets
    assert targets.skipped["0"] == f"it holds more than its weight and bias ({name}), which nothing would take over"


def test_buffers_that_nobody_uses_do_not_keep_a_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].register_buffer("total_ops", torch.zeros(1))
    assert list(lp.find_targets(model)) == ["0", "1"]
