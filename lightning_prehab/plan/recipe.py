"""What the user wishes: all settings of a cut as one object, checked, to be printed and kept in a file."""

import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from lightning_prehab.documents import settings
from lightning_prehab.documents.checks import check_path, check_whole
from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.factorizations import SVD, Factorization, KroneckerSVD
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.rank_policies import ParameterBudget, RankPolicy, RankRatio
from lightning_prehab.rank_policies.base import check_choice, check_keep
from lightning_prehab.statistics.sums import Wanted
from lightning_prehab.targets.find import Targets, check_uncut, find_targets
from lightning_prehab.targets.names import Patterns

#: For a layer: a rank (int), a share of its parameters (float), or "dense".
RankOverride = int | float | str

_HEADER = """\
# Recipe of lightning_prehab: how a model is to be cut. What is left out has its default value.
# To use it: compress_(model, Recipe.from_yaml(path), batches), or --recipe on the command line. Only read recipes that
# you trust: the classes that they name are imported.
"""


@dataclass(frozen=True, repr=False, eq=False)
class Recipe:
    """How a model is to be cut: everything that is wished for, and nothing about a certain model.

    Args:
        keep: Share of the targets' weight parameters to keep, in ``(0, 1]``: 0.4 keeps 40 %. Without effect if a policy
            is given.
        policy: Rank policy. None means one global :class:`~lightning_prehab.ParameterBudget` for factorizations whose
            spectra compare between layers (the default one), :class:`~lightning_prehab.RankRatio` for the others.
        factorization: How factors are computed. None means :class:`~lightning_prehab.KroneckerSVD`, and
            :class:`~lightning_prehab.SVD` where there is no data to calibrate with.
        layout: How a matrix of rank ``r`` is stored: ``"factors"``, two factors, ``r (m + n)`` numbers; or ``"pivot"``,
            some of its rows and what the others are made of, ``r (m + n - r)`` numbers: a higher rank for the same
            budget, the same function for the same rank. Layers that cannot be stored like that keep two factors, and
            the plan says so.
        target_modules: Names or fnmatch patterns of the layers to cut; None takes all that can be cut, but for
            projections to a vocabulary, see :func:`~lightning_prehab.find_targets`.
        exclude_modules: Names or fnmatch patterns of the layers to leave.
        rank_overrides: ``{pattern: rank}``: an int is a rank, a float a share of the layer's parameters in ``(0, 1)``,
            ``"dense"`` keeps the layer. Later patterns win.
        rank_multiple_of: Ranks are multiples of this; multiples of 8 to 32 may run faster, on GPUs above all: measure.
            Layers for which no multiple saves parameters are free.
        split_fused: Cut the parts of fused projections (queries, keys and values; gate and up) each for itself; else
            they are one matrix.

    Raises:
        ArgumentError: If a value is out of range.

    >>> recipe = Recipe(0.4, exclude_modules="head")
    >>> recipe
    Recipe(keep=0.4, exclude_modules='head')
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    keep: float = 0.5
    _: KW_ONLY
    policy: RankPolicy | None = None
    factorization: Factorization | None = None
    layout: Layout = "factors"
    target_modules: Patterns = None
    exclude_modules: Patterns = None
    rank_overrides: Mapping[str, RankOverride] | None = None
    rank_multiple_of: int = 1
    split_fused: bool = False

    def __post_init__(self) -> None:
        check_method(self.factorization, self.policy)
        if self.policy is None:
            check_keep(self.keep)
        check_choice("layout", self.layout, get_args(Layout))
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _checked_patterns(name, getattr(self, name)))
        object.__setattr__(self, "rank_overrides", _checked_overrides(self.rank_overrides))
        check_whole("rank_multiple_of", self.rank_multiple_of, 1)
        if not isinstance(self.split_fused, bool):
            raise ArgumentError(f"split_fused must be True or False, got {self.split_fused!r}.")

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self._given().items())
        return f"{type(self).__name__}({', '.join(given)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        """All values; of the overrides the order counts too, since later patterns win."""
        overrides = None if self.rank_overrides is None else tuple(self.rank_overrides.items())
        return (overrides, *(getattr(self, one.name) for one in fields(self) if one.name != "rank_overrides"))

    @classmethod
    def of(cls, keep_or_recipe: "float | Recipe", **flat: Any) -> "Recipe":
        """The recipe that flat arguments stand for, or the one that was given in the place of ``keep``.

        Raises:
            ArgumentError: If a value is out of range, or something is said beside a whole recipe.
        """
        if not isinstance(keep_or_recipe, Recipe):
            return cls(keep_or_recipe, **flat)
        beside = cls(**flat)._given().keys() - {"keep"}
        if beside:
            raise ArgumentError(
                f"{', '.join(sorted(beside))} cannot be given beside a whole recipe; make it a part of the recipe, for "
                "example with dataclasses.replace(recipe, ...)."
            )
        return keep_or_recipe

    @property
    def factorization_or_default(self) -> Factorization:
        """The factorization, the default one where none is given."""
        return KroneckerSVD() if self.factorization is None else self.factorization

    @property
    def policy_or_default(self) -> RankPolicy:
        """The policy, the default one for the factorization where none is given."""
        if self.policy is not None:
            return self.policy
        return ParameterBudget(self.keep) if self.factorization_or_default.comparable else RankRatio(self.keep)

    @property
    def wanted(self) -> Wanted:
        """What calibration has to collect."""
        gradients = self.policy_or_default.needs_weight_gradients
        return self.factorization_or_default.wanted.union(
            Wanted(gradients or self.policy_or_default.needs_positions, weight_gradients=gradients)
        )

    def where_calibrated(self, calibrates: bool) -> "Recipe":
        """The recipe for a place with data to calibrate with, or without: there the default method is another one."""
        return self if calibrates or self.factorization is not None else replace(self, factorization=SVD())

    def without_probes(self) -> "Recipe":
        """The recipe as long as nothing is tried or probed: the first of all trials; for probes one plain budget."""
        policy = next(self.policy_or_default.search())
        if not policy.needs_probes:
            return self if policy == self.policy_or_default else replace(self, policy=policy)
        wishes = {name: getattr(policy, name) for name in ("min_rank", "scope") if hasattr(policy, name)}
        return replace(self, policy=ParameterBudget(getattr(policy, "keep", self.keep), **wishes))

    def find_targets(self, model: nn.Module, *, cut_again: bool = False) -> Targets:
        """The layers to cut, and why others are left; see :func:`~lightning_prehab.find_targets`.

        Args:
            model: Any module.
            cut_again: Take what has been cut already for a deeper cut.

        Raises:
            TargetError: As there; and if the model has been cut already, is not to be cut again, and no
                ``target_modules`` name what is left.
        """
        wishes: dict[str, Any] = {"split_fused": self.split_fused, "cut_again": cut_again}
        found = find_targets(model, self.target_modules, self.exclude_modules, **wishes)
        if self.target_modules is None and not cut_again:
            check_uncut(model, found)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for YAML.

        Raises:
            PlanError: If a class of your own cannot be written down; it is named.
        """
        described: dict[str, Any] = settings.describe(self)["init_args"]
        return described

    @classmethod
    def from_dict(cls, data: object) -> "Recipe":
        """The recipe that :meth:`to_dict` has written, or a part of it; what is left out has its default value.

        Raises:
            ArgumentError: If something is wrong; the key, the value and the way out are named.
        """
        try:
            return settings.make(cls, data, "Recipe")
        except PlanError as error:
            raise ArgumentError(str(error)) from error

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The recipe as YAML; written to a file too if a path is given.

        Raises:
            PlanError: As :meth:`to_dict`.
        """
        text = _HEADER + "".join(settings.format_yaml(key, value) for key, value in self.to_dict().items())
        if path is not None:
            check_path("path", path)
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, text_or_path: str | os.PathLike[str]) -> "Recipe":
        """The recipe that :meth:`to_yaml` or a person has written.

        Args:
            text_or_path: A text of at least one line with its end, or the path of a file.

        Raises:
            ArgumentError: If the file cannot be read, or something in it is wrong.
        """
        where, text = "", text_or_path
        try:
            if not (isinstance(text, str) and "\n" in text):
                check_path("text_or_path", text_or_path)
                where, text = f"{os.fspath(text_or_path)}: ", settings.read_file(text_or_path)
            return cls.from_dict(settings.parse_yaml(text, whole=False))
        except (ArgumentError, PlanError) as error:
            raise ArgumentError(f"{where}{error}") from error
        except RecursionError as error:
            raise ArgumentError(f"{where}the text is nested too deeply to be a recipe.") from error

    def _given(self) -> dict[str, Any]:
        """What differs from the defaults; ``keep`` in any case."""
        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}
        return {name: value for name, (value, default) in values.items() if name == "keep" or value != default}


def check_method(factorization: object, policy: object) -> None:
    """Raises :class:`ArgumentError` for a class in place of an instance, or for something else altogether."""
    for value, kind in ((factorization, Factorization), (policy, RankPolicy)):
        if value is not None and not isinstance(value, kind):
            raise ArgumentError(f"Expected a {kind.__name__}, got {settings.show(value)}{_hint(value, kind)}.")


def _hint(value: object, kind: type) -> str:
    """How to write what was probably meant: an object in the place of its class, or of its name."""
    if isinstance(value, type):
        return f"; write {value.__name__}(...)"
    if not isinstance(value, str):
        return ""
    kinds = [kind]
    for one in kinds:
        kinds += one.__subclasses__()
    names = sorted(one.__name__ for one in kinds if not inspect.isabstract(one))
    near = [name for name in names if name.lower() == value.lower().replace("_", "")]
    return f"; write {near[0]}(...)" if near else f"; give an object of one of {', '.join(names)}"


def _checked_patterns(name: str, patterns: object) -> Patterns:
    if patterns is None or isinstance(patterns, str):
        return patterns
    found = tuple(patterns) if isinstance(patterns, Iterable) else None
    if found is None or not all(isinstance(one, str) for one in found):
        raise ArgumentError(f"{name} must be a name, a pattern or a list of them, got {patterns!r}.")
    return found


def _checked_overrides(overrides: object) -> dict[str, RankOverride] | None:
    if overrides is None:
        return None
    if not isinstance(overrides, Mapping) or not all(isinstance(pattern, str) for pattern in overrides):
        raise ArgumentError(f"rank_overrides must be a mapping from names or patterns to ranks, got {overrides!r}.")
    for pattern, wish in overrides.items():  # which numbers can be used is known when the layers are
        if not isinstance(wish, int | float | str):
            raise ArgumentError(
                f"rank_overrides: {wish!r} for {pattern!r} is neither a rank, nor a share in (0, 1), nor 'dense'."
            )
    return dict(overrides)
