"""A folder that is refined block by block is the model that is refined so in memory; killed ones go on; never worse."""

import copy
import json

import pytest
import torch

import lightning_prehab as lp

pytest.importorskip("transformers")

from lightning_prehab.offload import needs, refining
from lightning_prehab.offload.chain import Chain
from lightning_prehab.offload.needs import Needs, fitting_batches
from lightning_prehab.offload.skeleton import Skeleton, Source
from lightning_prehab.offload.work import Work
from lightning_prehab.refinement.blocks import find_blocks
from lightning_prehab.refinement.sequences import Sequences
from lightning_prehab.refinement.trained import parameters_to_train
from lightning_prehab.statistics.batches import tensors
from tests.offload.folders import Killed, dense, killed_after
from tests.refinement.models import decisive_

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer calibration tokens")

WISH = lp.Refinement(8, lr=3e-3, rows=16, precision="full", patience=9, seed=3)
SVD = lp.SVD()


def batches() -> list[dict[str, torch.Tensor]]:
    """One of them with padding."""
    found = []
    for number in range(5):
        ids = torch.randint(1, 48, (16, 12), generator=torch.Generator().manual_seed(number))
        mask = torch.ones_like(ids)
        mask[::2, 8:] = number != 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def decisive(name, folder):
    """Writes a model with something to lose; the answer is its class."""
    kind = dense(name, folder)
    model = decisive_(kind.from_pretrained(folder, dtype="auto"))
    for old in folder.iterdir():
        old.unlink()
    model.save_pretrained(folder)
    return kind


def compress(folder, output="small", refine=WISH, recipe=None, **settings):
    recipe = lp.Recipe(0.4, factorization=SVD) if recipe is None else recipe
    return lp.compress_folder(
        folder / "dense", folder / output, recipe, batches(), refine=refine, progress=False, **settings
    )


def weights(folder):
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def far(ours, theirs):
    """The largest relative difference of a weight; none counts that is without effect on attention: rounding alone."""
    names = [name for name in ours if not name.endswith("k_proj.bias")]
    pairs = [(ours[name].double(), theirs[name].double()) for name in names]
    return max(float((one - other).norm() / (other.norm() + 1e-6)) for one, other in pairs)


