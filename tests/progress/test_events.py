import threading

import pytest

from lightning_prehab.progress import Progress, counted, doing, listening, naming_items, quiet, tell


def test_without_a_listener_nothing_happens():
    tell("swap", 1, 2)
    assert list(counted("abc", "swap")) == ["a", "b", "c"]


def test_everyone_who_listens_hears_and_only_as_long():
    outer, inner = [], []
    with listening(outer.append):
        tell("a", 0)
        with listening(inner.append):
            tell("b", 1, 2)
            with quiet():
                tell("c", 2)
        tell("d", 3)
    tell("e", 4)
    assert outer == [Progress("a", 0, None), Progress("b", 1, 2), Progress("d", 3, None)]
    assert inner == [Progress("b", 1, 2)]


def test_an_error_inside_ends_the_listening():
    heard = []
    with pytest.raises(ZeroDivisionError), listening(heard.append):
        _ = 1 / 0
    tell("a", 0)
    assert heard == []


def test_other_threads_are_not_heard():
    heard = []
    with listening(heard.append):
        thread = threading.Thread(target=tell, args=("a", 0))
        thread.start()
        thread.join()
    assert heard == []


@pytest.mark.parametrize(
    ("items", "total", "expected"), [([1, 2], None, 2), (iter([1, 2]), None, None), (iter([1]), 5, 5)]
)
def test_totals(items, total, expected):
    heard = []
    with listening(heard.append):
        found = list(counted(items, "a", total))
    assert [one.done for one in heard[: len(found) + 1]] == list(range(len(found) + 1))
    assert {one.total for one in heard[: len(found) + 1]} == {expected}
    assert heard[-1] == Progress(
        "a", len(found), len(found)
    )  # the end is told once, whatever was thought of the length
    assert len(heard) == len(found) + (1 if expected == len(found) else 2)


class Unsure:
    """A DataLoader over an iterable data set has ``__len__``, which raises."""

    def __iter__(self):
        yield from (1, 2)

    def __len__(self):
        raise TypeError("no length")


def test_without_a_length_the_total_is_not_known():
    heard = []
    with listening(heard.append):
        assert list(counted(Unsure(), "a")) == [1, 2]
    assert heard == [*(Progress("a", done, None) for done in range(3)), Progress("a", 2, 2)]


def test_an_item_is_done_when_the_next_one_is_asked_for():
    heard = []
    with listening(heard.append):
        for item in counted([1, 2, 3], "a"):
            assert heard[-1].done == item - 1
            if item == 2:
                break
    assert heard[-1].done == 1


def test_what_cannot_be_counted_is_over_when_it_is():
    heard = []
    with listening(heard.append), doing("read", "a file"):
        assert heard == [Progress("read", 0, 1, "a file")]
    assert heard[1:] == [Progress("read", 1, 1)]


def test_what_breaks_is_never_over():
    heard = []
    with pytest.raises(ZeroDivisionError), listening(heard.append), doing("read"):
        _ = 1 / 0
    assert heard == [Progress("read", 0, 1)]


def test_names_of_the_items_of_one_phase():
    heard = []
    with listening(heard.append), naming_items("a", ["x", "y"]), naming_items("b", ["z"]):
        list(counted(range(2), "a"))
        tell("b", 0, 3)
        tell("b", 0, 3, "said")
        tell("b", 1, 3)
        tell("c", 0, 3)
    assert [one.what for one in heard] == ["x", "y", "", "z", "said", "", ""]
    with listening(heard.append):
        tell("a", 0, 1)
    assert heard[-1].what == ""
