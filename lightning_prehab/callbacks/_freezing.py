"""What is trained after the cut: the rest stands still, and is trainable again afterwards."""

from typing import Literal

import lightning.pytorch as pl
from torch import nn

from lightning_prehab.callbacks._distributed import rewrap
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.layers.pairs import factors_in
from lightning_prehab.sharded.pairs import pairs_of_now

#: What of a model is trained.
Train = Literal["all", "factors", "factors_norms_biases"]


class Freezing:
    """Parameters that were trainable and are not for a while.

    Args:
        train: What stays trainable; what the user has frozen stays frozen.
    """

    def __init__(self, train: Train) -> None:
        self._train = train
        self._frozen: list[nn.Parameter] = []

    def begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Freezes the rest. A DDP wrapper is made anew, which then waits for no gradients of it.

        Raises:
            UnsupportedError: If nothing would be left to train.
        """
        self.end()
        if self._train == "all":
            return
        factors = {id(parameter) for parameter in factors_in(pairs_of_now(pl_module))}
        small = self._train == "factors_norms_biases"
        trainable = [one for one in pl_module.parameters() if one.requires_grad]
        if not any(id(one) in factors for one in trainable):
            raise UnsupportedError(
                f"FactorTraining(train={self._train!r}): no factor of the model is trainable, and nothing would be "
                "trained. Unfreeze them, or leave train='all'."
            )
        self._frozen = [one for one in trainable if id(one) not in factors and not (small and one.dim() < 2)]
        if small:
            norms = {id(one) for part in pl_module.modules() if _normalizes(part) for one in part.parameters()}
            self._frozen = [one for one in self._frozen if id(one) not in norms]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
            parameter.grad = None  # what is pending would still be stepped
        if self._frozen:
            rewrap(trainer, pl_module)

    def end(self) -> None:
        """What was trainable is trainable again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []


def _normalizes(part: nn.Module) -> bool:
    """Whether this is a layer of normalization, whose weight may have several dimensions."""
    return "norm" in type(part).__name__.lower() and not any(part.children())
