import contextlib
import copy
import itertools
import json
import random
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError
from lightning_prehab.files import folders
from tests.same_model import assert_same_model


class Zoo(nn.Module):
    """Random stacks of linear layers: ties, shared modules, no bias, buffers."""

    def __init__(self, widths, bias, tied, shared, dtype):
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=bias) for n, m in pairs)
        self.embedding = nn.Embedding(7, widths[0])
        self.head = nn.Linear(widths[0], 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.again = self.layers[0] if shared else nn.Identity()
        self.register_buffer("scale", torch.tensor(1.5))
        self.norm = nn.BatchNorm1d(widths[0])
        self.to(dtype)


@st.composite
def zoos(draw):
    widths = draw(st.lists(st.integers(2, 12), min_size=2, max_size=4))
    flags = [draw(st.booleans()) for _ in range(3)]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return widths, *flags, dtype


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(zoos(), st.integers(0, 3))
def test_round_trip_is_exact(tmp_path_factory, arguments, seed):
    torch.manual_seed(seed)
    model = Zoo(*arguments)
    with contextlib.suppress(lp.PrehabError):  # nothing that can be cut so far: a dense model has to survive too
        lp.compress_(model, keep=0.7, factorization=lp.SVD())
    folder = lp.save_compressed(model, tmp_path_factory.mktemp("model"))
    fresh = Zoo(*arguments)
    assert lp.load_compressed(folder, fresh) is fresh
    assert str(fresh) == str(model)
    ours, theirs = fresh.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype
    assert (fresh.head.weight is fresh.embedding.weight) == arguments[2]


def make(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16, bias=bias), nn.Tanh(), nn.Linear(16, 14), nn.Linear(14, 6))


@pytest.fixture
def saved(tmp_path):
    model = make()
    report = lp.compress_(model, keep=0.5, factorization=lp.SVD())
    return lp.save_compressed(model, tmp_path / "model", report), model, report


def unchanged(model, before):
    return str(model) == str(before) and all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )


def test_the_json_can_be_read(saved):
    folder, _, report = saved
    structure = json.loads((folder / "structure.json").read_text())
    assert {layer["name"]: layer["rank"] for layer in structure["layers"]} == report.ranks
    for layer in structure["layers"]:
        assert layer["kind"] == "LowRankLinear"
        assert layer["method"] == "SVD()"
        assert 0 < layer["weight_error"] < 1
    assert sorted(file.name for file in folder.iterdir()) == sorted([structure["weights"]["file"], "structure.json"])


def test_loading_follows_into_any_structure(saved):
    folder, model, _ = saved
    x = torch.randn(5, 12)
    other = make()
    lp.compress_(other, keep=0.3, factorization=lp.SVD())
    for target in (make(), other, copy.deepcopy(model)):
        assert_same_model(lp.load_compressed(folder, target), model, x)
    dense = make()
    lp.save_compressed(dense, folder)
    assert_same_model(lp.load_compressed(folder, model), dense, x)
    assert type(model[0]) is nn.Linear


def test_sparse_parts(tmp_path):
    method = lp.LowRankPlusSparse(0.1, lp.SVD())
    for dtype in (torch.float32, torch.bfloat16):
        model, x = make().to(dtype), torch.randn(5, 12, dtype=dtype)
        report = lp.compress_(model, keep=0.6, factorization=method)
        folder = lp.save_compressed(model, tmp_path, report)
        other = make().to(dtype)
        lp.compress_(other, keep=0.5, factorization=lp.SVD())
        for target in (make().to(dtype), other, copy.deepcopy(model)):
            assert_same_model(lp.load_compressed(folder, target), model, x)
            assert str(target) == str(model)
        layers = json.loads((folder / "structure.json").read_text())["layers"]
        assert {layer["kind"] for layer in layers} == {"LowRankPlusSparseLinear"}
        assert [layer["nonzeros"] for layer in layers] == [19, 22, 8]
        assert layers[0]["method"] == repr(method)
    with torch.no_grad():
        model[0].indices[-1] = 192
    target = make().to(dtype)
    before = copy.deepcopy(target)
    with pytest.raises(CheckpointError, match="Layer '0': the checkpoint holds a sparse part of 19 values"):
        lp.load_compressed(lp.save_compressed(model, tmp_path), target)
    assert unchanged(target, before)


def test_a_bias_that_the_surgery_made(tmp_path):
    model = make(bias=False)
    lp.compress_(model, 0.6, [torch.randn(200, 12) + 2], factorization=lp.WhitenedSVD(centered=True))
    assert model[0].bias is not None
    fresh = lp.load_compressed(lp.save_compressed(model, tmp_path), make(bias=False))
    assert_same_model(fresh, model, torch.randn(5, 12))
    dense = lp.save_compressed(make(bias=False), tmp_path / "dense")
    assert lp.load_compressed(dense, fresh)[0].bias is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 15), nn.Linear(15, 6)), "Layer '2'"),
        (lambda: make()[:3], "'3.*of the file is not in the model"),
        (lambda: nn.Sequential(*make(), nn.Linear(6, 6)), "'4.bias' of the model is not in the file"),
        (lambda: make().double(), "float32 in the file and .* torch.float64 in the model"),
        (lambda: nn.Sequential(nn.Identity(), *make()), "Layer '3'.*the model has a 14x16 layer"),
    ],
    ids=["size", "shorter", "longer", "dtype", "shifted"],
)
def test_a_wrong_architecture_is_named_and_left_alone(change, match, saved):
    target = change()
    before = copy.deepcopy(target)
    with pytest.raises(CheckpointError, match=match):
        lp.load_compressed(saved[0], target)
    assert unchanged(target, before)


