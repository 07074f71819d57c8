"""What is measured again and again on the rows that are held back."""

import pytest
import torch

from lightning_prehab.refinement import exam
from lightning_prehab.refinement.exam import Exam
from lightning_prehab.refinement.pair import Pair
from tests.refinement.models import cut


def answers_given(module):
    """Counts the forward passes of a module."""
    asked = []
    module.register_forward_hook(lambda *_: asked.append(None))
    return asked


def divergence(model, dense, batches):
    with torch.no_grad():
        found = []
        for batch in batches:
            p, q = (one(**batch).logits.double().log_softmax(-1) for one in (dense, model))
            found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize(("room", "again"), [(1.0, 0), (0.0, 3)])
def test_the_teacher_answers_once_where_its_answers_can_be_kept(room, again, monkeypatch):
    monkeypatch.setattr(exam, "ROOM", room)
    model, dense, batches = cut("language")
    of_teacher, of_model = answers_given(dense), answers_given(model)
    found = Exam(Pair(model, dense, half=False), batches[:3])
    assert found.distance() == pytest.approx(divergence(model, dense, batches[:3]), rel=1e-4)
    assert len(of_teacher) == len(of_model) == 3 + 3  # the second three are asked by this test
    before = len(of_teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    changed = found.distance()
    assert len(of_teacher) - before == again
    assert changed == pytest.approx(divergence(model, dense, batches[:3]), rel=1e-4)


def test_as_many_answers_are_kept_as_there_is_room_for(monkeypatch):
    model, dense, batches = cut("language")
    size = dense(**batches[0]).logits.untyped_storage().nbytes()
    monkeypatch.setattr(exam, "ROOM", 1.0)
    monkeypatch.setattr(exam, "free_memory", lambda device: 2.5 * size)
    found = Exam(Pair(model, dense, half=False), batches[:4])
    asked = answers_given(dense)
    assert found.distance() == found.distance()
    assert len(asked) == 4 + 2


def test_nothing_is_kept_where_nobody_says_what_is_free(monkeypatch):
    monkeypatch.setattr(exam, "free_memory", lambda device: None)
    model, dense, batches = cut("language")
    asked = answers_given(dense)
    found = Exam(Pair(model, dense, half=False), batches[:2])
    assert found.distance() == found.distance()
    assert len(asked) == 4
