"""A matrix of rank ``r`` as ``r`` of its rows and what makes the others of them: fewer numbers than two factors."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.layers.conv import LowRankConv, LowRankConv1d, LowRankConv2d
from lightning_prehab.layers.linear import LowRankLayer, LowRankLinear, LowRankPlusSparseLinear, learns, parameter_like
from lightning_prehab.linalg.decomposition import weighted_low_rank
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.matrices import dequantized
from lightning_prehab.linalg.pivot import as_factor, balanced_factors, from_factor, is_order


class PivotLayer(LowRankLayer):
    """What :class:`PivotLinear` and the convolutions in this layout have in common; use one of these."""

    if TYPE_CHECKING:
        D: nn.Linear | nn.Conv1d | nn.Conv2d
        C: nn.Linear | nn.Conv1d | nn.Conv2d
        order: Tensor
        bias: nn.Parameter | None

    def _hold(self, d: nn.Module, c: nn.Module, bias: nn.Parameter | None) -> None:
        """Takes the two children; rows are in the order of the children until somebody says otherwise."""
        self.D, self.C = d, c  # type: ignore[assignment]
        rows = self.D.weight.shape[0] + self.C.weight.shape[0]
        self.register_buffer("order", torch.arange(rows, device=self.D.weight.device))
        self.register_parameter("bias", bias)

    def _take(self, factors: Factors, like: nn.Module) -> None:
        """Takes parts and a bias over."""
        weight = like._parameters["weight"]
        assert weight is not None
        assert factors.order is not None
        c = from_factor(factors.B, factors.order)
        self.D.weight = parameter_like(factors.A.reshape(self.D.weight.shape), weight)
        self.C.weight = parameter_like(c.reshape(self.C.weight.shape), weight)
        self.order = factors.order.to(device=weight.device, dtype=torch.int64, copy=True)
        self.register_parameter("bias", like._parameters["bias"])
        self.train(like.training)

    @property
    def weight(self) -> Tensor:
        """Dense weight, in the shape that the dense layer has; read-only, differentiable."""
        return self._show(self._product(), "weight")

    def factors(self) -> Factors:
        """The matrix as factors in this layout; differentiable."""
        d, c = dequantized(self.D.weight), dequantized(self.C.weight)
        return Factors(d.flatten(1), as_factor(c.flatten(1), self.order), order=self.order)

    @abstractmethod
    def low_rank(self) -> LowRankLayer:
        """Two balanced factors with the same function, which share the bias parameter."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Takes no order that names a row twice: nothing else would notice it."""
        order: Any = state_dict.get(f"{prefix}order")
        rows = len(self.order)
        read = isinstance(order, Tensor) and not order.is_meta and order.shape == self.order.shape
        if read and not is_order(order, rows):
            rest[-1].append(f"{prefix}order must name each of {rows} rows once; the file is damaged.")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _balanced(self) -> tuple[Tensor, Tensor]:
        d, c = dequantized(self.D.weight), dequantized(self.C.weight)
        return balanced_factors(d.flatten(1), c.flatten(1), self.order)

    def _product(self) -> Tensor:
        d, c = dequantized(self.D.weight), dequantized(self.C.weight)
        matrix = d.flatten(1)
        sizes: list[int] = list(d.shape)
        sizes[0] = -1
        return torch.cat([matrix, c.flatten(1) @ matrix]).index_select(0, self.order).reshape(sizes)


