"""Training of a cut model toward the dense one."""

import copy
import math

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, PrehabError, StatisticsError, UnsupportedError
from lightning_prehab.refinement import course
from lightning_prehab.refinement.checkpointing import checkpointed
from lightning_prehab.refinement.course import Course
from lightning_prehab.refinement.distance import distance
from lightning_prehab.refinement.pair import Pair
from lightning_prehab.refinement.trained import balance_, parameters_to_train
from lightning_prehab.report.refined import RefinementReport
from tests.refinement.models import MEASURES, MODELS, cut
from tests.same_model import assert_same_weights

EXACT = {"precision": "full", "seed": 3}


def refine(model, dense, batches, steps=12, **settings):
    wish = lp.Refinement(steps, **{"lr": 3e-3, "rows": 128, "patience": 9, **EXACT, **settings})
    return lp.refine_(model, dense, batches, wish, progress=False)


@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("name", MODELS)
def test_the_cut_model_comes_nearer_and_is_of_the_same_form(name, layout):
    model, dense, batches = cut(name, layout)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    kinds = [type(one) for one in model.modules()]
    untouched = copy.deepcopy(dense.state_dict())
    found = refine(model, dense, batches)
    assert (found.measure, found.kept, found.scope, found.steps) == (MEASURES[name], True, "model", 12)
    assert found.after < 0.95 * found.before
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert [type(one) for one in model.modules()] == kinds
    assert all(torch.equal(value, untouched[key]) for key, value in dense.state_dict().items())
    assert "forward" not in {key for one in model.modules() for key in one.__dict__}
    assert found.summary() in str(found)


@pytest.mark.parametrize("layout", ["factors", "pivot"])
def test_what_is_said_is_true_of_the_model_afterwards(layout):
    model, dense, batches = cut("language", layout)
    held_back = batches[4]["input_ids"]
    before = _divergence(model, dense, held_back)
    found = refine(model, dense, batches)
    assert found.data == "32 held-back rows"
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(_divergence(model, dense, held_back), rel=1e-4)


@torch.no_grad()
def _divergence(model, dense, tokens):
    p, q = (one(input_ids=tokens).logits.double().log_softmax(-1) for one in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ["language", "encoder"])
def test_blocks_one_by_one_come_nearer(name):
    model, dense, batches = cut(name)
    found = refine(model, dense, batches, scope="blocks")
    assert (found.scope, found.kept, found.steps) == ("blocks", True, 24)
    assert found.after < 0.95 * found.before
    assert "block by block" in found.summary()


def test_one_step_is_one_step_of_adamw_on_the_divergence():
    model, dense, batches = cut("language")
    twin = copy.deepcopy(model)
    refine(model, dense, [{"input_ids": batches[0]["input_ids"][:6]}], steps=1, lr=1e-4, held_back=0.34)
    balance_(twin)
    chosen = parameters_to_train(twin)
    rows = batches[0]["input_ids"][[0, 2, 3, 5]]  # of six two are held back
    p, q = (one(input_ids=rows).logits.log_softmax(-1) for one in (dense, twin))
    gradients = torch.autograd.grad((p.detach().exp() * (p.detach() - q)).sum(-1).mean(), chosen)
    norm = torch.stack([one.norm() for one in gradients]).norm()
    for parameter, gradient in zip(chosen, gradients, strict=True):
        parameter.grad = gradient * min(1.0, float(course.CLIP / (norm + 1e-6)))
    torch.optim.AdamW(chosen, lr=1e-4, weight_decay=0.0).step()
    for (key, value), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=key)


