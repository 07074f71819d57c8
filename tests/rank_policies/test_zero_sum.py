import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prehab.errors import PlanError, StatisticsError
from lightning_prehab.linalg.storage import largest_saving_rank
from lightning_prehab.rank_policies import LayerChoices, ZeroSum


def by_hand(layers, keep, min_rank):
    """The selection rule with plain lists: every offer is looked at again before each removal."""
    budget = int(keep * sum(one.out_features * one.in_features for one in layers) + 1e-6)
    left = [one.components.tolist() for one in layers]
    running = 0.0
    for one, deltas in zip(layers, left, strict=True):
        if not one.dense:  # an overridden rank: the rest is dropped beforehand
            dropped, deltas[one.ranks[-1] :] = deltas[one.ranks[-1] :], []
            running += sum(dropped)

    def stored(one, count):
        """Parameters and rank of a layer with so many components left."""
        allowed = [rank for rank in one.ranks if rank >= min_rank] or list(one.ranks[-1:])
        for rank in allowed:
            if rank >= count:
                sides = one.out_features + one.in_features - (rank if one.layout == "pivot" else 0)
                return rank * sides + one.new_bias, rank
        return one.out_features * one.in_features, None

    def smallest(one):
        allowed = [rank for rank in one.ranks if rank >= min_rank] or list(one.ranks[-1:])
        return allowed[0] if allowed else min(one.out_features, one.in_features)

    while sum(stored(one, len(deltas))[0] for one, deltas in zip(layers, left, strict=True)) > budget:
        offers = [
            (deltas[-1], i) for i, deltas in enumerate(left) if len(deltas) > smallest(layers[i]) and len(deltas) > 0
        ]
        if not offers:
            return None
        up, down = [o for o in offers if o[0] >= 0], [o for o in offers if o[0] < 0]
        pool = (up or down) if running <= 0 else (down or up)
        best = pool[0]
        for candidate in pool[1:]:
            if abs(candidate[0]) < abs(best[0]):
                best = candidate
        running += left[best[1]].pop()
    return {one.name: stored(one, len(deltas))[1] for one, deltas in zip(layers, left, strict=True)}


@st.composite
def layer_choices(draw, index):
    m, n = draw(st.integers(3, 12)), draw(st.integers(3, 12))
    layout = draw(st.sampled_from(["factors", "pivot"]))
    k, top = min(m, n), largest_saving_rank(m, n, layout)
    delta = st.one_of(st.integers(-3, 3).map(float), st.floats(-1, 1))
    components = torch.tensor(draw(st.lists(delta, min_size=k, max_size=k)), dtype=torch.float64)
    multiple = draw(st.integers(1, 3))
    ranks = tuple(range(multiple, top + 1, multiple)) or tuple(range(1, top + 1))
    dense, bias = True, draw(st.sampled_from([0, 0, 1]))
    kind = draw(st.sampled_from(["free", "free", "free", "fixed", "dense"]))
    if kind == "fixed":
        ranks, dense = (draw(st.integers(1, top)),), False
    elif kind == "dense":
        ranks = ()
    return LayerChoices(f"layer{index}", m, n, torch.ones(k).double(), ranks, dense, bias, components, layout=layout)


@settings(max_examples=400, deadline=None)
@given(st.data(), st.integers(1, 4), st.floats(0.05, 1.0), st.integers(1, 3))
def test_equals_the_rule_without_heaps(data, count, keep, min_rank):
    layers = [data.draw(layer_choices(i)) for i in range(count)]
    expected = by_hand(layers, keep, min_rank)
    if expected is None:
        with pytest.raises(PlanError, match="their smallest ranks hold"):
            ZeroSum(keep, min_rank)(layers)
        return
    assert ZeroSum(keep, min_rank)(layers) == expected


def test_the_sum_stays_near_zero():
    generator = torch.Generator().manual_seed(0)
    layers = []
    for i in range(6):
        values = torch.logspace(0, -2, 32, dtype=torch.float64)
        deltas = torch.randn(32, generator=generator, dtype=torch.float64) * values
        layers.append(LayerChoices(f"{i}", 32, 32, values, tuple(range(1, 16)), components=deltas))
    ranks = ZeroSum(0.3)(layers)
    assert all(rank is not None for rank in ranks.values())
    changes = [float(one.components[ranks[one.name] :].sum()) for one in layers]
    assert abs(sum(changes)) < 0.1 * sum(map(abs, changes))


def test_no_gradients():
    bare = LayerChoices("fc", 8, 8, torch.ones(8).double(), (1, 2, 3))
    with pytest.raises(StatisticsError, match=r"Layer 'fc' \(8x8\): ZeroSum needs the predicted change"):
        ZeroSum(0.5)([bare])
    assert ZeroSum.needs_weight_gradients
