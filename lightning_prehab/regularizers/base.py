"""What the regularizers of a shelf have in common: penalties are added to the loss, shrinkages applied to weights."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_prehab.linalg.rows import Rows
from lightning_prehab.regularizers.metric import IDENTITY, Metric

#: What a regularizer remembers of one layer between steps (warm starts, projectors, the age of what it caches). Owned
#: by the caller, empty at first; tensors only, so that it can stand in a checkpoint.
Memory = dict[str, Tensor]


class Penalty(ABC):
    """A differentiable scalar of a matrix. Subclasses are frozen dataclasses that check their own fields.

    A subclass need not know of metrics; one that does can save products by overriding :meth:`in_metric`, which is what
    training asks. A subclass that overrides the call alone is asked through the call, whatever its parent does. A call
    does not wait for the device, but for eigendecompositions: at the first call, and where a subclass says so.

    Attributes:
        needs_rank: The penalty aims at a target rank.
        default_strength: Factor in the loss where the user gives none; penalties have no common scale.
    """

    needs_rank: ClassVar[bool] = False
    default_strength: ClassVar[float] = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes :meth:`in_metric` ask the call where the call is defined further down than the ``in_metric`` found.

        The same with :meth:`needs_whole`: who asks for less of a matrix has to say so where it is computed.
        """
        super().__init_subclass__(**kwargs)
        if _overrides(cls, "__call__", "in_metric"):
            cls.in_metric = Penalty.in_metric  # type: ignore[method-assign]
        if _overrides(cls, "__call__", "needs_whole") or _overrides(cls, "in_metric", "needs_whole"):
            cls.needs_whole = Penalty.needs_whole  # type: ignore[method-assign]

    @abstractmethod
    def __call__(self, matrix: Tensor, rank: int | None = None, memory: Memory | None = None) -> Tensor:
        """The penalty of one layer.

        Args:
            matrix: Shape ``(m, n)``, float32 or float64; the result is differentiable in it.
            rank: Target rank of the layer, for penalties that need one.
            memory: Carried from step to step for this layer; None computes without a warm start.

        Returns:
            Scalar of the dtype of ``matrix``.
        """

    def needs_whole(self, memory: Memory, rank: int | None) -> bool:
        """Whether the next call has to see all of the matrix.

        Where it need not, :meth:`in_metric` takes :class:`~lightning_prehab.linalg.rows.Rows` as well, of a matrix
        that lies on several processes; it is then differentiable in the own rows, and the same value everywhere.
        """
        return True

    def in_metric(
        self, weight: Tensor | Rows, metric: Metric, rank: int | None = None, memory: Memory | None = None
    ) -> Tensor:
        """The penalty of ``M = L^T W S``, differentiable in ``W``."""
        assert isinstance(weight, Tensor)
        return self(metric.view(weight), rank, memory)


class Shrinkage(ABC):
    """A map from a weight to a smaller one, applied after the optimizer step. Subclasses are frozen dataclasses.

    Attributes:
        needs_rank: The shrinkage aims at a target rank.
    """

    needs_rank: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Who asks for less of a matrix, or counts calls that change nothing, has to say so where it is computed."""
        super().__init_subclass__(**kwargs)
        for name in ("needs_whole", "passes_"):
            if any(_overrides(cls, method, name) for method in ("__call__", "prepare_")):
                setattr(cls, name, getattr(Shrinkage, name))

    def needs_whole(self, memory: Memory, progress: float, rank: int | None) -> bool:
        """Whether the next :meth:`prepare_`, or the call where nothing has to be prepared, has to see all of a matrix.

        Where it need not, both take :class:`~lightning_prehab.linalg.rows.Rows` as well, of a matrix that lies on
        several processes; the call then returns the own rows.
        """
        return True

    def passes_(self, memory: Memory, progress: float, rank: int | None, lr: float) -> bool:
        """Counts the next call, if it is one that would change nothing; it need not be made then."""
        return False

    def has_work(self, memory: Memory, progress: float, rank: int | None) -> bool:
        """Whether the next call with this memory has spectral work to do that :meth:`prepare_` can do before it.

        The answer depends on nothing but the arguments, so that all processes give the same.
        """
        return False

    def prepare_(  # noqa: B027 (nothing to do is the rule, not a gap)
        self, weight: Tensor | Rows, rank: int | None, memory: Memory, progress: float, metric: Metric
    ) -> None:
        """Does that work and leaves its results in the memory; another process may then take them over from there."""

    @abstractmethod
    def __call__(
        self,
        weight: Tensor | Rows,
        rank: int | None = None,
        memory: Memory | None = None,
        progress: float = 1.0,
        lr: float = 0.0,
        metric: Metric = IDENTITY,
    ) -> Tensor:
        """The weight of one layer after shrinkage; nothing is changed in place and no graph is recorded.

        Args:
            weight: ``W`` of shape ``(m, n)``, float32 or float64.
            rank: Target rank of the layer, for shrinkages that need one.
            memory: Carried from step to step for this layer; None computes without a warm start.
            progress: Done share of the time before the surgery, 1 at the last step.
            lr: Learning rate of the optimizer step before, for shrinkages that go along with it.
            metric: The space in which singular values are meant, ``M = L^T W S``. The result is in the space of ``W``.

        Returns:
            Shape and dtype of ``weight``; it shares the memory of ``weight`` where there is nothing to do.
        """


def _overrides(cls: type, method: str, other: str) -> bool:
    """Whether the method that a class has is defined further down than the other one."""
    places = [next(place for place, kind in enumerate(cls.__mro__) if name in vars(kind)) for name in (method, other)]
    return places[0] < places[1]


def is_due(memory: Memory | None, every: int, first: bool = True) -> bool:
    """Counts a call in ``memory["age"]``; True at the first (or not) and every ``every``-th call, and without memory.

    The counter stays on the CPU: reading it does not wait for the device.

    >>> memory = {}
    >>> [is_due(memory, 3) for _ in range(7)]
    [True, False, False, True, False, False, True]
    >>> memory = {}
    >>> [is_due(memory, 3, first=False) for _ in range(7)]
    [False, False, True, False, False, True, False]
    """
    if memory is None:
        return True
    calls = int(memory["age"]) + 1 if "age" in memory else every if first else 1
    memory["age"] = torch.tensor(calls % every, dtype=torch.int64, device="cpu")
    return calls >= every


def will_be_due(memory: Memory, every: int) -> bool:
    """What the next :func:`is_due` is going to say; nothing is counted.

    >>> memory = {}
    >>> [(will_be_due(memory, 3), is_due(memory, 3)) for _ in range(4)]
    [(True, True), (False, False), (False, False), (True, True)]
    """
    return "age" not in memory or int(memory["age"]) + 1 >= every


def start_vector(size: int, like: Tensor) -> Tensor:
    """A fixed pseudo-random unit vector of the dtype and device of ``like``; the global random state is not touched."""
    generator = torch.Generator().manual_seed(size)
    vector = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    unit: Tensor = vector / vector.norm()
    return unit.to(like)
