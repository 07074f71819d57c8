"""A device that is not there: tensors that say they are on one, and are on the CPU. It finds what a GPU would find.

What brings tensors of the two devices together fails as it does on a GPU; what reads a value back from the device, or
brings one to it, and so waits for it, is counted by the line of the package that did it. Numbers are those of the CPU.
Autocast does nothing there.
"""

import builtins
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prehab.surgery import meanings, optimizers
from lightning_prehab.targets import weights

NAME = "pretended"
#: Newer than the oldest torch that we support.
POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
aten = torch.ops.aten
#: What moves tensors between devices.
_MOVES = {aten._to_copy.default, aten.copy_.default}
#: What answers with a number, not with a tensor.
_NUMBERS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
#: What needs a number that is on the device.
_READS = {
    *_NUMBERS,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._linalg_check_errors.default,
    aten.repeat_interleave.Tensor,
}
#: What takes indices, which may be on the CPU.
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class There(Tensor):
    """A tensor that says it is on the device; what it holds is on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made: There = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch refuses it for subclasses

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)  # as in a file that is read onto the CPU

    def __repr__(self) -> str:
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} outside of the pretended device")


class Pretended(TorchDispatchMode):
    """Inside, there is the device.

    Attributes:
        waits: Lines of the package that had to wait for the device, with how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = [one for one in given if isinstance(one, There)]
        to_there = bool(there)
        if kwargs.get("device") is not None:
            to_there = torch.device(kwargs["device"]).type == NAME
            kwargs["device"] = torch.device("cpu") if to_there else kwargs["device"]
        if not there and not to_there:
            return function(*args, **kwargs)
        if function is aten.copy_.default:
            to_there = isinstance(args[0], There)
        if function in _MOVES:
            if given and not (to_there and len(there) == len(given)):
                self._note(function)
        elif there:
            self._check(function, args, [one for one in given if not isinstance(one, There)])
        inner_args, inner_kwargs = tree_map_only(There, lambda one: one.held, (args, kwargs))
        found = function(*inner_args, **inner_kwargs)
        if function in _NUMBERS:
            return found
        if not to_there:
            return args[0] if function is aten.copy_.default else found
        known = {id(one.held): one for one in there}
        return tree_map_only(Tensor, lambda one: known[id(one)] if id(one) in known else There(one), found)

    def _check(self, function: Any, args: Any, here: list[Tensor]) -> None:
        """Raises where a GPU would; notes where it would wait."""
        indices = [one for one in args[1] if isinstance(one, Tensor)] if function in _INDEXED else []
        by_mask = any(one.dtype in (torch.bool, torch.uint8) for one in indices)
        if function in _READS or by_mask or any(not isinstance(one, There) for one in indices):
            self._note(function)
        changed = function._schema.arguments[0].is_write if function._schema.arguments else False
        wrong = [
            one
            for one in here
            if all(one is not index for index in indices) and (one.dim() > 0 or (changed and one is args[0]))
        ]
        if wrong:
            shapes = ", ".join(str(tuple(one.shape)) for one in wrong)
            raise RuntimeError(f"{function}: Expected all tensors to be on the same device, but {shapes} is on the CPU")

    def _note(self, function: Any) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            _, found, path = frame.f_code.co_filename.rpartition("/lightning_prehab/")
            if found:
                self.waits[f"{path}:{frame.f_lineno} {function.overloadpacket.__name__}"] += 1
                return
            frame = frame.f_back  # type: ignore[assignment]


class _Module:
    """What torch asks of the module of a device."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = _lazy_init = set_rng_state = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    get_rng_state = staticmethod(lambda *_: torch.zeros(0, dtype=torch.uint8))


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """There is nothing to set up."""


def trainer_settings() -> dict[str, Any]:
    """For a Trainer that trains there."""
    return {
        "accelerator": "auto",
        "strategy": SingleDeviceStrategy(device=torch.device(NAME, 0), accelerator=_Accelerator()),
    }


def _plain_type(value: Any) -> type:
    return Tensor if isinstance(value, There) else builtins.type(value)


def install() -> None:
    """Makes the device known to torch, for good, and lets the package take its tensors for ordinary ones."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    torch.accelerator.synchronize = lambda *_: None
    follows_rules = weights._has_own_operations
    weights._has_own_operations = lambda kind: kind is not There and follows_rules(kind)
    for module in (meanings, optimizers):
        module.type = _plain_type  # type: ignore[attr-defined]


@contextmanager
def pretended() -> Iterator[Pretended]:
    """Inside, ``.to("pretended")`` works, once it is installed."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Pretended() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
