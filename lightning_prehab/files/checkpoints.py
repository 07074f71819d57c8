"""Lightning checkpoints from after the surgery, without a Trainer."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

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
def load_from_checkpoint(cls: type[ModuleT], path: Any, **kwargs: Any) -> ModuleT:
    """``cls.load_from_checkpoint(path, **kwargs)`` for checkpoints from before or after the surgery.

    The module is built dense as always, and takes the structure of the weights just before they are loaded. Works for
    checkpoints of LightningCLI too.

    Args:
        cls: The LightningModule class (or a base of it, for a LightningCLI checkpoint in subclass mode).
        path: The ``.ckpt`` file.
        kwargs: As for ``load_from_checkpoint``: ``map_location``, ``strict``, arguments of the module, ...

    Returns:
        The module with its weights.

    Raises:
        CheckpointError: If the factors do not fit the module (the layer is named).
    """
    with _LOCK, _following(cls):
        return cls.load_from_checkpoint(path, **kwargs)


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