class PivotLinear(PivotLayer):
    """A linear layer whose weight of rank ``r`` is stored as ``r`` of its rows, and what makes the others of them.

    The children ``D`` (``in_features -> rank``: the pivot rows) and ``C`` (``rank -> out_features - rank``: the other
    rows are ``C D``) are ordinary ``nn.Linear`` modules without bias; the outputs of both, brought into the order of
    the rows, are the output. It is the same function as a :class:`LowRankLinear` of the rank, with
    ``rank * (in_features + out_features - rank)`` numbers instead of ``rank * (in_features + out_features)``, never
    more than the dense layer, and with fewer operations (Zhao et al., "Pivoting Factorization", ICML 2025,
    https://arxiv.org/abs/2501.19090). ``weight`` can be read as on ``nn.Linear``; it is the dense product,
    differentiable, computed anew at each access, also if the parts are quantized; writing to it raises.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Number of pivot rows, at least 1.
        bias: Whether there is one.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        order: Where each row of the weight stands in ``[D; C D]``: int64 buffer of shape ``(out_features,)``.

    Raises:
        ArgumentError: If ``rank`` is outside ``[1, min(in_features, out_features)]``.

    Shape:
        ``(*, in_features) -> (*, out_features)``

    >>> layer = PivotLinear(16, 8, rank=2)
    >>> layer(torch.zeros(5, 16)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 8]), torch.Size([8, 16]), 52)
    """

    _factors: ClassVar[type[LowRankLinear]] = LowRankLinear  # two of them: what this is made of, and goes back to
    if TYPE_CHECKING:
        D: nn.Linear
        C: nn.Linear

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
        d = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        with warnings.catch_warnings():  # of full rank there are no other rows: nothing to initialize
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            c = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self._hold(d, c, nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None)

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``(*, in_features)`` to ``(*, out_features)``; the argument is named as in ``nn.Linear``."""
        return self._map(input)

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    def _map(self, input: Tensor) -> Tensor:
        d = self.D(input)
        y = torch.cat([d, self.C(d)], -1).index_select(-1, self.order)
        return y if self.bias is None else y.add_(self.bias)  # in place: it is of the dtype that autocast multiplies in

    @classmethod
    def from_factors(cls, a: Tensor, b: Tensor, like: nn.Module, order: Tensor | None = None) -> "PivotLinear":
        """A layer for the product of two factors, which *shares* the bias parameter of ``like``.

        Args:
            a: Shape ``(rank, in_features)``.
            b: Shape ``(out_features, rank)``.
            like: The dense layer, with a ``weight`` and a ``bias``; device, dtype, ``requires_grad``, train/eval mode
                and the bias object are taken from it.
            order: Of factors that are in this layout already: ``a`` is then ``D``, and ``b`` holds rows of the identity
                and of ``C``, which are taken as they are. None: pivot rows are chosen here.

        Raises:
            NumericalError: If a factor is not finite.
        """
        factors = Factors(a, b).pivoted() if order is None else Factors(a, b, order=order)
        weight = like._parameters["weight"]
        assert weight is not None
        layer = cls(a.shape[1], b.shape[0], a.shape[0], bias=False, device="meta", dtype=weight.dtype)
        layer._take(factors, like)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> "PivotLinear":
        """Truncated SVD of a dense layer, whose bias parameter is shared; the dense layer is left as it was.

        Raises:
            ArgumentError: If ``rank`` is outside ``[1, min(in_features, out_features)]``.
            NumericalError: If the weight holds NaN or Inf.
        """
        a, b = weighted_low_rank(linear.weight, rank)
        return cls.from_factors(a, b, like=linear)

    def low_rank(self) -> LowRankLinear:
        """Two balanced factors with the same function, which share the bias parameter."""
        return self._factors.from_factors(*self._balanced(), like=like_linear(self.D.weight, self.bias, self.training))

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with the same function; its parameters are copies."""
        with torch.no_grad():
            weight = self._product()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=weight.dtype)
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


