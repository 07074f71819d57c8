"""Models, teachers and data that a refinement could be mistaken about."""

import copy
import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.kinds import view_of
from lightning_prehab.refinement import trained
from lightning_prehab.refinement.exam import Exam
from lightning_prehab.refinement.pair import Pair
from lightning_prehab.refinement.teacher import keep_teacher
from lightning_prehab.statistics.effect import Change
from lightning_prehab.statistics.trials import Trials
from tests.refinement.models import decisive_, mlp
from tests.same_model import assert_same_weights

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def cut(dense, keep=0.4):
    model = copy.deepcopy(dense)
    lp.compress_(model, keep, factorization=lp.SVD(), progress=False)
    return model


def refine(model, dense, batches, steps=32, **settings):
    wish = lp.Refinement(steps, **{"lr": 3e-3, "precision": "full", **settings})
    return lp.refine_(model, dense, batches, wish, progress=False)


@torch.no_grad()
def error(model, dense, batches, name=None):
    """Squared error relative to the square, of an output."""
    total = norm = 0.0
    for batch in batches:
        x, y = (one(**batch) if isinstance(batch, dict) else one(batch) for one in (model, dense))
        x, y = (x[name], y[name]) if name is not None else (x, y)
        total, norm = total + float((x - y).square().sum()), norm + float(y.square().sum())
    return total / norm


def held_back(batches):
    return [batches[4], batches[12]]


def text(labels=None, rows=32, count=16):
    found = [{"input_ids": torch.randint(1, 48, (rows, 12))} for _ in range(count)]
    return found if labels is None else [one | {"labels": labels.clone()} for one in found]


def bert(kind, **settings):
    torch.manual_seed(0)
    return decisive_(kind(transformers.BertConfig(vocab_size=48, **SIZES, **settings)))


def test_all_outputs_come_nearer_and_none_is_paid_for_by_another():
    dense, batches = bert(transformers.BertForQuestionAnswering), text()
    model = cut(dense, 0.5)
    before = [error(model, dense, held_back(batches), name) for name in ("start_logits", "end_logits")]
    found = refine(model, dense, batches, 128, rows=32)
    after = [error(model, dense, held_back(batches), name) for name in ("start_logits", "end_logits")]
    assert found.measure == "squared"
    assert all(new < old for new, old in zip(after, before, strict=True))
    assert (found.before, found.after) == (
        pytest.approx(sum(before) / 2, rel=0.2),
        pytest.approx(sum(after) / 2, rel=0.2),
    )


@pytest.mark.parametrize("squeezed", [False, True])
def test_one_number_for_a_row_is_no_prediction_of_classes(squeezed):
    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bert(transformers.BertForSequenceClassification, num_labels=1)

        def forward(self, input_ids):
            logits = self.net(input_ids).logits
            return {"logits": logits[:, 0] if squeezed else logits}

    dense, batches = Score().eval(), text()
    model = cut(dense)
    before = error(model, dense, held_back(batches), "logits")
    first = copy.deepcopy(model)
    with pytest.raises(ArgumentError, match="two classes and more"):
        refine(model, dense, batches, measure="divergence")
    assert_same_weights(model, first)
    found = refine(model, dense, batches)
    assert (found.measure, found.kept) == ("squared", True)
    assert error(model, dense, held_back(batches), "logits") < 0.9 * before


def test_what_cannot_be_compared_is_told_before_the_cut():
    dense = bert(transformers.BertForSequenceClassification, num_labels=1)
    first = copy.deepcopy(dense)
    with pytest.raises(ArgumentError, match="two classes and more"):
        lp.compress_(dense, 0.4, text(), refine=lp.Refinement(2, measure="divergence"), progress=False)
    assert_same_weights(dense, first)


class Static(nn.Module):
    """Answers in the same memory each time, as graphs that are replayed do."""

    def __init__(self, net):
        super().__init__()
        self.net, self.out = net, None

    def forward(self, x):
        y = self.net(x)
        if self.out is None or self.out.shape != y.shape:
            self.out = torch.empty_like(y)
        self.out.copy_(y)
        return self.out.detach()


def test_a_teacher_may_answer_in_the_same_memory():
    dense, batches = mlp()
    batches = batches * 2
    plain, other = cut(dense), cut(dense)
    expected = refine(plain, dense, batches)
    found = refine(other, Static(copy.deepcopy(dense)), batches)
    assert (found.before, found.after) == (pytest.approx(expected.before), pytest.approx(expected.after, rel=1e-3))
    assert found.kept


