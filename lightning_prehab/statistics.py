"""What calibration remembers of one layer: sums, so that batches, passes and processes merge exactly."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_prehab.errors import StatisticsError


class LayerStatistics:
    """Sums over the tokens that went through a layer ``y = W x + b``.

    A token is one row of the flattened input: every position of every sample, padding left out. ``g`` is the gradient
    of the loss of the token's sample with respect to ``y``.

    Args:
        in_features: ``n``, the size of ``x``.
        out_features: ``m``, the size of ``g``.
        gradients: Whether output gradients are summed too.
        device: Where the sums live (float32; the counts int64).

    Attributes:
        tokens: Number of tokens, scalar.
        samples: Number of samples of all batches seen, whether or not they reached this layer, scalar.
        input_sum: ``sum x``, shape ``(n,)``.
        input_gram: ``sum x x^T``, shape ``(n, n)``.
        gradient_gram: ``sum g g^T``, shape ``(m, m)``, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        gradients: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = torch.zeros((), dtype=torch.int64, device=device)
        self.input_sum = torch.zeros(in_features, device=device)
        self.input_gram = torch.zeros(in_features, in_features, device=device)
        self.gradient_gram = torch.zeros(out_features, out_features, device=device) if gradients else None

    def __repr__(self) -> str:
        gradients = self.gradient_gram is not None
        return (
            f"LayerStatistics({self.in_features} -> {self.out_features}, tokens={int(self.tokens)}, "
            f"samples={int(self.samples)}, gradients={gradients})"
        )

    @torch.no_grad()
    def update_inputs(self, x: Tensor) -> None:
        """Adds tokens: ``x`` of shape ``(tokens, n)``, any floating dtype."""
        x = x.to(self.input_gram.dtype)
        self.tokens += x.shape[0]
        self.input_sum += x.sum(0)
        self.input_gram.addmm_(x.mT, x)

    @torch.no_grad()
    def update_gradients(self, g: Tensor) -> None:
        """Adds output gradients: ``g`` of shape ``(tokens, m)``, any floating dtype.

        Raises:
            StatisticsError: If the object was made without ``gradients=True``.
        """
        if self.gradient_gram is None:
            raise StatisticsError("These statistics were made without output gradients; use gradients=True.")
        g = g.to(self.gradient_gram.dtype)
        self.gradient_gram.addmm_(g.mT, g)

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

    def missing(self, *, gradients: bool) -> str | None:
        """Why a data-driven factorization cannot use these sums, or None if it can."""
        if int(self.tokens) == 0:
            what = "no input with a gradient" if gradients else "no input"
            return f"{what} reached it during calibration"
        if float(self.input_gram.diagonal().sum()) == 0.0:
            return "its input was zero during calibration"
        if gradients and self.gradient_gram is None:
            return "its output gradients were not collected"
        if gradients and self.gradient_gram is not None and float(self.gradient_gram.diagonal().sum()) == 0.0:
            return "no output gradient reached it during calibration (frozen part of the model?)"
        return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all sums; whoever adds them over processes in place merges the statistics."""
        for name in ("tokens", "samples", "input_sum", "input_gram", "gradient_gram"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

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
        mine, theirs = dict(self.tensors()), dict(other.tensors())
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
            raise StatisticsError(f"Cannot merge {other!r} into {self!r}: they describe different layers.")
        for name, tensor in mine.items():
            tensor.add_(theirs[name].to(tensor.device))
        return self

    @staticmethod
    def _count(count: Tensor, what: str) -> Tensor:
        if int(count) == 0:
            raise StatisticsError(f"No {what} was seen; the statistics are empty.")
        return count
