"""With ``PREHAB_TEST_DEVICE=pretended:0`` the tests run on a device that is not there; see ``tests/pretended.py``."""

import pytest

from tests import pretended
from tests.cuda import device


@pytest.fixture(autouse=True)
def _device():
    if device.DEVICE.type != pretended.NAME:
        yield
        return
    with pretended.pretended() as mode:
        device.WAITS = mode.waits
        yield
