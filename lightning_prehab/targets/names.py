"""Names of layers and of their matrices, and patterns that fit them."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, TargetError

Patterns = str | Sequence[str] | None


def match_names(
    patterns: Patterns, names: Sequence[str], what: str, layers: Mapping[str, str] | None = None
) -> list[str]:
    """Names that fit at least one pattern, in the order of ``names``; see :func:`find_targets` for the rules.

    Args:
        patterns: The patterns.
        names: The names to choose from.
        what: Which argument the patterns came from.
        layers: Name of the layer for each name that may be matched in its place.

    Raises:
        ArgumentError: If they are no patterns.
        TargetError: If a pattern fits no name; near names are listed.
    """
    found: set[str] = set()
    for pattern in as_list(patterns, what):
        fits: list[str] = []
        for tried in (pattern, f"*.{pattern}"):
            fits = fits or [name for name in names if fnmatchcase(name, tried)]
            fits = fits or [name for name in names if layers is not None and fnmatchcase(layers.get(name, ""), tried)]
        if not fits:
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
            listed = f"Near names: {', '.join(near)}." if near else f"There are {len(names)}: {_first(names)}."
            raise TargetError(f"{what}: {pattern!r} matches no layer. {listed if names else 'There are none.'}")
        found.update(fits)
    return [name for name in names if name in found]


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])])


def begins_with(pattern: str, module: str) -> bool:
    """Whether a pattern says the name of a module, in full or from a dot on, before anything that is left open.

    >>> begins_with("fid.*", "metrics.fid"), begins_with("*.fid.*", "metrics.fid")
    (True, False)
    """
    said, parts = re.split(r"[*?\[]", pattern)[0], module.split(".")
    return any(said.startswith(".".join(parts[start:])) for start in range(len(parts)))


def join(layer: str, part: str) -> str:
    """Name of a matrix of a layer, or of a module in another one.

    >>> join("attn.qkv", "q"), join("fc", ""), join("", "B")
    ('attn.qkv.q', 'fc', 'B')
    """
    return ".".join(name for name in (layer, part) if name)


def clean_name(name: str) -> str:
    """The name without what ``torch.compile`` and torch's ``checkpoint_wrapper`` put around an inner module.

    >>> clean_name("net._orig_mod.0"), clean_name("net.0._checkpoint_wrapped_module.fc")
    ('net.0', 'net.0.fc')
    """
    return ".".join(part for part in stored_name(name).split(".") if part != "_orig_mod")


def stored_name(name: str) -> str:
    """The name of a module as it stands in state dicts, where ``checkpoint_wrapper`` leaves itself out.

    >>> stored_name("net._orig_mod.0"), stored_name("net.0._checkpoint_wrapped_module.fc")
    ('net._orig_mod.0', 'net.0.fc')
    """
    return ".".join(part for part in name.split(".") if part != "_checkpoint_wrapped_module")


def as_list(patterns: Patterns, what: str) -> list[str]:
    """The patterns one by one.

    Raises:
        ArgumentError: If they are no patterns.

    >>> as_list("fc*", "names"), as_list(None, "names")
    (['fc*'], [])
    """
    if patterns is None:
        return []
    found = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else [None]
    if not all(isinstance(one, str) for one in found):
        raise ArgumentError(f"{what} must be a name or a pattern, or a list of them, or None, got {show(patterns)}.")
    return found
