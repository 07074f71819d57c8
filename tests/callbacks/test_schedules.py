import math

import pytest

from lightning_prehab.callbacks._schedules import between, ramp


def test_warmup_shapes():
    for shape in ("linear", "cosine"):
        factors = [between(0.1, 2.0, step / 10, shape) for step in range(11)]
        assert factors[0] == pytest.approx(0.1)
        assert factors[10] == 2.0
        assert factors == sorted(factors)
    assert between(0.0, 1.0, 0.5, "cosine") == pytest.approx(0.5)
    assert between(0.0, 1.0, 0.2, "cosine") == pytest.approx((1 - math.cos(math.pi / 5)) / 2)


def test_no_ramp_is_the_whole_strength():
    assert ramp(0, 0) == 1.0
