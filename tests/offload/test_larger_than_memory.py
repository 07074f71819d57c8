"""A folder that is compressed block by block is the one of the cut in memory, bit by bit."""

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.layers.linear import LowRankLayer

pytest.importorskip("transformers")

from safetensors.torch import save_file

from tests.offload.folders import MODELS, batches, dense

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer calibration tokens")

RECIPES = {
    "default": lp.Recipe(0.5),
    "svd": lp.Recipe(0.5, factorization=lp.SVD()),
    "forward only": lp.Recipe(0.6, factorization=lp.WhitenedSVD()),
    "with a bias": lp.Recipe(0.6, factorization=lp.WhitenedSVD(centered=True)),
    "weight gradients": lp.Recipe(0.5, policy=lp.ZeroSum(0.5), factorization=lp.FisherSVD()),
    "halves": lp.Recipe(0.5, factorization=lp.KroneckerSVD("auto"), rank_multiple_of=2),
    "sparse": lp.Recipe(0.5, factorization=lp.LowRankPlusSparse(0.05)),
    "pivot": lp.Recipe(0.5, layout="pivot"),
    "some": lp.Recipe(0.6, target_modules=["*.1.*"], split_fused=True, rank_overrides={"*.mlp.*": 0.5}),
}
CASES = [(model, "default") for model in MODELS]
CASES += [("llama", recipe) for recipe in RECIPES if recipe != "default"]
CASES += [("gpt2", "some"), ("opt", "forward only")]


@pytest.mark.parametrize(("name", "wish"), CASES)
def test_it_is_the_cut_in_memory(name, wish, tmp_path):
    kind, recipe = dense(name, tmp_path / "dense"), RECIPES[wish]
    data = batches() if any(recipe.wanted) else None
    reference = kind.from_pretrained(tmp_path / "dense", dtype="auto")
    expected = lp.compress_(reference, recipe, data, progress=False)
    report = lp.compress_folder(tmp_path / "dense", tmp_path / "small", recipe, data, progress=False)
    assert report.ranks == expected.ranks
    assert report.weight_errors == pytest.approx(expected.weight_errors, rel=1e-4)
    assert (report.parameters_before, report.parameters_after) == (
        expected.parameters_before,
        expected.parameters_after,
    )
    assert any(isinstance(module, LowRankLayer) for module in reference.modules())
    again, loading = kind.from_pretrained(tmp_path / "small", dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading
    other = lp.load_compressed(tmp_path / "small", kind.from_pretrained(tmp_path / "dense", dtype="auto"))
    for found in (again, other):
        ours, theirs = found.state_dict(), reference.state_dict()
        assert list(ours) == list(theirs)
        for key, tensor in ours.items():
            assert tensor.dtype == theirs[key].dtype
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6)
    shared = len({tensor.data_ptr() for tensor in reference.state_dict().values()})
    assert len({tensor.data_ptr() for tensor in again.state_dict().values()}) == shared  # tied weights are tied
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small"]
    stored = lp.CompressionReport.load_json(tmp_path / "small" / "report.json")
    assert stored.ranks == report.ranks


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    dense("llama", tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "LICENSE").write_text("free")
    lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, batches(1), progress=False)
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"tokenizer.json", "LICENSE", "config.json", "report.json", "structure.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) == 3  # of each block, and around them


def test_an_output_that_is_there_is_kept(tmp_path):
    dense("llama", tmp_path / "dense")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    with pytest.raises(lp.PrehabError, match="exists; give overwrite=True"):
        lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, batches(1), progress=False)
    assert (tmp_path / "small" / "mine.txt").is_file()
    lp.compress_folder(tmp_path / "dense", tmp_path / "other", 0.6, batches(1), progress=False)
    report = lp.compress_folder(tmp_path / "dense", tmp_path / "other", 0.5, batches(1), overwrite=True, progress=False)
    assert report.keep <= 0.5
    assert lp.CompressionReport.load_json(tmp_path / "other" / "report.json").ranks == report.ranks
    with pytest.raises(lp.PrehabError, match="is the model that is read"):
        lp.compress_folder(tmp_path / "dense", tmp_path / "dense", 0.5, batches(1), overwrite=True)


def test_wrong_wishes_are_refused_before_the_work(tmp_path):
    dense("llama", tmp_path / "dense")

    def refused(message, *args, **settings):
        with pytest.raises(lp.PrehabError, match=message):
            lp.compress_folder(tmp_path / "dense", tmp_path / "small", *args, progress=False, **settings)
        assert not (tmp_path / "small").exists()

    refused("tries cuts on the whole model", lp.Recipe(policy=lp.ProbeBudget(0.5)), batches(1))
    refused("memory must be bytes or words", 0.5, batches(1), memory="much")
    refused("too little: about .* are needed for", 0.5, batches(1), memory="1MiB")
    refused("batches is one", 0.5, batches(1)[0])
    refused("needs calibration statistics", lp.Recipe(factorization=lp.WhitenedSVD()))
    refused("cannot be called on a batch of type", 0.5, [{"pixels": torch.zeros(2, 3)}])
    refused("cannot be called on a batch of type", 0.5, [torch.full((2, 3), 48)])
    for data in (batches(1)[0], [torch.full((2, 3), 48)]):
        with pytest.raises(lp.PrehabError):
            lp.compress_folder(tmp_path / "dense", tmp_path / "new" / "deep" / "small", 0.5, data, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    with pytest.raises(lp.PrehabError, match="holds no config.json"):
        lp.compress_folder(tmp_path, tmp_path / "small", 0.5, batches(1))
    with pytest.raises(lp.PrehabError, match="is no folder"):
        lp.compress_folder(tmp_path / "nowhere", tmp_path / "small", 0.5, batches(1))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"labels": torch.full((2, 3), 99)}, "labels 2x3 .IndexError: Target 99 is out of bounds"),
        ({"attention_mask": torch.ones(2, 1, 3, 5)}, "attention_mask 2x1x3x5 .RuntimeError: "),
    ],
)
def test_a_batch_that_a_block_or_the_head_does_not_take_is_told(more, said, tmp_path):
    dense("llama", tmp_path / "dense")
    data = [*batches(1), {"input_ids": torch.ones(2, 3, dtype=torch.long), **more}]
    with pytest.raises(lp.PrehabError, match=f"cannot be called on a batch of type dict with input_ids 2x3, {said}"):
        lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, data, progress=False)
    assert not (tmp_path / "small").exists()


