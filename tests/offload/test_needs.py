"""What is said of disk and of time before the work begins, against what the work takes: counted, never in seconds."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lightning_prehab as lp

pytest.importorskip("transformers")

import transformers

from lightning_prehab.linalg import decomposition
from lightning_prehab.offload import effort
from lightning_prehab.offload.chain import Chain
from lightning_prehab.offload.effort import Effort
from lightning_prehab.offload.needs import Needs
from lightning_prehab.offload.skeleton import Skeleton, Source
from lightning_prehab.offload.work import Work

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer calibration tokens")

WISHES = {
    "default": (lp.Recipe(0.5), None),
    "no metric, pivot layout": (lp.Recipe(0.8, factorization=lp.SVD(), layout="pivot"), None),
    "forward alone": (lp.Recipe(0.5, factorization=lp.WhitenedSVD()), None),
    "centered": (lp.Recipe(0.5, factorization=lp.WhitenedSVD(centered=True)), None),
    "sparse": (lp.Recipe(0.5, factorization=lp.LowRankPlusSparse(steps=1, base=lp.SVD())), None),
    "refined": (lp.Recipe(0.5), lp.Refinement(3, scope="blocks", rows=8, precision="full")),
}


def batches():
    return [{"input_ids": torch.randint(1, 64, (8, 32))} for _ in range(4)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "dense"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def of(kind, source, wish):
    skeleton = Skeleton(Source(source))
    return kind.of(skeleton, Chain(skeleton), wish[0], batches(), wish[1])


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_the_work_is_what_was_counted(wish, source, tmp_path, monkeypatch):
    """Products, eigenproblems, and what lies on disk at most, but for notes, which are text of a spectrum's size."""
    cubes, sizes, solve = [], [], decomposition.symmetric_eigh

    def counted(grams, dtype):
        cubes.append(grams.shape[0] * grams.shape[-1] ** 3)
        return solve(grams, dtype)

    def looking(act):
        def watched(*args, **settings):
            files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".done", ".json")]
            sizes.append(sum(path.stat().st_size for path in files))
            return act(*args, **settings)

        return watched

    monkeypatch.setattr(decomposition, "symmetric_eigh", counted)
    for name in ("finish", "remove", "clear"):
        monkeypatch.setattr(Work, name, looking(getattr(Work, name)))
    with FlopCounterMode(display=False) as counter:
        lp.compress_folder(source, tmp_path / "small", wish[0], batches(), refine=wish[1], progress=False)
    said, disk = of(Effort, source, wish), of(Needs, source, wish).disk
    assert 1 / 2 < sum(said.products.values()) / counter.get_total_flops() < 2
    assert 1 / 2 < said.eigen / sum(cubes) < 2
    assert max(sizes) <= 1.05 * disk  # files have headers
    assert disk <= 3 * max(sizes)


def test_the_time_is_what_is_counted_at_the_speed_that_was_measured(source, tmp_path, monkeypatch, capsys):
    found = Effort({torch.float32: 6.0 * effort.SIZE**3, torch.bfloat16: 8.0 * effort.SIZE**3}, 5.0 * effort.SIZE**3)
    monkeypatch.setattr(effort, "_seconds_of_product", {torch.float32: 10.0, torch.bfloat16: 100.0}.get)
    monkeypatch.setattr(effort, "_seconds_of_eigen", lambda: 1000.0)
    assert found.seconds() == pytest.approx(3 * 10 + 4 * 100 + 5 * 1000)
    monkeypatch.setattr(Effort, "seconds", lambda self: 1500.0)
    lp.compress_folder(source, tmp_path / "small", lp.Recipe(0.5, factorization=lp.SVD()))
    assert "\n25 minutes of computing, by a short measurement" in capsys.readouterr().err
    monkeypatch.setattr(Effort, "seconds", lambda self: 5.0)
    lp.compress_folder(source, tmp_path / "again", lp.Recipe(0.5, factorization=lp.SVD()))
    assert "\nLess than a minute of computing, by a short measurement" in capsys.readouterr().err


def test_a_speed_is_measured():
    assert 0.0 < Effort({torch.float32: 2.0 * effort.SIZE**3}, 0.0).seconds() < 60.0
    assert Effort({}, 1.0).seconds() > 0.0
