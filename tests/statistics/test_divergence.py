"""One Kullback-Leibler divergence, behind three doors: of a batch, of predictions that are kept, of what is trained."""

import ast

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from lightning_prehab.plan import probes
from lightning_prehab.refinement.distance import distance
from lightning_prehab.statistics import divergence as room
from lightning_prehab.statistics.divergence import divergence
from lightning_prehab.statistics.predictions import Predictions
from tests.test_architecture import FILES, name_of


def of_a_batch(right, other, batch):
    return divergence(right, other, batch)


def of_what_is_kept(right, other, batch):
    return tuple(Predictions(right, batch, 2**20).distance(other))


def of_what_is_trained(right, other, batch):
    found = distance("divergence", other, right, batch)
    return float(found.total), found.weight


def of_a_probe(right, other, batch):
    return probes._increase(right, other, batch), None


DOORS = (of_a_batch, of_what_is_kept, of_what_is_trained, of_a_probe)


@pytest.fixture
def logits():
    source = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, 11, generator=source, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("at_once", [1, 30, 2**19])
def test_it_is_the_divergence(door, at_once, logits, monkeypatch):
    monkeypatch.setattr(room, "AT_ONCE", at_once)
    right, other = logits
    exact = kl_divergence(Categorical(logits=right), Categorical(logits=other))
    found, count = door(right, other, None)
    assert found == pytest.approx(float(exact.sum()), rel=1e-6)
    assert count in (15, None)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    found, count = door(right, other, {"attention_mask": mask})
    assert found == pytest.approx(float(exact[mask.bool()].sum()), rel=1e-6)
    assert count in (10, None)


@pytest.mark.parametrize("never", [-1e9, torch.finfo(torch.float64).min, -torch.inf])
@pytest.mark.parametrize("door", DOORS)
def test_what_never_happens_in_both_does_not_count(door, never, logits):
    right, other = logits
    for one in logits:
        one[..., 3:6] = never
    exact = kl_divergence(*(Categorical(logits=torch.cat([one[..., :3], one[..., 6:]], -1)) for one in logits))
    if door is of_what_is_kept and never == -torch.inf:
        pytest.skip("infinite logits are refused there")
    assert door(right, other, None)[0] == pytest.approx(float(exact.sum()), rel=1e-6)


def test_no_other_place_computes_it():
    words = {"kl_div", "kl_divergence", "log_softmax", "KLDivLoss"}
    found = {
        name_of(path)
        for path, tree in FILES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in words) or (isinstance(node, ast.Name) and node.id in words)
    }
    assert found == {"statistics/divergence.py", "statistics/outputs.py"}  # the latter for cross-entropies
