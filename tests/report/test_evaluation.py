"""What a model is worth, against numbers that are computed by hand."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.errors import ArgumentError, NumericalError
from lightning_prehab.progress import listening
from lightning_prehab.report.evaluation import Evaluation, for_calibration
from tests.tiny_llama import llama

transformers = pytest.importorskip("transformers")
VOCABULARY = 48


def cross_entropies(logits, labels):
    """By hand, in numpy: of logits ``(count, classes)`` to labels ``(count,)``."""
    logits = logits.detach().double().numpy()
    logits = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), np.asarray(labels)]


def text(rows=4, positions=9, lengths=None):
    tokens = torch.randint(1, VOCABULARY, (rows, positions))
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths or []):
        tokens[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def next_tokens(model, batches):
    """Losses of all tokens but the first of each row, padding left out."""
    found = []
    for batch in batches:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        for row, tokens in enumerate(batch["input_ids"]):
            length = int(batch["attention_mask"][row].sum())
            found.append(cross_entropies(logits[row, : length - 1], tokens[1:length]))
    return np.concatenate(found)


def test_perplexity_of_a_text_with_padding():
    """A mean over the tokens, not over rows or batches."""
    batches = [text(lengths=[9, 5, 2, 1]), text(2, 17)]
    model = llama()
    score = Evaluation(batches).score(model)
    losses = next_tokens(model, batches)
    assert len(losses) == score.count == 8 + 4 + 1 + 0 + 2 * 16
    assert score.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert (score.unit, score.accuracy, score.data) == ("tokens", None, "6 rows")


def hugging_face_loss(model, batch):
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


@pytest.mark.parametrize("way", ["labels", "some labels", "loss=", "tensor"])
def test_perplexity_however_the_text_is_given(way):
    model, batches, forward = llama(), [text(3, 11), text(2, 5)], None
    expected = next_tokens(model, batches)
    if way == "loss=":
        forward = hugging_face_loss
    elif way == "tensor":
        batches = [batch["input_ids"] for batch in batches]
    else:
        batches = [{**batch, "labels": batch["input_ids"].clone()} for batch in batches]
    if way == "some labels":  # the first four are a question
        expected = np.concatenate([one[3:] for one in np.split(expected, [10, 20, 30, 34])])
        for batch in batches:
            batch["labels"][:, :4] = -100
    score = Evaluation(batches, forward).score(model)
    assert (score.unit, score.count) == ("tokens", len(expected))
    assert score.loss == pytest.approx(expected.mean(), rel=1e-6)


def test_a_sure_model_that_is_wrong_is_still_a_language_model():
    """By its class: its own expectation is far from the text. Without a class it counts as a model of something."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(2000.0)

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, tokens):
            return self.inner(tokens).logits

    tokens = text()["input_ids"]
    assert Evaluation([tokens]).score(model).unit == "tokens"
    assert Evaluation([tokens]).score(Bare()).output_error == 0.0


