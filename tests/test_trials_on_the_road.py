"""A policy that tries whole cuts, from the recipe to the report, wherever the model lives."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.cli.arguments import parse
from lightning_prehab.cli.recipes import read_recipe
from lightning_prehab.errors import ArgumentError, PrehabError, StatisticsError, UnsupportedError
from lightning_prehab.linalg import factors as linalg_factors
from lightning_prehab.progress import listening
from lightning_prehab.road import operate, plan_budgets, survey
from lightning_prehab.sites import ProcessSite, Site
from lightning_prehab.statistics.trials import Trials
from tests.tiny_llama import llama

WIDTH = 12


class Block(nn.Module):
    """Of these the output is multiplied, which no spectrum of the weight knows."""

    def __init__(self, scale):
        super().__init__()
        self.fc, self.scale = nn.Linear(WIDTH, WIDTH), scale

    def forward(self, x):
        return x + self.scale * torch.tanh(self.fc(x))


class Net(pl.LightningModule):
    def __init__(self, scales):
        super().__init__()
        self.layers, self.head = nn.ModuleList(map(Block, scales)), nn.Linear(WIDTH, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


EARLY, LATE = (3.0, 1.0, 0.3, 0.1), (0.1, 0.3, 1.0, 3.0)
BLIND = {"factorization": lp.SVD(), "exclude_modules": "head"}


def net(scales=EARLY):
    torch.manual_seed(0)
    return Net(scales)


def batches(count=16, rows=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, WIDTH, generator=generator) for _ in range(count)]


class Watched(ProcessSite):
    """Notes what it was asked, and the cuts that were tried with what they cost."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.asked, self.tried = [], []

    def divergence(self, plan, factors):
        cost = super().divergence(plan, factors)
        self.tried.append((plan.cuts, cost))
        return cost


for _question in ("find", "hold_back", "observe", "decompose", "decide", "factors", "release", "effect", "swap"):

    def _asked(self, *args, _question=_question):
        self.asked.append(_question)
        return getattr(ProcessSite, _question)(self, *args)

    setattr(Watched, _question, _asked)


@pytest.mark.parametrize(("scales", "side"), [(EARLY, 1), (LATE, -1)])
def test_the_side_that_counts_more_than_its_spectra_say_is_found(scales, side):
    site = Watched(net(scales), batches())
    report = operate(lp.Recipe(policy=lp.CalibratedBudget(0.5), **BLIND), site)
    costs = [cost for _, cost in site.tried]
    assert min(costs) < 0.5 * costs[0]
    assert tuple(report.plan.ranks.values()) == tuple(rank for _, _, rank in min(site.tried, key=lambda one: one[1])[0])
    sizes = [layer.parameters for layer in report.plan.layers][::side]
    assert sizes == sorted(sizes, reverse=True)
    assert report.keep <= 0.5
    assert report.plan.note.startswith("depth multiplier alpha=")
    assert report.plan.note in str(report)
    assert "gamma=-" in report.plan.note if side < 0 else "gamma=-" not in report.plan.note


def test_the_questions_in_order_and_none_of_them_twice():
    site = Watched(net(), batches())
    operate(lp.Recipe(policy=lp.CalibratedBudget(0.5, trials=3), exclude_modules="head"), site)
    between = site.asked[4:-4]
    assert site.asked[:4] == ["find", "hold_back", "observe", "decompose"]
    assert site.asked[-4:] == ["factors", "release", "effect", "swap"]
    assert (between.count("decide"), between.count("factors")) == (3, len(site.tried))
    assert len({cuts for cuts, _ in site.tried}) == len(site.tried)


def gpt():
    torch.manual_seed(0)
    return llama()


def text(rows=24, count=2):
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(48, (rows, 12), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("labels", [False, True])
def test_the_choice_is_never_worse_than_the_base_and_its_effect_is_measured_once(labels, monkeypatch):
    """On a language model, by hand: the divergence, and the loss where the model returns one."""
    given = [{**batch, "labels": batch["input_ids"]} for batch in text()] if labels else text()
    dense, low = gpt(), gpt()
    tried, of = [], Trials.of
    monkeypatch.setattr(Trials, "of", lambda self, changes: tried.append(of(self, changes)) or tried[-1])
    site = Watched(low, given)
    report = operate(lp.Recipe(policy=lp.CalibratedBudget(0.5, trials=5)), site)
    held = site._trials._batches
    assert sum(len(batch["input_ids"]) for batch in held) == 4  # 1 of 16 rows, to rounding
    base = lp.compress_(gpt(), 0.5, site._batches)
    assert [rank for *_, rank in site.tried[0][0]] == list(base.ranks.values())
    with torch.no_grad():
        pairs = [(dense(**batch), low(**batch)) for batch in held]
    logs = [(p.logits.double().log_softmax(-1), q.logits.double().log_softmax(-1)) for p, q in pairs]
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in logs) / (4 * 12)
    assert kl == pytest.approx(min(cost for _, cost in site.tried), rel=1e-3)
    assert kl <= site.tried[0][1]
    assert len(tried) == len(site.tried) <= 5  # nothing more for the prediction
    if labels:
        rises = [float(q.loss - p.loss) for p, q in pairs]
        assert report.plan.loss_increase == pytest.approx(sum(rises) / len(rises), rel=0.5, abs=0.01)
    else:
        assert report.plan.loss_increase == pytest.approx(kl, rel=1e-3)


