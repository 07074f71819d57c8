"""When a run is cut, and how each time: one cut, or several, each deeper than the one before."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, NamedTuple, overload

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.report.compression_report import CompressionReport

#: When the surgery comes: one epoch, several, or when it counts as free.
Epochs = int | Sequence[int] | Literal["auto"]
#: How much is kept: a share or a recipe, or one of them for each epoch.
Keeps = float | Recipe | Sequence[float] | Sequence[Recipe]


class Cut(NamedTuple):
    """One surgery of a run.

    Attributes:
        epoch: It comes before the first batch of this epoch.
        recipe: What is wished for.
    """

    epoch: int
    recipe: Recipe


class Cuts(Sequence[Cut]):
    """The surgeries of a run, and how many of them are behind.

    Args:
        cuts: At least one, in order.

    Attributes:
        made: How many are behind.
    """

    def __init__(self, cuts: Iterable[Cut]) -> None:
        self._cuts = list(cuts)
        self.made = 0

    @overload
    def __getitem__(self, place: int) -> Cut: ...

    @overload
    def __getitem__(self, place: slice) -> list[Cut]: ...

    def __getitem__(self, place: int | slice) -> Cut | list[Cut]:
        return self._cuts[place]

    def __len__(self) -> int:
        return len(self._cuts)

    @property
    def done(self) -> bool:
        """Whether all are behind."""
        return self.made == len(self)

    @property
    def to_come(self) -> list[Cut]:
        """Those that are not."""
        return self._cuts[self.made :]

    @property
    def next(self) -> Cut:
        """The next one, or the last one where none is to come."""
        return self._cuts[min(self.made, len(self) - 1)]

    @next.setter
    def next(self, cut: Cut) -> None:
        self._cuts[min(self.made, len(self) - 1)] = cut

    @property
    def name_of_next(self) -> str:
        """See :func:`number_of`."""
        return number_of(self.made + 1, len(self))

    @property
    def began(self) -> int:
        """The epoch that the time before the next one has begun with: 0, or that of the surgery before."""
        return self._cuts[self.made - 1].epoch if self.made else 0

    def due(self, epoch: int) -> list[Cut]:
        """Those to come whose epoch has come; the last of them is made, and what is left out is wished for no more."""
        return [cut for cut in self.to_come if epoch >= cut.epoch]

    def change_recipes(self, **changes: object) -> None:
        """Gives all recipes other values in some fields."""
        self._cuts = [Cut(epoch, replace(recipe, **changes)) for epoch, recipe in self._cuts]  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """What a resumed run compares with, as plain data."""
        cuts = [{"epoch": cut.epoch, "recipe": plain_recipe(cut.recipe)} for cut in self]
        return {"made": self.made, "epoch": self.next.epoch, "recipe": plain_recipe(self.next.recipe), "cuts": cuts}


def planned_cuts(epoch: Any, keep: Any, policy: RankPolicy | None, **flat: Any) -> Cuts:
    """The cuts that the arguments of a CompressionCallback stand for, checked against each other.

    Args:
        epoch: One, or several; ``"auto"`` stands for one that is decided later.
        keep: One, or one for each epoch.
        policy: The rank policy. Of several cuts each gets it with a ``keep`` of its own.
        flat: Other fields of a recipe.

    Raises:
        ArgumentError: If they do not fit together; what is wrong with which cut is said.
    """
    several = _is_list(epoch)
    epochs = list(epoch) if several else [epoch]
    keep = list(keep) if isinstance(keep, Iterator) else keep
    for one in epochs:
        if isinstance(one, bool) or not isinstance(one, Integral) or one < 0:
            if one == "auto" and not several:
                continue
            what = "each epoch" if several else "epoch"
            alternative = "" if several else ", or 'auto'"
            raise ArgumentError(f"{what} is a whole number that counts from 0{alternative}, got {epoch!r}.")
    epochs = [one if one == "auto" else int(one) for one in epochs]
    if not several and not _is_list(keep):
        return Cuts([Cut(0 if epochs == ["auto"] else epochs[0], Recipe.of(keep, policy=policy, **flat))])
    if not several or not _is_list(keep) or len(keep) != len(epochs) or not epochs:
        raise ArgumentError(
            "Several cuts need as many epochs as keeps: CompressionCallback(epoch=[3, 6], keep=[0.6, 0.4]); got "
            f"epoch={show(epoch)} and keep={show(keep)}."
        )
    if any(later <= earlier for earlier, later in pairwise(epochs)):
        raise ArgumentError(f"The epochs of several cuts must ascend, got epoch={show(epoch)}.")
    recipes = [_recipe(one, policy, flat) for one in keep]
    known = [share_of(recipe) for recipe in recipes]
    for earlier, later in pairwise(known):
        if earlier is not None and later is not None and later >= earlier:
            raise ArgumentError(
                "The keeps of several cuts must descend, since each counts against the dense weights and a cut takes "
                f"nothing back; got {', '.join('?' if one is None else f'{one:g}' for one in known)}."
            )
    return Cuts(Cut(*both) for both in zip(epochs, recipes, strict=True))


def settings_of_cuts(cuts: Sequence[Cut]) -> dict[str, Any]:
    """By the names of the arguments of a CompressionCallback what each cut has; once, if it is the only one."""
    found = {"epoch": [cut.epoch for cut in cuts]}
    found |= {one.name: [getattr(cut.recipe, one.name) for cut in cuts] for one in fields(Recipe)}
    return found if len(cuts) > 1 else {name: values[0] for name, values in found.items()}


def share_of(recipe: Recipe) -> float | None:
    """The share that a recipe asks to keep; None where its policy is not given one."""
    share = recipe.keep if recipe.policy is None else getattr(recipe.policy, "keep", None)
    return float(share) if isinstance(share, int | float) else None


def cuts_made(cuts: Sequence[Cut], report: CompressionReport) -> int:
    """How many of the cuts have led to a model of which nothing but its weights is known; at least one.

    What a cut keeps is never above what it was asked for.
    """
    shares = [share_of(cut.recipe) for cut in cuts]
    return max(sum(share is not None and report.keep <= share + 1e-9 for share in shares), 1)


def number_of(made: int, of: int) -> str:
    """How one of several cuts is called; empty for the only one.

    >>> number_of(2, 3), number_of(1, 1)
    ('cut 2 of 3', '')
    """
    return f"cut {made} of {of}" if of > 1 else ""


def plain_recipe(recipe: Recipe) -> dict[str, Any] | None:
    """A recipe for a checkpoint; None if a class of the user's own in it cannot be written down."""
    try:
        return recipe.to_dict()
    except PlanError:
        return None


def _recipe(keep: Any, policy: RankPolicy | None, flat: Mapping[str, Any]) -> Recipe:
    if policy is None or isinstance(keep, Recipe):
        return Recipe.of(keep, policy=policy, **flat)
    settings: Any = policy
    names = [one.name for one in fields(settings)] if hasattr(settings, "__dataclass_fields__") else []
    if "keep" not in names:
        raise ArgumentError(
            f"{policy} has no keep that several cuts could differ in; give a list of recipes instead, one for each "
            "cut: keep=[Recipe(policy=...), Recipe(policy=...)]."
        )
    return Recipe.of(keep, policy=replace(settings, keep=Recipe(keep).keep), **flat)


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
