"""Convolutions: ``nn.Conv1d`` and ``nn.Conv2d``, whose tokens are the positions of the output.

A convolution multiplies its kernel with the patch of the input at each position, so its matrix, its inputs and its
outputs are those of a linear layer that is fed with patches. The spatial scheme sees another matrix of the same kernel;
:class:`SpatialView` says which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.kinds.base import Kind, MatrixView, not_its_own, part_of, plain_type
from lightning_prehab.layers.conv import (
    LowRankConv,
    LowRankConv1d,
    LowRankConv2d,
    Scheme,
    check_scheme,
    factor_shapes,
    kernel_to_matrix,
    matrix_to_kernel,
)
from lightning_prehab.layers.pivot import PivotConv, PivotConv1d, PivotConv2d
from lightning_prehab.linalg.factors import Factors

Conv = nn.Conv1d | nn.Conv2d


@dataclass(frozen=True)
class _Axis:
    """How a kernel moves along one axis: sizes in positions; ``before`` and ``after`` are paddings."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    @property
    def span(self) -> int:
        """Positions from the first to the last that the kernel touches at once."""
        return self.dilation * (self.kernel - 1) + 1

    def windows(self, x: Tensor, dim: int) -> Tensor:
        """What the kernel sees at each of its places along ``dim``, in a new last dimension; nothing is copied."""
        return x.unfold(dim, self.span, self.stride)[..., :: self.dilation]