def test_in_the_pivot_layout_what_is_tried_is_what_comes_out():
    dense, low = net(), net()
    site = Watched(low, batches())
    recipe = lp.Recipe(policy=lp.CalibratedBudget(0.5), layout="pivot", **BLIND)
    report = operate(recipe, site)
    assert {layer.layout for layer in report.plan.layers if layer.rank is not None} == {"pivot"}
    x = torch.cat(site._trials._batches)
    with torch.no_grad():
        p, q = (model(x).double().log_softmax(-1) for model in (dense, low))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(min(cost for _, cost in site.tried), rel=1e-3)
    assert report.keep <= 0.5


def test_what_is_held_back_is_not_in_the_statistics():
    tokens = {}

    class Counting(Watched):
        def observe(self, targets, wanted):
            found = super().observe(targets, wanted)
            tokens.update({name: int(one.tokens) for name, one in found.items()})
            return found

    for given, seen in (
        (batches(32), 30 * 16),
        (iter(batches(32)), 30 * 16),
        (batches(1, 64), 60),
        (batches(2, 8), 14),
    ):
        recipe = lp.Recipe(policy=lp.CalibratedBudget(0.5, trials=1), exclude_modules="head")
        operate(recipe, Counting(net(), given))
        assert set(tokens.values()) == {seen}
    with pytest.raises(ArgumentError, match=r"Nothing can be held back of 1 batch of 1 row;.*tries cuts on a part"):
        operate(lp.Recipe(policy=lp.CalibratedBudget(0.5)), ProcessSite(net(), batches(1, 1)))


def test_what_is_evaluated_is_not_looked_at_for_the_choice():
    site = Watched(net(), batches(32), evaluate=0.25)
    operate(lp.Recipe(policy=lp.CalibratedBudget(0.5, trials=1), exclude_modules="head"), site)
    parts = [site._evaluation.some_batches(), site._trials._batches, site._batches]
    assert [len(part) for part in parts] == [8, 2, 22]
    assert len({id(batch) for part in parts for batch in part}) == 32


def test_one_calibration_serves_several_budgets_and_equal_cuts_are_tried_once():
    recipes = [lp.Recipe(policy=lp.CalibratedBudget(keep, trials=4), exclude_modules="head") for keep in (0.3, 0.6)]
    site = Watched(net(), batches())
    plans = plan_budgets(recipes, site)
    for recipe, plan in zip(recipes, plans, strict=True):
        assert plan_budgets([recipe], ProcessSite(net(), batches())) == [plan]
    assert len({cuts for cuts, _ in site.tried}) == len(site.tried)
    one = Watched(nn.Sequential(nn.Linear(WIDTH, WIDTH)), batches())
    operate(lp.Recipe(policy=lp.CalibratedBudget(0.5)), one)  # a single block: no multiplier makes a difference
    assert len(one.tried) == 1


def test_a_plan_of_trials_is_a_plan_like_any_other(tmp_path):
    recipe = lp.Recipe(policy=lp.CalibratedBudget(0.5), **BLIND)
    (plan,) = plan_budgets([recipe], ProcessSite(net(), batches()))
    plan.to_yaml(tmp_path / "plan.yaml")
    read = lp.CompressionPlan.from_yaml(tmp_path / "plan.yaml")
    assert read == plan
    assert plan.note in str(read)
    one, other = net(), net()
    report = lp.apply_plan_(one, read)
    expected = lp.compress_(other, recipe, batches())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert report.plan.note == expected.plan.note == plan.note
    assert lp.CompressionReport.from_dict(expected.to_dict(), lp.SVD()).plan.note == plan.note


def test_without_anything_to_try_on_it_says_so():
    model, policy = net(), lp.CalibratedBudget(0.5)
    targets = lp.find_targets(model)
    statistics = lp.collect_statistics(model, targets, batches(), gradients=True)
    found = survey(lp.Recipe(0.5), ProcessSite(model, batches()))
    for attempt in (
        lambda: lp.make_plan(targets, policy, statistics=statistics),
        lambda: lp.compress_(model, policy=policy, factorization=lp.SVD()),
        lambda: found.plan(lp.Recipe(policy=policy)),
    ):
        with pytest.raises(StatisticsError, match=r"tries cuts of the model.*trials=0, alpha=\.\.\., gamma=\.\.\."):
            attempt()
    known = lp.CalibratedBudget(0.5, trials=0, alpha=1, gamma=3)
    assert lp.make_plan(targets, known, statistics=statistics).keep <= 0.5
    assert Site.hold_back(ProcessSite(model)) is False


