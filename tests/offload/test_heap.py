"""Freed memory goes back to the system."""

import os

import pytest
import torch

from lightning_prehab.offload import heap

SIZE = 8 * 2**20


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(heap._trim() is None, reason="a C library that keeps no heap of large pieces, or gives none back")
def test_what_lies_between_pieces_in_use_is_given_back():
    torch.ones(24 * 2**20, dtype=torch.uint8)  # from its end on, smaller ones come from the heap
    pieces, kept = [], []
    for _ in range(24):
        pieces.append(torch.ones(SIZE, dtype=torch.uint8))
        kept.append(torch.ones(2**17, dtype=torch.uint8))
    pieces.clear()
    before = resident()
    heap.give_back()
    assert before - resident() > 12 * SIZE
    assert all(bool(one.all()) for one in kept)


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
