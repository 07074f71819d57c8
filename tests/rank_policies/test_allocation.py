import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prehab.errors import PlanError
from lightning_prehab.rank_policies import allocation
from lightning_prehab.rank_policies.allocation import best_allocation


def brute_force(costs, values, budget):
    return max(
        sum(v[i] for v, i in zip(values, choice, strict=True))
        for choice in itertools.product(*map(range, map(len, costs)))
        if sum(c[i] for c, i in zip(costs, choice, strict=True)) <= budget
    )


items = st.lists(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0, 10)), min_size=1, max_size=6, unique_by=lambda o: o[0]),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(items, st.floats(0, 1))
def test_equals_brute_force_for_any_curves(items, share):
    costs = [sorted(cost for cost, _ in options) for options in items]
    values = [[value for _, value in options] for options in items]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + int(share * (most - least))
    chosen = best_allocation([torch.tensor(c) for c in costs], [torch.tensor(v) for v in values], budget)
    assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= budget
    assert sum(v[i] for v, i in zip(values, chosen, strict=True)) == pytest.approx(
        brute_force(costs, values, budget), rel=1e-9, abs=1e-9
    )


def test_impossible_budget():
    with pytest.raises(PlanError, match="costs 5, the budget is 4"):
        best_allocation([torch.tensor([2, 9]), torch.tensor([3])], [torch.tensor([1.0, 2.0]), torch.tensor([1.0])], 4)


def test_a_capped_search_still_fills_the_budget(monkeypatch):
    monkeypatch.setattr("lightning_prehab.rank_policies.allocation.MAX_STATES", 3)
    generator = torch.Generator().manual_seed(0)
    costs = [torch.arange(1, 40) * k for k in (7, 11, 13, 17, 19)]
    values = [torch.rand(39, generator=generator).sort(descending=True).values.cumsum(0) for _ in costs]
    chosen = best_allocation(costs, values, 900)
    spent = sum(int(c[i]) for c, i in zip(costs, chosen, strict=True))
    assert 900 - 7 < spent <= 900


@pytest.mark.parametrize("curve", ["concave", "convex"])
def test_the_best_choice_of_a_gap_is_the_best_of_all(monkeypatch, curve):
    """Concave costs, as of the pivot layout, make value over cost convex; wide gaps and narrow ones agree."""
    monkeypatch.setattr("lightning_prehab.rank_policies.allocation.AT_ONCE", 0)
    generator = torch.Generator().manual_seed(3)
    ranks = torch.arange(1, 25)
    for _ in range(5):
        sides = torch.randint(50, 70, (5,), generator=generator).tolist()
        costs = [ranks * (side - ranks if curve == "convex" else side) for side in sides]
        falls = torch.rand(5, generator=generator).mul(0.2).tolist()
        values = [torch.exp(-fall * ranks.double()).cumsum(0) for fall in falls]
        budget = int(0.55 * sum(int(cost[-1]) for cost in costs))
        chosen = best_allocation(costs, values, budget)
        monkeypatch.setattr("lightning_prehab.rank_policies.allocation.LEVELS", 1)
        whole = best_allocation(costs, values, budget)
        monkeypatch.undo()
        monkeypatch.setattr("lightning_prehab.rank_policies.allocation.AT_ONCE", 0)
        totals = [sum(float(v[i]) for v, i in zip(values, one, strict=True)) for one in (chosen, whole)]
        assert totals[0] == pytest.approx(totals[1], rel=1e-12)
        assert sum(int(c[i]) for c, i in zip(costs, chosen, strict=True)) <= budget


@pytest.mark.parametrize("share", [0.4, 0.5, 0.777])
@pytest.mark.parametrize("steps", [[1.0], [1.0, 0.5]])
def test_flat_spectra_do_not_take_the_whole_search(monkeypatch, share, steps):
    """Equal items whose options are all near ties: the work of each is bounded, and the choice is still the best."""
    layers, size = 40, 96
    costs = torch.tensor([*(2 * size * rank for rank in range(1, size // 2)), size * size])
    squares = torch.tensor(steps, dtype=torch.float64).repeat_interleave(size // len(steps))
    values = torch.cat([squares.cumsum(0)[: size // 2 - 1], squares.sum()[None]])
    budget = int(share * layers * size * size) + 77  # no multiple of a rank's cost
    extended, repeat = [], torch.Tensor.repeat_interleave

    def counted(tensor, *args, **settings):
        extended.append(repeat(tensor, *args, **settings))
        return extended[-1]

    monkeypatch.setattr(allocation, "MOST", 2**12)
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", counted)
    chosen = best_allocation([costs] * layers, [values] * layers, budget)
    monkeypatch.undo()
    assert sum(int(costs[index]) for index in chosen) <= budget
    assert all(one.numel() <= 2**12 for one in extended)
    best = torch.full((budget // (2 * size) + 1,), -torch.inf, dtype=torch.float64)  # by cost, in ranks
    best[0] = 0.0
    for _ in range(layers):
        shifted = [torch.nn.functional.pad(best, (int(c) // (2 * size), 0), value=-torch.inf) for c in costs]
        best = torch.stack([one[: len(best)] + v for one, v in zip(shifted, values, strict=True)]).amax(0)
    assert float(values[torch.tensor(chosen)].sum()) == pytest.approx(float(best.max()))
