"""What a refinement needs in memory, and what there is."""

from pathlib import Path

import torch
from torch import Tensor, nn

#: What Linux says of the memory of the machine, and of that of a container (control groups, version 2 and 1).
MACHINE = Path("/proc/meminfo")
CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = MACHINE.read_text().splitlines()
    except OSError:
        return None
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return free if free is None else min([free, *_left_in_containers()])


def _left_in_containers() -> list[int]:
    """Bytes up to the limit of a container, where there is one; what files hold there can be had too."""
    found = []
    for limit, used in CONTAINERS:
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            kept = Path(limit).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):  # not there, or "max"
            continue
        found.append(max(left + int(kept[kept.index("inactive_file") + 1]) if "inactive_file" in kept else left, 0))
    return found


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
