"""Drop-in low-rank convolutions."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, no_type_check

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.layers.linear import LowRankLayer, learns, parameter_like
from lightning_prehab.linalg.decomposition import weighted_low_rank

#: Which matrix of a kernel is factorized: ``"channel"``, of shape ``(out, in k_h k_w)``, or ``"spatial"``, of shape
#: ``(out k_w, in k_h)``.
Scheme = Literal["channel", "spatial"]


def kernel_to_matrix(kernel: Tensor, scheme: str = "channel") -> Tensor:
    """The matrix of a kernel; differentiable.

    Args:
        kernel: Shape ``(out, in / groups, *k)``, with two sizes ``k`` for ``"spatial"``.
        scheme: ``"channel"`` or ``"spatial"``.

    Returns:
        Shape ``(out, in / groups * prod(k))``; ``(out * k_w, in * k_h)`` for ``"spatial"``.
    """
    if scheme == "channel":
        return kernel.flatten(1)
    return kernel.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def matrix_to_kernel(matrix: Tensor, shape: list[int], scheme: str = "channel") -> Tensor:
    """The kernel of the given shape whose matrix this is; differentiable.

    >>> kernel = torch.arange(24.0).reshape(2, 2, 2, 3)
    >>> torch.equal(matrix_to_kernel(kernel_to_matrix(kernel, "spatial"), list(kernel.shape), "spatial"), kernel)
    True
    """
    if scheme == "channel":
        return matrix.reshape(shape)
    m, n, height, width = shape
    return matrix.reshape(m, width, n, height).permute(0, 2, 3, 1)


def factor_shapes(
    kernel: Sequence[int], rank: int, scheme: Scheme = "channel", groups: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two kernels in the place of one.

    >>> factor_shapes((8, 4, 3, 5), 2), factor_shapes((8, 4, 3, 5), 2, "spatial")
    (((2, 4, 3, 5), (8, 2, 1, 1)), ((2, 4, 3, 1), (8, 2, 1, 5)))
    """
    m, n, *sizes = kernel
    if scheme == "channel":
        return (groups * rank, n, *sizes), (m, rank, *(1 for _ in sizes))
    return (rank, n, sizes[0], 1), (m, rank, 1, sizes[1])


