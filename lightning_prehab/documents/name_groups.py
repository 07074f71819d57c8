"""Names of many layers in few words: those that differ in numbers alone, and what all of them begin with."""

import re
from collections.abc import Hashable, Mapping, Sequence


def group_names(kinds: Mapping[str, Hashable]) -> list[tuple[str, list[str]]]:
    """Groups of names that differ in numbers alone, in the order of their first names.

    Numbers in the last part of a name tell kinds apart (``fc1`` and ``fc2``), unless that part is a number.

    Args:
        kinds: ``{name: kind}``; names of one group are of one kind.

    Returns:
        For each group its pattern, with a ``*`` for each number that differs, and its names.

    >>> group_names({"h.0.fc1": 1, "h.0.fc2": 1, "h.1.fc1": 1, "h.1.fc2": 2})
    [('h.*.fc1', ['h.0.fc1', 'h.1.fc1']), ('h.0.fc2', ['h.0.fc2']), ('h.1.fc2', ['h.1.fc2'])]
    """
    groups: dict[Hashable, list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault((tuple(_split(name)[0::2]), kind), []).append(name)
    return [(_pattern(names), names) for names in groups.values()]


def numbers_of(name: str) -> tuple[int, ...]:
    """The numbers in which names of a group can differ.

    >>> numbers_of("layers.12.mlp.fc1"), numbers_of("net.3")
    ((12,), (3,))
    """
    return tuple(map(int, _split(name)[1::2]))


def common_prefix(names: Sequence[str]) -> str:
    """The parts that all names begin with, up to a dot; a part that a number follows is none of them.

    >>> common_prefix(["model.layers.0.fc", "model.layers.1.fc"]), common_prefix(["fc", "head"])
    ('model.', '')
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while parts and all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        if _is_number(parts[0][shared]):
            break
        shared += 1
    if shared and any(_is_number(one[shared]) for one in parts):
        shared -= 1
    return "".join(f"{part}." for part in parts[0][:shared]) if shared else ""


def _is_number(part: str) -> bool:
    return re.fullmatch(r"[0-9*]+", part) is not None


def _split(name: str) -> list[str]:
    """Words and numbers in turn, a word first and last."""
    front, dot, last = name.rpartition(".")
    if last.isdigit() and last.isascii():
        return [*_cut(front + dot), last, ""]
    found = _cut(front + dot)
    found[-1] += last
    return found


def _cut(text: str) -> list[str]:
    return re.split(r"([0-9]+)", text)


def _pattern(names: Sequence[str]) -> str:
    """One name for all of them."""
    first, *others = map(_split, names)
    return "".join(
        part if place % 2 == 0 or all(other[place] == part for other in others) else "*"
        for place, part in enumerate(first)
    )