@pytest.mark.parametrize("question", ["hold_back", "divergence", "factors"])
def test_whatever_breaks_the_model_is_as_it_was(question, monkeypatch):
    def fail(self, *args):
        raise StatisticsError(f"broken at {question}")

    monkeypatch.setattr(ProcessSite, question, fail)
    model = net()
    before, shown = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(PrehabError, match=f"broken at {question}"):
        lp.compress_(model, policy=lp.CalibratedBudget(0.5), batches=batches())
    assert str(model) == shown
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_progress_counts_the_trials_and_nothing_inside_of_them():
    heard = []
    with listening(heard.append):
        lp.compress_(net(), policy=lp.CalibratedBudget(0.5, trials=3), batches=batches())
    steps = [(one.done, one.total) for one in heard if one.phase == "budget"]
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    between = [one.phase for one in heard]
    first, last = between.index("budget"), len(between) - 1 - between[::-1].index("budget")
    assert set(between[first : last + 1]) == {"budget"}


def test_a_cut_that_leaves_no_numbers_is_not_chosen(monkeypatch):
    of = Trials.of
    monkeypatch.setattr(Trials, "of", lambda self, changes: of(self, changes)._replace(divergence=math.inf))
    report = lp.compress_(net(), policy=lp.CalibratedBudget(0.5), batches=batches())
    assert report.plan.note.startswith("no depth multiplier")


def fit(make_trainer, module, callbacks, epochs, rows=256):
    x = torch.cat(batches(rows // 16))
    with torch.no_grad():
        y = module(x).argmax(1)
    loader = DataLoader(TensorDataset(x, y), 16)
    make_trainer(max_epochs=epochs, callbacks=callbacks).fit(module, loader)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(("scales", "side"), [(EARLY, 1), (LATE, -1)])
def test_in_a_trainer(epoch, scales, side, make_trainer):
    recipe = lp.Recipe(policy=lp.CalibratedBudget(0.5, trials=6), **BLIND)
    compression = lp.CompressionCallback(epoch, recipe, calibration_batches=8)
    prehab = [lp.PrehabCallback(lp.TailEnergy(), 0.0)] if epoch else []
    fit(make_trainer, net(scales), [*prehab, compression], epoch + 1)
    sizes = [layer.parameters for layer in compression.report.plan.layers][::side]
    assert sizes == sorted(sizes, reverse=True)
    assert "depth multiplier alpha=" in compression.report.plan.note


def test_manual_optimization_is_refused_before_training(make_trainer):
    class Manual(Net):
        def __init__(self):
            super().__init__(EARLY)
            self.automatic_optimization, self.steps = False, 0

        def training_step(self, batch, batch_idx):
            self.steps += 1

    for policy in (lp.CalibratedBudget(0.5), lp.ProbeBudget(0.5)):
        module = Manual()
        with pytest.raises(UnsupportedError, match="Use another rank policy"):
            fit(make_trainer, module, [lp.CompressionCallback(1, policy=policy)], 2)
        assert module.steps == 0


def recipe_of(*options, keep=None):
    return read_recipe(parse(["plan", "model", *map(str, options)]), keep)


def test_the_command_line(tmp_path):
    assert recipe_of("--trials", 5).policy == lp.CalibratedBudget(0.5, trials=5)
    assert recipe_of("--trials", 5, keep=0.3).policy == lp.CalibratedBudget(0.3, trials=5)
    probing = recipe_of("--trials", 5, "--policy", "probe").policy
    assert probing == lp.CalibratedBudget(0.5, trials=5, base=lp.ProbeBudget(0.5))
    stored = lp.Recipe(policy=lp.CalibratedBudget(0.4, 2, trials=0, alpha=2, gamma=2))
    stored.to_yaml(tmp_path / "recipe.yaml")
    assert recipe_of("--recipe", tmp_path / "recipe.yaml") == stored
    again = recipe_of("--recipe", tmp_path / "recipe.yaml", "--trials", 4, keep=0.3)
    assert again.policy == lp.CalibratedBudget(0.3, 2, trials=4)
    with pytest.raises(ArgumentError, match="--trials tries budgets, and RankRatio.* use --policy budget"):
        recipe_of("--trials", 5, "--policy", "ratio")


def test_trials_do_no_work_of_the_pivot_layout(monkeypatch):
    """Their products are the same without it; each layer is packed once, for the cut."""
    packed = []
    usual = linalg_factors.pivot_parts
    monkeypatch.setattr(linalg_factors, "pivot_parts", lambda a, b: packed.append(1) or usual(a, b))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
    batches = [torch.randn(32, 24) for _ in range(4)]
    report = lp.compress_(model, batches=batches, policy=lp.CalibratedBudget(0.6, trials=4), layout="pivot")
    assert len(packed) == sum(layer.rank is not None for layer in report.plan.layers) > 0
