"""Low-rank modules for fused projections, and for the transposed linear layer of transformers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.layers.linear import LowRankLayer, LowRankLinear, learns
from lightning_prehab.layers.pivot import PivotLinear
from lightning_prehab.linalg.matrices import dequantized


class LowRankBlocks(LowRankLayer):
    """A linear layer whose outputs are those of several layers, one after the other, on the same input.

    It takes the place of a fused projection: queries, keys and values, or a gate and what it multiplies. Each block has
    a rank of its own, or stays dense.

    Args:
        blocks: ``{name: layer}``: :class:`LowRankLinear` or ``nn.Linear``, in the order of the outputs.
        bias: One bias for all of them, shape ``(out_features,)``, or None.

    Raises:
        ArgumentError: If the blocks do not fit together.

    Shape:
        ``(*, in_features) -> (*, out_features)``

    >>> layer = LowRankBlocks({"q": LowRankLinear(16, 8, 2, bias=False), "k": nn.Linear(16, 4, bias=False)})
    >>> layer(torch.zeros(5, 16)).shape, layer.weight.shape
    (torch.Size([5, 12]), torch.Size([12, 16]))
    """

    if TYPE_CHECKING:
        bias: nn.Parameter | None

    def __init__(self, blocks: Mapping[str, nn.Module], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        sizes: list[Any] = [(block.out_features, block.in_features) for block in blocks.values()]
        if len({columns for _, columns in sizes}) != 1:
            raise ArgumentError(f"The blocks must have one input size, got shapes {sizes}.")
        self.in_features: int = sizes[0][1]
        self.out_features: int = sum(rows for rows, _ in sizes)
        if bias is not None and bias.shape != (self.out_features,):
            raise ArgumentError(f"The bias must have shape ({self.out_features},), got {tuple(bias.shape)}.")
        for name, block in blocks.items():
            self.add_module(name, block)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """Dense weight of shape ``(out_features, in_features)``, differentiable; read-only."""
        return self._show(self._product(), "weight")

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``(*, in_features)`` to ``(*, out_features)``; the argument is named as in ``nn.Linear``."""
        return self._join(input)

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _blocks(self) -> list[Any]:
        return list(self.children())

    def _join(self, input: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for block in self.children():  # a loop, for TorchScript
            outputs += [block(input)]
        y = torch.cat(outputs, -1)
        return y if self.bias is None else y + self.bias

    def _product(self) -> Tensor:
        weights: list[Tensor] = []
        for block in self.children():
            weights += [dequantized(block.weight)]  # type: ignore[arg-type]
        return torch.cat(weights)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the same function; its parameters are copies."""
        weight = self._product()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=learns(self))
        biases = [block.bias for block in self._blocks()]
        if self.bias is not None or any(bias is not None for bias in biases):
            own = [
                weight.new_zeros(block.out_features) if block.bias is None else block.bias for block in self._blocks()
            ]
            total = torch.cat(own) if self.bias is None else torch.cat(own) + self.bias
            trained = any(bias is not None and bias.requires_grad for bias in (self.bias, *biases))
            linear.bias = nn.Parameter(total, requires_grad=trained)
        return linear.train(self.training)

    def to_dense(self) -> nn.Module:
        """The same as :meth:`to_linear`."""
        return self.to_linear()


class LowRankConv1D(LowRankLinear):
    """A :class:`LowRankLinear` in the place of a ``Conv1D`` of transformers; its ``weight`` is transposed likewise."""

    @property
    def weight(self) -> Tensor:
        """Dense product of shape ``(in_features, out_features)``, as of a ``Conv1D``; read-only."""
        return self._show(self._product().mT, "weight")

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(*, in_features)`` to ``(*, out_features)``; the argument is named as in ``Conv1D``."""
        y: Tensor = self.B(self.A(x))
        return y

    def to_dense(self) -> nn.Module:
        """A dense ``Conv1D`` with the same function; its parameters are copies."""
        return _conv1d(self.to_linear())


class PivotConv1D(PivotLinear):
    """A :class:`PivotLinear` in the place of a ``Conv1D`` of transformers; its ``weight`` is transposed likewise."""

    _factors = LowRankConv1D

    @property
    def weight(self) -> Tensor:
        """Dense product of shape ``(in_features, out_features)``, as of a ``Conv1D``; read-only."""
        return self._show(self._product().mT, "weight")

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(*, in_features)`` to ``(*, out_features)``; the argument is named as in ``Conv1D``."""
        return self._map(x)

    def to_dense(self) -> nn.Module:
        """A dense ``Conv1D`` with the same function; its parameters are copies."""
        return _conv1d(self.to_linear())


class LowRankConv1DBlocks(LowRankBlocks):
    """:class:`LowRankBlocks` in the place of a ``Conv1D`` of transformers; its ``weight`` is transposed likewise."""

    @property
    def weight(self) -> Tensor:
        """Dense weight of shape ``(in_features, out_features)``, as of a ``Conv1D``; read-only."""
        return self._show(self._product().mT, "weight")

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(*, in_features)`` to ``(*, out_features)``; the argument is named as in ``Conv1D``."""
        return self._join(x)

    def to_dense(self) -> nn.Module:
        """A dense ``Conv1D`` with the same function; its parameters are copies."""
        return _conv1d(self.to_linear())


def _conv1d(linear: nn.Linear) -> nn.Module:
    """The ``Conv1D`` that does the same, with the same bias object."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):  # no random numbers are drawn
        layer: nn.Module = Conv1D(linear.out_features, linear.in_features)  # type: ignore[no-untyped-call]
    weight = linear.weight.detach().mT.contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    layer.register_parameter("bias", linear.bias)
    return layer.train(linear.training)
