"""How a layer shows its weight matrices: what every kind of layer has in common."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prehab.layers.linear import LowRankLayer, parameter_like
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.products import Product
from lightning_prehab.linalg.sharding import is_distributed
from lightning_prehab.linalg.storage import Layout

#: Receives the matrices of a layer that were just used together: ``see(views, x, y)``. ``x`` and ``y`` are what
#: :meth:`MatrixView.inputs` and :meth:`MatrixView.outputs` read.
See = Callable[[Sequence["MatrixView"], Tensor, Tensor], None]


class MatrixView(ABC):
    """One weight matrix ``W`` of a layer, ``y = W x`` for each token ``x``.

    A layer of several matrices (fused queries, keys and values) shows a view for each. A grouped convolution shows one
    view whose matrix is that of its groups, one below the other; the groups share a rank, and :meth:`groups` gives a
    view for each.

    Args:
        module: The layer.
        out_features: Rows of the matrix, ``m``.
        in_features: Its columns, ``n``.
        group_count: Number of groups; each has ``m / group_count`` rows.

    Attributes:
        module: The layer.
        out_features: ``m``.
        in_features: ``n``.
        group_count: Number of groups.
        part: Which of the layer's matrices this is; ``""`` if it has one.
        form: Which way to see it, among several; ``""`` for the ordinary one.
        reads: Views with equal values make the same of the same input; None: they take it as it is.
        rank: Of a matrix that has been cut already, ``W = B A``; None of one that is stored as it is.
        layout: How such a matrix is stored.
    """

    part: str = ""
    form: str = ""
    reads: Hashable = None
    rank: int | None = None
    layout: Layout = "factors"

    def __init__(self, module: nn.Module, out_features: int, in_features: int, group_count: int = 1) -> None:
        self.module = module
        self.out_features = out_features
        self.in_features = in_features
        self.group_count = group_count

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.out_features}x{self.in_features} of {type(self.module).__name__})"

    @property
    @abstractmethod
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the matrix, and perhaps others beside it."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All parameters that hold the matrix, :attr:`parameter` first."""
        return (self.parameter,)

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """What is added to the output of this matrix, shape ``(m,)``: the parameter, or a part of it; or None."""

    @abstractmethod
    def matrix(self, tensor: Tensor) -> Tensor:
        """The matrix, shape ``(m, n)``, in a tensor of the parameter's shape (its value, gradient, moments).

        Differentiable.
        """

    @torch.no_grad()
    def write_(self, matrix: Tensor, into: Tensor | None = None) -> None:
        """Copies ``matrix`` of shape ``(m, n)`` into the parameter (or a tensor of its shape), in place.

        This default is for kinds whose :meth:`matrix` is a view of the tensor's memory.
        """
        self.matrix(self.parameter if into is None else into).copy_(matrix)

    @property
    def slices(self) -> range | None:
        """Which slices of the parameter, along its first dimension, are the rows of the matrix when they are flattened.

        None: the rows lie in another way. Where a parameter is shared out slice by slice, so are the rows then.
        """
        return None

    def inputs(self, x: Tensor) -> Tensor:
        """What is multiplied, shape ``(*, n)``, from the input of the layer; ``(*, groups, n)`` if there are groups."""
        return x

    def samples_at_once(self, x: Tensor, entries: int) -> int | None:
        """Of how many samples :meth:`inputs` has about so many entries at most; None: the batch stays whole.

        For inputs that are much larger than what the layer is fed with. Samples are along the first dimension.
        """
        return None

    def outputs(self, y: Tensor) -> Tensor:
        """The product, shape ``(*, m)``, from the output of the layer or its gradient; leading sizes as of the inputs.

        ``(*, groups, m / groups)`` if there are groups.
        """
        return y

    @property
    def copies(self) -> int:
        """How many times each output stands in the rows of :meth:`outputs`: alone, each time in another row.

        If it is more than 1, ``sum g g^T`` over the rows has that of :meth:`distinct_outputs` in the places
        ``(i * copies + c, j * copies + c)`` and is zero elsewhere.
        """
        return 1

    def distinct_outputs(self, y: Tensor) -> Tensor:
        """As :meth:`outputs`, but each output once: shape ``(*, m / copies)``."""
        return self.outputs(y)

    @property
    def bias_size(self) -> int:
        """Entries of a bias for the outputs of this matrix."""
        return self.out_features

    def to_bias(self, shift: Tensor) -> Tensor:
        """What to add to the bias so that every product is shifted: ``shift`` has shape ``(m,)``."""
        return shift

    def fold(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Factors ``A`` (``(groups * rank, n)``) and ``B`` (``(m, rank)``) in the shapes of the low-rank module's."""
        return a, b

    def unfold(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The way back from :meth:`fold`.

        Raises:
            RuntimeError: If the shapes cannot be those of factors of this matrix.
        """
        return a, b

    def groups(self) -> Sequence["MatrixView"]:
        """A view of each group; of a layer without groups the view itself."""
        return [self]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """The matrix itself: shape ``(m, n)``, differentiable."""
        return self.matrix(self.parameter)

    def product(self) -> Product | None:
        """The two factors of a matrix of one group that has been cut already, differentiable; else None."""
        return None


class Kind(ABC):
    """One kind of layer: which modules, which matrices, which low-rank module in their place.

    A kind of your own is one subclass, made known with :func:`~lightning_prehab.kinds.register_kind`.

    Attributes:
        linear: Every matrix is applied to the last dimension of the input as it is: the time of a matrix product is the
            time of the layer.
        sparse: A sparse part can be kept beside the factors.
        pivot: A matrix can be stored in the pivot layout; see :meth:`can_pivot`.
    """

    linear: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    pivot: ClassVar[bool] = False

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Whether a module is of this kind: the exact type, since the forward pass of a subclass is not known."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why a module of this kind cannot be cut all the same, or None."""
        return None

    @abstractmethod
    def views(self, module: nn.Module, blocks: Mapping[str, int] | None = None) -> dict[str, MatrixView]:
        """The matrices by part.

        Args:
            module: A module that fits.
            blocks: Row blocks that the one matrix of the layer shall be seen as, ``{part: rows}``; None sees it whole.

        Returns:
            ``{part: view}`` in a fixed order. The part of a layer that is one matrix is ``""``; others name a child of
            the low-rank module that takes the place of the matrix.
        """

    def candidates(self, module: nn.Module, blocks: Mapping[str, int] | None = None) -> Sequence[dict[str, MatrixView]]:
        """All ways to see a layer, :meth:`views` first; their matrices differ in shape.

        Plans and stored factors say by their shapes which one they were made for.
        """
        return [self.views(module, blocks)]

    def choices(self, module: nn.Module) -> Sequence[dict[str, MatrixView]]:
        """Those of the :meth:`candidates` that planning may choose from by the predicted error, :meth:`views` first.

        There is a choice only for layers that are one matrix.
        """
        return [self.views(module)]

    @abstractmethod
    def low_rank(
        self, module: nn.Module, views: Mapping[str, MatrixView], factors: Mapping[str, Factors]
    ) -> LowRankLayer:
        """The module that takes the place of a layer.

        It shares the bias of the layer and, for matrices without factors, holds a dense child with a copy.

        Args:
            module: The layer.
            views: As from :meth:`views`.
            factors: By part, at least one.
        """

    def can_pivot(self, view: MatrixView) -> bool:
        """Whether a matrix can be stored in the pivot layout: :meth:`low_rank` is then given factors with an order."""
        return self.pivot and view.group_count == 1

    def watch(self, module: nn.Module, views: Sequence[MatrixView], see: See) -> list[RemovableHandle]:
        """Calls ``see`` whenever the layer has been called, until the handles are removed."""

        def hook(_: nn.Module, args: tuple[Any, ...], settings: dict[str, Any], output: Tensor) -> None:
            see(views, first_argument(args, settings), output)

        # A plan of tensor parallelism has a hook that leaves only the part of this process of an output.
        first = any(is_distributed(parameter) for parameter in module.parameters())
        return [module.register_forward_hook(hook, with_kwargs=True, prepend=first)]


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of a unit of FSDP2, which is of a subclass of its own (``FSDPLinear``), the class below.

    >>> plain_type(nn.Linear(2, 2)).__name__
    'Linear'
    """
    kind, unit = type(module), getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if unit is None or unit not in kind.__mro__:
        return kind
    return kind.__mro__[kind.__mro__.index(unit) + 1]


def part_of(bias: Tensor, start: int, rows: int) -> Tensor:
    """Some entries of a bias, as a view; of a sharded one, which has no such view, a tensor without values."""
    if is_distributed(bias):
        return torch.empty(rows, dtype=bias.dtype, device="meta")
    return bias.narrow(0, start, rows)


def first_argument(args: tuple[Any, ...], settings: Mapping[str, Any]) -> Tensor:
    """The input of a layer with one, however it was passed."""
    found: Tensor = args[0] if args else next(iter(settings.values()))
    return found


def not_its_own(module: nn.Module, name: str, shape: tuple[int, ...] | None) -> str | None:
    """Why a parameter of a module is not what its kind has there, or None if it is.

    Weights can be exchanged for buffers, plain tensors and flat pieces of a sharded model.

    Args:
        module: The module.
        name: Of the parameter.
        shape: That it has to have; None for one that may be missing and whose shape does not matter.
    """
    found = module._parameters.get(name)
    if name not in module._parameters or not (isinstance(found, nn.Parameter) or (found is None and shape is None)):
        return f"its {name} is no parameter"
    if found is not None and shape is not None and tuple(found.shape) != shape:
        sizes, expected = ("x".join(map(str, one)) or "()" for one in (found.shape, shape))
        return f"its {name} has the shape {sizes}, not {expected}"
    return None


@torch.no_grad()
def dense_linear(matrix: Tensor, like: nn.Parameter, training: bool) -> nn.Linear:
    """An ``nn.Linear`` without bias that holds a copy of ``matrix``."""
    rows, columns = matrix.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=like.dtype)
    linear.weight = parameter_like(matrix, like)
    return linear.train(training)
