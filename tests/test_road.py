"""The road: its steps in order, the same for everybody, and nothing changed before the end."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.callbacks import _sharded_site
from lightning_prehab.callbacks import _site as trainer_sites
from lightning_prehab.cli import commands
from lightning_prehab.errors import ArgumentError, PlanError, PrehabError, StatisticsError, TargetError
from lightning_prehab.progress import listening
from lightning_prehab.road import operate, plan_budgets, survey
from lightning_prehab.sites import ProcessSite, Site
from tests.before_the_house.comparison import assert_same_data, in_shares
from tests.before_the_house.make import (
    METHODS,
    MODELS,
    Lit,
    Loader,
    batches,
    build,
    by_command_line,
    by_compress,
    state_of,
    trainer_of,
    undisturbed,
)

QUESTIONS = ["find", "score", "observe", "decompose", "probe", "decide", "factors", "release", "effect", "swap"]
#: What is asked where something is cut: with a prediction of the loss, and without.
CUT = ["factors", "release", "effect", "swap"]
CUT_UNPREDICTED = ["factors", "release", "swap"]


def recording(kind: type[Site]) -> type[Site]:
    """The same site, which writes down what it was asked and the plan that it was given."""

    class Recording(kind):
        asked: list[str]
        plan = None

        def swap(self, plan, factors):
            self.plan = plan
            return super().swap(plan, factors)

    def note(question):
        answer = getattr(Recording, question)

        def asked(self, *args):
            self.__dict__.setdefault("asked", []).append(question)
            return answer(self, *args)

        return asked

    for question in QUESTIONS:
        setattr(Recording, question, note(question))
    return Recording


RecordingProcessSite = recording(ProcessSite)


def loss_of(net, batch):
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@undisturbed()
def by_the_road(model, method, *, loss=loss_of, inputs_alone=False):
    """The road on a recording site: what was asked, the plan and the weights."""
    chosen, module = METHODS[method], build(model)
    given = [x for x, _ in batches(model)] if inputs_alone else batches(model)
    site = RecordingProcessSite(module, given if chosen.data else None, loss)
    operate(lp.Recipe(chosen.keep, **chosen.arguments()), site)
    return site.asked, site.plan.to_dict(), state_of(module)


def assert_same(state, other):
    assert list(state) == list(other)
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_compress_walks_it(model, method, tmp_path):
    asked, plan, state = by_the_road(model, method)
    predicts = lp.Recipe(**METHODS[method].arguments()).factorization_or_default.comparable
    assert asked == ["find", "score", "observe", "decompose", "decide", *(CUT if predicts else CUT_UNPREDICTED)]
    found = by_compress(model, method, tmp_path)
    assert found["plan"] == plan
    assert_same(found["states"]["surgery"], state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_command_line_walks_it(model, method, tmp_path, monkeypatch):
    sites = []

    class Watched(RecordingProcessSite):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            sites.append(self)

    monkeypatch.setattr(commands, "ProcessSite", Watched)
    found = by_command_line(model, method, tmp_path)
    asked, plan, state = by_the_road(model, method, loss=None, inputs_alone=True)
    planned, compressed = sites
    assert planned.asked[:4] == ["find", "observe", "decompose", "decide"]
    assert planned.asked[4:] == (["factors", "effect", "release"] if "effect" in asked else ["release"])  # no swap
    assert compressed.asked == asked
    shown = {key: value for key, value in found["plan"].items() if key not in ("keep", "model_keep")}
    assert without_prefix(shown) == without_prefix(plan)
    assert_same({name.removeprefix("net."): value for name, value in found["states"]["surgery"].items()}, state)


def without_prefix(plan):
    """A plan for the model in a LightningModule as one for the model itself."""
    layers = [{**layer, "name": layer["name"].removeprefix("net.")} for layer in plan["layers"]]
    skipped = {name.removeprefix("net."): why for name, why in plan["skipped"].items()}
    return {**plan, "layers": layers, "skipped": skipped}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_callback_walks_it(model, method, tmp_path, monkeypatch):
    """At epoch 0 it sees the same batches with the same weights; so it ends with the same ones."""
    sites, states = [], []

    class Watched(recording(trainer_sites.TrainerSite)):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            sites.append(self)

    class AtSurgery(lp.RehabSchedule):
        def on_surgery(self, trainer, pl_module, report):
            super().on_surgery(trainer, pl_module, report)
            states.append(state_of(pl_module.net))

    monkeypatch.setattr(_sharded_site, "TrainerSite", Watched)  # where the site is chosen
    chosen = METHODS[method]
    callback = lp.CompressionCallback(0, lp.Recipe(chosen.keep, **chosen.arguments()))
    with undisturbed():
        trainer_of(tmp_path, max_epochs=1, callbacks=[callback, AtSurgery()]).fit(Lit(model), Loader(model))
    asked, plan, state = by_the_road(model, method)
    assert [site.asked for site in sites] == [asked]
    assert sites[0]._decompositions == {}  # what is large is let go of
    assert sites[0]._collected is None
    found = without_prefix(sites[0].plan.to_dict())
    assert_same_data(in_shares(found), in_shares(plan))
    ours, theirs = (lp.CompressionPlan.from_dict(one).loss_increase for one in (found, plan))
    if theirs is not None:  # the same loss of the same batches
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-7)
    assert_same(states[0], state)


def test_one_calibration_serves_several_budgets():
    recipes = [lp.Recipe(keep) for keep in (0.3, 0.5, 0.9)]
    site = RecordingProcessSite(build("mlp"), batches("mlp"), loss_of)
    plans = plan_budgets(recipes, site)
    assert site.asked == ["find", "observe", "decompose", *["decide", "factors", "effect"] * 3, "release"]
    for recipe, plan in zip(recipes, plans, strict=True):
        alone = plan_budgets([recipe], ProcessSite(build("mlp"), batches("mlp"), loss_of))
        assert alone == [plan]
    site = RecordingProcessSite(build("mlp"), batches("mlp"), loss_of)
    with pytest.raises(PlanError, match=r"keep=0.001"):
        plan_budgets([lp.Recipe(0.5), lp.Recipe(0.001)], site)
    assert site.asked == ["find"]  # the last budget is looked at before the work for the first


def test_budgets_with_probes_are_each_probed_in_the_forms_that_they_choose():
    """The forms of convolutions differ with the budget, and with them what a small cut does."""
    keeps = (0.15, 0.3, 0.5, 0.8)
    recipes = [lp.Recipe(policy=lp.ProbeBudget(keep)) for keep in keeps]
    together = plan_budgets(recipes, ProcessSite(build("conv"), batches("conv"), loss_of))
    alone = [plan_budgets([one], ProcessSite(build("conv"), batches("conv"), loss_of))[0] for one in recipes]
    assert together == alone
    forms = {tuple(layer.form for layer in plan.layers) for plan in together}
    assert len(forms) > 1


@pytest.mark.parametrize(
    "other",
    [
        lp.Recipe(0.3, factorization=lp.WhitenedSVD()),
        lp.Recipe(0.3, exclude_modules="0"),
        lp.Recipe(0.3, split_fused=True),
        lp.Recipe(policy=lp.ZeroSum(0.3)),
    ],
)
def test_recipes_that_need_a_calibration_of_their_own_are_refused(other):
    site = RecordingProcessSite(build("mlp"), batches("mlp"), loss_of)
    with pytest.raises(ArgumentError, match="cannot be planned together"):
        plan_budgets([lp.Recipe(0.5), other], site)
    assert not hasattr(site, "asked")


def test_probes_are_asked_for_between_decomposing_and_deciding():
    site = RecordingProcessSite(build("conv"), batches("conv"), loss_of)
    operate(lp.Recipe(policy=lp.ProbeBudget(0.5)), site)
    assert site.asked == ["find", "score", "observe", "decompose", "decide", "probe", "decide", *CUT]


def test_in_blocks_everything_is_seen_once():
    site = RecordingProcessSite(build("mlp"), batches("mlp"), loss_of, layers_at_once=3)
    operate(lp.Recipe(0.5), site)
    blocks = ["observe", "decompose"] * 2  # four layers
    assert site.asked == ["find", "score", *blocks, "decide", *CUT]


def broken_at(question, kind=ProcessSite):
    class Broken(kind):
        pass

    def fail(self, *args):
        raise StatisticsError(f"broken at {question}")

    setattr(Broken, question, fail)
    return Broken


@pytest.mark.parametrize("question", [question for question in QUESTIONS if question != "probe"])
def test_whatever_breaks_the_model_is_as_it_was(question):
    module = build("transformer")
    before, shown = state_of(module), str(module)
    optimizer = torch.optim.AdamW(module.parameters())
    groups = [list(group["params"]) for group in optimizer.param_groups]
    site = broken_at(question)(module, batches("transformer"), loss_of, [optimizer])
    with pytest.raises(PrehabError, match=f"broken at {question}"):
        operate(lp.Recipe(0.5), site)
    assert str(module) == shown
    assert_same(state_of(module), before)
    assert all(
        a is b
        for one, other in zip(groups, optimizer.param_groups, strict=True)
        for a, b in zip(one, other["params"], strict=True)
    )
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in module.modules())


PROBED = lp.Recipe(policy=lp.ProbeBudget(0.5))
PHASES = ["calibrate", "decompose", "probe", "factorize", "try"]


def test_progress_of_all_phases():
    heard = []
    with listening(heard.append):
        lp.compress_(build("conv"), PROBED, batches("conv"), loss_of)
    assert list(dict.fromkeys(one.phase for one in heard)) == PHASES
    for phase in PHASES:
        steps = [one for one in heard if one.phase == phase]
        assert [one.done for one in steps] == sorted(one.done for one in steps)
        assert (steps[0].done, steps[-1].done) == (0, steps[-1].total), phase
        assert len({one.total for one in steps[:-1]}) == 1  # the cut may be tried less often than was thought
        named = [one.what for one in steps if one.done < one.total]
        assert all(named) == any(named) == (phase in ("decompose", "probe", "factorize")), phase


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, PrehabError])
def test_a_listener_that_gives_up_ends_the_work_and_the_model_is_as_it_was(phase, error):
    def give_up(progress):
        if progress.phase == phase:
            raise error("enough")

    module = build("conv")
    before = copy.deepcopy(module)
    with pytest.raises(error, match="enough"), listening(give_up):
        lp.compress_(module, PROBED, batches("conv"), loss_of)
    assert str(module) == str(before)
    assert_same(state_of(module), state_of(before))
    assert not any(layer._forward_hooks for layer in module.modules())


def test_blocks_are_told_of_with_what_is_done_in_them():
    heard = []
    with listening(heard.append):
        lp.compress_(build("mlp"), 0.5, batches("mlp"), loss_of, layers_at_once=1)
    parts = [one for one in heard if one.phase == "block"]
    assert [one.done for one in parts] == list(range(parts[0].total + 1))
    assert parts[0].total > 1
    between = heard[heard.index(parts[0]) : heard.index(parts[-1])]
    assert {one.phase for one in between} == {"block", "calibrate", "decompose"}


def test_a_survey_makes_plans_and_changes_nothing():
    module = build("mlp")
    before = state_of(module)
    found = survey(lp.Recipe(0.5), ProcessSite(module, batches("mlp"), loss_of))
    plans = [found.plan(lp.Recipe(keep)) for keep in (0.9, 0.3)]
    assert plans[0].keep > plans[1].keep
    assert_same(state_of(module), before)
    with pytest.raises(PlanError):
        found.plan(replace(lp.Recipe(0.5), policy=lp.RankRatio(0.01)))
    with pytest.raises(TargetError, match="no layer"):
        found.plan(lp.Recipe(0.5, rank_overrides={"nowhere": 3}))
