"""What calibration remembers of one layer: sums, so that batches, passes and processes merge exactly."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prehab.errors import StatisticsError
from lightning_prehab.linalg.matrices import working_dtype
from lightning_prehab.statistics.sampling import gram, sample, sample_by_energy

#: Sums over inputs, which layers that are fed by the same tensor may share.
_INPUT_SUMS = ("tokens", "input_sum", "input_absolute_sum", "input_gram")
_SUMS = (*_INPUT_SUMS, "samples", "gradient_gram", "weight_gradient", "fisher_rows", "fisher_columns")


class Wanted(NamedTuple):
    """What calibration has to collect.

    Attributes:
        inputs: Input sums.
        gradients: ``sum g g^T``.
        weight_gradients: Sums of the weight gradients of the batches and of their squares.
        halves: The sums of every other batch alone too.
        magnitudes: ``sum |x|``.
        gradient_trim: Share of each sequence, at both ends, that ``sum g g^T`` leaves out.
        gradient_clip: How many times the median norm of a batch a ``g`` may be long in it, or None.
    """

    inputs: bool = False
    gradients: bool = False
    weight_gradients: bool = False
    halves: bool = False
    magnitudes: bool = False
    gradient_trim: float = 0.0
    gradient_clip: float | None = None

    @property
    def backward(self) -> bool:
        """Whether a backward pass is needed."""
        return self.gradients or self.weight_gradients

    @property
    def aligned(self) -> bool:
        """Whether it has to be known which output gradient belongs to which input."""
        return self.weight_gradients or self.gradient_trim > 0.0

    def union(self, other: "Wanted") -> "Wanted":
        """What both want; of two settings for gradients, the first one's."""
        return Wanted._make(mine or theirs for mine, theirs in zip(self, other, strict=True))


class InputSums(NamedTuple):
    """What some tokens add to the statistics of a layer that they are fed to.

    Attributes:
        tokens: Their number.
        total: ``sum x``, shape ``(n,)``.
        absolute: ``sum |x|``, shape ``(n,)``, or 0 if it is not wanted.
        gram: ``sum x x^T``, shape ``(n, n)``.
    """

    tokens: int
    total: Tensor
    absolute: Tensor | float
    gram: Tensor

    def plus(self, other: "InputSums") -> "InputSums":
        """The sums over the tokens of both."""
        return InputSums(
            self.tokens + other.tokens,
            self.total + other.total,
            self.absolute + other.absolute,
            self.gram + other.gram,
        )

    def times(self, factor: float) -> "InputSums":
        """The sums over more tokens, of which these are the ones that were looked at."""
        return InputSums(self.tokens, self.total * factor, self.absolute * factor, self.gram.mul_(factor))


