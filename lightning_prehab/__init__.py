"""SVD compression of neural networks in three acts, as PyTorch Lightning callbacks: prehab, surgery, rehab.

The names are those of :mod:`lightning_prehab.public_names`. They are imported, all of them at once, when the first of
them is asked for: ``lightning-prehab --help`` need not wait for torch.
"""

from typing import TYPE_CHECKING

from lightning_prehab.__about__ import __version__ as __version__
from lightning_prehab.integrations._registration import register_when_imported

if TYPE_CHECKING:
    from lightning_prehab.public_names import *  # noqa: F403
    from lightning_prehab.public_names import __all__ as __all__
else:

    def _import_all() -> None:
        from importlib import import_module

        names = import_module("lightning_prehab.public_names")
        globals().update({name: getattr(names, name) for name in ("__all__", *names.__all__)})

    def __getattr__(name: str) -> object:
        if name == "__all__" or not name.startswith("__"):  # others are asked for by whoever looks at any module
            _import_all()
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        _import_all()
        return list(globals())


register_when_imported()