def test_the_way_is_that_of_the_dense_model():
    """After a ruinous cut a language model expects other tokens than it sees, and is a language model all the same."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

        def forward(self, tokens):
            return self.out(self.embed(tokens))

    model, tokens = Bare(), text()["input_ids"]
    evaluation = Evaluation([tokens])
    assert evaluation.score(model).unit == "tokens"
    with torch.no_grad():
        model.out.weight.mul_(1000.0)
    found = evaluation.score(model)
    logits = model(tokens)[:, :-1].flatten(0, 1)
    assert found.unit == "tokens"
    assert found.loss == pytest.approx(cross_entropies(logits, tokens[:, 1:].flatten()).mean(), rel=1e-6)


@pytest.mark.parametrize("loss", [False, True])
def test_accuracy_of_a_classifier(loss):
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    batches = [[torch.randn(rows, 6), torch.randint(5, (rows,))] for rows in (20, 3)]
    forward = (lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])) if loss else None
    score = Evaluation(batches, forward).score(model)
    logits = torch.cat([model(x) for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    assert score.loss == pytest.approx(cross_entropies(logits, labels).mean(), rel=1e-6)
    assert score.accuracy == (logits.argmax(-1).numpy() == labels.numpy()).mean()
    assert (score.count, score.unit) == (23, "labels")


def test_another_loss_keeps_its_unit_and_the_accuracy_is_told():
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    batches = [[torch.randn(rows, 6), torch.randint(5, (rows,))] for rows in (20, 3)]

    def forward(model, batch):
        return 1000 * nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.2)

    score = Evaluation(batches, forward).score(model)
    losses = [float(forward(model, batch)) for batch in batches]
    assert score.loss == pytest.approx((20 * losses[0] + 3 * losses[1]) / 23)
    hits = sum(int((model(x).argmax(-1) == y).sum()) for x, y in batches)
    assert (score.accuracy, score.count, score.unit, score.perplexity) == (hits / 23, 23, "rows", None)


def test_a_regression_has_a_loss_alone():
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    batches = [(torch.randn(8, 6), torch.randn(8, 5))]
    score = Evaluation(batches, lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])).score(model)
    expected = np.square((model(batches[0][0]) - batches[0][1]).detach().numpy()).mean()
    assert score.loss == pytest.approx(expected, rel=1e-6)
    assert (score.accuracy, score.unit) == (None, "rows")


def test_tokens_that_are_classified_have_an_accuracy():
    """The labels stand where the logits do, which the loss of the model tells."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=VOCABULARY,
    )
    model = transformers.BertForTokenClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(30.0)
    batch = {**text(), "labels": torch.randint(VOCABULARY, (4, 9))}
    batch["labels"][:, ::3] = -100
    score = Evaluation([batch]).score(model)
    asked = batch["labels"] != -100
    logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[asked]
    assert (score.unit, score.count) == ("labels", 4 * 6)
    assert score.loss == pytest.approx(cross_entropies(logits, batch["labels"][asked]).mean(), rel=1e-6)


