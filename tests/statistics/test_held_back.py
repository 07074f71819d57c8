import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prehab.errors import ArgumentError
from lightning_prehab.statistics.batches import tensors
from lightning_prehab.statistics.held_back import hold_back


def rows_of(batches):
    return sorted(int(row) for batch in batches for row in next(tensors(batch)).flatten())


@given(st.integers(1, 12), st.integers(1, 9), st.floats(0.01, 0.99), st.sampled_from(["tensor", "dict", "list"]))
def test_nothing_is_lost_and_both_parts_have_something(count, rows, share, kind):
    kinds = {"tensor": lambda x: x, "dict": lambda x: {"a": x, "b": x + 1}, "list": lambda x: [x, x + 1]}
    batches = [kinds[kind](x) for x in torch.arange(count * rows).split(rows)]
    if count == 1 and round(rows * share) < 1:
        with pytest.raises(ArgumentError, match="Nothing can be held back of 1 batch of"):
            hold_back(batches, share)
        return
    if count == rows == 1:
        with pytest.raises(ArgumentError, match="Nothing can be held back of 1 batch of 1 row;"):
            hold_back(batches, share)
        return
    rest, held = hold_back(batches, share)
    assert rows_of(rest)
    assert rows_of(held)
    assert sorted(rows_of(rest) + rows_of(held)) == list(range(count * rows))
    wanted = share * count * rows
    assert len(rows_of(held)) <= max(wanted + rows, rows + 0.5 * count)  # at most one batch too many
    if kind != "tensor":  # what belongs together stays together
        for batch in [*rest, *held]:
            a, b = batch.values() if kind == "dict" else batch
            assert torch.equal(a + 1, b)


def test_whole_batches_are_spread_evenly():
    batches = [torch.tensor([[i]]) for i in range(20)]
    rest, held = hold_back(batches, 0.2)
    assert rows_of(held) == [2, 7, 12, 17]
    assert len(rest) == 16
    assert all(any(one is other for other in batches) for one in [*rest, *held])  # no copies


def test_rows_of_few_batches():
    rest, held = hold_back([torch.arange(20), torch.arange(20, 23)], 0.1)
    assert rows_of(held) == [5, 15]  # three rows are too few for a tenth
    assert [len(one) for one in rest] == [18, 3]


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.zeros(20, 2), "scale": torch.zeros(())},
        [torch.zeros(20, 2), "text"],
        [torch.zeros(20, 2), torch.zeros(7, 2)],
        [torch.zeros(20, 2), [torch.zeros(20)]],
        object(),
    ],
)
def test_batches_whose_rows_cannot_be_told_apart_stay_whole(batch):
    rest, held = hold_back([batch] * 3, 0.1)
    assert rest == [batch] * 2
    assert held == [batch]
    with pytest.raises(ArgumentError, match="1 batch of .* rows?; give more batches, or evaluate= other batches"):
        hold_back([batch], 0.1)


def test_nothing_at_all():
    with pytest.raises(ArgumentError, match="batches is empty.*A generator can be"):
        hold_back([], 0.5)


def test_named_tuples_stay_what_they_are():
    from collections import namedtuple

    pair = namedtuple("pair", "x y")
    rest, held = hold_back([pair(torch.arange(10), torch.arange(10))], 0.2)
    assert type(rest[0]) is type(held[0]) is pair
    assert math.isclose(len(held[0].x), 2)
