"""Refinement, text of the model's own, latencies and memory on a GPU."""

import copy
import gc

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.plan.timing import time_calls
from lightning_prehab.report.evaluation import Evaluation
from lightning_prehab.report.latency import compare_latencies
from tests.cuda import device as here
from tests.cuda.device import (
    DEVICE,
    assert_here,
    assert_near,
    decisive_,
    labelled,
    loss,
    matrices,
    mlp,
    needs_device,
    needs_gpu,
    not_pretended,
)
from tests.pretended import NAME

pytestmark = needs_device


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_llama(dtype=torch.float32):
    pytest.importorskip("transformers")
    from tests.tiny_llama import llama

    torch.manual_seed(0)
    return decisive_(llama()).to(dtype)


def text(rows=16, count=6):
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(rows, 16, dtype=torch.long)
    mask[: rows // 2, 12:] = 0
    return [
        {"input_ids": torch.randint(1, 48, (rows, 16), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


@pytest.mark.parametrize("precision", ["full", "half"])
@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("scope", ["model", "blocks"])
def test_a_refinement_brings_the_model_nearer(scope, layout, precision):
    if precision == "half":
        not_pretended()
    outcomes = []
    for device in (DEVICE, "cpu"):
        dense = small_llama().to(device)
        model = copy.deepcopy(dense)
        lp.compress_(model, 0.5, text(), layout=layout, factorization=lp.WhitenedSVD(), progress=False)
        wish = lp.Refinement(12, scope=scope, lr=3e-3, rows=32, precision=precision)
        report = lp.refine_(model, dense, text(), wish, progress=False)
        assert_here(model, torch.device(device))
        assert report.after < report.before
        outcomes.append(report)
    there, here = outcomes
    assert there.before == pytest.approx(here.before, rel=0.02 if precision == "full" else 0.1)
    assert there.after == pytest.approx(here.after, rel=0.1 if precision == "full" else 0.3)


@pytest.mark.parametrize("checkpointing", [True, False, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_refinements_of_all_dtypes_within_a_cut(dtype, checkpointing):
    not_pretended()
    model = small_llama(dtype).to(DEVICE)
    wish = lp.Refinement(4, checkpointing=checkpointing, rows=32)
    report = lp.compress_(model, 0.5, text(), refine=wish, evaluate=0.2, progress=False)
    assert_here(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert str(report)


def test_where_the_padding_is_is_asked_once_a_batch():
    if DEVICE.type != NAME:
        pytest.skip("for the pretended device, which counts")
    model = small_llama().to(DEVICE)
    targets = lp.find_targets(model)
    here.WAITS.clear()
    lp.collect_statistics(model, targets, text(count=3), gradients=True)
    asked = {line: often for line, often in here.WAITS.items() if line.endswith(("nonzero", "index"))}
    ours = {line: often for line, often in asked.items() if line.startswith("statistics/collector.py")}
    assert sum(ours.values()) == 3


@pytest.mark.parametrize("policy", [lp.CalibratedBudget(0.5, trials=3), lp.ProbeBudget(0.5), lp.ZeroSum(0.5)])
def test_language_models_are_cut_by_labels_of_their_own(policy):
    """Labels are drawn from the logits by a generator of the CPU: as on the CPU, but where rounding decides one."""
    answers = []
    for device in (DEVICE, "cpu"):
        model = small_llama().to(device)
        report = lp.compress_(model, policy=policy, batches=text(), evaluate=0.2, progress=False)
        assert_here(model, torch.device(device))
        answers.append((report.ranks, report.scores))
    (there, _), (here, _) = answers
    assert there.keys() == here.keys()
    assert sum(one != here[name] for name, one in there.items()) <= len(here) // 2


def test_scores_are_those_of_the_cpu():
    for make, batches in ((mlp, labelled(2)), (small_llama, text(count=2))):
        found = [Evaluation(batches).score(make().to(device)) for device in (DEVICE, "cpu")]
        assert found[0].loss == pytest.approx(found[1].loss, rel=1e-4)
        assert found[0].count == found[1].count
        assert found[0].accuracy == found[1].accuracy


class Tokenizer:
    """What is asked of one."""

    bos_token_id, eos_token_id, all_special_ids = 1, 2, (0, 1, 2)

    def __len__(self):
        return 48


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_a_model_writes_the_same_text_as_on_the_cpu(dtype):
    texts = []
    for device in (DEVICE, "cpu"):
        model = small_llama().to(device)
        batches = lp.own_samples(model, Tokenizer(), sequences=12, length=16, dtype=dtype, progress=False)
        assert all(one["input_ids"].device.type == "cpu" for one in batches)
        texts.append(torch.cat([one["input_ids"] for one in batches]))
    assert texts[0].shape == texts[1].shape == (12, 16)
    if dtype is not None:  # a place where rounding decides changes the rest of its text
        assert (texts[0] == texts[1]).all(1).float().mean() > 0.7
    model = small_llama().to(DEVICE)
    lp.compress_(model, 0.6, [{"input_ids": texts[0], "attention_mask": torch.ones_like(texts[0])}], progress=False)


def test_a_folder_is_compressed_and_runs_here(tmp_path):
    """``compress_folder`` computes on the CPU; what it writes runs anywhere."""
    pytest.importorskip("safetensors")
    model = small_llama()
    model.save_pretrained(tmp_path / "dense")
    lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, text(), progress=False)
    loaded = lp.load_compressed(tmp_path / "small", small_llama().to(DEVICE))
    assert_here(loaded)
    in_memory = small_llama().to(DEVICE)
    lp.compress_(in_memory, 0.5, text(), progress=False)
    assert matrices(loaded).keys() == matrices(in_memory).keys()


@needs_gpu
def test_latencies_are_of_work_that_is_done():
    """The clock is stopped when the device is done: its own events say the same, whatever the queue of the CPU does."""
    size = 6144
    x, y = (torch.randn(size, size, device=DEVICE) for _ in range(2))
    seconds = time_calls({"product": lambda: x @ y}, DEVICE)["product"]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(5):
        x @ y
    end.record()
    torch.cuda.synchronize()
    assert seconds == pytest.approx(begin.elapsed_time(end) / 5e3, rel=0.5)
    dense = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size)).to(DEVICE)
    small = copy.deepcopy(dense)
    lp.compress_(
        small, 0.2, factorization=lp.WhitenedSVD(), batches=[torch.randn(2048, size)], loss=_square, progress=False
    )
    latency = compare_latencies(dense, small, [torch.randn(4096, size)])
    assert latency.device == str(DEVICE)
    batch = latency.batches[0]
    assert 1.5 < batch.dense_seconds / batch.compressed_seconds < 10.0
    assert sum(before for before, _ in batch.layers.values()) == pytest.approx(batch.dense_seconds, rel=0.5)


def _square(model, batch):
    return model(batch).square().mean()


@needs_gpu
def test_memory_is_given_back_and_stays_within_what_is_said():
    """Sums of all layers, or of a few at a time; afterwards the factors, and nothing else."""
    size, count = 1024, 12

    def cut(at_once):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count))).to(DEVICE)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        lp.compress_(
            model, 0.4, [torch.randn(512, size) for _ in range(2)], loss=_square, layers_at_once=at_once, progress=False
        )
        peak = torch.cuda.max_memory_allocated() - before
        gc.collect()
        held = torch.cuda.memory_allocated() - before
        return model, peak, held

    weight, grams = 4 * size**2, 2 * 4 * size**2
    cut(None)  # workspaces of the solvers stay
    _, whole, held = cut(None)
    assert held < -0.5 * count * weight  # dense weights are gone
    _, one, held_one = cut(1)
    assert held_one < -0.5 * count * weight
    assert whole > count * grams * 0.5  # what is saved is there
    assert one < whole - 0.25 * count * grams, (one / weight, whole / weight)
    print(f"peak above the model, in weights: {whole / weight:.1f} at once, {one / weight:.1f} one at a time")


@needs_gpu
def test_a_gpu_other_than_the_current_one_is_a_matter_of_the_model():
    if torch.cuda.device_count() < 2:
        pytest.skip("for two GPUs")
    second = torch.device("cuda", 1)
    model = mlp().to(second)
    lp.compress_(model, 0.5, labelled(), loss, progress=False)
    assert_here(model, second)


def test_random_numbers_of_the_device_are_left_alone():
    model = small_llama().to(DEVICE)
    torch.manual_seed(5)
    expected = [torch.rand(3), torch.rand(3, device=DEVICE)]
    torch.manual_seed(5)
    lp.compress_(
        model, policy=lp.CalibratedBudget(0.5, trials=2), batches=text(), refine=4, evaluate=0.2, progress=False
    )
    for one, other in zip(expected, [torch.rand(3), torch.rand(3, device=DEVICE)], strict=True):
        assert torch.equal(one, other)


def test_outputs_without_labels_are_compared_on_the_device():
    model = mlp().to(DEVICE)
    report = lp.compress_(model, 0.5, [batch[0] for batch in labelled()], loss=_square, evaluate=0.3, progress=False)
    assert_here(model)
    assert_near(model(labelled(1)[0][0].to(DEVICE)), model.cpu()(labelled(1)[0][0]), 1e-4)
    assert str(report)