class _ConvView(MatrixView):
    """One matrix of a kernel.

    Attributes:
        scheme: Which one; see :mod:`lightning_prehab.layers.conv`.
    """

    scheme: Scheme
    module: Conv

    @property
    def parameter(self) -> nn.Parameter:
        """The kernel."""
        weight: nn.Parameter = self.module._parameters["weight"]  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer."""
        return self.module._parameters["bias"]

    def samples_at_once(self, x: Tensor, entries: int) -> int | None:
        """Batches are taken apart if their patches are too many."""
        if x.dim() != len(self.module.kernel_size) + 2:
            return None
        strides = 1
        for stride, kernel in zip(self.module.stride, self.module.kernel_size, strict=True):
            strides *= min(stride, kernel)
        places = x.shape[2:].numel() // (strides if self.scheme == "channel" else 1)
        return max(entries // max(places * self.in_features * self.group_count, 1), 1)

    def fold(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels of the two convolutions."""
        shapes = factor_shapes(self.parameter.shape, b.shape[1], self.scheme, self.group_count)
        return matrix_to_kernel(a, list(shapes[0])), matrix_to_kernel(b, list(shapes[1]), self.scheme)

    def unfold(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Their matrices."""
        shapes = factor_shapes(self.parameter.shape, b.shape[1], self.scheme, self.group_count)
        if (a.shape, b.shape) != shapes:
            raise RuntimeError(f"Expected kernels of shapes {shapes}, got {tuple(a.shape)} and {tuple(b.shape)}.")
        return kernel_to_matrix(a), kernel_to_matrix(b, self.scheme)

    def _geometry(self) -> tuple[object, ...]:
        """What decides which patches are seen."""
        conv = self.module
        return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode

    def _padded(self, x: Tensor) -> tuple[Tensor, _Axis, _Axis]:
        """The input as ``(B, C, H, W)`` with its padding, and the two axes; a signal is an image of height 1."""
        vertical, horizontal = _axes(self.module)
        x = _as_images(x, self.module)
        sides = (horizontal.before, horizontal.after, vertical.before, vertical.after)
        if any(sides):
            mode = self.module.padding_mode
            x = nn.functional.pad(x, sides, mode="constant" if mode == "zeros" else mode)
        return x, vertical, horizontal


class ChannelView(_ConvView):
    """The matrix ``(out, in / groups * k_h * k_w)`` of a kernel, or the rows of one group of it.

    Args:
        module: The layer.
        group: Number of the group; None is the matrix of all groups, one below the other.
    """

    scheme = "channel"

    def __init__(self, module: Conv, group: int | None = None) -> None:
        count = module.groups if group is None else 1
        m = module.out_channels if group is None else module.out_channels // module.groups
        super().__init__(module, m, module.weight.shape[1:].numel(), count)
        self._group = group
        self.reads = ("channel", module.groups, group, *self._geometry())

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer, or of the group."""
        bias = super().bias
        if bias is None or self._group is None:
            return bias
        return part_of(bias, self._group * self.out_features, self.out_features)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Flattened rows of a kernel."""
        return kernel_to_matrix(self._rows(tensor))

    @property
    def slices(self) -> range | None:
        """Output channels, of one group or of all that there are."""
        start = (self._group or 0) * self.out_features
        return range(start, start + self.out_features)

    @torch.no_grad()
    def write_(self, matrix: Tensor, into: Tensor | None = None) -> None:
        """Copies the rows into the kernel, whatever its memory format."""
        rows = self._rows(self.parameter if into is None else into)
        rows.copy_(matrix_to_kernel(matrix, list(rows.shape)))

    def inputs(self, x: Tensor) -> Tensor:
        """Patches at the positions of the output: ``(B, L, n)``, with groups ``(B, L, groups, n)``."""
        if self._group is not None:
            x = self._channels(x, self.module.in_channels)
        x, vertical, horizontal = self._padded(x)
        patches = horizontal.windows(vertical.windows(x, 2), 3)  # (B, C, H_out, W_out, k_h, k_w)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        if self.group_count == 1:
            return patches.flatten(2)
        shape = (self.group_count, patches.shape[2] // self.group_count)
        return patches.unflatten(2, shape).flatten(3)  # type: ignore[no-untyped-call, no-any-return]

    def outputs(self, y: Tensor) -> Tensor:
        """Channels at the positions of the output: ``(B, L, m)``, with groups ``(B, L, groups, m / groups)``."""
        if self._group is not None:
            y = self._channels(y, self.module.out_channels)
        y = _as_images(y, self.module).flatten(2).mT
        if self.group_count == 1:
            return y
        return y.unflatten(2, (self.group_count, -1))  # type: ignore[no-untyped-call, no-any-return]

    def groups(self) -> Sequence[MatrixView]:
        """The rows of each group."""
        if self.group_count == 1:
            return [self]
        return [ChannelView(self.module, group) for group in range(self.group_count)]

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor if self._group is None else tensor.narrow(0, self._group * self.out_features, self.out_features)

    def _channels(self, x: Tensor, channels: int) -> Tensor:
        assert self._group is not None
        size = channels // self.module.groups
        return x.narrow(-1 - len(self.module.kernel_size), self._group * size, size)


class SpatialView(_ConvView):
    """The matrix ``(out * k_w, in * k_h)`` of a kernel: a vertical convolution to a rank, then a horizontal one.

    With ``M[(o, j), (c, i)] = K[o, c, i, j]`` and the vertical patch ``v(h, w)`` of the padded input at output row
    ``h`` and input column ``w``, the output is ``y[o, h, w] = sum_j (M v(h, w s + j d))[(o, j)]``. A token is therefore
    such a pair of an output row and an input column, and its output gradient has in the place ``(o, j)`` that of the
    one output whose tap ``j`` lies on the column, or zero. Columns of zero padding are no tokens: their product is
    zero whatever the matrix.
    """

    scheme = "spatial"
    form = "spatial"

    def __init__(self, module: Conv) -> None:
        check_scheme("spatial", module)
        height, width = module.kernel_size
        super().__init__(module, module.out_channels * width, module.in_channels * height)
        self.reads = ("spatial", *self._geometry())

    def matrix(self, tensor: Tensor) -> Tensor:
        """A kernel with its axes permuted and flattened."""
        return kernel_to_matrix(tensor, "spatial")

    @torch.no_grad()
    def write_(self, matrix: Tensor, into: Tensor | None = None) -> None:
        """Copies the matrix into the kernel, whatever its memory format."""
        kernel = self.parameter if into is None else into
        kernel.copy_(matrix_to_kernel(matrix, list(kernel.shape), "spatial"))

    @property
    def bias_size(self) -> int:
        """Output channels."""
        return self.module.out_channels

    def to_bias(self, shift: Tensor) -> Tensor:
        """Sums over the taps; in columns beside zero padding, where some are missing, that is too much."""
        return shift.reshape(self.bias_size, -1).sum(1)

    def inputs(self, x: Tensor) -> Tensor:
        """Vertical patches at output rows and input columns: ``(B, H_out * columns, n)``."""
        x, vertical, horizontal = self._padded(x)
        places = (x.shape[3] - horizontal.span) // horizontal.stride + 1
        columns = self._columns(places, horizontal).to(x.device)
        patches = vertical.windows(x, 2).index_select(3, columns)  # (B, C, H_out, columns, k_h)
        return patches.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)

    def outputs(self, y: Tensor) -> Tensor:
        """The gradients that belong to the inputs, from the gradient of the output: ``(B, H_out * columns, m)``.

        From the output itself they cannot be had: it is the sum of ``k_w`` products.
        """
        y = _as_images(y, self.module).permute(0, 2, 3, 1)
        horizontal = _axes(self.module)[1]
        columns = self._columns(y.shape[2], horizontal)
        gradients = y.new_zeros(*y.shape[:2], len(columns), y.shape[3], horizontal.kernel)
        for tap in range(horizontal.kernel):
            touched = _tap(tap, y.shape[2], horizontal)
            found = torch.searchsorted(columns, touched).clamp_max_(max(len(columns) - 1, 0))
            inside = torch.isin(touched, columns)
            gradients[:, :, found[inside].to(y.device), :, tap] = y[:, :, inside.to(y.device)]
        return gradients.flatten(3).flatten(1, 2)

    @property
    def copies(self) -> int:
        """All taps, where no column is seen from two places, as in the patch embedding of a Vision Transformer."""
        horizontal = _axes(self.module)[1]
        padded = self.module.padding_mode == "zeros" and (horizontal.before, horizontal.after) != (0, 0)
        return 1 if padded or horizontal.stride < horizontal.span else horizontal.kernel

    def distinct_outputs(self, y: Tensor) -> Tensor:
        """The gradient of each output once, if that is enough."""
        return self.outputs(y) if self.copies == 1 else _as_images(y, self.module).flatten(2).mT

    def _columns(self, places: int, axis: _Axis) -> Tensor:
        """Columns of the padded input that a kernel touches from ``places`` places, ascending.

        Without those that are zero padding, as far as the number of places tells: of up to ``stride - 1`` columns at
        the right end it does not.
        """
        touched: Tensor = torch.unique(torch.cat([_tap(tap, places, axis) for tap in range(axis.kernel)]))
        if self.module.padding_mode != "zeros":
            return touched
        end = (places - 1) * axis.stride + axis.span + axis.stride - 1 - axis.after
        return touched[(touched >= axis.before) & (touched < end)]


@dataclass(frozen=True)
class ConvKind(Kind):
    """``nn.Conv1d`` and ``nn.Conv2d``.

    Args:
        scheme: ``"channel"``: every layer becomes a convolution to ``rank`` channels and a 1x1 convolution.
            ``"spatial"``: two-dimensional kernels larger than 1 along both axes, without groups, become a vertical and
            a horizontal one; the others are cut as in ``"channel"``. ``"auto"``: whichever is predicted to lose less
            at equal parameters, layer by layer; ``"channel"`` where nobody predicts, and for policies that count
            operations.

    Raises:
        ArgumentError: If the scheme is not known.
    """

    pivot: ClassVar[bool] = True
    scheme: Scheme | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.scheme not in ("auto", "channel", "spatial"):
            raise ArgumentError(f"scheme must be 'auto', 'channel' or 'spatial', got {self.scheme!r}.")

    def fits(self, module: nn.Module) -> bool:
        """Exactly these types."""
        return plain_type(module) in (nn.Conv1d, nn.Conv2d)

    def refusal(self, module: nn.Module) -> str | None:
        """A kernel that is no parameter, or of another shape than the layer says."""
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        if 0 in shape:
            return f"its weight is empty ({'x'.join(map(str, shape))})"
        return not_its_own(module, "weight", shape) or not_its_own(module, "bias", None)

    def views(self, module: nn.Module, blocks: Mapping[str, int] | None = None) -> dict[str, MatrixView]:
        """The one matrix of the kernel; row blocks are not known to convolutions.

        Raises:
            ArgumentError: If blocks are given.
        """
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        if blocks:
            raise ArgumentError(f"A {type(module).__name__} has no row blocks, got {dict(blocks)}.")
        return self.candidates(module, blocks)[0]

    def candidates(self, module: nn.Module, blocks: Mapping[str, int] | None = None) -> Sequence[dict[str, MatrixView]]:
        """Both schemes where there are two."""
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        found: list[dict[str, MatrixView]] = [{"": ChannelView(module)}]
        if module.groups == 1 and len(module.kernel_size) == 2 and min(module.kernel_size) > 1:
            found.insert(0 if self.scheme == "spatial" else 1, {"": SpatialView(module)})
        return found

    def choices(self, module: nn.Module) -> Sequence[dict[str, MatrixView]]:
        """All of them, unless the scheme is given."""
        candidates = self.candidates(module)
        return candidates if self.scheme == "auto" else candidates[:1]

    def can_pivot(self, view: MatrixView) -> bool:
        """Where the second convolution is 1x1: a horizontal one mixes places."""
        return super().can_pivot(view) and not isinstance(view, SpatialView)

    def low_rank(
        self, module: nn.Module, views: Mapping[str, MatrixView], factors: Mapping[str, Factors]
    ) -> LowRankConv | PivotConv:
        """A :class:`~lightning_prehab.LowRankConv1d` or :class:`~lightning_prehab.LowRankConv2d`, or its like."""
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        view, found = views[""], factors[""]
        assert isinstance(view, _ConvView)
        if found.order is not None:
            packed = PivotConv1d if isinstance(module, nn.Conv1d) else PivotConv2d
            return packed.from_factors(found.A, found.B, module, found.order)
        kind = LowRankConv1d if isinstance(module, nn.Conv1d) else LowRankConv2d
        return kind.from_factors(found.A, found.B, module, view.scheme)


def _axes(module: Conv) -> tuple[_Axis, _Axis]:
    """The vertical and the horizontal axis; a signal has no vertical one."""
    axes = []
    for axis, kernel in enumerate(module.kernel_size):
        stride, dilation = module.stride[axis], module.dilation[axis]
        if isinstance(module.padding, str):
            total = dilation * (kernel - 1) if module.padding == "same" else 0
            before, after = total // 2, total - total // 2
        else:
            before = after = module.padding[axis]
        axes.append(_Axis(kernel, stride, dilation, before, after))
    return (axes[0], axes[1]) if len(axes) == 2 else (_Axis(), axes[0])


def _as_images(x: Tensor, module: Conv) -> Tensor:
    """Input or output as ``(B, C, H, W)``, whether it is batched or not."""
    sizes = len(module.kernel_size)
    x = x if x.dim() == sizes + 2 else x.unsqueeze(0)
    return x if sizes == 2 else x.unsqueeze(2)


def _tap(tap: int, places: int, axis: _Axis) -> Tensor:
    """Columns of the padded input that one tap of the kernel lies on, from each of its places."""
    return torch.arange(places, device="cpu") * axis.stride + tap * axis.dilation
