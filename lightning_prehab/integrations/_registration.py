"""Tells transformers about this package as soon as somebody imports transformers, and not before.

transformers has no entry points: a method is known once ``register_quantizer`` has been called. Import sorters put
``import lightning_prehab`` before ``import transformers``, so that call has to wait for the second import. A finder
waits for one module, ``transformers.quantizers.auto``, registers when it has run, and is gone.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

WAIT_FOR = "transformers.quantizers.auto"
INTEGRATION = "lightning_prehab.integrations.huggingface"


def register_when_imported() -> None:
    """Registers now if transformers is there already, else when it is imported."""
    if WAIT_FOR in sys.modules:
        importlib.import_module(INTEGRATION)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module, by the ordinary path finder, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WAIT_FOR:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Runs the module with its own loader, and registers after that."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        importlib.import_module(INTEGRATION)