def test_memory_is_kept_to_with_smaller_batches_and_fewer_layers(tmp_path, capsys, monkeypatch):
    from lightning_prehab.offload import needs

    dense("llama", tmp_path / "dense")
    reference = lp.compress_folder(tmp_path / "dense", tmp_path / "whole", 0.5, batches())
    said = capsys.readouterr().err
    assert "2 blocks, one at a time: about " in said
    assert "batches of at most 36 tokens, 108 in all" in said
    monkeypatch.setattr(needs, "resident", lambda: 0)
    monkeypatch.setattr(needs, "LATER", 0)
    monkeypatch.setattr(needs, "COPIES", 0.0)
    report = lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, batches(), memory=2**20)
    said = capsys.readouterr().err
    assert "batches of at most" in said
    assert report.keep <= 0.5
    assert abs(report.keep - reference.keep) < 0.05


def test_what_is_no_compressed_model_is_never_replaced(tmp_path):
    dense("llama", tmp_path / "dense")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").write_text("a photo")
    (tmp_path / "letter").write_text("a letter")
    (tmp_path / "link").symlink_to(tmp_path / "dense")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name in ("photos", "letter", "dense", "link", ".", "letter/small"):
        with pytest.raises(lp.PrehabError, match="give another output|cannot be written"):
            lp.compress_folder(
                tmp_path / "dense", tmp_path / name, lp.Recipe(factorization=lp.SVD()), overwrite=True, progress=False
            )
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert after == before


def scaled(monkeypatch) -> None:
    """Blocks of LLaMA whose output is multiplied by a buffer that lies in the file, as those of Gemma 4 are."""
    from transformers.models.llama import modeling_llama

    class LlamaDecoderLayer(modeling_llama.LlamaDecoderLayer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_buffer("scale", torch.ones(1))

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * self.scale

    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", LlamaDecoderLayer)


def test_buffers_are_those_of_the_file(tmp_path, monkeypatch):
    scaled(monkeypatch)
    torch.manual_seed(0)
    model = MODELS["llama"]()
    for number, block in enumerate(model.model.layers):
        block.scale.fill_(0.25 * (number + 1))
    model.save_pretrained(tmp_path / "dense")
    report = lp.compress_(model, 0.5, batches(), progress=False)
    ours = lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, batches(), progress=False)
    assert ours.ranks == report.ranks
    state = type(model).from_pretrained(tmp_path / "small").state_dict()
    assert [float(state[f"model.layers.{number}.scale"]) for number in (0, 1)] == [0.25, 0.5]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor)


def test_a_head_that_differs_from_the_embeddings_it_should_be_tied_to_is_refused(tmp_path):
    dense("llama", tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    untied = config.read_text()
    assert '"tie_word_embeddings": false' in untied
    config.write_text(untied.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(lp.PrehabError, match=r"'lm_head.weight' are one weight of .* and differ in"):
        lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, batches(), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    model = MODELS["tied llama"]()
    state = {**model.state_dict(), "lm_head.weight": model.lm_head.weight.detach().clone()}
    model.save_pretrained(tmp_path / "twice")
    save_file(state, tmp_path / "twice" / "model.safetensors", metadata={"format": "pt"})  # twice, and the same
    lp.compress_folder(tmp_path / "twice", tmp_path / "small", 0.5, batches(), progress=False)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ', "[]", '{"weight_map": 3}', "\xff"])
def test_a_damaged_index_is_named(content, tmp_path):
    dense("llama", tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(lp.PrehabError, match=r"index.json cannot be read .* copy it again"):
        lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, batches(), progress=False)


def test_of_two_sets_of_weights_it_takes_the_one_that_transformers_takes(tmp_path):
    kind = dense("llama", tmp_path / "dense")
    other = MODELS["llama"]()
    save_file(other.state_dict(), tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    expected = kind.from_pretrained(tmp_path / "dense")
    lp.compress_folder(tmp_path / "dense", tmp_path / "small", 1.0, batches(), progress=False)
    found = kind.from_pretrained(tmp_path / "small").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_batches_are_no_data(data, tmp_path):
    dense("llama", tmp_path / "dense")
    with pytest.raises(lp.PrehabError, match="batches is empty"):
        lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, data, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_an_output_behind_a_link_is_written_where_it_points_to(tmp_path):
    dense("llama", tmp_path / "dense")
    (tmp_path / "large").mkdir()
    (tmp_path / "small").symlink_to(tmp_path / "large" / "small")
    lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, batches(), progress=False)
    assert (tmp_path / "small").is_symlink()
    assert (tmp_path / "large" / "small" / "structure.json").is_file()
