"""Counts large tensors while they live: who holds more of a model than it should is found whatever the machine."""

import weakref

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the bytes of the large tensors that are made inside, as long as they live.

    Args:
        least: Bytes of those that count.

    Attributes:
        now: Bytes of those that live.
        most: The same at the worst time.
    """

    def __init__(self, least):
        super().__init__()
        self.least, self.now, self.most = least, 0, 0
        self._sizes = {}

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
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, key)
        return answer

    def _forget(self, key):
        self.now -= self._sizes.pop(key)


def _plain(things):
    return [one for one in tree_leaves(things) if type(one) in (Tensor, nn.Parameter) and one.device.type != "meta"]
