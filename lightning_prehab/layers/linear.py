"""Drop-in low-rank modules."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, no_type_check

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError, ReadOnlyError
from lightning_prehab.layers.shown import refusal, show
from lightning_prehab.linalg.decomposition import weighted_low_rank
from lightning_prehab.linalg.matrices import dequantized
from lightning_prehab.linalg.sparse import Sparse, sparse_matrix


class LowRankLayer(nn.Module, ABC):
    """A layer that holds low-rank factors in place of one dense weight or several.

    What it shows of them under the names of a dense layer (``weight``, ``bias``, ...) is no parameter of its own. It is
    there to be read. Assigning, deleting or pruning it raises, and so does writing to a weight, which is computed; see
    :mod:`lightning_prehab.layers.shown`.
    """

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """The dense layer with the same function, as it was before the surgery; its parameters are copies."""

    def count_dense(self) -> int:
        """Parameters of the dense layer; a layer that knows its sizes need not make one to say that."""
        return sum(parameter.numel() for parameter in self.to_dense().parameters())

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses to set what is shown of the parts."""
        self._check_own(name, "assignment")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Refuses to delete it."""
        self._check_own(name, "del")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuses what ``torch.nn.utils.prune`` puts beside it, too."""
        self._check_own(name.removesuffix("_orig"), "register_parameter")
        super().register_parameter(name, param)

    def _check_own(self, name: str, what: str) -> None:
        shown = getattr(type(self), name, None)
        if isinstance(shown, property) and shown.fset is None:
            raise ReadOnlyError(refusal(self._owner(name), what))

    def _owner(self, name: str) -> str:
        return f"The {name} of a {type(self).__name__}"

    def _show(self, value: Tensor, name: str) -> Tensor:
        """A tensor, as it is shown under the name of a property."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return value
        else:  # noqa: RET505  # TorchScript skips it
            return show(value, self._owner(name))


class LowRankLinear(LowRankLayer, nn.Sequential):
    """A linear layer whose weight is the product of two factors: ``y = B(A(x)) + bias``.

    The children ``A`` (``in_features -> rank``, no bias) and ``B`` (``rank -> out_features``) are ordinary
    ``nn.Linear`` modules, so quantizers, adapters and FLOP counters understand them. The layer is an ``nn.Sequential``
    of the two, so that pruners that walk over all modules look for parameters in them alone. ``weight`` and ``bias``
    can be read as on ``nn.Linear`` (``nn.MultiheadAttention``, the fast path of ``nn.TransformerEncoderLayer`` and T5
    do that); ``weight`` is then the dense product, differentiable, computed anew at each access, also if the factors
    are quantized; writing to it raises.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Inner size, at least 1. Ranks above ``break_even_rank(out_features, in_features)`` hold more parameters
            than the dense layer; they are allowed here, the surgery never makes them.
        bias: Whether ``B`` has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ArgumentError: If ``rank`` is outside ``[1, min(in_features, out_features)]``.

    Shape:
        ``(*, in_features) -> (*, out_features)``

    >>> layer = LowRankLinear(16, 8, rank=2)
    >>> layer(torch.zeros(5, 16)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 8]), torch.Size([8, 16]), 56)
    """

    if TYPE_CHECKING:  # properties below; said here because nn.Module.__getattr__ hides their types
        A: nn.Linear
        B: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ArgumentError(
                f"rank must lie in [1, {min(in_features, out_features)}] for a {out_features}x{in_features} layer, "
                f"got {rank}."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """Dense product ``B A`` of shape ``(out_features, in_features)``; read-only."""
        return self._show(self._product(), "weight")

    @property
    @no_type_check  # so that TorchScript finds out itself whether there is one
    def bias(self):
        """The bias of ``B``, shape ``(out_features,)``, or None: that very parameter."""
        return self.B.bias

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``(*, in_features)`` to ``(*, out_features)``; the argument is named as in ``nn.Linear``."""
        y: Tensor = self.B(self.A(input))
        return y

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    def _product(self) -> Tensor:
        return dequantized(self.B.weight) @ dequantized(self.A.weight)

    @classmethod
    def from_factors(cls, a: Tensor, b: Tensor, like: nn.Module) -> "LowRankLinear":
        """A layer that holds the given factors and *shares* the bias parameter of ``like``.

        Args:
            a: Shape ``(rank, in_features)``.
            b: Shape ``(out_features, rank)``.
            like: The dense layer, with a ``weight`` and a ``bias``; device, dtype, ``requires_grad``, train/eval mode
                and the bias object are taken from it.
        """
        weight, bias = like._parameters["weight"], like._parameters["bias"]
        assert weight is not None
        layer = cls(a.shape[1], b.shape[0], a.shape[0], bias=False, device="meta", dtype=weight.dtype)
        layer.A.weight, layer.B.weight = parameter_like(a, weight), parameter_like(b, weight)
        layer.B.register_parameter("bias", bias)
        return layer.train(like.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """Truncated SVD of a dense layer, whose bias parameter is shared; the dense layer is left as it was.

        Raises:
            ArgumentError: If ``rank`` is outside ``[1, min(in_features, out_features)]``.
            NumericalError: If the weight holds NaN or Inf.
        """
        a, b = weighted_low_rank(linear.weight, rank)
        return cls.from_factors(a, b, like=linear)

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with the same function; its parameters are copies."""
        with torch.no_grad():
            weight = self._product()
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=weight.dtype
        )
        linear.weight = nn.Parameter(weight, requires_grad=learns(self))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def to_dense(self) -> nn.Module:
        """The same as :meth:`to_linear`."""
        return self.to_linear()

    def count_dense(self) -> int:
        """Parameters of the dense layer."""
        return self.out_features * self.in_features + (0 if self.bias is None else self.out_features)


class LowRankPlusSparseLinear(LowRankLinear):
    """A :class:`LowRankLinear` with some entries of the weight beside the factors: ``y = B(A(x)) + S x + bias``.

    It saves parameters, not time: the product with ``S`` is done with a dense matrix that is filled in at each call,
    so that all dtypes, autocast and compilers work. A forward pass takes longer than that of the dense layer (1.7 times
    as long for 768x768 at rank 150 and density 0.05 with 2,048 tokens, on one CPU core) and needs the memory of a dense
    weight while it runs. The values are a parameter; their places, which training does not change, are a buffer of 4
    bytes each (8 if the matrix has 2^31 entries or more): in half precision a stored entry takes as much as three
    entries of a factor.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Inner size of the factors, at least 1.
        nonzeros: Entries of ``S``; they start at zero, in places spread evenly.
        bias: Whether ``B`` has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        values: Entries of ``S``: parameter of shape ``(nonzeros,)``.
        indices: Their places in the weight read row by row, ascending: buffer of shape ``(nonzeros,)``.

    Raises:
        ArgumentError: If ``rank`` or ``nonzeros`` is out of range.

    Shape:
        ``(*, in_features) -> (*, out_features)``

    >>> layer = LowRankPlusSparseLinear(16, 8, rank=2, nonzeros=6)
    >>> layer(torch.zeros(5, 16)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 8]), torch.Size([8, 16]), 62)
    """

    if TYPE_CHECKING:
        values: nn.Parameter
        indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        nonzeros: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, device, dtype)
        size = in_features * out_features
        if not 0 <= nonzeros <= size:
            raise ArgumentError(
                f"nonzeros must lie in [0, {size}] for a {out_features}x{in_features} layer, got {nonzeros}."
            )
        self.values = nn.Parameter(torch.zeros(nonzeros, device=device, dtype=dtype))
        index_dtype = torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64
        places = torch.arange(nonzeros, device=device, dtype=torch.int64) * (size // max(nonzeros, 1))
        self.register_buffer("indices", places.to(index_dtype))

    @property
    def nonzeros(self) -> int:
        """Entries of the sparse part."""
        return self.values.numel()

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``(*, in_features)`` to ``(*, out_features)``."""
        y: Tensor = self.B(self.A(input)) + nn.functional.linear(input, self._sparse_matrix())
        return y

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        return f"{super().extra_repr()}, nonzeros={self.nonzeros}"

    def _product(self) -> Tensor:
        return dequantized(self.B.weight) @ dequantized(self.A.weight) + self._sparse_matrix()

    @classmethod
    def from_factors(
        cls, a: Tensor, b: Tensor, like: nn.Module, sparse: Sparse | None = None
    ) -> "LowRankPlusSparseLinear":
        """A layer that holds the given parts; see :meth:`LowRankLinear.from_factors`. By default ``S`` has no entry."""
        layer = super().from_factors(a, b, like)
        assert isinstance(layer, cls)
        places, values = (a.new_empty(0), a.new_empty(0)) if sparse is None else sparse
        weight = layer.A.weight
        layer.values = parameter_like(values, weight)
        layer.indices = places.to(device=weight.device, dtype=layer.indices.dtype, copy=True).contiguous()
        return layer

    def _sparse_matrix(self) -> Tensor:
        return sparse_matrix(self.indices, self.values, self.out_features, self.in_features)


def weights_in(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices that a layer is made of, without its biases."""
    return (parameter for parameter in layer.parameters() if parameter.dim() > 1)


def learns(layer: nn.Module) -> bool:
    """Whether anything of what the matrices of a layer are made of is trained; then the dense weight is, too."""
    return any(
        parameter.requires_grad
        for name, parameter in layer.named_parameters()
        if not name.rpartition(".")[2].startswith("bias")
    )


def parameter_like(value: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter with a copy of ``value``, of the device, dtype and ``requires_grad`` of ``like``."""
    data = torch.empty(
        value.shape, device=like.device, dtype=like.dtype
    )  # of the usual strides, also where a size is 1
    return nn.Parameter(data.copy_(value.detach()), requires_grad=like.requires_grad)
