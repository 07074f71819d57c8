"""What a model is worth on some data, before a compression and after it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_prehab.documents import settings
from lightning_prehab.errors import CheckpointError

#: The unit of a loss that is the cross-entropy of a text's next tokens, in nats: its exponential is a perplexity.
TOKENS = "tokens"


@dataclass(frozen=True)
class Score:
    """What one model is worth on some data; what is not known is None.

    Attributes:
        loss: Mean over ``count`` of what ``unit`` says; lower is better.
        count: How many entries the means are over.
        unit: ``"tokens"`` (each predicted from those before it: a language model), ``"labels"`` or ``"rows"``.
        accuracy: Share of the labels that are the most likely class, in [0, 1].
        output_error: Where there is neither a loss nor labels: ``|y - y'| / |y|``, how far the outputs are from those
            of the dense model; 0 for the dense model itself.
        data: Where it was measured, such as ``"34 held-back rows"``.
    """

    loss: float | None
    count: int
    unit: str = "rows"
    accuracy: float | None = None
    output_error: float | None = None
    data: str = ""

    @property
    def perplexity(self) -> float | None:
        """``exp(loss)`` of a language model; None for other models.

        >>> Score(0.0, 100, "tokens").perplexity, Score(0.0, 100, "rows").perplexity
        (1.0, None)
        """
        if self.loss is None or self.unit != TOKENS:
            return None
        return math.exp(self.loss) if self.loss < 700.0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON; the perplexity is for readers alone."""
        perplexity = self.perplexity
        return {
            "loss": self.loss,
            "count": self.count,
            "unit": self.unit,
            "accuracy": self.accuracy,
            "output_error": self.output_error,
            "perplexity": None if perplexity is None or math.isinf(perplexity) else perplexity,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "") -> "Score":
        """What :meth:`to_dict` has written.

        Args:
            data: Its keys; those that are missing are not known.
            where: On what data it was measured.
        """
        known = {name: data.get(name) for name in ("loss", "accuracy", "output_error")}
        numbers = {name: None if value is None else float(value) for name, value in known.items()}
        return cls(count=int(data["count"]), unit=str(data["unit"]), data=where, **numbers)


@dataclass(frozen=True)
class Scores:
    """What a model is worth on some data before and after a compression, both measured the same way.

    Attributes:
        before: Of the dense model.
        after: Of the compressed one.
    """

    before: Score
    after: Score

    @property
    def data(self) -> str:
        """Where both were measured, such as ``"34 held-back rows"``; empty if nobody has said."""
        return self.before.data

    def summary(self) -> str:
        """All of it in one line.

        >>> Scores(Score(3.2347, 8000, "tokens", data="34 held-back rows"), Score(3.5056, 8000, "tokens")).summary()
        'perplexity 25.4 -> 33.3 on 34 held-back rows'
        >>> Scores(Score(0.31, 500, "labels", 0.912), Score(0.33, 500, "labels", 0.908)).summary()
        'accuracy 91.2 % -> 90.8 %, loss 0.310 -> 0.330'
        """
        text = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in self.lines().items())
        if self.before.output_error is not None and self.after.output_error is not None:
            text = ", ".join(filter(None, [text, f"outputs differ by {_percent(self.after.output_error)}"]))
        return f"{text} on {self.data}" if self.data else text

    def lines(self) -> dict[str, tuple[str, str]]:
        """``{name: (before, after)}``, each as it is shown: ``perplexity``, ``accuracy`` and ``loss``, if known.

        A perplexity stands for its loss.
        """
        found = {}
        for name, show in (("perplexity", show_number), ("accuracy", _percent), ("loss", show_number)):
            before, after = getattr(self.before, name), getattr(self.after, name)
            if before is not None and after is not None and not (name == "loss" and "perplexity" in found):
                found[name] = show(before), show(after)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {"data": self.data, "before": self.before.to_dict(), "after": self.after.to_dict()}

    @classmethod
    def from_dict(cls, data: object) -> "Scores":
        """What :meth:`to_dict` has written.

        Raises:
            CheckpointError: If it is something else.
        """
        try:
            if not isinstance(data, Mapping):
                raise CheckpointError(f"These are not scores, but {settings.show(data)}.")
            where = str(data.get("data", ""))
            return cls(Score.from_dict(data["before"], where), Score.from_dict(data["after"], where))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"These are not whole scores ({type(error).__name__}: {error}).") from error


def show_number(value: float) -> str:
    """Three digits for people.

    >>> [show_number(value) for value in (0.0, 0.00123, 0.31, 25.4321, 1234.5, 64.2e6, math.inf)]
    ['0', '0.00123', '0.310', '25.4', '1,234', '6.42e7', 'inf']
    """
    size = abs(value)
    if size == 0.0 or not math.isfinite(value):
        return f"{value:.0f}"
    if not 1e-4 <= size < 1e6:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:,.{max(2 - math.floor(math.log10(size)), 0)}f}"


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"
