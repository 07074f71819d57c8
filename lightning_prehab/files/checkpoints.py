"""Lightning checkpoints from after the surgery, without a Trainer."""

import inspect
import os
import pickle
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, CheckpointError, UnsupportedError
from lightning_prehab.files.distributed import check_complete, is_distributed
from lightning_prehab.surgery.holders import names_holders
from lightning_prehab.surgery.structure import follow_state_dict_

if TYPE_CHECKING:
    import lightning.pytorch as pl

ModuleT = TypeVar("ModuleT", bound="pl.LightningModule")
_LOCK = threading.RLock()


class LowRankCheckpointMixin:
    """For a LightningModule whose own ``load_from_checkpoint`` shall work for checkpoints from after the surgery.

    Put it first: ``class LitModel(LowRankCheckpointMixin, L.LightningModule)``. Nothing else changes.
    """

    @names_holders
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the structure of the weights; inside ``Trainer.fit`` the CompressionCallback does that."""
        if getattr(self, "_trainer", None) is None:
            follow_state_dict_(cast("pl.LightningModule", self), checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


@names_holders
def load_from_checkpoint(cls: type[ModuleT], path: Any, *, weights_only: bool | None = None, **kwargs: Any) -> ModuleT:
    """``cls.load_from_checkpoint(path, **kwargs)`` for checkpoints from before or after the surgery.

    The module is built dense as always, and takes the structure of the weights just before they are loaded. Works for
    checkpoints of LightningCLI too.

    Args:
        cls: The LightningModule class (or a base of it, for a LightningCLI checkpoint in subclass mode).
        path: The ``.ckpt`` file.
        weights_only: Whether to refuse whatever could run code while it is read. None is the default of Lightning,
            which is True from Lightning 2.6 on. False is needed, for files that you trust, where the hyperparameters
            hold objects of other classes (a ``pathlib.Path`` is one).
        kwargs: As for ``load_from_checkpoint``: ``map_location``, ``strict``, arguments of the module, ...

    Returns:
        The module with its weights.

    Raises:
        ArgumentError: If ``cls`` is no LightningModule class, or ``path`` is none.
        CheckpointError: If the factors do not fit the module (the layer is named), or the file is damaged, holds more
            than weights, or is no checkpoint of Lightning (the file is named).
        UnsupportedError: If ``weights_only`` is True, and Lightning is older than 2.6 and knows nothing of it.
    """
    if not isinstance(cls, type) or not hasattr(cls, "load_from_checkpoint"):
        found = cls if isinstance(cls, type | str | os.PathLike) else f"a {type(cls).__name__}"
        raise ArgumentError(
            f"load_from_checkpoint takes a LightningModule class and the path of a .ckpt file, got {found} in the "
            "place of the class: load_from_checkpoint(LitModel, path)."
        )
    if not (isinstance(path, str | os.PathLike) or hasattr(path, "read")):
        raise ArgumentError(f"path must be the path of a .ckpt file, or an open one, got {show(path)}.")
    if weights_only is not None and "weights_only" in inspect.signature(cls.load_from_checkpoint).parameters:
        kwargs["weights_only"] = weights_only
    elif weights_only:
        raise UnsupportedError("load_from_checkpoint of this Lightning has no weights_only; update it to 2.6 or later.")
    try:
        with _LOCK, _following(cls):
            return cls.load_from_checkpoint(path, **kwargs)
    except CheckpointError:
        raise
    except Exception as error:
        _blame_the_file(path, error)
        raise


def _blame_the_file(path: Any, error: Exception) -> None:
    """Raises :class:`CheckpointError` from an error if the file is the reason: it is read once more, by itself."""
    if not isinstance(path, str | os.PathLike) or not Path(path).exists():
        return  # a stream, an address, or nothing, which the error says
    if is_distributed(path):
        check_complete(path)
        raise CheckpointError(
            f"{str(path)!r} holds the pieces of a sharded run; make one file of them first: python -m "
            f"lightning.fabric.utilities.consolidate_checkpoint {path}"
        ) from error
    if Path(path).is_dir():
        raise CheckpointError(
            f"{str(path)!r} is a folder, not a .ckpt file; what save_compressed has written is loaded with "
            "load_compressed(folder, model)."
        ) from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as unsafe:
        found = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", str(unsafe))
        if found is None:
            raise _damaged(path, unsafe) from error
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{str(path)!r} holds more than weights ({found[1]}, probably among the hyperparameters), and reading "
                "that could run code of whoever wrote the file. If you trust it: load_from_checkpoint(..., "
                "weights_only=False)."
            ) from error
        return
    except Exception as damage:  # whatever a damaged file leads to
        raise _damaged(path, damage) from error
    if not isinstance(checkpoint, Mapping) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        raise CheckpointError(
            f"{str(path)!r} was not written by a Trainer of Lightning. Weights that torch.save has written are loaded "
            "with torch.load and load_state_dict."
        ) from error


def _damaged(path: Any, error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
    return CheckpointError(
        f"{str(path)!r} is damaged, or no checkpoint at all ({reason}). Was it copied to the end, was the disk full? "
        "Take an earlier checkpoint of the run."
    )


@contextmanager
def _following(cls: "type[pl.LightningModule]") -> Iterator[None]:
    """Inside, instances of ``cls`` follow what they load. Only an attribute of this class is set, and removed again."""
    own = cls.__dict__.get("load_state_dict")
    load = cls.load_state_dict

    def follow_and_load(self: "pl.LightningModule", state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        follow_state_dict_(self, state_dict)
        return load(self, state_dict, *args, **kwargs)

    cls.load_state_dict = follow_and_load  # type: ignore[assignment]
    try:
        yield
    finally:
        if own is None:
            del cls.load_state_dict
        else:
            cls.load_state_dict = own  # type: ignore[method-assign]
