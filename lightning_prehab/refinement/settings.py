"""How a cut model is trained toward the dense one."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

from lightning_prehab.documents import settings
from lightning_prehab.documents.checks import check_real, check_seed, check_whole
from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.rank_policies.base import check_choice

Scope = Literal["model", "blocks"]
Measure = Literal["divergence", "squared"]
Precision = Literal["auto", "full", "half"]

#: Steps by scope; of ``"blocks"``, for each of them.
STEPS = {"model": 128, "blocks": 32}
#: Learning rates by scope; of the model at a divergence of one nat.
RATES = {"model": 2e-4, "blocks": 5e-4}
#: The rate of the model goes with this power of smaller divergences, and is at least this share.
POWER, LEAST = 2 / 3, 0.1


@dataclass(frozen=True)
class Refinement:
    """Training without labels right after the cut: the cut model learns to answer as the dense one did.

    Factors, norms and biases are trained, also frozen ones, which stay marked as frozen; all other weights stay. Each
    step takes some rows of the batches, in an order of its own; AdamW without weight decay, the learning rate rises
    over the first tenth of the steps and falls as a cosine to a tenth of it, gradients are clipped to norm 1, dropout
    is off. A part of the rows is held back to measure on: the best state is kept, and what is not better than right
    after the cut is undone.

    Args:
        steps: Of training, at least 1; for scope ``"blocks"`` in each block. None means 128, for blocks 32.
        scope: ``"model"`` trains all at once toward the outputs of the dense model: the divergence of its logits, or
            the squared error of outputs that are none (self-referential distillation after SVD: SparseKD, 2026,
            https://arxiv.org/abs/2602.00372). ``"blocks"`` trains one block after the other, each to give on the
            compressed network's inputs what its dense form gives on the dense network's (AA-SVD, 2026,
            https://arxiv.org/abs/2604.02119): worse at equal time, with the gradients of one block in memory. None
            takes the first where gradients and optimizer states fit into memory.
        lr: Largest learning rate. None means 5e-4 for blocks, and 2e-4 for the model; where its divergence is measured,
            that times ``min(1, divergence) ** (2/3)``, at least a tenth: what steps cost in noise must be less than
            what the cut has cost.
            (On SmolLM2 5e-5, 1e-4, 2e-4 were good where the cut had cost 0.14, 0.56, 1.2 nats, and 2e-4 won none of
            the 0.14 back; one draw each.)
        rows: Of a batch that a step takes; None means about 2,048 tokens of text, and whole batches of other data.
        held_back: Share of the rows to measure on, in ``(0, 1)``; never more than four steps take.
        measure: ``"divergence"`` takes outputs for logits, ``"squared"`` for numbers. None tells by the model: logits
            are an output's ``.logits``, and a tensor that fits to class labels or tokens in the batch.
        precision: ``"half"`` computes in bfloat16 (weights stay in float32), ``"full"`` does not; ``"auto"`` where the
            device is fast at it.
        checkpointing: Compute activations of blocks twice rather than keep them; None where memory is short.
        patience: End after so many measurements, of at most eight over the course, without a new best, at least 1. With
            8 all steps are made: the last ones, at a low rate, may bring back what the first ones have cost.
        seed: Of the order of the rows.

    Raises:
        ArgumentError: If a value is out of range.

    >>> Refinement(64, lr=1e-4)
    Refinement(steps=64, scope=None, lr=0.0001, rows=None, held_back=0.125, measure=None, precision='auto', \
checkpointing=None, patience=8, seed=0)
    """

    steps: int | None = None
    _: KW_ONLY
    scope: Scope | None = None
    lr: float | None = None
    rows: int | None = None
    held_back: float = 0.125
    measure: Measure | None = None
    precision: Precision = "auto"
    checkpointing: bool | None = None
    patience: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1, optional=True)
        check_real("lr", self.lr, "(0, inf)", optional=True)
        check_whole("rows", self.rows, 1, optional=True)
        check_real("held_back", self.held_back, "(0, 1)")
        for name, choices in (("scope", Scope), ("measure", Measure)):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), get_args(choices))
        check_choice("precision", self.precision, get_args(Precision))
        if self.checkpointing is not None and not isinstance(self.checkpointing, bool):
            raise ArgumentError(f"checkpointing must be True, False or None, got {settings.show(self.checkpointing)}.")
        check_whole("patience", self.patience, 1)
        check_seed("seed", self.seed)

    @classmethod
    def of(cls, wish: "Refinement | bool | int | None") -> "Refinement | None":
        """What ``refine=`` stands for: True is the default one, a number its steps, None and False none.

        Raises:
            ArgumentError: If it is something else.

        >>> Refinement.of(True) == Refinement(), Refinement.of(16).steps, Refinement.of(False)
        (True, 16, None)
        """
        if wish is None or wish is False:
            return None
        if wish is True:
            return cls()
        if isinstance(wish, cls):
            return wish
        if isinstance(wish, int):
            return cls(wish)
        hint = f"; write {wish.__name__}(...)" if isinstance(wish, type) else ""
        raise ArgumentError(f"refine must be a Refinement, True or a number of steps, got {settings.show(wish)}{hint}.")

    def steps_in(self, scope: str) -> int:
        """Steps of the model, or of each block."""
        return STEPS[scope] if self.steps is None else self.steps

    def rate_in(self, scope: str, divergence: float | None = None) -> float:
        """The largest learning rate, where the cut has cost so much; None where that is not known.

        >>> [f"{Refinement().rate_in('model', cost):.1e}" for cost in (None, 1.2, 0.56, 0.14, 0.001)]
        ['2.0e-04', '2.0e-04', '1.4e-04', '5.4e-05', '2.0e-05']
        """
        if self.lr is not None:
            return self.lr
        return RATES[scope] * (1.0 if divergence is None else max(min(divergence, 1.0) ** POWER, LEAST))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for YAML."""
        described: dict[str, Any] = settings.describe(self)["init_args"]
        return described

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Refinement":
        """What :meth:`to_dict` has written, or a part of it.

        Raises:
            ArgumentError: If something is wrong; the key and the value are named.
        """
        try:
            return settings.make(cls, data, "Refinement")
        except PlanError as error:
            raise ArgumentError(str(error)) from error
