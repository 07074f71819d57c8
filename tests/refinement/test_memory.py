"""What is said to be free."""

import pytest
import torch

from lightning_prehab.refinement import memory
from lightning_prehab.refinement.memory import free_memory

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Files as Linux has them: 8 GB can be had, and of a container of 3 GB one is used, a quarter of that by files."""
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 16000000 kB\nMemAvailable:    8000000 kB\n")
    monkeypatch.setattr(memory, "MACHINE", told)
    monkeypatch.setattr(memory, "CONTAINERS", ((str(tmp_path / "memory.max"), str(tmp_path / "memory.current")),))
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    (tmp_path / "memory.stat").write_text("anon 600000000\ninactive_file 250000000\nactive_file 5\n")
    return tmp_path


def test_a_container_has_its_own_limit(machine):
    assert free_memory(CPU) == 2_250_000_000


@pytest.mark.parametrize("limit", ["max", "", None])
def test_without_a_limit_it_is_what_the_machine_has(limit, machine):
    (machine / "memory.max").unlink() if limit is None else (machine / "memory.max").write_text(limit)
    assert free_memory(CPU) == 8_192_000_000


def test_a_container_that_is_full_has_nothing_left(machine):
    (machine / "memory.current").write_text("4000000000")
    (machine / "memory.stat").write_text("anon 4000000000")
    assert free_memory(CPU) == 0


def test_nobody_may_say_it(machine):
    (machine / "meminfo").unlink()
    assert free_memory(CPU) is None
