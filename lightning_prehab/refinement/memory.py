"""What a refinement needs in memory, and what there is."""

from pathlib import Path

import torch
from torch import Tensor, nn


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def bytes_to_train(parameters: list[nn.Parameter]) -> int:
    """Gradients, two moments, the best state and the first one, all in float32."""
    return 5 * 4 * sum(parameter.numel() for parameter in parameters)


def weights_in(module: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(one.numel() * one.element_size() for one in module.parameters())


class SavedBytes:
    """Counts what autograd keeps for a backward pass: a context for the forward pass."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        place = tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)
        if not isinstance(tensor, nn.Parameter) and place not in self._seen:
            self._seen.add(place)
            self.bytes += tensor.numel() * tensor.element_size() if tensor.layout is torch.strided else 0
        return tensor

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
