import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lightning_prehab as lp
from lightning_prehab.distillation.teacher import Teacher, bytes_of_copy, copy_of, rebuilt
from lightning_prehab.errors import CheckpointError, UnsupportedError
from lightning_prehab.surgery.hooks import hooks_of
from tests.layers.every_layer import Case, every_case, name_of


class Tied(nn.Module):
    """Tied weights, a buffer that is not in state dicts, running statistics."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 6))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x):
        return self.head(self.body(self.embed(x)) * self.scale)


X = torch.arange(8)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_copy_shares_nothing_and_stays_as_it_was(half):
    model = Tied().eval()
    teacher = Teacher(copy_of(model, half=half), half=half)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half is not None):
        before = model(X)
    theirs = {one.data_ptr() for one in (*model.parameters(), *model.buffers())}
    assert not theirs & {one.data_ptr() for one in teacher.tensors().values()}
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.train()(X)
    with teacher.at_work(None):
        torch.testing.assert_close(teacher.module(X), before)  # in half precision too: autocast casts the same weights
    assert teacher.module.head.weight is teacher.module.embed.weight
    assert teacher.bytes == bytes_of_copy(model, half)
    dtypes = {name: one.dtype for name, one in teacher.tensors().items()}
    assert dtypes["body.0.weight"] == (half or torch.float32)
    assert dtypes["embed.weight"] == dtypes["head.weight"] == dtypes["body.0.bias"] == torch.float32
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


@pytest.mark.parametrize("kind", [name for name in dir(nn.Module) if re.fullmatch("_?register_.*hook", name)])
def test_a_copy_has_none_of_the_hooks(kind):
    """Whatever there is to register on a module: on the model, on a container, on a layer."""
    model, calls = Tied(), []
    for module in (model, model.body, model.body[2]):
        getattr(module, kind)(lambda *args: calls.append(kind))
    made = copy_of(model)
    assert any(hooks_of(module) for module in model.modules())
    assert not any(hooks_of(module) for module in made.modules())
    made(X).sum()
    made.load_state_dict(made.state_dict())
    assert calls == []


def scaled_down(layer):
    class Smallest(prune.L1Unstructured):  # of the user's own
        pass

    Smallest.apply(layer, "weight", amount=0.5)
    return layer


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm, scaled_down])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_torch_computes_weights_with_stays(wrap):
    model = nn.Sequential(nn.Linear(6, 6), wrap(nn.Linear(6, 4)))
    made = copy_of(model).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(made(x), model.eval()(x))
    with torch.no_grad():
        for parameter in made[1].parameters():
            parameter.mul_(3.0)
    assert not torch.allclose(made(x), model(x))  # by its own weights


def test_what_cannot_be_copied_is_told_the_way_out():
    model = Tied()
    model.file = (number for number in range(3))
    with pytest.raises(UnsupportedError, match=r"Tied cannot be deep-copied .* Give a teacher: teacher="):
        copy_of(model)


@pytest.mark.parametrize(("kind", "number"), every_case(), ids=name_of)
def test_the_dense_teacher_of_each_cut_layer_is_rebuilt_bit_by_bit(kind, number):
    case = Case(kind, number)
    student = nn.Sequential(case.layer)
    dense = nn.Sequential(case.layer.to_dense()).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    tensors = Teacher(copy_of(dense)).tensors()
    made = rebuilt(student, tensors)
    assert type(made[0]) is type(dense[0])
    found = Teacher(made).tensors()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].stride() == tensor.stride()
    torch.testing.assert_close(case.run(made[0].eval()), case.run(dense[0]))
    assert student[0] is case.layer


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_teacher_is_rebuilt_from_a_file(half, tmp_path):
    model = Tied().eval()
    teacher = Teacher(copy_of(model, half=half), half=half)
    torch.save(teacher.tensors(), tmp_path / "teacher.pt")
    size = (tmp_path / "teacher.pt").stat().st_size
    assert size < teacher.bytes + 6000  # what is tied lies in it once
    student = copy.deepcopy(model)
    lp.compress_(student, 0.4, factorization=lp.SVD(), target_modules="body.*")
    made = rebuilt(student, torch.load(tmp_path / "teacher.pt", weights_only=True))
    assert made.head.weight is made.embed.weight
    again = Teacher(made, half=half)
    for name, tensor in teacher.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    with teacher.at_work(None), again.at_work(None):
        torch.testing.assert_close(again.module(X), teacher.module(X))


def test_weights_of_another_model_are_named():
    model = Tied()
    tensors = Teacher(copy_of(model)).tensors()
    for change, match in [
        ({"body.0.bias": None}, "lack 'body.0.bias'"),
        ({"other.weight": torch.ones(2)}, "hold 'other.weight', which the model lacks"),
        ({"body.0.bias": torch.ones(3)}, r"'body.0.bias' has shape \(3,\), that of the model \(12,\)"),
    ]:
        wrong = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        with pytest.raises(CheckpointError, match=match):
            rebuilt(model, wrong)


def test_attention_answers_as_in_training():
    """Not on the fast path of eval mode, which leaves 0 at padded positions and is taken without hooks alone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x, padded = torch.randn(3, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    teacher = Teacher(copy_of(model))
    with teacher.at_work(None):
        answer = teacher.module(x, src_key_padding_mask=padded)
    torch.testing.assert_close(answer, model.train()(x, src_key_padding_mask=padded))
    with pytest.raises(RuntimeError, match="on purpose"), teacher.at_work(None):
        raise RuntimeError("on purpose")
    assert torch.backends.mha.get_fastpath_enabled()