class LayerStatistics:
    """Sums over the tokens that went through a layer ``y = W x + b``.

    A token is one row of the flattened input: every position of every sample, padding left out. ``g`` is the gradient
    of the loss of the token's sample with respect to ``y``.

    Args:
        in_features: ``n``, the size of ``x``.
        out_features: ``m``, the size of ``g``.
        gradients: Whether output gradients are summed too.
        weight_gradients: Whether weight gradients and their squares are summed too.
        halves: Whether the sums of every other batch are kept apart too, in ``half``.
        magnitudes: Whether absolute values of the inputs are summed too.
        device: Where the sums live.
        dtype: Of the sums; the counts are int64.

    Attributes:
        tokens: Number of tokens, scalar.
        samples: Number of samples of all batches seen, whether or not they reached this layer, scalar.
        input_sum: ``sum x``, shape ``(n,)``.
        input_absolute_sum: ``sum |x|``, shape ``(n,)``, or None.
        input_gram: ``sum x x^T``, shape ``(n, n)``.
        gradient_gram: ``sum g g^T``, shape ``(m, m)``, or None.
        weight_gradient: Gradient of the loss summed over the samples, shape ``(m, n)``, or None.
        fisher_rows: Squared weight gradients of the batches, summed over batches and columns, shape ``(m,)``, or None.
        fisher_columns: The same, summed over batches and rows, shape ``(n,)``, or None.
        half: Statistics of every other batch, or None.
    """

    weight_gradient: Tensor | None
    fisher_rows: Tensor | None
    fisher_columns: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        gradients: bool = False,
        weight_gradients: bool = False,
        halves: bool = False,
        magnitudes: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        m, n = out_features, in_features
        self.in_features = in_features
        self.out_features = out_features
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = torch.zeros((), dtype=torch.int64, device=device)
        self.input_sum = torch.zeros(n, dtype=dtype, device=device)
        self.input_absolute_sum = torch.zeros(n, dtype=dtype, device=device) if magnitudes else None
        self.input_gram = torch.zeros(n, n, dtype=dtype, device=device)
        self.gradient_gram = torch.zeros(m, m, dtype=dtype, device=device) if gradients else None
        self.weight_gradient = torch.zeros(m, n, dtype=dtype, device=device) if weight_gradients else None
        self.fisher_rows = torch.zeros(m, dtype=dtype, device=device) if weight_gradients else None
        self.fisher_columns = torch.zeros(n, dtype=dtype, device=device) if weight_gradients else None
        self.half = None
        if halves:
            self.half = LayerStatistics(n, m, gradients=gradients, magnitudes=magnitudes, device=device, dtype=dtype)

    def __repr__(self) -> str:
        gradients = self.gradient_gram is not None
        return (
            f"LayerStatistics({self.in_features} -> {self.out_features}, tokens={int(self.tokens)}, "
            f"samples={int(self.samples)}, gradients={gradients})"
        )

    @torch.no_grad()
    def update_inputs(self, x: Tensor) -> None:
        """Adds tokens: ``x`` of shape ``(tokens, n)``, any floating dtype."""
        self.add_inputs(input_sums(x))

    @torch.no_grad()
    def add_inputs(self, sums: "InputSums") -> None:
        """Adds what :func:`input_sums` has made of some tokens."""
        self.tokens += sums.tokens
        self.input_sum += sums.total
        if self.input_absolute_sum is not None:
            self.input_absolute_sum += sums.absolute
        self.input_gram += sums.gram

    @torch.no_grad()
    def update_gradients(self, g: Tensor) -> None:
        """Adds output gradients: ``g`` of shape ``(tokens, m)``, any floating dtype.

        Raises:
            StatisticsError: If the object was made without ``gradients=True``.
        """
        self.add_gradient_gram(gradient_gram(g))

    @torch.no_grad()
    def add_gradient_gram(self, gram: Tensor, copies: int = 1) -> None:
        """Adds what :func:`gradient_gram` has made of some tokens.

        Args:
            gram: Shape ``(m / copies, m / copies)``.
            copies: See :attr:`lightning_prehab.kinds.MatrixView.copies`.

        Raises:
            StatisticsError: If the object was made without ``gradients=True``.
        """
        if self.gradient_gram is None:
            raise StatisticsError("These statistics were made without output gradients; use gradients=True.")
        if copies == 1:
            self.gradient_gram += gram
        else:
            blocks = self.gradient_gram.view(len(gram), copies, len(gram), copies)
            blocks.diagonal(dim1=1, dim2=3).add_(gram[..., None])

    @torch.no_grad()
    def update_weight_gradient(self, gradient: Tensor, samples: int) -> None:
        """Adds the weight gradient of the mean loss of a batch: shape ``(m, n)``.

        Raises:
            StatisticsError: If the object was made without ``weight_gradients=True``.
        """
        if self.weight_gradient is None or self.fisher_rows is None or self.fisher_columns is None:
            raise StatisticsError("These statistics were made without weight gradients; use weight_gradients=True.")
        gradient = gradient.to(self.weight_gradient.dtype)
        self.weight_gradient.add_(gradient, alpha=samples)
        square = gradient.square()
        self.fisher_rows += square.sum(1)
        self.fisher_columns += square.sum(0)

    def add_samples(self, count: int) -> None:
        """Counts the samples of one batch."""
        self.samples += count

    def input_second_moment(self) -> Tensor:
        """``C = E[x x^T]`` per token, shape ``(n, n)``.

        Raises:
            StatisticsError: If no token was seen.
        """
        return self.input_gram / self._count(self.tokens, "input")

    def input_mean(self) -> Tensor:
        """``mu = E[x]`` per token, shape ``(n,)``.

        Raises:
            StatisticsError: If no token was seen.
        """
        return self.input_sum / self._count(self.tokens, "input")

    def input_mean_absolute(self) -> Tensor:
        """``E[|x|]`` per token, shape ``(n,)``.

        Raises:
            StatisticsError: If no token was seen, or magnitudes were not collected.
        """
        if self.input_absolute_sum is None:
            raise StatisticsError("Magnitudes were not collected; collect statistics with wanted=factorization.wanted.")
        return self.input_absolute_sum / self._count(self.tokens, "input")

    def gradient_second_moment(self) -> Tensor:
        """``G = E[sum over the tokens of a sample of g g^T]``, shape ``(m, m)``.

        Divided by samples, not by tokens: the curvature of the loss in ``W`` is then about ``G (x) C`` in one unit for
        all layers, also when some see a whole sequence and others one pooled token (K-FAC for shared weights,
        Eschenhagen et al., 2023, https://arxiv.org/abs/2311.00636).

        Raises:
            StatisticsError: If gradients were not collected or no sample was seen.
        """
        if self.gradient_gram is None:
            raise StatisticsError("Output gradients were not collected; collect statistics with gradients=True.")
        return self.gradient_gram / self._count(self.samples, "sample")

    def mean_weight_gradient(self) -> Tensor:
        """Gradient of the mean loss in the weight, shape ``(m, n)``.

        Raises:
            StatisticsError: If weight gradients were not collected or no sample was seen.
        """
        if self.weight_gradient is None:
            raise StatisticsError(_NO_WEIGHT_GRADIENTS)
        return self.weight_gradient / self._count(self.samples, "sample")

    def fisher(self) -> tuple[Tensor, Tensor]:
        """Row and column sums of the squared weight gradients, shapes ``(m,)`` and ``(n,)``, summed over batches.

        Raises:
            StatisticsError: If weight gradients were not collected.
        """
        if self.fisher_rows is None or self.fisher_columns is None:
            raise StatisticsError(_NO_WEIGHT_GRADIENTS)
        return self.fisher_rows, self.fisher_columns

    def missing(self, wanted: Wanted) -> str | None:
        """Why a method that wants these sums cannot use them, or None if it can."""
        if int(self.tokens) == 0:
            what = "no input with a gradient" if wanted.backward else "no input"
            return f"{what} reached it during calibration (unused, frozen, or its weight is used without calling it)"
        if float(self.input_gram.diagonal().sum()) == 0.0:
            return "its input was zero during calibration"
        lacking = "no output gradient reached it during calibration (frozen part of the model?)"
        if wanted.gradients:
            if self.gradient_gram is None:
                return "its output gradients were not collected"
            if float(self.gradient_gram.diagonal().sum()) == 0.0:
                return lacking
        if wanted.weight_gradients:
            if self.fisher_rows is None:
                return "its weight gradients were not collected"
            if float(self.fisher_rows.sum()) == 0.0:
                return lacking
        if wanted.magnitudes and self.input_absolute_sum is None:
            return "the magnitudes of its inputs were not collected"
        if wanted.halves and self.half is not None and int(self.half.tokens) in (0, int(self.tokens)):
            return "to see how noisy its statistics are, it must be reached in even and in odd batches"
        return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all sums; whoever adds them over processes in place merges the statistics."""
        for name in _SUMS:
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor
        if self.half is not None:
            yield from ((f"half.{name}", tensor) for name, tensor in self.half.tensors())

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all sums by name: plain tensors for a checkpoint."""
        return {name: tensor.clone() for name, tensor in self.tensors()}

    @torch.no_grad()
    def restore_(self, sums: Mapping[str, Tensor]) -> "LayerStatistics":
        """Takes over the sums of a :meth:`snapshot`.

        Raises:
            StatisticsError: If they belong to another layer.
        """
        mine = dict(self.tensors())
        if {name: tensor.shape for name, tensor in mine.items()} != {name: t.shape for name, t in sums.items()}:
            raise StatisticsError(f"The stored sums do not belong to {self!r}.")
        for name, tensor in mine.items():
            tensor.copy_(sums[name])
        return self

    @torch.no_grad()
    def merge_(self, other: "LayerStatistics") -> "LayerStatistics":
        """Adds the sums of ``other``, seen elsewhere on the same layer.

        Raises:
            StatisticsError: If the shapes differ or only one of the two has gradients.
        """
        self.unshare_inputs_()
        mine, theirs = dict(self.tensors()), dict(other.tensors())
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
            raise StatisticsError(f"Cannot merge {other!r} into {self!r}: they describe different layers.")
        for name, tensor in mine.items():
            tensor.add_(theirs[name].to(tensor.device))
        return self

    def same_inputs(self, other: "LayerStatistics") -> bool:
        """Whether both have seen the same inputs so far, by their sums."""
        names = [name for name in _INPUT_SUMS if getattr(self, name) is not None and getattr(other, name) is not None]
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        if (self.half is None) != (other.half is None):
            return False
        halves = self.half is None or other.half is None or self.half.same_inputs(other.half)
        return halves and all(mine.shape == theirs.shape and torch.equal(mine, theirs) for mine, theirs in pairs)

    def share_inputs_(self, leader: "LayerStatistics") -> None:
        """Lets go of the own input sums: from now on they are those of ``leader``, which is fed by the same tensor."""
        for name in _INPUT_SUMS:
            setattr(self, name, getattr(leader, name))
        if self.half is not None and leader.half is not None:
            self.half.share_inputs_(leader.half)

    def unshare_inputs_(self) -> None:
        """Makes the input sums the own ones again: copies of the common ones."""
        for name in _INPUT_SUMS:
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).clone())
        if self.half is not None:
            self.half.unshare_inputs_()

    @staticmethod
    def _count(count: Tensor, what: str) -> Tensor:
        if int(count) == 0:
            raise StatisticsError(f"No {what} was seen; the statistics are empty.")
        return count


