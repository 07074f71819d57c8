"""What a model returns: a loss, logits, and how well labels are predicted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.errors import NumericalError
from lightning_prehab.statistics.batches import IGNORED, padding_mask, tensors
from lightning_prehab.statistics.divergence import in_parts, wide

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def loss_in(output: Any) -> Tensor | None:
    """The loss: a scalar output, or the output's ``.loss``, which may have one entry; None if there is none."""
    if isinstance(output, Tensor):
        return output if output.dim() == 0 else None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def logits_in(output: Any) -> Tensor | None:
    """Logits of shape ``(..., classes)``: the output itself, or its ``.logits``; None if there are none."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    return found if isinstance(found, Tensor) and found.dim() >= 2 and found.shape[-1] >= 2 else None


def main_tensor(output: Any) -> Tensor | None:
    """What a model is asked for: its logits, or the first floating tensor of two dimensions or more."""
    found = logits_in(output)
    if found is None:
        found = next((one for one in tensors(output) if one.is_floating_point() and one.dim() >= 2), None)
    return None if found is None else found.detach()


@dataclass(frozen=True)
class Fit:
    """How well some labels are predicted: sums over them.

    Attributes:
        loss: Cross-entropy in nats.
        entropy: Of the predictions: the cross-entropy that the model itself expects.
        hits: How many labels are the most likely class.
        count: How many there are.
    """

    loss: float = 0.0
    entropy: float = 0.0
    hits: int = 0
    count: int = 0

    def __add__(self, other: "Fit") -> "Fit":
        """Of the labels of both."""
        sums = self.loss + other.loss, self.entropy + other.entropy
        return Fit(*sums, self.hits + other.hits, self.count + other.count)

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Fit":
        """Of logits of shape ``(count, classes)`` to labels of shape ``(count,)``."""
        loss = entropy = 0.0
        hits = 0
        parts = in_parts(logits)
        for rows, right in zip(parts, torch.split(labels, [len(part) for part in parts]), strict=True):
            logs = rows.to(wide(rows)).log_softmax(-1)
            loss -= float(logs.gather(1, right[:, None]).sum())
            entropy -= float((logs.exp() * logs).sum())
            hits += int((logs.argmax(-1) == right).sum())
        return cls(loss, entropy, hits, len(labels))


def next_token_loss(logits: Tensor, batch: Any) -> tuple[float, bool] | None:
    """How well each token of a text is predicted from those before it, where this is what a model does.

    Args:
        logits: Shape ``(batch, positions, classes)``.
        batch: With the tokens of shape ``(batch, positions)``; its ``attention_mask`` leaves positions out.

    Returns:
        The mean cross-entropy in nats, and whether it is about what the model itself expects (the entropy of its
        predictions): what says that it has learned to do this, and not to classify tokens or to fill gaps. None if the
        batch holds no such tokens.
    """
    found = fit_to_next_tokens(logits, batch)
    if found is None or found.count == 0:
        return None
    return found.loss / found.count, are_expected(found)


def fit_to_next_tokens(logits: Tensor, batch: Any) -> Fit | None:
    """As for :func:`next_token_loss`; None if the batch holds no tokens."""
    tokens = next((found for found in tensors(batch) if _are_tokens(found, logits)), None)
    if tokens is None:
        return None
    mask = padding_mask(batch)
    seen = torch.ones_like(tokens, dtype=torch.bool) if mask is None or mask.shape != tokens.shape else mask
    seen = seen[:, 1:] & seen[:, :-1]
    return Fit.of(logits[:, :-1][seen], tokens[:, 1:][seen].long())


def are_expected(found: Fit) -> bool:
    """Whether a loss is about what the model itself expects: it has learned to predict such labels."""
    return found.loss <= 2.0 * found.entropy + 0.5 * found.count


def fit_to_labels(logits: Tensor, batch: Any, shift: bool = False) -> Fit | None:
    """How well the labels of a batch are predicted; those that are -100 are left out.

    Args:
        logits: Shape ``(..., classes)``.
        batch: A mapping with ``labels`` (or ``label``), or a pair whose second part they are: integers of the shape
            ``(...)``.
        shift: Each label stands one position after the logits that predict it, as for a language model.

    Returns:
        None if there are no such labels.
    """
    labels = labels_in(batch)
    if labels is None or labels.shape != logits.shape[:-1] or (shift and labels.dim() != 2):
        return None
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = labels != IGNORED
    labels, logits = labels[asked].long(), logits[asked]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        return None
    return Fit.of(logits, labels)


def labels_in(batch: Any) -> Tensor | None:
    """``labels`` (or ``label``) of a mapping, or the second part of a pair, if they are whole numbers; else None."""
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in ("labels", "label") if name in batch), None)
    else:
        found = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    whole = isinstance(found, Tensor) and found.dtype in _WHOLE
    return found if whole else None


def _are_tokens(found: Tensor, logits: Tensor) -> bool:
    if found.dtype not in (torch.int32, torch.int64) or logits.dim() != 3 or found.shape != logits.shape[:-1]:
        return False
    return found.shape[1] > 1 and int(found.min()) >= 0 and int(found.max()) < logits.shape[-1]


def require_finite_output(output: Tensor, what: str) -> None:
    """Raises :class:`NumericalError` for NaN or Inf."""
    if not bool(torch.isfinite(output).all()):
        raise NumericalError(f"{what} holds NaN or Inf; check the batches and the model's precision.")
