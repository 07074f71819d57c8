"""What has to wait until somebody imports another library: this package imports none of them by itself.

transformers has no entry points: a method is known once ``register_quantizer`` has been called. LightningCLI knows
classes without their module once they are there. Import sorters put ``import lightning_prehab`` before both, so that
has to wait for the second import. A finder waits for it, and imports what is needed when it has run.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

#: What is imported, after what.
AFTER = {
    "transformers.quantizers.auto": "lightning_prehab.integrations.huggingface",
    "lightning.pytorch.cli": "lightning_prehab.public_names",
}


def register_when_imported() -> None:
    """Imports now what belongs to a module that is there already, and the rest when its module is imported."""
    for module, ours in AFTER.items():
        if module in sys.modules:
            importlib.import_module(ours)
        elif not any(isinstance(finder, _Finder) and finder.module == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(module))


class _Finder(MetaPathFinder):
    """Finds one module, by the ordinary path finder, and wraps its loader."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Runs the module with its own loader, and then imports ours."""

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
        importlib.import_module(AFTER[self.finder.module])
