"""Counts large tensors while they live: who holds more of a model than it should is found whatever the machine."""

import time
import weakref

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Seconds that a thread of the backend may take, on a busy machine.
PATIENCE = 600


class Alive(TorchDispatchMode):
    """Counts the bytes of the large tensors that are made inside, as long as they live.

    A thread of the backend may let go of what it sent only after the call has returned. Where it is known how much may
    live, more than that counts only if it stays.

    Args:
        least: Bytes of those that count.
        allowed: Bytes that may live at one time, and none at the end; None counts what is seen.

    Attributes:
        most: Bytes of those that lived at the worst time.
    """

    def __init__(self, least, allowed=None):
        super().__init__()
        self.least, self.allowed, self.most = least, allowed, 0
        self._sizes = {}

    @property
    def now(self):
        """Bytes of those that live."""
        return sum(list(self._sizes.values()))

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0] is None and self.allowed is not None:
            self._wait_for(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what it does to its parts comes by again
        known = {one.untyped_storage()._cdata for one in _plain((args, kwargs))}
        answer = func(*args, **(kwargs or {}))
        for one in _plain(answer):
            storage = one.untyped_storage()
            key = storage._cdata
            if key not in known and key not in self._sizes and storage.nbytes() >= self.least:
                self._sizes[key] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, key)
                if self.allowed is not None:
                    self._wait_for(self.allowed)
                self.most = max(self.most, self.now)
        return answer

    def _wait_for(self, size):
        end = time.monotonic() + PATIENCE
        while self.now > size and time.monotonic() < end:
            time.sleep(0.001)
        if self.now > size:
            self.allowed = None  # what has stayed so long stays: once is enough


def _plain(things):
    return [one for one in tree_leaves(things) if type(one) in (Tensor, nn.Parameter) and one.device.type != "meta"]
