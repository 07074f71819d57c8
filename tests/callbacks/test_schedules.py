import math

import pytest

from lightning_prehab.callbacks._schedules import ramp, warmup_factor


def test_warmup_shapes():
    for shape in ("linear", "cosine"):
        factors = [warmup_factor(step, 10, 0.1, 2.0, shape) for step in range(15)]
        assert factors[0] == pytest.approx(0.1)
        assert factors[10:] == [2.0] * 5
        assert factors == sorted(factors)
    assert warmup_factor(5, 10, 0.0, 1.0, "cosine") == pytest.approx(0.5)
    assert warmup_factor(2, 10, 0.0, 1.0, "cosine") == pytest.approx((1 - math.cos(math.pi / 5)) / 2)


def test_no_warmup_is_the_peak():
    assert warmup_factor(0, 0, 0.1, 1.5) == 1.5
    assert ramp(0, 0) == 1.0