def test_the_gradient_is_that_of_the_divergence_without_padding():
    model, dense, _ = cut("language")
    tokens = torch.randint(1, 48, (3, 9))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    chosen = parameters_to_train(model)
    for one in model.parameters():
        one.requires_grad_(True)
    ours = torch.autograd.grad(Pair(model, dense, half=False).distance(batch).mean, chosen)
    p, q = (one(**batch).logits[mask.bool()].log_softmax(-1) for one in (dense, model))
    loss = nn.functional.kl_div(q, p.detach(), log_target=True, reduction="batchmean")
    for one, other in zip(ours, torch.autograd.grad(loss, chosen), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_never_happens_adds_nothing():
    right, answer = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    open_ones = distance("divergence", answer[:, :3], right[:, :3], {})
    masked = torch.full((4, 2), -torch.inf)
    closed = distance("divergence", torch.cat([answer[:, :3], masked], 1), torch.cat([right[:, :3], masked], 1), {})
    torch.testing.assert_close(closed.total, open_ones.total)
    ours, theirs = (torch.autograd.grad(one.total, answer)[0] for one in (closed, open_ones))
    torch.testing.assert_close(ours, theirs)


def test_checkpointing_changes_no_gradient():
    model, dense, batches = cut("language")
    chosen = parameters_to_train(model)
    pair = Pair(model, dense, half=False)
    plain = torch.autograd.grad(pair.distance(batches[0]).mean, chosen)
    with checkpointed(model):
        twice = torch.autograd.grad(pair.distance(batches[0]).mean, chosen)
    for one, other in zip(plain, twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", ["factors", "pivot"])
@pytest.mark.parametrize("scope", ["model", "blocks"])
def test_what_makes_it_worse_is_undone_bit_by_bit(scope, layout):
    model, dense, batches = cut("language", layout)
    before = copy.deepcopy(model)
    found = refine(model, dense, batches, scope=scope, lr=30.0, steps=4)
    assert not found.kept
    assert found.after == found.before
    assert "brought nothing" in found.summary()
    assert_same_weights(model, before)


def test_what_is_not_finite_goes_back_to_the_best():
    parameter = nn.Parameter(torch.tensor(1.0))
    losses = iter([1.0, 1.0, math.nan])
    measured = iter([3.0, 2.0, 1.0])
    found = Course([parameter], 5, 0.1, 3).run(
        range(5), lambda number: parameter * next(losses), lambda: next(measured), phase=None
    )
    assert found == (3.0, 1.0, 2, True, "step 3 was not finite")
    assert 0.5 < float(parameter.detach()) < 1.0


def test_an_interruption_leaves_the_best_state_and_says_so():
    model, dense, batches = cut("language", "pivot")
    before = _divergence(model, dense, batches[4]["input_ids"])
    calls = []

    def interrupt(module, args, output):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 8:
            raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(interrupt)
    with pytest.warns(UserWarning, match="Interrupted while the model was refined"), pytest.raises(KeyboardInterrupt):
        refine(model, dense, batches)
    handle.remove()
    assert _divergence(model, dense, batches[4]["input_ids"]) < before


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interruption_before_anything_is_better_leaves_the_very_same_model(at):
    model, dense, batches = cut("language", "pivot")
    before = copy.deepcopy(model)
    calls = []

    def interrupt(module, args, output):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(interrupt)
    with pytest.warns(UserWarning, match="Interrupted while the model was refined"), pytest.raises(KeyboardInterrupt):
        refine(model, dense, batches)
    handle.remove()
    assert_same_weights(model, before)


def test_everything_of_the_user_is_as_it_was():
    model, dense, batches = cut("language")
    model.train()
    model.model.layers[0].eval()
    model.requires_grad_(False)
    table = model.model.embed_tokens.weight
    gradient = torch.ones_like(table)
    table.requires_grad_(True).grad = gradient
    dense.train()
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(1))
    copies = copy.deepcopy(batches)
    state, modes = torch.get_rng_state(), [one.training for one in model.modules()]
    with torch.no_grad():
        found = refine(model, dense, batches)
    assert found.kept
    assert torch.equal(torch.get_rng_state(), state)
    assert [one.training for one in model.modules()] == modes
    assert [name for name, one in model.named_parameters() if one.requires_grad] == ["model.embed_tokens.weight"]
    assert table.grad is gradient
    assert all(one.grad is None for one in model.parameters() if one is not table)
    assert dense.training
    assert model.config.use_cache
    assert list(model._forward_hooks) == [handle.id]
    assert seen
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(batches, copies, strict=True))


@pytest.mark.parametrize("layout", ["factors", "pivot"])
def test_a_model_in_half_precision_is_trained_in_float32_and_stays_in_half(layout):
    dense, batches = MODELS["language"]()
    dense.bfloat16()
    model = copy.deepcopy(dense)
    lp.compress_(model, 0.4, factorization=lp.SVD(), layout=layout, progress=False)
    found = refine(model, dense, batches, precision="half")
    assert found.kept
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


def test_the_same_seed_gives_the_same_weights():
    (one, dense, batches), (other, _, _) = cut("mlp"), cut("mlp")
    torch.manual_seed(5)
    other.load_state_dict(one.state_dict())
    refine(one, dense, batches)
    torch.manual_seed(6)
    refine(other, dense, batches)
    assert_same_weights(one, other)


def test_a_measure_can_be_chosen():
    model, dense, batches = cut("vision")
    assert refine(model, dense, batches, steps=2, measure="squared").measure == "squared"


