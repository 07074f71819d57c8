import json

import numpy as np
import pytest
import torch

from lightning_prehab.report.thinned_spectrum import POINTS, LayerSpectrum


def test_short_spectra_are_kept_whole():
    values = torch.linspace(5, 0, POINTS)
    spectrum = LayerSpectrum.of(values, 7)
    assert spectrum.indices == tuple(range(1, POINTS + 1))
    np.testing.assert_allclose(spectrum.values, values.numpy(), rtol=1e-5)


@pytest.mark.parametrize("rank", [None, 1, 123, 500, 768])
def test_long_ones_are_thinned(rank):
    values = torch.linspace(0, -7, 768, dtype=torch.float64).exp()
    spectrum = LayerSpectrum.of(values, rank)
    places = np.array(spectrum.indices)
    assert len(places) <= POINTS + 2
    assert (places[0], places[-1]) == (1, 768)
    assert np.all(np.diff(places) > 0)
    assert np.diff(places).max() <= 768 / (POINTS // 2 - 1) + 1  # nowhere a hole
    assert set(range(1, 5)) <= set(spectrum.indices)  # the largest ones nearly all
    assert rank is None or {rank, min(rank + 1, 768)} <= set(spectrum.indices)
    np.testing.assert_allclose(spectrum.values, values.numpy()[places - 1], rtol=1e-5)
    assert LayerSpectrum.from_dict(json.loads(json.dumps(spectrum.to_dict()))) == spectrum


def test_nothing_to_show():
    assert LayerSpectrum.of(torch.empty(0)) is None
    assert LayerSpectrum.of(torch.tensor([1.0, float("nan")])) is None
    assert LayerSpectrum.of(torch.tensor([1.0, -1e-12], dtype=torch.float64)).values == (1.0, 0.0)


@pytest.mark.parametrize(
    ("indices", "values"),
    [([], []), ([2, 3], [1, 0]), ([1, 3, 3], [1, 1, 1]), ([1, 2], [1]), ([1], [-1]), ([1], [float("inf")]), ([1], "x")],
)
def test_damaged_ones_are_refused(indices, values):
    with pytest.raises(ValueError, match=r"ascending indices|could not convert"):
        LayerSpectrum.from_dict({"indices": indices, "values": values})
