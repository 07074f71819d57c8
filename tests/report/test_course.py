import pytest

from lightning_prehab.errors import CheckpointError
from lightning_prehab.report.course import Moment, PrehabCourse

COURSE = PrehabCourse(
    Moment(45, 0.31, {}, 5.1, 9.0, 0.25),
    Moment(90, 0.34, {"val_loss": 0.4, "val_acc": 0.9, "val_f1": 0.8}, 3.2, 4.0, 1e-15),
    Moment(180, 0.29, {"val_loss": 0.35, "val_acc": 0.91, "val_f1": 0.8}),
)


def test_there_and_back():
    assert PrehabCourse.from_dict(COURSE.to_dict()) == COURSE
    data = COURSE.to_dict()
    del data["end"], data["cut"]["tail_energy"], data["start"]["validation"]
    assert PrehabCourse.from_dict(data).cut.tail_energy is None


def test_one_line():
    assert COURSE.summary() == (
        "training loss 0.310 -> 0.340 at the cut -> 0.290 at the end; val_loss 0.400 at the cut -> 0.350 at the end; "
        "val_acc 0.900 at the cut -> 0.910 at the end; stable rank 5.10 -> 3.20"
    )


def test_the_tail_is_zero_at_rounding():
    assert COURSE.rows()["energy beyond the ranks"] == ["0.250", "0", ""]


def test_nothing_is_known():
    course = PrehabCourse(Moment(0), Moment(1))
    assert (course.rows(), course.summary()) == ({}, "")


@pytest.mark.parametrize("data", [None, [], {}, {"start": {}}, {"start": {"step": 0}, "cut": {"step": "x"}}])
def test_something_else(data):
    with pytest.raises(CheckpointError, match="not the course of a prehab"):
        PrehabCourse.from_dict(data)
