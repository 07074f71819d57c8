"""A device that is not there: tensors that say they are on a GPU, and compute on the CPU.

Whatever brings tensors of the two devices together fails as it does on a GPU, and what reads a value back from the device,
and so waits for it, is counted by the line that did it. Numbers are those of the CPU.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

NAME = "pretended"
aten = torch.ops.aten
#: What moves tensors between devices.
_MOVES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
#: What needs a number that is on the device.
_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten._linalg_check_errors.default,
    aten.repeat_interleave.Tensor,
}


class There(Tensor):
    """A tensor that says it is on the device; what it holds is on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        """As of any other tensor; torch refuses it for subclasses."""
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of the pretended device")


class Pretended(TorchDispatchMode):
    """Inside, there is the device.

    Attributes:
        waits: Lines of the package that had to wait for the device, with how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given, _ = tree_flatten((args, kwargs))
        there = [one for one in given if isinstance(one, There)]
        here = [one for one in given if isinstance(one, Tensor) and not isinstance(one, There)]
        wish = kwargs.get("device")
        to_device = bool(there) if wish is None else torch.device(wish).type == NAME
        if wish is not None:
            kwargs["device"] = torch.device("cpu") if torch.device(wish).type == NAME else wish
        if not there and not to_device:
            return function(*args, **kwargs)
        if function in _MOVES:
            if function is aten.copy_.default:
                to_device = isinstance(args[0], There)
            if there and (here or not to_device):
                self._note(function)
        elif there:
            self._check(function, args, there, here)
            if function in _READS or self._by_mask(function, args):
                self._note(function)
        inner = tree_map_only(There, lambda one: one.held, (args, kwargs))
        found = function(*inner[0], **inner[1])
        if function in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
            return found
        if not to_device:
            return found if function is not aten.copy_.default else args[0]
        known = {id(one.held): one for one in there}
        flat, spec = tree_flatten(found)
        flat = [self._outside(one, known, function) for one in flat]
        return tree_unflatten(flat, spec)

    def _outside(self, one: Any, known: dict[int, There], function: Any) -> Any:
        if not isinstance(one, Tensor) or isinstance(one, There):
            return one
        if id(one) in known:
            return known[id(one)]
        return There(one)

    def _by_mask(self, function: Any, args: Any) -> bool:
        if function not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            return False
        return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1])

    def _check(self, function: Any, args: Any, there: list[There], here: list[Tensor]) -> None:
        name = function.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            # indices may be on the CPU, values of one number too
            here = [one for one in here if one is args[0] or (len(args) > 2 and one is args[2])]
            for one in args[1]:
                if isinstance(one, Tensor) and not isinstance(one, There):
                    self._note(function)
        if name.startswith("_foreach") or name.startswith("_fused"):
            here = [one for one in here if one.dim() > 0]
        wrong = [one for one in here if one.dim() > 0]
        if (
            isinstance(args[0] if args else None, Tensor)
            and not isinstance(args[0], There)
            and name.endswith("_")
            and not name.startswith("_")
        ):
            wrong = [args[0]]
        if wrong:
            shapes = [tuple(one.shape) for one in wrong]
            raise RuntimeError(
                f"{function}: Expected all tensors to be on the same device, but found {shapes} on the CPU"
            )

    def _note(self, function: Any) -> None:
        frame = sys._getframe(2)
        names = []
        while frame is not None:
            path = frame.f_code.co_filename
            if "/lightning_prehab/" in path:
                names.append(f"{path.split('/lightning_prehab/')[-1]}:{frame.f_lineno}")
                break
            frame = frame.f_back
        if names:
            self.waits[f"{names[0]} {function.overloadpacket.__name__}"] += 1


class _Module:
    """What torch asks of the module of a device."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_stream = staticmethod(lambda *_: None)
    manual_seed_all = synchronize = _lazy_init = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    get_rng_state = staticmethod(lambda *_: torch.zeros(0, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda *_: None)


@contextmanager
def pretended() -> Iterator[Pretended]:
    """Inside, there is the device; it stays known to this process."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, _Module())
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Pretended() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
