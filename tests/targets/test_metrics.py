"""Networks inside of a torchmetrics.Metric measure the model; they are no part of it unless they are named."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torchmetrics
from torch import nn
from torchmetrics.wrappers import BootStrapper, MetricTracker, MultitaskWrapper

import lightning_prehab as lp
from lightning_prehab.errors import TargetError
from lightning_prehab.targets.metrics import measured_by


class Distance(torchmetrics.Metric):
    """A metric with a frozen network inside, as FID, LPIPS and BERTScore have."""

    def __init__(self, features=None):
        super().__init__()
        frozen = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12)).requires_grad_(False)
        self.features = frozen if features is None else features
        self.add_state("total", torch.zeros(()), "sum")

    def update(self, a, b):
        self.total += (self.features(a) - self.features(b)).square().mean()

    def compute(self):
        return self.total


#: Where people keep metrics.
PLACES = {
    "attribute": Distance,
    "dict": lambda: nn.ModuleDict({"fit": Distance(), "val": Distance()}),
    "list": lambda: nn.ModuleList([nn.ModuleDict({"a": Distance()})]),
    "sequential": lambda: nn.Sequential(nn.Identity(), Distance()),
    "collection": lambda: torchmetrics.MetricCollection({"d": Distance()}, prefix="val_"),
    "collections": lambda: nn.ModuleDict({"v": torchmetrics.MetricCollection([Distance()])}),
    "wrapper": lambda: BootStrapper(Distance(), num_bootstraps=2),
    "tracker": lambda: MetricTracker(Distance(), maximize=False),
    "tasks": lambda: MultitaskWrapper({"a": Distance(), "b": torchmetrics.MetricCollection([Distance()])}),
    "nested": lambda: Distance(nn.Sequential(nn.Linear(6, 6), Distance())),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("first", [True, False])
def test_never_a_target_wherever_the_metric_hangs(place, first):
    net = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 6))
    children = {"distance": PLACES[place](), "net": net} if first else {"net": net, "distance": PLACES[place]()}
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    for target_modules in (None, "*", ["*.0", "*.1", "*.2"]):
        targets = lp.find_targets(model, target_modules)
        assert set(targets) == {"net.0", "net.1"}
        measuring = [name for name in targets.skipped if name.startswith("distance.")]
        assert len(measuring) >= 2
        assert all("belongs to the metric 'distance" in targets.skipped[name] for name in measuring)
    named = measuring[0]
    assert list(lp.find_targets(model, named)) == [named]
    metrics = [f"{name}.*" for name in set(measured_by(model).values())]
    assert set(lp.find_targets(model, ["net.*", *metrics])) == {"net.0", "net.1", *measuring}


def test_the_metric_measures_the_same_after_a_surgery_in_training(lit, loader, make_trainer):
    lit.net.append(nn.Linear(6, 6))
    lit.distance = Distance()
    a, b = torch.randn(2, 50, 6)
    before = copy.deepcopy(lit.distance)(a, b)
    compression = lp.CompressionCallback(1, 0.5, factorization=lp.SVD())
    make_trainer(max_epochs=2, callbacks=[lp.PrehabCallback(), compression]).fit(lit, loader)
    assert any(name.startswith("net.") for name in compression.report.ranks)
    assert not any(name.startswith("distance.") for name in compression.report.ranks)
    assert torch.equal(lit.distance(a, b), before)


def test_what_the_model_holds_too_is_a_part_of_it():
    encoder = nn.Sequential(nn.Linear(6, 12))
    model = nn.ModuleDict({"distance": Distance(encoder), "encoder": encoder, "head": nn.Linear(12, 12)})
    assert measured_by(model).keys() == {id(model["distance"])}
    assert list(lp.find_targets(model)) == ["distance.features.0", "head"]
    lp.compress_(model, 0.5)
    assert model["encoder"][0] is model["distance"].features[0]
    assert isinstance(encoder[0], lp.LowRankLinear)


def test_a_metric_that_is_the_model_is_asked_for():
    assert list(lp.find_targets(Distance())) == ["features.0", "features.2"]


def test_a_metric_is_named_by_a_pattern_that_begins_with_its_name():
    model = nn.ModuleDict({"features": nn.Sequential(nn.Linear(6, 6)), "metrics": nn.ModuleDict({"fid": Distance()})})
    inside = ["metrics.fid.features.0", "metrics.fid.features.2"]
    for pattern in ("metrics.fid.*", "metrics.fid*", "fid.*", inside, "fid.features.[02]"):
        assert list(lp.find_targets(model, pattern)) == inside
    for pattern in ("*", "metrics.*", "*.fid.*", "*.features.*", "features.2"):
        with pytest.raises(TargetError, match="begins with 'metrics.fid'") if pattern != "*" else nullcontext():
            assert list(lp.find_targets(model, pattern)) == ["features.0"]
    with pytest.raises(TargetError, match="begins with 'metrics.fid'"):
        lp.find_targets(model, exclude_modules="features.0")
