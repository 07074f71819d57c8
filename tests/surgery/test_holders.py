"""Nobody of ours holds what was replaced, and whoever else does is named."""

import copy
import gc
import warnings
import weakref
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_prehab as lp
from lightning_prehab.surgery.holders import holders
from tests.replaceable import CASES, WAYS, by_compress, by_plan

OUTSIDE = []  # a global that holds something now and then


@pytest.fixture
def _globals_too():
    """What was imported is gone through as well, as in a program of a user; see tests/conftest.py."""
    gc.unfreeze()
    yield
    gc.freeze()


def small():
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


def parts_of(model):
    """Modules and parameters, weakly."""
    return [weakref.ref(thing) for thing in (*model.modules(), *model.parameters())]


def left_over(refs, model):
    """What lives although the model does not have it, with whoever refers to it."""
    gc.collect()
    here = {id(thing) for thing in (*model.modules(), *model.parameters())}
    alive = [thing for ref in refs if (thing := ref()) is not None and id(thing) not in here]
    return [(type(thing), [type(one) for one in gc.get_referrers(thing)]) for thing in alive]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CASES)
def test_nothing_that_was_replaced_lives_on(kind, way, tmp_path):
    case = CASES[kind]
    model = case.model()
    refs = parts_of(model)
    WAYS[way](model, case, tmp_path)
    assert left_over(refs, model) == []


@pytest.mark.parametrize("way", [by_compress, by_plan])
@pytest.mark.parametrize("kind", CASES)
def test_nor_in_optimizers(kind, way, tmp_path):
    case = CASES[kind]
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(case.x()).sum().backward()
    optimizer.step()
    scheduler.step()
    refs = parts_of(model)
    way(model, case, tmp_path, optimizers=[optimizer])
    assert left_over(refs, model) == []


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("space", ["weight", "loss"])
def test_nor_in_a_trainer(space, epoch, mlp, loader, make_trainer, lit_class, tmp_path):
    refs, seen = [], []

    class Watch(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            refs.extend(parts_of(pl_module))

        def on_train_epoch_start(self, trainer, pl_module):
            if isinstance(pl_module.net[0], lp.LowRankLinear):
                seen.append(left_over(refs, pl_module))

    def configure(parameters):
        optimizer = torch.optim.AdamW(parameters, foreach=True, lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

    callbacks = [
        lp.PrehabCallback(lp.StableRank(), space=space),
        lp.CompressionCallback(epoch=epoch, keep=0.5),
        lp.RehabSchedule(warmup_steps=2),
        ModelCheckpoint(tmp_path, save_top_k=-1),
        Watch(),
    ]
    if epoch == 0:
        del callbacks[0]
    trainer = make_trainer(
        max_epochs=4, gradient_clip_val=0.5, callbacks=callbacks, enable_checkpointing=True, enable_model_summary=True
    )
    lit = lit_class(mlp, configure)
    trainer.fit(lit, loader)
    assert seen == [[]] * len(seen)
    assert seen
    assert left_over(refs, lit) == []

    again = lit_class(CASES["linear"].model(), configure)
    again.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 6))
    seen.clear()
    refs.clear()
    last = sorted(tmp_path.glob("*.ckpt"))[-1]
    make_trainer(
        max_epochs=5,
        callbacks=[lp.CompressionCallback(epoch=epoch, keep=0.5), Watch()],
    ).fit(again, loader, ckpt_path=last)
    assert seen == [[]]


class Holder:
    """Holds something under some name."""


def in_a_list(model):
    holder = Holder()
    holder.params = list(model.parameters())
    return holder, "Holder.params (list)"


def in_a_tuple_in_a_dict(model):
    holder = Holder()
    holder.groups = {"decay": (model[0].weight,)}
    return holder, "Holder.groups (dict)"


def as_keys(model):
    holder = Holder()
    holder.shadow = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    return holder, "Holder.shadow (dict)"


def in_a_set(model):
    holder = Holder()
    holder.seen = set(model)
    return holder, "Holder.seen (set)"


def as_an_attribute(model):
    holder = Holder()
    holder.head = model[2]
    return holder, "Holder.head (Linear)"


def in_slots(model):
    class Slotted:
        __slots__ = ("weight",)

    holder = Slotted()
    holder.weight = model[2].weight
    return holder, "Slotted.weight (Parameter)"


def in_a_closure(model):
    params = list(model.parameters())

    def clip():
        nn.utils.clip_grad_norm_(params, 1.0)

    return clip, "in_a_closure.<locals>.clip (its variable 'params')"


def in_a_partial(model):
    holder = Holder()
    holder.clip = partial(nn.utils.clip_grad_norm_, [model[0].weight])
    return holder, "Holder.clip (partial)"


def as_a_method(model):
    holder = Holder()
    holder.call = model[0].forward
    return holder, "Holder.call (method)"


def in_a_default(model):
    def clip(params=None):
        return params

    clip.__defaults__ = (tuple(model.parameters()),)
    return clip, "in_a_default.<locals>.clip (a default)"


def of_a_class(model):
    class Settings:
        pass

    Settings.params = list(model.parameters())
    return Settings, "Settings.params (list)"


def in_another_module(model):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(model[0], nn.ReLU())

    return Other(), "Other.features (Sequential)"