CASES = [("llama", "factors"), ("llama", "pivot"), ("tied llama", "factors"), ("half a llama", "pivot")]
CASES += [("opt", "pivot")]  # what lies before the blocks is cut too


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_it_is_the_refinement_in_memory(name, layout, tmp_path):
    kind = decisive(name, tmp_path / "dense")
    recipe = lp.Recipe(0.4, factorization=SVD, layout=layout)
    reference = kind.from_pretrained(tmp_path / "dense", dtype="auto")
    cut = copy.deepcopy(reference)
    lp.compress_(cut, recipe, batches(), progress=False)
    wish = lp.Refinement.from_dict({**WISH.to_dict(), "scope": "blocks"})
    expected = lp.compress_(reference, recipe, batches(), refine=wish, progress=False)
    report = compress(tmp_path, recipe=recipe)
    assert (report.refinement.scope, report.refinement.measure, report.refinement.kept) == ("blocks", "squared", True)
    assert report.refinement.steps == expected.refinement.steps
    assert report.refinement.data == f"{expected.refinement.data}, after the last block"
    again, loading = kind.from_pretrained(tmp_path / "small", dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading
    assert again.state_dict().keys() == reference.state_dict().keys()
    for one in (again, reference, cut):
        lp.to_dense_(one)  # where rows are as good as others, rounding decides which of them are pivots
    ours, theirs, before = (one.state_dict() for one in (again, reference, cut))
    share = 1e-3 if next(reference.parameters()).dtype == torch.float32 else 0.2  # of what was learned
    assert far(ours, theirs) < share * far(before, theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small"]
    assert lp.CompressionReport.load_json(tmp_path / "small" / "report.json").refinement == report.refinement


@torch.no_grad()
def last_states(model, parts):
    """What the last block returns for some batches, without padding."""
    found = []

    def keep(module, args, output):
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    handle = find_blocks(model)[-1][1].register_forward_hook(keep)
    for part in parts:
        model(**part)
    handle.remove()
    return torch.cat([one[part["attention_mask"].bool()] for one, part in zip(found, parts, strict=True)]).double()


@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral", "bert"])
def test_what_is_said_is_true_of_the_folder(name, tmp_path):
    kind = dense(name, tmp_path / "dense")
    found = compress(tmp_path).refinement
    compress(tmp_path, "plain", refine=None)
    parts = Sequences(batches(), WISH).held_back
    right, plain, refined = (
        last_states(kind.from_pretrained(tmp_path / folder, dtype="auto").eval(), parts)
        for folder in ("dense", "plain", "small")
    )
    errors = [float((one - right).square().sum() / right.square().sum()) for one in (plain, refined)]
    near = 1e-3 if kind.from_pretrained(tmp_path / "dense", dtype="auto").dtype == torch.float32 else 2e-2
    assert [found.before, found.after] == pytest.approx(errors, rel=near)
    assert found.kept == (found.after < found.before)
    assert found.after <= found.before


def test_every_stage_is_done_once_whenever_it_is_killed(tmp_path, monkeypatch):
    decisive("llama", tmp_path / "dense")
    recipe = lp.Recipe(0.4, layout="pivot")
    expected = compress(tmp_path, "whole", recipe=recipe)
    done: list[str] = []
    for _ in range(100):
        try:
            with killed_after(3, monkeypatch) as seen:
                report = compress(tmp_path, recipe=recipe)
            done += seen
            break
        except Killed:
            done += seen
            assert not (tmp_path / "small").exists()
    assert len(done) == len(set(done))
    assert [stage for stage in done if stage.startswith("refined")] == [
        "refined-model.layers.0",
        "refined-model.layers.1",
        "refined",
    ]
    assert report.refinement.kept
    found, wanted = report.refinement.to_dict(), expected.refinement.to_dict()
    assert found.pop("seconds") > 0.0 < wanted.pop("seconds")
    assert found == wanted
    assert_same(weights(tmp_path / "small"), weights(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small", "whole"]


@pytest.mark.parametrize("last", ["refined-model.layers.1", "refined", "complete"])
def test_a_kill_before_a_stage_is_noted_changes_nothing(last, tmp_path, monkeypatch):
    decisive("llama", tmp_path / "dense")
    expected = compress(tmp_path, "whole")
    finish = Work.finish

    def killed(self, stage, note=True):
        if stage == last:
            raise Killed
        finish(self, stage, note)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "finish", killed)
        with pytest.raises(Killed):
            compress(tmp_path)
    assert compress(tmp_path).refinement.after == expected.refinement.after
    assert_same(weights(tmp_path / "small"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("layout", ["factors", "pivot"])
def test_what_makes_it_worse_is_not_written(layout, tmp_path):
    decisive("llama", tmp_path / "dense")
    recipe = lp.Recipe(0.4, factorization=SVD, layout=layout)
    compress(tmp_path, "plain", refine=None, recipe=recipe)
    found = compress(tmp_path, refine=lp.Refinement(4, lr=30.0, rows=16), recipe=recipe).refinement
    assert (found.kept, found.after) == (False, found.before)
    assert "brought nothing" in found.summary()
    assert_same(weights(tmp_path / "small"), weights(tmp_path / "plain"))


def test_blocks_that_are_better_alone_and_worse_together_are_not_written(tmp_path, monkeypatch):
    decisive("llama", tmp_path / "dense")
    compress(tmp_path, "plain", refine=None)
    measured = iter([0.5, 0.6])
    monkeypatch.setattr(refining, "relative_error", lambda *_: next(measured))
    found = compress(tmp_path).refinement
    assert (found.before, found.after, found.kept, found.steps) == (0.5, 0.5, False, 16)
    assert_same(weights(tmp_path / "small"), weights(tmp_path / "plain"))


@pytest.mark.parametrize("precision", ["full", "half"])
def test_a_model_in_half_precision_is_trained_in_float32(precision, tmp_path, monkeypatch):
    kind = decisive("half a llama", tmp_path / "dense")
    refine, seen = refining.refine_block_, set()

    def watched(pair, block, calls, inputs, *others):
        given = [inputs[0], *tensors([*calls[0].args, *calls[0].settings.values()]), *block.parameters()]
        seen.update(one.dtype for one in given if one.is_floating_point())
        return refine(pair, block, calls, inputs, *others)

    monkeypatch.setattr(refining, "refine_block_", watched)
    wish = lp.Refinement(8, lr=3e-3, rows=16, precision=precision)
    assert compress(tmp_path, refine=wish).refinement.kept
    assert seen == {torch.float32}
    model = kind.from_pretrained(tmp_path / "small", dtype="auto")
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


def test_what_fails_is_a_warning_and_the_folder_is_that_of_the_cut(tmp_path, monkeypatch):
    decisive("llama", tmp_path / "dense")
    compress(tmp_path, "plain", refine=None)

    def fail(*args):
        raise ValueError("no")

    monkeypatch.setattr(refining, "refine_block_", fail)
    with pytest.warns(UserWarning, match="compressed, but it could not be refined"):
        assert compress(tmp_path).refinement is None
    assert_same(weights(tmp_path / "small"), weights(tmp_path / "plain"))


def test_wrong_wishes_are_refused_before_the_work(tmp_path):
    dense("llama", tmp_path / "dense")

    def refused(message, refine, data):
        with pytest.raises(lp.PrehabError, match=message):
            lp.compress_folder(tmp_path / "dense", tmp_path / "small", 0.5, data, refine=refine, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]

    refused("scope='model'.* trains all blocks at once", lp.Refinement(scope="model"), batches())
    refused("compares the predictions of whole models", lp.Refinement(measure="divergence"), batches())
    refused("needs batches to train on", True, None)
    refused("a refinement measures on a part of them", 4, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    refused("refine must be a Refinement", "yes", batches())
    refused("cannot be called on a batch of type dict", 4, [{"input_ids": torch.full((16, 3), 48)}])


@pytest.mark.parametrize("layout", ["factors", "pivot"])
def test_memory_is_that_of_gradients_moments_and_states(layout, tmp_path, monkeypatch):
    decisive("llama", tmp_path / "dense")
    skeleton = Skeleton(Source(tmp_path / "dense"))
    recipe = lp.Recipe(0.4, factorization=SVD, layout=layout)
    monkeypatch.setattr(needs, "resident", lambda: 0)
    monkeypatch.setattr(needs, "LATER", 0)
    with_it, without = (Needs.of(skeleton, Chain(skeleton), recipe, batches(), one) for one in (WISH, None))
    assert "the refinement of a block" not in without.stages()
    assert with_it.disk > without.disk
    assert with_it.step == 16 * 12
    assert with_it.memory == with_it.stages()["the refinement of a block"]
    smaller, fitted = fitting_batches(with_it, batches(), with_it.memory - 1)
    assert fitted.memory < with_it.memory
    assert {len(batch["input_ids"]) for batch in smaller} == {fitted.rows} == {8}
    compress(tmp_path, recipe=lp.Recipe(0.4, factorization=SVD))  # in factors: so they are trained
    model = lp.load_compressed(tmp_path / "small", type(skeleton.model).from_pretrained(tmp_path / "dense"))
    for _, block in find_blocks(model):
        trained = sum(one.numel() for one in parameters_to_train(block))
        assert with_it.training > 5 * 4 * trained


def test_another_refinement_is_another_wish(tmp_path, monkeypatch):
    dense("llama", tmp_path / "dense")
    for wish in (None, 4, 5, lp.Refinement(5, seed=1)):
        with killed_after(4, monkeypatch), pytest.raises(Killed):
            compress(tmp_path, refine=wish)
    left = [json.loads((folder / "wish.json").read_bytes())["refine"] for folder in tmp_path.glob(".small.*")]
    assert len(left) == 4
    assert None in left
