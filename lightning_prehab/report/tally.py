"""What one pass over some batches tells of a model, and how to make a score of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_prehab.report.scores import TOKENS, Score
from lightning_prehab.statistics.batches import batch_size
from lightning_prehab.statistics.outputs import Fit, are_expected, fit_to_labels, fit_to_next_tokens

#: What logits can be compared with: labels as they stand, labels that stand one position later, tokens of the input.
FITS: dict[str, Callable[[Tensor, Any], Fit | None]] = {
    "labels": fit_to_labels,
    "next labels": lambda logits, batch: fit_to_labels(logits, batch, shift=True),
    "next tokens": fit_to_next_tokens,
}
#: Ways to score beside these: by the loss that the model gives itself, and by what becomes of the outputs.
LOSS, OUTPUTS = "loss", "outputs"
#: The mean cross-entropy of labels may be so far from a loss, relatively, and still be what the loss is.
SAME = 0.01


@dataclass
class Tally:
    """What is seen of a model in one pass over some batches.

    Attributes:
        ways: Keys of ``FITS``: what the logits are compared with.
        sizes: Rows of each batch.
        losses: The loss of each batch that the model or the user's function gives, or None.
        fits: For each way those of each batch, or None.
    """

    ways: Iterable[str] = tuple(FITS)
    sizes: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    fits: dict[str, list[Fit | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fits = {way: [] for way in self.ways}

    @property
    def rows(self) -> int:
        """Of all batches."""
        return sum(self.sizes)

    def add(self, loss: Tensor | None, logits: Tensor | None, batch: Any) -> None:
        """Takes in one batch."""
        self.sizes.append(batch_size(batch))
        self.losses.append(None if loss is None else float(loss.detach()))
        for way, found in self.fits.items():
            found.append(None if logits is None else FITS[way](logits, batch))

    def way(self, model: nn.Module) -> str:
        """How the model, which has been looked at in all ways, is to be scored."""
        if None not in self.losses:
            distances = {way: self._distance(way) for way in self.fits}
            nearest = min(distances, key=lambda way: distances[way])
            return nearest if distances[nearest] <= SAME else LOSS
        if self._sum("labels").count:
            return "labels"
        text = self._sum("next tokens")
        return "next tokens" if text.count and (are_expected(text) or _generates(model)) else OUTPUTS

    def score(self, way: str, data: str) -> Score:
        """The score, in one of the ways but the outputs."""
        labels = self._sum("labels") if "labels" in self.fits else None
        if way == LOSS:
            pairs = zip(self.losses, self.sizes, strict=True)
            loss = sum(loss * size for loss, size in pairs if loss is not None) / self.rows
            known = labels is not None and labels.count == self.rows  # one for each row
            return Score(loss, self.rows, "rows", labels.hits / labels.count if known and labels else None, data=data)
        found = self._sum(way)
        accuracy = found.hits / found.count if way == "labels" else None
        unit = "labels" if way == "labels" else TOKENS
        return Score(found.loss / found.count, found.count, unit, accuracy, data=data)

    def _sum(self, way: str) -> Fit:
        return sum((fit for fit in self.fits[way] if fit is not None), Fit())

    def _distance(self, way: str) -> float:
        """How far the means of one way are from the given losses, relatively; infinite if there are none to compare."""
        off = total = 0.0
        for loss, fit in zip(self.losses, self.fits[way], strict=True):
            if loss is None or fit is None or fit.count == 0:
                return float("inf")
            off, total = off + abs(fit.loss / fit.count - loss), total + abs(loss)
        return off / total if total else float("inf")


def _generates(model: nn.Module) -> bool:
    """Whether a model says itself that it goes on with a text, as those of transformers do."""
    generates = getattr(model, "can_generate", None)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return callable(generates) and bool(generates()) and not encodes
