"""When are two models the same? Their weights bit by bit, their outputs to rounding.

Products are rounded by where their operands lie in memory, and a copy, a loaded model or a view lies elsewhere.
"""

from typing import Any

import torch
from torch import nn


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


def assert_same_model(found: nn.Module, expected: nn.Module, *inputs: Any, **named: Any) -> None:
    assert_same_weights(found, expected)
    torch.testing.assert_close(found(*inputs, **named), expected(*inputs, **named))
