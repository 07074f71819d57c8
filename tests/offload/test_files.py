"""What lies on disk: tensors in the format of safetensors, states between the blocks, work that is not finished."""

import pytest
import torch

import lightning_prehab as lp
from lightning_prehab.offload.needs import bytes_in
from lightning_prehab.offload.states import States
from lightning_prehab.offload.tensors import Written, entries_in, write_tensors
from lightning_prehab.offload.wish import digest_of
from lightning_prehab.offload.work import Work

safetensors = pytest.importorskip("safetensors.torch")

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
TENSORS = {f"{dtype}.{n}": torch.ones(n, 3).to(dtype) for dtype in DTYPES for n in (0, 1, 5)}
TENSORS |= {"scalar": torch.tensor(2.5), "turned": torch.arange(6.0).view(2, 3).mT}


def test_they_are_those_of_safetensors(tmp_path):
    digest = write_tensors(tmp_path / "ours", {name: Written.of(tensor) for name, tensor in TENSORS.items()})
    assert len(digest) == 64
    safetensors.save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "theirs")
    by_them = safetensors.load_file(tmp_path / "ours")
    for path in ("ours", "theirs"):
        by_us = {name: entry.read() for name, entry in entries_in(tmp_path / path).items()}
        for found in (by_them, by_us):
            assert found.keys() == TENSORS.keys()
            assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
            assert all(found[name].dtype == TENSORS[name].dtype for name in TENSORS)


@pytest.mark.parametrize(
    "content", [b"", b"not one", (10**15).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"]
)
def test_damaged_files_are_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(lp.PrehabError, match="cannot be read as safetensors"):
        entries_in(tmp_path / "file")


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    write_tensors(tmp_path / "file", {"a": Written.of(torch.ones(100))})
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-8])
    with pytest.raises(lp.PrehabError, match="ends too early"):
        entries_in(tmp_path / "file")["a"].read()


def write(states, tensor, name="others"):
    with states.writing(name) as file:
        file.add(torch.ones(2))
        file.add(tensor)


def test_states_come_back_and_must_be_finite(tmp_path):
    work = Work(tmp_path / "out", {})
    states, tensors = States(work), [torch.randn(2, 3), torch.randn(1, 5)]
    for tensor in tensors:
        states.note(tensor)
    with states.writing("some") as file:
        for tensor in tensors:
            file.add(tensor)
    assert all(torch.equal(states.read("some", number), tensor) for number, tensor in enumerate(tensors))
    with pytest.raises(lp.PrehabError, match="others: NaN or Inf between two blocks"):
        write(states, torch.full((2, 3), torch.nan))
    assert states.is_there("some")
    assert not states.is_there("others")
    work.clear()


def test_work_has_a_place_for_each_wish_and_loses_nothing_halfway(tmp_path):
    one, other = Work(tmp_path / "out", {"keep": 0.5}), Work(tmp_path / "out", {"keep": 0.4})
    assert one.folder != other.folder
    one.finish("a stage/with any:name", {"found": [1, None]})
    assert one.done("a stage/with any:name") == {"found": [1, None]}
    assert other.done("a stage/with any:name") is None
    with pytest.raises(lp.PrehabError, match="NaN"):
        write(States(one), torch.full((2, 3), torch.nan), "data")
    assert not one.path("data").exists()
    one.close()
    other.close()
    assert not other.folder.exists()  # nothing was done
    again = Work(tmp_path / "out", {"keep": 0.5})
    assert again.resumed
    assert again.done("a stage/with any:name") == {"found": [1, None]}
    assert list(again.folder.glob("*.part")) == []
    again.clear()
    assert list(tmp_path.iterdir()) == []


def test_other_data_is_another_wish():
    known = [{"a": torch.ones(2), "b": torch.zeros(2)}]
    others = [
        [{"a": torch.zeros(2), "b": torch.ones(2)}],
        [{"b": torch.ones(2), "a": torch.zeros(2)}],
        [{"a": torch.ones(2), "b": torch.zeros(2, dtype=torch.int64)}],
        [{"a": torch.ones(2)}],
        known * 2,
        [known],
        [(torch.ones(2), torch.zeros(2))],
    ]
    assert len({digest_of(one) for one in [known, *others]}) == len(others) + 1


@pytest.mark.parametrize("memory", ["", "GB", "3 apples", "-1GB", "1.2.3GB", True, 5, [3]])
def test_memory_must_be_an_amount(memory):
    with pytest.raises(lp.PrehabError, match="memory must be"):
        bytes_in(memory)