class PivotConv(PivotLayer):
    """What :class:`PivotConv1d` and :class:`PivotConv2d` have in common; use one of these."""

    _dense: ClassVar[Any]  # nn.Conv1d or nn.Conv2d
    _factors: ClassVar[type[LowRankConv]]
    if TYPE_CHECKING:
        D: nn.Conv1d | nn.Conv2d
        C: nn.Conv1d | nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        geometry = (kernel_size, stride, padding, dilation, 1, False, padding_mode)
        like = self._dense(in_channels, out_channels, *geometry, device="meta")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, ...] = like.kernel_size
        self.rank = rank
        self.stride: tuple[int, ...] = like.stride
        self.padding: str | tuple[int, ...] = like.padding
        self.dilation: tuple[int, ...] = like.dilation
        self.groups = 1
        self.padding_mode = padding_mode
        most = min(out_channels - 1, in_channels * math.prod(self.kernel_size))  # torch has no convolution to nothing
        if not 1 <= rank <= most:
            matrix = f"{out_channels}x{in_channels * math.prod(self.kernel_size)} matrix in the pivot layout"
            raise ArgumentError(f"rank must lie in [1, {most}] for a {matrix}, got {rank}.")
        d = self._dense(in_channels, rank, *geometry, device=device, dtype=dtype)
        c = self._dense(rank, out_channels - rank, 1, bias=False, device=device, dtype=dtype)
        self._axis = -1 - len(self.kernel_size)
        self._bias_shape = [out_channels] + [1] * len(self.kernel_size)
        self._hold(d, c, nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None)

    def forward(self, input: Tensor) -> Tensor:
        """Does what the dense convolution with the kernel :attr:`weight` does."""
        d = self.D(input)
        y = torch.cat([d, self.C(d)], self._axis).index_select(self._axis, self.order)
        return y if self.bias is None else y.add_(self.bias.view(self._bias_shape))

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"

    @classmethod
    def from_factors(
        cls, a: Tensor, b: Tensor, like: nn.Conv1d | nn.Conv2d, order: Tensor | None = None
    ) -> "PivotConv":
        """A layer for the product of two factors, which *shares* the bias parameter of ``like``.

        Args:
            a: Shape ``(rank, in * prod(k))``.
            b: Shape ``(out, rank)``.
            like: The dense layer, without groups; geometry, device, dtype, ``requires_grad``, train/eval mode and the
                bias object are taken from it.
            order: As for :meth:`PivotLinear.from_factors`.

        Raises:
            ArgumentError: If the rank is out of range.
            NumericalError: If a factor is not finite.
        """
        factors = Factors(a, b).pivoted() if order is None else Factors(a, b, order=order)
        layer = cls(
            like.in_channels,
            like.out_channels,
            like.kernel_size,
            b.shape[1],
            like.stride,
            like.padding,
            like.dilation,
            False,
            like.padding_mode,
            device="meta",
            dtype=like.weight.dtype,
        )
        layer._take(factors, like)
        return layer

    def low_rank(self) -> LowRankConv:
        """Two balanced factors with the same function, which share the bias parameter."""
        return self._factors.from_factors(*self._balanced(), like=self._like(self.D.weight, self.bias))

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A dense convolution with the same function; its parameters are copies."""
        bias = None if self.bias is None else parameter_like(self.bias, self.bias)
        dense: nn.Module = self._like(parameter_like(self._product(), self.D.weight).requires_grad_(learns(self)), bias)
        return dense

    def count_dense(self) -> int:
        """Parameters of the dense layer."""
        kernel = self.out_channels * self.in_channels * math.prod(self.kernel_size)
        return kernel + (0 if self.bias is None else self.out_channels)

    def _like(self, weight: Any, bias: nn.Parameter | None) -> Any:
        return like_conv(self, weight, bias)


class PivotConv1d(PivotConv):
    """A one-dimensional convolution whose kernel is stored as some of its rows; see :class:`PivotLinear`.

    The children are ordinary ``nn.Conv1d`` modules without bias: ``D`` is the dense layer with ``rank`` of its output
    channels, ``C`` has kernel size 1 and makes the others of those. ``weight`` can be read as on ``nn.Conv1d``; it is
    the dense kernel, computed anew at each access.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Of the dense kernel, ``k``.
        rank: From 1 to ``min(out_channels - 1, in_channels * k)``.
        stride: As for ``nn.Conv1d``.
        padding: As for ``nn.Conv1d``, also ``"same"`` and ``"valid"``.
        dilation: As for ``nn.Conv1d``.
        bias: Whether there is one.
        padding_mode: As for ``nn.Conv1d``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ArgumentError: If ``rank`` is out of range.

    >>> layer = PivotConv1d(16, 8, 3, rank=2, padding=1)
    >>> layer(torch.zeros(5, 16, 10)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 8, 10]), torch.Size([8, 16, 3]), 116)
    """

    _dense = nn.Conv1d
    _factors = LowRankConv1d


class PivotConv2d(PivotConv):
    """A two-dimensional convolution whose kernel is stored as some of its rows; see :class:`PivotLinear`.

    The children are ordinary ``nn.Conv2d`` modules without bias: ``D`` is the dense layer with ``rank`` of its output
    channels, ``C`` is 1x1 and makes the others of those. ``weight`` can be read as on ``nn.Conv2d``; it is the dense
    kernel, computed anew at each access.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Of the dense kernel, ``k`` or ``(k_h, k_w)``.
        rank: From 1 to ``min(out_channels - 1, in_channels * k_h * k_w)``.
        stride: As for ``nn.Conv2d``.
        padding: As for ``nn.Conv2d``, also ``"same"`` and ``"valid"``.
        dilation: As for ``nn.Conv2d``.
        bias: Whether there is one.
        padding_mode: As for ``nn.Conv2d``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ArgumentError: If ``rank`` is out of range.

    >>> layer = PivotConv2d(16, 8, 3, rank=2, padding=1)
    >>> layer(torch.zeros(5, 16, 7, 7)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 8, 7, 7]), torch.Size([8, 16, 3, 3]), 308)
    """

    _dense = nn.Conv2d
    _factors = LowRankConv2d


def low_rank_linear(factors: Factors, like: nn.Module) -> LowRankLinear | PivotLinear:
    """A layer of the kind that the factors need; see :meth:`LowRankLinear.from_factors`."""
    if factors.order is not None:
        return PivotLinear.from_factors(factors.A, factors.B, like, factors.order)
    if factors.sparse is None:
        return LowRankLinear.from_factors(factors.A, factors.B, like)
    return LowRankPlusSparseLinear.from_factors(factors.A, factors.B, like, factors.sparse)


def bias_holder(layer: Any) -> nn.Module:
    """The module whose parameter the bias of a layer of one matrix is: ``B``, or the layer itself if it is packed."""
    holder: nn.Module = layer if isinstance(layer, PivotLayer) else layer.B
    return holder


def like_linear(weight: Any, bias: nn.Parameter | None, training: bool) -> nn.Module:
    """What the constructors of low-rank layers take for a dense layer: its flags are those of a parameter."""
    like = nn.Module()
    like.register_parameter("weight", weight)
    like.register_parameter("bias", bias)
    return like.train(training)


def like_conv(layer: Any, weight: Any, bias: nn.Parameter | None) -> Any:
    """A dense convolution of the geometry of a low-rank one, with given parameters."""
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, False, layer.padding_mode)
    like = layer._dense(layer.in_channels, layer.out_channels, *geometry, device="meta")
    like.weight, like.bias = weight, bias
    return like.train(layer.training)