HOSTILE = {
    "no batches": (lambda m, d, b: (m, d, []), ArgumentError, "batches is empty"),
    "None": (lambda m, d, b: (m, d, None), ArgumentError, "needs batches"),
    "one row": (
        lambda m, d, b: (m, d, [{"input_ids": b[0]["input_ids"][:1]}]),
        ArgumentError,
        "a refinement measures on",
    ),
    "a tensor": (lambda m, d, b: (m, d, b[0]["input_ids"]), ArgumentError, "one tensor"),
    "no teacher": (lambda m, d, b: (m, None, b), ArgumentError, "teacher must be an nn.Module"),
    "itself": (lambda m, d, b: (m, m, b), ArgumentError, "shares weights"),
    "not cut": (lambda m, d, b: (d, copy.deepcopy(d), b), ArgumentError, "no low-rank layers"),
    "other classes": (lambda m, d, b: (m, d.model, b), StatisticsError, "must be the dense form"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_used_is_refused_before_anything_is_changed(case):
    model, dense, batches = cut("language")
    given, error, words = HOSTILE[case]
    given = given(model, dense, batches)
    before = copy.deepcopy(given[0])
    with pytest.raises(error, match=words):
        refine(*given)
    assert_same_weights(given[0], before)


@pytest.mark.parametrize("scope", ["blocks"])
def test_blocks_that_are_no_chain_are_refused(scope):
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))

        def forward(self, x):
            return self.layers[0](x) + self.layers[1](x)

    dense, batches = Parallel(), [torch.randn(8, 16) for _ in range(4)]
    model = copy.deepcopy(dense)
    lp.compress_(model, 0.5, batches, progress=False)
    before = copy.deepcopy(model)
    with pytest.raises(UnsupportedError, match="not given what the one before it returns"):
        refine(model, dense, batches, scope=scope)
    assert_same_weights(model, before)


def test_compress_refines_in_one_call_and_the_report_says_so(tmp_path):
    dense, batches = MODELS["language"]()
    model, control = copy.deepcopy(dense), copy.deepcopy(dense)
    wish = lp.Refinement(12, lr=3e-3, rows=128, **EXACT)
    report = lp.compress_(model, 0.4, iter(batches), factorization=lp.SVD(), refine=wish, progress=False)
    lp.compress_(control, 0.4, factorization=lp.SVD(), progress=False)
    found = lp.refine_(control, dense, batches, wish, progress=False)
    assert report.refinement.after == pytest.approx(found.after, rel=1e-4)
    assert "refined in 12 steps" in str(report)
    report.save_json(tmp_path / "report.json")
    assert lp.CompressionReport.load_json(tmp_path / "report.json").refinement == report.refinement


def test_a_plan_can_be_refined_too():
    dense, batches = MODELS["mlp"]()
    plan = lp.make_plan(lp.find_targets(dense), 0.4, lp.SVD())
    report = lp.apply_plan_(dense, plan, batches=batches, refine=lp.Refinement(16, lr=2e-3))
    assert report.refinement.kept


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"refine": 4}, "needs batches"),
        ({"refine": "yes", "batches": [torch.zeros(4, 24)]}, "refine must be"),
        ({"refine": lp.Refinement, "batches": [torch.zeros(4, 24)]}, r"write Refinement\(...\)"),
    ],
)
def test_compress_refuses_before_the_cut(given, words):
    model, _ = MODELS["mlp"]()
    before = copy.deepcopy(model)
    with pytest.raises(ArgumentError, match=words):
        lp.compress_(model, 0.5, progress=False, **given)
    assert_same_weights(model, before)


