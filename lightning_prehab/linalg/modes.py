"""Work that comes out the same in whatever mode of torch the caller is."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

#: Where autocast may be on.
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def outside_inference_mode(work: Callable[P, T]) -> Callable[P, T]:
    """Lets work leave ``torch.inference_mode``: tensors that are made in it can never be trained."""

    @functools.wraps(work)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return work(*args, **kwargs)
        with torch.inference_mode(False):
            return work(*args, **kwargs)

    return outside


def in_full_precision(work: Callable[P, T]) -> Callable[P, T]:
    """Lets work leave ``torch.autocast``, which is meant for the forward passes of models."""

    @functools.wraps(work)
    def exact(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as off:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    off.enter_context(torch.autocast(device, enabled=False))
            return work(*args, **kwargs)

    return exact