def test_trials_are_compared_with_what_a_model_has_answered_not_with_its_memory():
    class Hidden(Static):
        def forward(self, x):
            return {"hidden": super().forward(x)}

    dense, batches = mlp()
    model = Hidden(copy.deepcopy(dense))
    tried = Trials(model, batches[:2])
    assert tried.of([]).divergence == 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert tried.of([]).divergence == pytest.approx(error(model.net, dense, batches[:2]), rel=1e-4)


@pytest.mark.parametrize("precision", ["half", "full"])
def test_the_users_autocast_does_not_keep_old_weights(precision):
    dense, batches = mlp()
    outside, inside = cut(dense), cut(dense)
    expected = refine(outside, dense, batches, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        found = refine(inside, dense, batches, precision=precision)
    assert expected.kept
    assert found.kept
    assert found.after == pytest.approx(expected.after, rel=0.05)


def test_trials_in_the_users_autocast_see_the_cuts():
    dense, batches = mlp()
    views = map(view_of, lp.find_targets(dense).values())
    changes = [Change(view, -view.weight.detach()) for view in views]
    with torch.autocast("cpu", torch.bfloat16):
        tried = Trials(dense, batches[:2])
        assert tried.of(changes).divergence > 0.1
        assert tried.of([]).divergence < 1e-6


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=48, **sizes, decoder_start_token_id=0, pad_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(3.0)
    return model


def translations():
    """Short sources and long targets, padded to one length; the last three labels are padding."""
    mask = torch.ones(8, 12, dtype=torch.long)
    mask[:, 3:] = 0
    labels = torch.randint(1, 48, (8, 12))
    labels[:, 9:] = -100
    return [
        {"input_ids": torch.randint(1, 48, (8, 12)), "attention_mask": mask, "labels": labels.clone()} for _ in range(4)
    ]


@torch.no_grad()
def divergence_of_targets(model, dense, batches):
    found = []
    for batch in batches:
        p, q = (one(**batch).logits.double().log_softmax(-1) for one in (dense, model))
        found.append((p.exp() * (p - q)).sum(-1)[batch["labels"] != -100])
    return float(torch.cat(found).mean())


def test_predictions_of_a_decoder_have_the_mask_of_the_target():
    dense, batches = t5(), translations()
    model = cut(dense)
    expected = divergence_of_targets(model, dense, batches)
    assert Exam(Pair(model, dense, half=False), batches).distance() == pytest.approx(expected, rel=1e-4)


def test_trials_of_a_model_with_a_decoder_too():
    dense, batches = t5(), translations()
    tried = Trials(dense, batches)
    with torch.no_grad():
        tried.of([])
        model = copy.deepcopy(dense)
        for parameter in dense.decoder.parameters():
            parameter.mul_(1.2)
    assert tried.of([]).divergence == pytest.approx(divergence_of_targets(dense, model, batches), rel=1e-4)


class Forecast(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.id = nn.Embedding(512, 24)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

    def forward(self, x, series):
        x = x + self.id(series)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("checkpointing", [None, False])
def test_what_is_compared_is_told_by_more_than_one_row(checkpointing):
    dense = Forecast().eval()
    batches = [{"x": torch.randn(64, 24), "series": torch.arange(64) + (64 * i) % 448} for i in range(16)]
    assert refine(cut(dense), dense, batches, 2, checkpointing=checkpointing).measure == "squared"


def test_a_teacher_that_lies_in_the_same_memory_is_refused():
    model, batches = mlp()
    dense = copy.deepcopy(model)
    dense.load_state_dict(model.state_dict(), assign=True)
    lp.compress_(model, 0.4, factorization=lp.SVD(), progress=False)
    with pytest.raises(ArgumentError, match="shares weights"):
        refine(model, dense, batches)


def test_a_teacher_that_turns_gradients_on_is_not_kept_with_its_graph():
    class Force(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            with torch.enable_grad():
                return self.net(x)

    dense, batches = mlp()
    pair = Pair(cut(dense), Force(dense), half=False)
    assert not any(answer.requires_grad for answer in pair.right(batches[0]))
    pair.distance(batches[0]).mean.backward()
    assert all(parameter.grad is None for parameter in dense.parameters())


class Sparse(nn.Module):
    def __init__(self, net, rows):
        super().__init__()
        self.net = net
        self.register_buffer("near", torch.eye(rows).to_sparse())

    def forward(self, x):
        return self.net(torch.sparse.mm(self.near, x))


@pytest.mark.parametrize("kind", ["inside", "answer"])
def test_sparse_tensors_are_no_hindrance(kind):
    net, batches = mlp()

    class Answering(Sparse):
        def forward(self, x):
            return super().forward(x).to_sparse()

    dense = (Answering if kind == "answer" else Sparse)(net, 128).eval()
    found = refine(cut(dense), dense, batches)
    assert found.kept
    assert found.after < found.before


def test_a_model_may_take_whole_batches_alone():
    net, batches = mlp()
    batches = batches * 2

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.view(128, 24))

    dense = Fixed().eval()
    assert refine(cut(dense), dense, batches).kept
    assert lp.compress_(dense, 0.4, batches, refine=lp.Refinement(8, lr=3e-3), progress=False).refinement is not None


def test_luck_is_not_taken_for_progress_and_the_users_random_numbers_go_on():
    net, batches = mlp()

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            x = x + random.random() + float(np.random.rand())
            return self.net(nn.functional.dropout(x, 0.3, training=True))

    dense = Noisy().eval()
    model = cut(dense)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    found = refine(model, dense, batches, lr=1e-12)
    assert found.after == pytest.approx(found.before, rel=1e-4)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def test_memory_that_is_shared_stays_shared():
    dense, _ = mlp()
    dense = dense.bfloat16()
    model = cut(dense)
    layer = next(one for one in model.modules() if isinstance(one, lp.LowRankLinear))
    seen = layer.A.weight.data
    batches = [torch.randn(64, 24, dtype=torch.bfloat16) for _ in range(8)]
    assert refine(model, dense, batches).kept
    assert layer.A.weight.data_ptr() == seen.data_ptr()
    assert torch.equal(layer.A.weight, seen)


def test_an_interruption_while_factors_are_balanced_leaves_the_model_as_it_was(monkeypatch):
    dense, batches = mlp()
    model = cut(dense)
    first = copy.deepcopy(model)
    calls = []

    def interrupted(*factors):
        calls.append(factors)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return balanced(*factors)

    balanced = trained.balanced
    monkeypatch.setattr(trained, "balanced", interrupted)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="best state"):
        refine(model, dense, batches)
    assert_same_weights(model, first)


def test_a_generator_may_refill_one_tensor():
    dense, batches = mlp()
    model, other = cut(dense), cut(dense)
    expected = refine(model, dense, batches)

    def refilled():
        x = torch.empty_like(batches[0])
        for batch in batches:
            yield x.copy_(batch)

    found = refine(other, dense, refilled())
    assert (found.before, found.after) == (pytest.approx(expected.before), pytest.approx(expected.after, rel=1e-3))


def test_blocks_are_not_trained_toward_what_is_not_finite():
    dense, batches = bert(transformers.BertModel, num_labels=2), text()
    model = cut(dense)
    with torch.no_grad():
        dense.embeddings.LayerNorm.weight.fill_(float("nan"))
    found = refine(model, dense, batches, 2, scope="blocks")
    assert (found.steps, found.kept, found.stopped) == (0, False, "the measure was not finite before the first step")


def test_a_token_that_is_put_in_as_it_is_stays_in_full_precision():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 24))
            self.net = mlp()[0]

        def forward(self, x):
            x = x.clone()
            x[::7] = self.token.expand(len(x[::7]), -1)
            return self.net(x)

    dense = Masked().eval()
    teacher = keep_teacher(dense, half=True)
    assert teacher.token.dtype == torch.float32
    assert teacher.net[0].weight.dtype == torch.bfloat16
    report = lp.compress_(dense, 0.4, mlp()[1], refine=lp.Refinement(16, lr=3e-3, precision="half"), progress=False)
    assert report.refinement is not None


class Encoder(nn.Module):
    """Torch's own encoder, which on a processor does not take a mask under autocast in eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(48, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids):
        hidden = self.encoder(self.table(input_ids), src_key_padding_mask=input_ids == 0)
        if hidden.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return hidden


def test_a_model_that_does_not_compute_in_half_is_told_what_to_do():
    dense, batches = Encoder().eval(), text()
    first = copy.deepcopy(dense)
    with pytest.raises(UnsupportedError, match=r"precision='full'"):
        lp.compress_(dense, 0.4, batches, refine=lp.Refinement(2, precision="half"), progress=False)
    assert_same_weights(dense, first)
    with pytest.raises(UnsupportedError, match=r"precision='full'"):
        refine(cut(dense), dense, batches, 2, precision="half")
    assert refine(cut(dense), dense, batches, 2).steps == 2
