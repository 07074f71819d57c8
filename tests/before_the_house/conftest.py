"""What has changed on purpose since the files were made, put back while they are compared."""

import pytest
import torch

from lightning_prehab.surgery import moments


@pytest.fixture(autouse=True)
def _second_moments_of_then(monkeypatch):
    """They moved as if gradients were uncorrelated, with a higher floor; today the first moment knows how they are."""
    monkeypatch.setattr(moments, "CORRELATED_FLOOR", 1.0)
    monkeypatch.setattr(moments, "_correlation", lambda moment, factor, **_: torch.ones(factor.shape[1]).to(moment))
