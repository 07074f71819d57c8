"""What tensors say of lying in shards on several processes; torch's engine for them is not imported."""

import sys
from typing import Any

from torch import Tensor

#: What of a tensor each process has, in placements that can be served.
_SERVED = ("Shard", "Replicate", "_StridedShard")


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``: nobody can have made one before that class was imported."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor, detached and without a copy: of a ``DTensor`` its part, else all of it."""
    local: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return local.detach()  # afterwards: what is detached as a DTensor does not tell when its part is changed


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that passes between layers: of a ``DTensor`` put together, detached; any other is itself.

    Collective for a ``DTensor``: all processes that have a part have to call it.
    """
    found: Tensor = tensor.detach().full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return found


def why_not_shards(tensor: Any, what: str) -> str | None:
    """Why a ``DTensor`` is no weight that can be put together and taken apart again, or None if it is one.

    Args:
        tensor: A ``DTensor``.
        what: How the sentence begins.
    """
    odd = [placement for placement in tensor.placements if type(placement).__name__ not in _SERVED]
    if odd:
        return f"{what} is a DTensor of which processes have {odd[0]}, neither shards nor copies"
    return None
