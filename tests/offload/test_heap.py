"""Freed memory goes back to the system."""

import os
import subprocess
import sys

import pytest

from lightning_prehab.offload import heap

#: A process of its own: what a heap does with a piece depends on all that was in it before.
PROGRAM = """
import os
import torch
from lightning_prehab.offload import heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

size = 8 * 2**20
torch.ones(24 * 2**20, dtype=torch.uint8)  # from its end on, smaller ones come from the heap
pieces, kept = [], []
for _ in range(24):
    pieces.append(torch.ones(size, dtype=torch.uint8))
    kept.append(torch.ones(2**17, dtype=torch.uint8))
pieces.clear()
before = resident()
heap.give_back()
assert before - resident() > 12 * size, (before, resident())
assert all(bool(one.all()) for one in kept)
"""


@pytest.mark.skipif(heap._trim() is None, reason="a C library that keeps no heap of large pieces, or gives none back")
def test_what_lies_between_pieces_in_use_is_given_back():
    paths = os.pathsep.join(path for path in sys.path if path)
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    subprocess.run([sys.executable, "-c", PROGRAM], env=settings | {"PYTHONPATH": paths}, check=True)


def test_elsewhere_nothing_happens(monkeypatch):
    """No C library is looked at where it is not known to be glibc."""
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    monkeypatch.setattr(heap.ctypes, "CDLL", None)
    heap._trim.cache_clear()
    try:
        assert heap._trim() is None
        heap.give_back()
    finally:
        heap._trim.cache_clear()