def in_a_global(model):
    OUTSIDE.append(model[0])
    return None, f"{__name__}.OUTSIDE (list)"


HOLD = [
    in_a_list,
    in_a_tuple_in_a_dict,
    as_keys,
    in_a_set,
    as_an_attribute,
    in_slots,
    in_a_closure,
    in_a_partial,
    as_a_method,
    in_a_default,
    of_a_class,
    in_another_module,
    in_a_global,
]


@pytest.mark.usefixtures("_globals_too")
@pytest.mark.parametrize("hold", HOLD)
def test_who_is_named(hold):
    model = small()
    holder, name = hold(model)
    with pytest.warns(UserWarning, match="still held by") as caught:
        lp.compress_(model, 0.5)
    OUTSIDE.clear()
    assert [str(one.message).split(" still held by ")[1].split(";")[0] for one in caught] == [name]
    assert holder is not None or hold is in_a_global


def test_one_warning_names_all():
    model = small()
    found = [hold(model) for hold in (in_a_list, as_an_attribute, in_a_closure)]
    with pytest.warns(UserWarning, match="held by") as caught:
        lp.compress_(model, 0.5)
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for _, name in found)


@pytest.mark.parametrize("way", ["load_compressed", "follow_state_dict_", "to_dense_"])
def test_loading_names_them_too(way, tmp_path):
    case = CASES["linear"]
    model, holder = case.model(), Holder()
    if way == "to_dense_":
        lp.compress_(model, 0.5)
    holder.params = list(model.parameters())
    if way == "follow_state_dict_":  # the part that others use: who calls it tells
        WAYS[way](model, case, tmp_path)
        return
    with pytest.warns(UserWarning, match=r"Holder\.params \(list\)"):
        (lp.to_dense_ if way == "to_dense_" else partial(WAYS[way], case=case, folder=tmp_path))(model)


@pytest.mark.usefixtures("_globals_too")
def test_a_list_of_the_module_in_a_trainer(mlp, loader, make_trainer, lit_class, tmp_path):
    """The case that happens: gradients are clipped over a list that was made in __init__."""

    class Lit(lit_class):
        def __init__(self, net):
            super().__init__(net)
            self.params = list(net.parameters())

    class Anew(Lit):
        def on_surgery(self, trainer, pl_module, report):
            self.params = list(self.net.parameters())

        def on_train_start(self):
            self.params = list(self.net.parameters())

    dense = copy.deepcopy(mlp)
    compression = lp.CompressionCallback(epoch=1, keep=0.5, factorization=lp.SVD())
    with pytest.warns(UserWarning, match=r"still held by Lit\.params \(list\);"):
        make_trainer(max_epochs=2, callbacks=[compression]).fit(Lit(mlp), loader)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*still held")
        compression = lp.CompressionCallback(epoch=1, keep=0.5, factorization=lp.SVD())
        trainer = make_trainer(max_epochs=2, callbacks=[compression])
        trainer.fit(Anew(copy.deepcopy(dense)), loader)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def resume(kind):  # the dense module is cut when the fit starts, and nobody is told of a surgery
        resumed = make_trainer(max_epochs=3, callbacks=[lp.CompressionCallback(1, 0.5, factorization=lp.SVD())])
        resumed.fit(kind(copy.deepcopy(dense)), loader, ckpt_path=tmp_path / "cut.ckpt")

    with pytest.warns(UserWarning, match=r"still held by Lit\.params \(list\);"):
        resume(Lit)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*still held")
        resume(Anew)


@pytest.mark.usefixtures("_globals_too")
def test_who_is_not_named(mlp, loader, make_trainer, lit_class, data):
    """Variables of the caller, what find_targets gave, graphs, a Trainer that is done, what waits for the collector."""
    lit = lit_class(mlp)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(lit, loader)
    targets = lp.find_targets(mlp)
    layer, weights = mlp[0], [module.weight for module in mlp if isinstance(module, nn.Linear)]
    graph = mlp(data.tensors[0])
    generator = mlp.parameters()
    next(generator)
    garbage = Holder()
    garbage.params, garbage.itself = list(mlp.parameters()), garbage
    del garbage
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.compress_(mlp, 0.5)
    assert targets["0"] is layer
    assert weights[0] is layer.weight
    assert graph.requires_grad
    assert trainer.optimizers


def test_an_optimizer_is_told_when_it_steps(data):
    """One that is done with, or that is made anew in place, has nothing to be told."""
    model = small()
    stale, renewed, followed = (torch.optim.AdamW(model.parameters()) for _ in range(3))
    lp.compress_(model, 0.5, optimizers=[followed])
    renewed.param_groups.clear()
    renewed.add_param_group({"params": list(model.parameters())})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        renewed.step()
        followed.step()
    with pytest.warns(UserWarning, match="AdamW steps 2 weights that have been replaced"):
        stale.step()
    stale.step()


def test_an_error_names_nobody(mlp):
    holder = Holder()
    holder.params = list(mlp.parameters())
    with pytest.raises(lp.PrehabError):
        lp.compress_(mlp, 0.0)


def test_a_deep_chain_ends():
    layer, holder = nn.Linear(2, 2), Holder()
    nested = [layer]
    for _ in range(50):
        nested = [nested]
    holder.nested = nested
    assert holders([layer]) == ([], [])