class LowRankConv(LowRankLayer, nn.Sequential):
    """What :class:`LowRankConv1d` and :class:`LowRankConv2d` have in common; use one of these."""

    _dense: ClassVar[Any]  # nn.Conv1d or nn.Conv2d
    if TYPE_CHECKING:  # a subclass has one or the other
        A: nn.Conv1d | nn.Conv2d
        B: nn.Conv1d | nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: Scheme = "channel",
    ) -> None:
        super().__init__()
        geometry = (kernel_size, stride, padding, dilation, groups, False, padding_mode)
        like = self._dense(in_channels, out_channels, *geometry, device="meta")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, ...] = like.kernel_size
        self.rank = rank
        self.stride: tuple[int, ...] = like.stride
        self.padding: str | tuple[int, ...] = like.padding
        self.dilation: tuple[int, ...] = like.dilation
        self.groups = groups
        self.padding_mode = padding_mode
        self.scheme: Scheme = scheme
        check_scheme(scheme, like)
        m, n = kernel_to_matrix(like.weight, scheme).shape
        if not 1 <= rank <= min(m // groups, n):
            where = f"a {m}x{n} matrix" if groups == 1 else f"{groups} groups of {m // groups}x{n}"
            raise ArgumentError(f"rank must lie in [1, {min(m // groups, n)}] for {where} ({scheme}), got {rank}.")
        of_a, of_b = self._children_geometry()
        self.A = self._dense(in_channels, groups * rank, **of_a, bias=False, device=device, dtype=dtype)
        self.B = self._dense(groups * rank, out_channels, **of_b, bias=bias, device=device, dtype=dtype)

    def _children_geometry(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of the two convolutions."""
        whole: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": self.padding_mode,
        }
        if self.scheme == "channel":
            return {**whole, "groups": self.groups}, {"kernel_size": 1, "groups": self.groups}
        idle = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}  # padding pads each axis for itself
        vertical, horizontal = dict(whole), dict(whole)
        for name, value in idle.items():
            if not isinstance(whole[name], str):
                vertical[name], horizontal[name] = (whole[name][0], value), (value, whole[name][1])
        return vertical, horizontal

    @property
    def weight(self) -> Tensor:
        """Dense kernel of shape ``(out_channels, in_channels / groups, *kernel_size)``; read-only, differentiable."""
        return self._show(self._product(), "weight")

    @property
    @no_type_check  # so that TorchScript finds out itself whether there is one
    def bias(self):
        """The bias of ``B``, shape ``(out_channels,)``, or None: that very parameter."""
        return self.B.bias

    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors as matrices, of the shapes that :meth:`from_factors` takes; differentiable."""
        return kernel_to_matrix(self.A.weight), kernel_to_matrix(self.B.weight, self.scheme)

    def forward(self, input: Tensor) -> Tensor:
        """Does what the dense convolution with the kernel :attr:`weight` does."""
        y: Tensor = self.B(self.A(input))
        return y

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        groups = "" if self.groups == 1 else f", groups={self.groups}"
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"
        return f"{sizes}{groups}, scheme={self.scheme!r}"

    def _product(self) -> Tensor:
        a, b = self.factors()
        product = b.reshape(self.groups, -1, b.shape[1]) @ a.reshape(self.groups, -1, a.shape[1])
        shape = [self.out_channels, self.in_channels // self.groups]
        shape += list(self.kernel_size)
        return matrix_to_kernel(product.flatten(0, 1), shape, self.scheme)

    @classmethod
    def from_factors(
        cls, a: Tensor, b: Tensor, like: nn.Conv1d | nn.Conv2d, scheme: Scheme = "channel"
    ) -> "LowRankConv":
        """A layer that holds the given factors and *shares* the bias parameter of ``like``.

        Args:
            a: Shape ``(groups * rank, in / groups * prod(k))``; ``(rank, in * k_h)`` in the spatial scheme.
            b: Shape ``(out, rank)``; ``(out * k_w, rank)`` in the spatial scheme.
            like: The dense layer; geometry, device, dtype, ``requires_grad``, train/eval mode and the bias object are
                taken from it.
            scheme: ``"channel"`` or ``"spatial"``.

        Raises:
            ArgumentError: If the scheme does not suit the layer.
        """
        layer = cls(
            like.in_channels,
            like.out_channels,
            like.kernel_size,
            b.shape[1],
            like.stride,
            like.padding,
            like.dilation,
            like.groups,
            False,
            like.padding_mode,
            device="meta",
            dtype=like.weight.dtype,
            scheme=scheme,
        )
        layer.A.weight = parameter_like(matrix_to_kernel(a, list(layer.A.weight.shape)), like.weight)
        layer.B.weight = parameter_like(matrix_to_kernel(b, list(layer.B.weight.shape), scheme), like.weight)
        layer.B.bias = like.bias
        return layer.train(like.training)

    @classmethod
    def from_conv(cls, conv: nn.Conv1d | nn.Conv2d, rank: int, scheme: Scheme = "channel") -> "LowRankConv":
        """Truncated SVD of a dense layer, of each group; the bias is shared, the dense layer is left as it was.

        Raises:
            ArgumentError: If the rank is out of range, or the scheme does not suit the layer.
            NumericalError: If the weight holds NaN or Inf.
        """
        check_scheme(scheme, conv)
        parts = kernel_to_matrix(conv.weight.detach(), scheme).chunk(conv.groups)
        factors = [weighted_low_rank(part, rank) for part in parts]
        return cls.from_factors(torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors]), conv, scheme)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A dense convolution with the same function; its parameters are copies."""
        dense: nn.Module = self._dense(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
            dtype=self.A.weight.dtype,
        )
        dense.weight = parameter_like(self.weight, self.A.weight).requires_grad_(learns(self))
        if self.bias is not None:
            dense.bias = parameter_like(self.bias, self.bias)
        return dense.train(self.training)

    def count_dense(self) -> int:
        """Parameters of the dense layer."""
        kernel = self.out_channels * (self.in_channels // self.groups) * math.prod(self.kernel_size)
        return kernel + (0 if self.bias is None else self.out_channels)


class LowRankConv1d(LowRankConv):
    """A one-dimensional convolution whose kernel is the product of two: ``y = B(A(x))``.

    The children are ordinary ``nn.Conv1d`` modules: ``A`` has the kernel, stride, padding, dilation and groups of the
    dense layer, ``rank`` output channels per group and no bias; ``B`` is of kernel size 1, with the bias. ``weight``
    and ``bias`` can be read as on ``nn.Conv1d``; ``weight`` is the dense kernel, computed anew at each access.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Of the dense kernel, ``k``.
        rank: Inner channels of each group, from 1 to ``min(out_channels / groups, in_channels / groups * k)``.
        stride: As for ``nn.Conv1d``.
        padding: As for ``nn.Conv1d``, also ``"same"`` and ``"valid"``.
        dilation: As for ``nn.Conv1d``.
        groups: As for ``nn.Conv1d``.
        bias: Whether ``B`` has a bias.
        padding_mode: As for ``nn.Conv1d``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        scheme: ``"channel"``; a kernel of one dimension has no other.

    Raises:
        ArgumentError: If ``rank`` or ``scheme`` cannot be used.

    Shape:
        As ``nn.Conv1d``: ``(N, in_channels, L) -> (N, out_channels, L_out)``, also without ``N``.

    >>> layer = LowRankConv1d(16, 8, 3, rank=2, padding=1)
    >>> layer(torch.zeros(5, 16, 10)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 8, 10]), torch.Size([8, 16, 3]), 120)
    """

    _dense = nn.Conv1d


class LowRankConv2d(LowRankConv):
    """A two-dimensional convolution whose kernel is the product of two: ``y = B(A(x))``.

    The children are ordinary ``nn.Conv2d`` modules. ``scheme="channel"``: ``A`` has the kernel, stride, padding,
    dilation and groups of the dense layer, ``rank`` output channels per group and no bias; ``B`` is 1x1, with the bias
    (Zhang et al., 2015, https://arxiv.org/abs/1505.06798). ``scheme="spatial"``: ``A`` is ``k_h x 1``, ``B`` is
    ``1 x k_w``, each with its axis of stride, padding and dilation (Jaderberg et al., 2014,
    https://arxiv.org/abs/1405.3866); the parameters are ``rank (in k_h + out k_w)``. ``weight`` and ``bias`` can be
    read as on ``nn.Conv2d``; ``weight`` is the dense kernel, computed anew at each access.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Of the dense kernel, ``k`` or ``(k_h, k_w)``.
        rank: Inner channels of each group, from 1 to the smaller side of the matrix that is factorized.
        stride: As for ``nn.Conv2d``.
        padding: As for ``nn.Conv2d``, also ``"same"`` and ``"valid"``.
        dilation: As for ``nn.Conv2d``.
        groups: As for ``nn.Conv2d``.
        bias: Whether ``B`` has a bias.
        padding_mode: As for ``nn.Conv2d``; all of them pad each axis for itself, so both schemes are exact.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        scheme: ``"channel"`` or, without groups, ``"spatial"``.

    Raises:
        ArgumentError: If ``rank`` or ``scheme`` cannot be used.

    Shape:
        As ``nn.Conv2d``: ``(N, in_channels, H, W) -> (N, out_channels, H_out, W_out)``, also without ``N``.

    >>> layer = LowRankConv2d(16, 8, 3, rank=2, padding=1)
    >>> layer(torch.zeros(5, 16, 7, 7)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 8, 7, 7]), torch.Size([8, 16, 3, 3]), 312)
    >>> sum(p.numel() for p in LowRankConv2d(16, 8, 3, rank=2, padding=1, scheme="spatial").parameters())
    152
    """

    _dense = nn.Conv2d


def check_scheme(scheme: str, conv: nn.Conv1d | nn.Conv2d) -> None:
    """Raises :class:`ArgumentError` for a scheme that does not suit the layer."""
    if scheme not in ("channel", "spatial"):
        raise ArgumentError(f"scheme must be 'channel' or 'spatial', got {scheme!r}.")
    if scheme == "spatial" and (len(conv.kernel_size) != 2 or conv.groups != 1):
        raise ArgumentError(
            "scheme 'spatial' is for two-dimensional convolutions without groups; got kernel size "
            f"{tuple(conv.kernel_size)} and groups={conv.groups}. Use scheme='channel'."
        )
