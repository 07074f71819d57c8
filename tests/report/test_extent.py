"""How far a model is compressed: told from modules alone, against the model that it was."""

import copy

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.layers import LowRankLayer
from lightning_prehab.report.extent import Extent
from tests.layers.every_layer import Case, every_case, name_of
from tests.tiny_llama import llama


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "number"), every_case(), ids=name_of)
def test_every_layer_knows_what_it_was(kind, number):
    """As the layer alone and inside of a model."""
    layer = Case(kind, number).layer
    dense = size(layer.to_dense())
    assert layer.count_dense() == dense
    for model in (layer, nn.Sequential(layer, nn.Linear(3, 3))):
        found, beside = Extent.of(model), 0 if model is layer else 12
        assert found.parameters == size(layer) + beside
        assert found.dense_parameters == dense + beside
        assert 1 <= found.low_rank <= found.matrices
        assert found.low_rank == sum(
            isinstance(one, LowRankLayer) and not any(isinstance(part, LowRankLayer) for part in one.children())
            for one in model.modules()
        )


def test_attention_has_four_matrices():
    model = nn.Sequential(nn.MultiheadAttention(12, 3), nn.Linear(5, 5), nn.Embedding(7, 12), nn.LayerNorm(5))
    assert Extent.of(model).matrices == 5
    lp.compress_(model, 0.5, rank_overrides={"0.k_proj": "dense", "0.q_proj": 2, "0.v_proj": 2, "0.out_proj": 2})
    assert (Extent.of(model).low_rank, Extent.of(model).matrices) == (4, 5)


def test_a_language_model_there_and_back(tmp_path):
    model = llama()
    dense = size(model)
    assert str(Extent.of(model)) == f"low-rank layers: 0 of 15 matrices || parameters: {dense:,}, nothing is cut"
    report = lp.compress_(model, 0.4)
    found = Extent.of(model)
    cut = sum(rank is not None for rank in report.ranks.values())
    assert found == Extent(cut, 15, size(model), dense)
    assert found.keep == report.model_keep
    lp.save_compressed(model, tmp_path)
    assert Extent.of(lp.load_compressed(tmp_path, llama())) == found
    lp.to_dense_(model)
    assert Extent.of(model) == Extent(0, 15, dense, dense)


def test_after_a_cut_in_a_trainer(lit, loader, make_trainer, capsys):
    dense = size(lit)
    callback = lp.CompressionCallback(0, 0.5)
    make_trainer(max_epochs=1, callbacks=[callback]).fit(lit, loader)
    cut = sum(rank is not None for rank in callback.report.ranks.values())
    capsys.readouterr()
    lp.print_compression(lit)
    line = capsys.readouterr().out
    assert line == f"{Extent.of(lit)}\n"
    small = size(lit)
    share = f"{small} of {dense} ({100 * small / dense:.1f} %), {dense / small:.2f} times smaller"
    assert line == f"low-rank layers: {cut} of 3 matrices || parameters: {share}\n"


def test_shared_layers_are_counted_once():
    layer = lp.LowRankLinear(16, 16, 2)
    model = nn.Sequential(layer, nn.Tanh(), layer, copy.deepcopy(layer))
    assert Extent.of(model) == Extent(2, 2, 2 * (64 + 16), 2 * (256 + 16))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.ReLU(), "low-rank layers: 0 of 0 matrices || parameters: 0, nothing is cut"),
        (nn.Linear(3, 3), "low-rank layers: 0 of 1 matrices || parameters: 12, nothing is cut"),
        (nn.LazyLinear(3), "low-rank layers: 0 of 1 matrices || parameters: 0, nothing is cut"),
        (
            lp.LowRankLinear(4, 4, 4, bias=False),
            "low-rank layers: 1 of 1 matrices || parameters: 32 of 16 (200.0 %), 2.00 times larger",
        ),
    ],
)
def test_odd_models(model, text, capsys):
    lp.print_compression(model)
    assert capsys.readouterr().out == f"{text}\n"


def test_no_random_number_is_drawn_and_nothing_changes():
    model = llama()
    lp.compress_(model, 0.5)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Extent.of(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