_NO_WEIGHT_GRADIENTS = "Weight gradients were not collected; collect statistics with gradients=True."


def statistics_bytes(shapes: Iterable[tuple[int, int]], wanted: Wanted, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that the sums of some layers take at most; layers fed by the same tensor share some of them.

    Args:
        shapes: ``(out_features, in_features)`` of each layer.
        wanted: What is collected.
        dtype: Of the sums.

    >>> statistics_bytes([(10, 10)], Wanted(inputs=True)) // 4  # 10 x 10 and a sum of 10
    110
    """
    entries = 0
    for m, n in shapes:
        moments = n * n + (2 * n if wanted.magnitudes else n) + (m * m if wanted.gradients else 0)
        entries += moments * (2 if wanted.halves else 1) + (m * n + m + n if wanted.weight_gradients else 0)
    return dtype.itemsize * entries


@torch.no_grad()
def input_sums(x: Tensor, at_most: int | None = None, *, magnitudes: bool = True, turn: int = 0) -> InputSums:
    """Sums over tokens, in float32; in float64 if the tokens are.

    Args:
        x: Shape ``(tokens, n)``, any floating dtype.
        at_most: Estimate the Gram matrix from so many tokens, and the other sums from some more; see
            :mod:`lightning_prehab.statistics.sampling`. All are counted.
        magnitudes: Whether to sum absolute values too.
        turn: Number of the batch.
    """
    tokens = x.shape[0]
    x, factor = sample(x, at_most, turn)
    total = x.sum(0, dtype=working_dtype(x.dtype))
    absolute = x.abs().sum(0, dtype=working_dtype(x.dtype)) if magnitudes else 0
    found = InputSums(tokens, total, absolute, gram(sample_by_energy(x, at_most)))
    return found if factor == 1.0 else found.times(factor)


@torch.no_grad()
def gradient_gram(g: Tensor, at_most: int | None = None, turn: int = 0) -> Tensor:
    """``sum g g^T``, shape ``(m, m)``; dtype and arguments as for :func:`input_sums`."""
    g, factor = sample(g, at_most, turn)
    found = gram(sample_by_energy(g, at_most))
    return found if factor == 1.0 else found.mul_(factor)