class Encoder(nn.Module):
    """Neither logits nor a loss."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None):
        return {"name": "encoder", "hidden": self.out(self.mix(self.embed(input_ids)).tanh())}


def test_how_far_outputs_are_from_those_of_the_dense_model():
    model, batches = Encoder(), [text(lengths=[9, 5, 2, 1]), text(2, 7)]
    dense = [model(**batch)["hidden"] for batch in batches]
    evaluation = Evaluation(batches)
    before = evaluation.score(model)
    assert (before.loss, before.accuracy, before.output_error, before.count) == (None, None, 0.0, 6)
    lp.compress_(model, 0.3)
    found = [model(**batch)["hidden"] for batch in batches]
    seen = [batch["attention_mask"].bool() for batch in batches]
    y, z = (torch.cat([one[mask] for one, mask in zip(outputs, seen, strict=True)]) for outputs in (dense, found))
    assert evaluation.score(model).output_error == pytest.approx(float((y - z).norm() / y.norm()), rel=1e-5)


def test_outputs_are_kept_of_so_many_batches_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr("lightning_prehab.report.evaluation.KEPT_BYTES", 8 * (2 * 9 * 2 + 9 * 8) * 2)
    evaluation = Evaluation([text(1) for _ in range(5)])
    assert evaluation.score(Encoder()).data == "2 rows"


def test_images_without_labels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(6), nn.Flatten(), nn.Linear(8, 7))
    report = lp.compress_(model, 0.3, [torch.randn(40, 3, 8, 8)], evaluate=[torch.randn(5, 3, 8, 8)])
    assert report.scores.summary().startswith("outputs differ by ")
    assert report.scores.data == "5 rows"
    assert report.scores.before.output_error == 0.0 < report.scores.after.output_error


def test_where_nothing_can_be_told():
    class Silent(Encoder):
        def forward(self, input_ids, attention_mask=None):
            super().forward(input_ids)
            return "done"

    assert Evaluation([text()]).score(Silent()) is None
    report = lp.compress_(Silent(), 0.5, [text(8, 16)], factorization=lp.WhitenedSVD(), evaluate=[text()])
    assert report.scores is None
    assert report.keep <= 0.5


class Moody(nn.Module):
    """Draws numbers, counts its calls, replaces a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 12), nn.Linear(12, 12), nn.Dropout(0.5)
        self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(12, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach()[0, :3].clone()
        torch.rand(3), np.random.rand(2)
        return self.head(self.norm(self.drop(self.b(self.a(x).tanh()))))


@pytest.mark.parametrize("loss", [False, True])
def test_a_model_is_left_as_it_was(loss):
    model = Moody()
    model.train()
    model.drop.eval()
    model(torch.randn(8, 6)).sum().backward()
    heard = []
    model.a.register_forward_hook(lambda *_: heard.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    copies = [gradient.clone() for gradient in gradients]
    buffers = [id(buffer) for buffer in model.buffers()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    arrays = np.random.get_state()[1].copy()
    batch = [torch.randn(8, 6), torch.randint(4, (8,))]
    random = torch.get_rng_state()
    given = copy.deepcopy(batch)

    def forward(model, batch):
        x, y = batch.pop(0), batch.pop(0)
        return nn.functional.cross_entropy(model(x), y)

    evaluation = Evaluation([batch], forward if loss else None)
    scores = [evaluation.score(model) for _ in range(2)]
    assert scores[0] == scores[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is one for parameter, one in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(gradients, copies, strict=True))
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert (np.random.get_state()[1] == arrays).all()
    assert all(torch.equal(one, other) for one, other in zip(batch, given, strict=True))
    assert torch.is_grad_enabled()


def test_in_inference_mode():
    model = Moody()
    with torch.inference_mode():
        batch = [torch.randn(8, 6), torch.randint(4, (8,))]
        assert Evaluation([batch]).score(model).count == 8
    assert not model.calls.is_inference()


def pairs(count=4, rows=40):
    return [[torch.randn(rows, 12), torch.randint(6, (rows,))] for _ in range(count)]


def without_measurements(report):
    """What the cut does to the loss is tried on other batches where there is an evaluation."""
    layers = tuple(replace(layer, loss_increase=None) for layer in report.plan.layers)
    return replace(report, plan=replace(report.plan, layers=layers), scores=None)


def test_the_prediction_is_that_of_the_rows_that_were_not_seen(mlp):
    """Twelve inputs, some rows: what was seen is learned by heart, and predicts too little."""
    optimizer, seen = torch.optim.Adam(mlp.parameters(), 1e-2), pairs(2, 60)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(mlp(seen[0][0]), seen[0][1]).backward()
        optimizer.step()

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    report = lp.compress_(mlp, 0.6, seen[:1], loss, evaluate=seen[1:])
    measured = report.scores.after.loss - report.scores.before.loss
    assert report.plan.loss_increase == pytest.approx(max(measured, 0.0), rel=1e-3, abs=1e-4)


def test_what_is_measured_on_is_not_calibrated_with(mlp):
    other, batches = copy.deepcopy(mlp), pairs()
    report = lp.compress_(mlp, 0.4, batches, evaluate=0.25)
    assert report.scores.data == "40 held-back rows"
    rest, (held,) = [batches[0], batches[1], batches[3]], [batches[2]]
    expected = Evaluation([held])
    dense = expected.score(other)
    without = lp.compress_(other, 0.4, rest)
    for one, theirs in zip(mlp.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, theirs)
    assert without_measurements(without) == without_measurements(report)
    assert report.scores.before.loss == dense.loss
    assert report.scores.after.loss == expected.score(other).loss != dense.loss


def test_measuring_changes_no_number_of_the_cut(mlp):
    other, batches = copy.deepcopy(mlp), pairs()
    report = lp.compress_(mlp, 0.4, batches, evaluate=iter(pairs(2, 5)))
    assert report.scores.data == "10 rows"
    assert without_measurements(lp.compress_(other, 0.4, batches)) == without_measurements(report)
    for one, theirs in zip(mlp.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, theirs)


@pytest.mark.parametrize("layers_at_once", [None, 1])
def test_a_share_of_an_iterator_and_of_a_loader(mlp, layers_at_once):
    batches = pairs()
    for given in (iter(batches), torch.utils.data.DataLoader(batches, batch_size=None)):
        report = lp.compress_(
            copy.deepcopy(mlp), 0.4, given, evaluate=0.3, layers_at_once=layers_at_once, policy=lp.ProbeBudget(0.4)
        )
        assert report.scores.data == "40 held-back rows"


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (0.0, r"evaluate must be a share in \(0, 1\) or batches, got 0.0; None measures nothing"),
        (1.0, "got 1.0"),
        (2, "got 2"),
        (True, "got True"),
        (float("nan"), "got nan"),
        (torch.randn(4, 12), r"got Tensor; for one batch give evaluate=\[batch\]"),
        ("test.txt", "got str"),
        (object(), "got object"),
        ([], "evaluate is empty; give at least one batch"),
        ([{"y": 3}], "The model cannot be called on a batch of type dict"),
    ],
)
def test_wrong_values(mlp, evaluate, message):
    before = copy.deepcopy(mlp.state_dict())
    with pytest.raises(ArgumentError, match=message):
        lp.compress_(mlp, 0.5, pairs(), evaluate=evaluate)
    assert type(mlp[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_a_share_of_nothing(mlp):
    with pytest.raises(ArgumentError, match="holds a part of the calibration batches back; give batches"):
        lp.compress_(mlp, 0.5, evaluate=0.1)
    with pytest.raises(ArgumentError, match="batches is one tensor"):
        lp.compress_(mlp, 0.5, torch.randn(40, 12), evaluate=0.1)
    assert for_calibration(None, None, None) == (None, None)


def failing_at(call):
    """A loss that breaks at one of its calls in eval mode without a graph, which are those of the evaluation."""
    calls = []

    def loss(model, batch):
        if batch[0].shape[0] == 3:
            calls.append(1)
            if len(calls) == call:
                raise RuntimeError("out of ideas")
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return loss


def test_an_evaluation_that_fails_before_the_cut_leaves_the_model(mlp):
    before = copy.deepcopy(mlp.state_dict())
    with pytest.raises(RuntimeError, match="out of ideas"):
        lp.compress_(mlp, 0.5, pairs(), failing_at(1), evaluate=pairs(1, 3))
    assert type(mlp[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    assert not any(module._forward_hooks for module in mlp.modules())


def test_an_evaluation_that_fails_after_the_cut_loses_nothing(mlp):
    other, batches = copy.deepcopy(mlp), pairs()
    message = r"The model is compressed, but .* could not be measured \(RuntimeError: out of ideas\)"

    def failing_when_cut(model, batch):
        if isinstance(model[0], lp.LowRankLinear):
            raise RuntimeError("out of ideas")
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.warns(UserWarning, match=message):
        report = lp.compress_(mlp, 0.5, batches, failing_when_cut, evaluate=pairs(1, 3))
    assert report.scores is None
    again = lp.compress_(other, 0.5, batches, failing_at(0))
    assert without_measurements(report) == without_measurements(again)
    assert isinstance(mlp[0], lp.LowRankLinear)
    assert not any(module._forward_hooks for module in mlp.modules())


def test_who_interrupts_the_last_measurement_is_told_that_the_model_is_cut(mlp):
    def stop(progress):
        if progress.phase == "evaluate" and isinstance(mlp[0], lp.LowRankLinear):
            raise KeyboardInterrupt

    with (
        pytest.warns(UserWarning, match="the model in memory is cut"),
        listening(stop),
        pytest.raises(KeyboardInterrupt),
    ):
        lp.compress_(mlp, 0.5, pairs(), evaluate=pairs(1, 3))
    assert not any(module._forward_hooks for module in mlp.modules())


def test_what_is_not_finite_is_no_score(mlp):
    with torch.no_grad():
        mlp[4].bias.fill_(float("inf"))
    with pytest.raises(NumericalError, match="The loss on 3 rows is nan"):
        Evaluation(pairs(1, 3)).score(mlp)


def test_the_callback_does_not_measure_what_the_trainer_validates(lit, loader, make_trainer):
    callback = lp.CompressionCallback(0, 0.5)
    make_trainer(max_epochs=1, callbacks=[callback]).fit(lit, loader)
    assert callback.report.scores is None
