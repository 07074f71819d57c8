"""The tests for a GPU run on a device that is not there too: what only a GPU would find is found on any machine.

In a process of its own: torch knows the device from then on, and others would take it for this machine's accelerator.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretended import NAME, POSSIBLE

TESTS = Path(__file__).parent / "cuda"
#: All of it takes minutes: ``PREHAB_TEST_DEVICE=pretended:0 pytest tests/cuda``.
SOME = (
    "svd-ratio or plan_of or padding or (every_kind and pivot-whitened)"
    " or (only_steps and 32-true and default) or (resumed and 32-true and default)"
)


@pytest.mark.slow
@pytest.mark.skipif(not POSSIBLE, reason="this torch has no devices in Python")
def test_models_on_another_device_stay_there_and_nothing_waits_for_it():
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "--tb=short", str(TESTS)]
    settings = os.environ | {"PREHAB_TEST_DEVICE": f"{NAME}:0"}
    ended = subprocess.run(
        [*command, "-k", SOME], env=settings, cwd=TESTS.parents[1], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout[-8000:]