def corruptions():
    generator = random.Random(0)
    for kind in ("truncate", "flip", "insert", "json"):
        for _ in range(60):
            yield kind, generator.random(), generator.randrange(1, 256)


def corrupt(folder, kind, where, byte):
    structure = json.loads((folder / "structure.json").read_text())
    files = [folder / "structure.json", folder / structure["weights"]["file"]]
    if kind == "json":  # well-formed JSON that says something else, checksum and all
        keys = [key for key in structure if key != "checksum"]
        key = keys[int(where * len(keys))]
        layer = next(iter(structure["tensors"]))
        tricks = {
            "format": ["pickle", None, 7],
            "version": [0, 2, "1"],
            "written_by": [None],
            "weights": [{"file": "../../etc/passwd", "sha256": "0"}, {"file": "/etc/passwd"}, [], {"file": 3}],
            "layers": ["x"],
            "tensors": [
                {},
                {**structure["tensors"], "extra": {"shape": [1], "dtype": "torch.float32"}},
                {layer: 1},
                [],
            ],
            "aliases": [{"../x": layer}, {"x": "missing"}, {"x": layer}, []],
        }[key]
        structure[key] = tricks[byte % len(tricks)]
        if byte % 2:
            structure.pop(key)
        structure.pop("checksum")
        structure["checksum"] = folders._checksum(structure)
        files[0].write_text(json.dumps(structure))
        return key
    file = files[byte % 2]
    content = bytearray(file.read_bytes())
    place = int(where * len(content))
    if kind == "truncate":
        del content[place:]
    elif kind == "flip":
        content[place] ^= byte
    else:
        content[place:place] = bytes([byte]) * 3
    file.write_bytes(content)
    return file.name


def test_240_corruptions_are_all_errors(saved, tmp_path):
    """Or harmless: a blank in the JSON, a remark that nothing depends on."""
    folder, model, _ = saved
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    errors = 0
    for kind, where, byte in corruptions():
        what = corrupt(folder, kind, where, byte)
        target = make()
        before = copy.deepcopy(target)
        try:
            lp.load_compressed(folder, target)
        except CheckpointError:
            errors += 1
            assert unchanged(target, before), (kind, what)
        else:
            assert what in ("structure.json", "written_by", "layers"), (kind, what)
            assert unchanged(target, model), (kind, what)
        for name, content in good.items():
            (folder / name).write_bytes(content)
    assert errors > 200


def test_missing_files(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"There is no folder '.*nowhere'. Check the path"):
        lp.load_compressed(tmp_path / "nowhere", make())
    folder, _, _ = saved
    next(folder.glob("weights-*")).unlink()
    with pytest.raises(CheckpointError, match="weights file weights-.* is missing"):
        lp.load_compressed(folder, make())


@pytest.mark.parametrize("moment", ["weights", "structure"])
def test_killed_while_saving_leaves_the_old_model(moment, saved, monkeypatch):
    folder, model, _ = saved
    calls = []

    def killed(source, target):
        calls.append(target)
        if len(calls) == {"weights": 1, "structure": 2}[moment]:
            raise KeyboardInterrupt
        return real(source, target)

    real = folders.os.replace
    monkeypatch.setattr(folders.os, "replace", killed)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[3].A.weight.add_(1)
    with pytest.raises(KeyboardInterrupt):
        lp.save_compressed(changed, folder)
    monkeypatch.undo()
    assert unchanged(lp.load_compressed(folder, make()), model)
    assert not list(folder.glob(".*"))
    lp.save_compressed(changed, folder)
    assert unchanged(lp.load_compressed(folder, make()), changed)
    assert len(list(folder.iterdir())) == 2


def test_saving_needs_tensors_and_the_extra(tmp_path, monkeypatch):
    class Odd(nn.Module):
        def get_extra_state(self):
            return {"anything": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(lp.PrehabError, match="'_extra_state' is not a tensor"):
        lp.save_compressed(Odd(), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(lp.PrehabError, match=r"lightning-prehab\[hf\]"):
        lp.save_compressed(make(), tmp_path)


def test_no_pickle_in_the_package():
    """Nothing is pickled, and the files of users are read with ``weights_only=True`` (the error may be named)."""
    import ast
    from pathlib import Path

    loads = 0
    for file in Path(lp.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert {name for name in used if name.startswith("pickle.")} <= {"pickle.UnpicklingError"}
        assert "torch.save" not in used
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "pickle"]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                loads += 1
                assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords]
    assert loads > 0


@pytest.mark.filterwarnings("ignore")  # torch calls its sparse and quantized tensors experimental
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda w: w.to_sparse(), r"is no dense tensor \(torch.sparse_coo\)"),
        (lambda w: w.to_sparse_csr(), r"is no dense tensor \(torch.sparse_csr\)"),
        (lambda w: torch.nested.nested_tensor([w, w]), r"is no dense tensor \(nested\)"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is quantized"),
    ],
)
def test_tensors_that_a_file_has_no_place_for(make, match, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    model[1].register_buffer("odd", make(torch.ones(8, 8)))
    lp.compress_(model, 0.5)
    with pytest.raises(lp.PrehabError, match=f"'1.odd' {match}"):
        lp.save_compressed(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_module_that_is_built_in_configure_model_is_told_to_build_first(tmp_path):
    class Late(torch.nn.Module):
        net = None

        def configure_model(self):
            self.net = torch.nn.Linear(8, 8)

    model = Late()
    model.configure_model()
    lp.save_compressed(model, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"'net.bias' of the file .*: nothing is built yet: call .*configure_model"
    ):
        lp.load_compressed(tmp_path, Late())