class Loss(nn.Module):
    """Returns a loss and nothing else."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).square().mean()


@pytest.mark.parametrize(
    ("wrap", "make", "wish", "words"),
    [
        (Loss, lambda x: x, 2, r"refine calls the model on the batches alone.*not a loss alone"),
        (nn.Sequential, lambda x: {"inputs": x}, 2, "refine calls the model on the batches alone, without loss="),
        (nn.Sequential, lambda x: x, lp.Refinement(2, scope="blocks"), "has no blocks"),
        (nn.Sequential, lambda x: x, lp.Refinement(2, checkpointing=True), "has no blocks"),
    ],
)
def test_what_cannot_be_refined_is_refused_before_the_cut(wrap, make, wish, words):
    net, batches = MODELS["mlp"]()
    model = wrap(net) if wrap is Loss else net
    before = copy.deepcopy(model)

    def loss(module, batch):
        inputs = batch["inputs"] if isinstance(batch, dict) else batch
        return module(inputs).square().mean()

    batches = [make(one) for one in batches]
    with pytest.raises(PrehabError, match=words):
        lp.compress_(model, 0.5, batches, loss, refine=wish, progress=False)
    assert_same_weights(model, before)


@pytest.mark.parametrize("scope", ["model", "blocks"])
@pytest.mark.parametrize("where", [0, -1])
def test_a_batch_that_the_model_does_not_take_is_told(scope, where):
    model, dense, batches = cut("language")
    before = copy.deepcopy(model)
    batches[where] = {"input_ids": torch.full((32, 16), 48)}  # one more than it knows
    words = r"The dense model cannot be called on a batch of type dict with input_ids \d*x16 \(IndexError: index out"
    with pytest.raises(PrehabError, match=words):
        lp.refine_(model, dense, batches, lp.Refinement(8, scope=scope), progress=False)
    assert_same_weights(model, before)
    with pytest.raises(PrehabError, match="cannot be called on"):
        lp.compress_(copy.deepcopy(dense), 0.5, batches, refine=2, progress=False)


def test_a_batch_that_the_cut_model_alone_does_not_take_is_told():
    model, dense, batches = cut("language")
    model.set_input_embeddings(nn.Embedding(40, 32))
    before = copy.deepcopy(model)
    with pytest.raises(
        PrehabError, match=r"The cut model cannot be called on .*; both forms of the model are called on"
    ):
        lp.refine_(model, dense, batches, 2, progress=False)
    assert_same_weights(model, before)


def test_another_model_is_no_teacher():
    model, _, batches = cut("mlp")
    before = copy.deepcopy(model)
    with pytest.raises(PrehabError, match=r"The dense model cannot be called on .*; both forms of the model are"):
        lp.refine_(model, nn.Linear(3, 3), batches, 2, progress=False)
    assert_same_weights(model, before)


@pytest.mark.parametrize("held_back", ["all", "one", "another"])
def test_masks_that_leave_nothing_to_measure_on_are_refused(held_back):
    model, dense, batches = cut("language")
    before = copy.deepcopy(model)
    hidden = {"all": range(8), "one": [4], "another": [0]}[held_back]
    for number in hidden:
        batches[number]["attention_mask"] = torch.zeros(32, 16, dtype=torch.int64)
    if held_back == "another":
        assert lp.refine_(model, dense, batches, 8, progress=False).before > 0.0
        return
    with pytest.raises(StatisticsError, match="attention_mask or labels leave out every position of them"):
        lp.refine_(model, dense, batches, 8, progress=False)
    assert_same_weights(model, before)


def test_masks_of_an_answer_without_positions_are_no_business_of_ours():
    """Additive masks, say, which are 0 where a token counts."""

    class Pooled(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, attention_mask):
            return self.net(x) + attention_mask.sum()

    model, dense, batches = cut("mlp")
    rows = [{"x": x, "attention_mask": torch.zeros(128, 3)} for x in batches]
    assert lp.refine_(Pooled(model), Pooled(dense), rows, 20, progress=False).kept


def test_a_teacher_that_says_nothing_is_refused():
    model, dense, batches = cut("mlp")
    before = copy.deepcopy(model)
    with torch.no_grad():
        for one in dense.parameters():
            one.zero_()
    with pytest.raises(PrehabError, match="the dense model answers with zeros alone"):
        lp.refine_(model, dense, batches, lp.Refinement(2, measure="squared"), progress=False)
    assert_same_weights(model, before)


def test_a_block_with_nothing_to_train_is_passed_over():
    dense = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh()) for _ in range(2)))
    model, batches = copy.deepcopy(dense), [torch.randn(32, 16) for _ in range(4)]
    lp.compress_(model, 0.5, factorization=lp.SVD(), target_modules="1.*", progress=False)
    before = copy.deepcopy(model[0])
    assert refine(model, dense, batches, scope="blocks", steps=4).steps == 4
    assert_same_weights(model[0], before)


def test_a_teacher_of_another_depth_is_refused():
    model, _, batches = cut("language")
    other = copy.deepcopy(model)
    del other.model.layers[1]
    for parameter in other.parameters():
        parameter.data = parameter.data.clone()
    before = copy.deepcopy(model)
    with pytest.raises(ArgumentError, match=r"no block 'model.layers.1'; it must be the dense form"):
        refine(model, other, batches, scope="blocks")
    assert_same_weights(model, before)


def test_an_optimizer_with_moments_is_refused():
    model, batches = MODELS["mlp"]()
    optimizer = torch.optim.Adam(model.parameters())
    model(batches[0]).sum().backward()
    optimizer.step()
    with pytest.raises(UnsupportedError, match="has made steps"):
        lp.compress_(model, 0.5, batches, optimizers=[optimizer], refine=2, progress=False)


def test_what_fails_after_the_cut_is_a_warning():
    dense, batches = MODELS["mlp"]()

    def fail(module, args):
        if torch.is_grad_enabled() and isinstance(module[0], lp.LowRankLinear):
            raise ValueError("no")

    dense.register_forward_pre_hook(fail)
    with pytest.warns(UserWarning, match="compressed, but it could not be refined"):
        report = lp.compress_(dense, 0.4, batches, factorization=lp.SVD(), refine=4, progress=False)
    assert report.refinement is None


def test_a_report_that_is_none_is_refused():
    for data in (3, {"scope": "model"}):
        with pytest.raises(lp.PrehabError):
            RefinementReport.from_dict(data)
