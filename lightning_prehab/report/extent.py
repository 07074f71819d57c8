"""How far a model is compressed, told from its modules alone."""

from dataclasses import dataclass

from torch import nn

from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.targets.find import check_model, count_dense_parameters, count_parameters
from lightning_prehab.targets.locate import layers_of


@dataclass(frozen=True)
class Extent:
    """How far a model is compressed.

    Attributes:
        low_rank: How many of its weight matrices are factors.
        matrices: How many there are; embeddings, which are looked up and not multiplied, do not count.
        parameters: Of the whole model, shared ones counted once.
        dense_parameters: The same with a dense weight in the place of all factors. Biases that a cut has added count.
    """

    low_rank: int
    matrices: int
    parameters: int
    dense_parameters: int

    @classmethod
    def of(cls, model: nn.Module) -> "Extent":
        """Of any model: one that was cut here or in a Trainer, that was loaded, or that was never cut."""
        layers = [module for module in model.modules() if isinstance(module, LowRankLayer)]
        cut = [module for module in layers if _holds_factors(module)]
        dense = sum(not isinstance(part, LowRankLayer) for one in layers if one not in cut for part in one.children())
        for layer in layers_of(nn.ModuleList([model])):  # in a list, so that a layer that is the model itself counts
            if not isinstance(layer.module, nn.Embedding | nn.EmbeddingBag):
                dense += max(len(layer.views(split_fused=False)), 1)
        return cls(len(cut), len(cut) + dense, count_parameters(model), count_dense_parameters(model))

    @property
    def keep(self) -> float:
        """Share of the parameters that is left; 1 for a model without parameters."""
        return self.parameters / self.dense_parameters if self.dense_parameters else 1.0

    def __str__(self) -> str:
        layers = f"low-rank layers: {self.low_rank:,} of {self.matrices:,} matrices"
        if not self.low_rank:
            return f"{layers} || parameters: {self.parameters:,}, nothing is cut"
        times = f"{1 / self.keep:.2f} times smaller" if self.keep <= 1.0 else f"{self.keep:.2f} times larger"
        share = f"{self.parameters:,} of {self.dense_parameters:,} ({100 * self.keep:.1f} %), {times}"
        return f"{layers} || parameters: {share}"


def print_compression(model: nn.Module) -> None:
    """Prints in one line how many weight matrices of a model are low-rank, and how much smaller it is for that.

    Args:
        model: Any model: one that was cut here or in a Trainer, that was loaded, or that was never cut.

    Raises:
        ArgumentError: If it is no module.

    >>> from lightning_prehab import compress_
    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> print_compression(model)
    low-rank layers: 0 of 2 matrices || parameters: 1,320, nothing is cut
    >>> report = compress_(model, keep=0.5)
    >>> print_compression(model)
    low-rank layers: 2 of 2 matrices || parameters: 672 of 1,320 (50.9 %), 1.96 times smaller
    """
    check_model(model)
    print(Extent.of(model))


def _holds_factors(layer: LowRankLayer) -> bool:
    """A low-rank layer of one matrix; layers of several hold such layers, and dense ones."""
    return not any(isinstance(inner, LowRankLayer) for inner in layer.modules() if inner is not layer)
