"""Settings as plain data that people read and edit: checked dictionaries, class paths, YAML."""

import difflib
import importlib
import math
import os
import pkgutil
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from lightning_prehab.errors import PlanError, PrehabError

T = TypeVar("T")

_SCALARS = {bool, int, float, str, types.NoneType}
_PLAIN = _SCALARS | {list, tuple, dict}
_PACKAGE = __name__.partition(".")[0]

_short = reprlib.Repr()
_short.maxlevel = 2
_short.maxstring = _short.maxother = 120


def show(value: object) -> str:
    """``repr`` for messages, cut short: a damaged file can hold anything."""
    return " ".join(_short.repr(value).split("\n"))  # of modules and optimizers it has lines


def read_mapping(data: object, where: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """A copy of ``data``, which must be a mapping with all the required keys and no unknown one.

    Raises:
        PlanError: If it is not; ``where`` starts the sentence.
    """
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: expected keys with values, got {show(data)}.")
    required = list(required)
    known = [*required, *optional]
    for key in data:
        if key not in known:
            raise PlanError(f"{where}: unknown key {key!r}.{_near(key, known)} The keys are {', '.join(known)}.")
    for key in required:
        if key not in data:
            raise PlanError(f"{where}: the key {key!r} is missing.")
    return dict(data)


def read_text(value: object, where: str) -> str:
    """``value``, which must be text."""
    if not isinstance(value, str):
        raise PlanError(f"{where} must be text, got {show(value)}; put it in quotes.")
    return value


def read_integer(value: object, where: str, low: int, high: int | None = None) -> int:
    """``value``, which must be a whole number in the given range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise PlanError(f"{where} must be a whole number {bounds}, got {show(value)}.")
    return value


def read_number(value: object, where: str) -> float | None:
    """``value``, which must be a finite number or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise PlanError(f"{where} must be a number or null, got {show(value)}.")
    return float(value)


def later(default: Any) -> Any:
    """A field of a dataclass that older versions do not have: at its default it is neither written down nor shown."""
    return field(default=default, metadata={"later": True})


def settings_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass instance by name, without those that are :func:`later` ones at their defaults."""
    found = {one: getattr(value, one.name) for one in fields(value) if one.init}
    return {one.name: kept for one, kept in found.items() if not (one.metadata.get("later") and kept == one.default)}


def describe(value: object) -> dict[str, Any]:
    """A dataclass instance as ``{"class_path": ..., "init_args": {...}}``, as LightningCLI writes it.

    Arguments that are dataclasses are described likewise. Public classes of this package have their short path.

    Raises:
        PlanError: If the class cannot be imported by its path, or an argument is not plain data.
    """
    kind = type(value)
    path = f"{kind.__module__}.{kind.__qualname__}"
    if not is_dataclass(value) or isinstance(value, type):
        raise PlanError(
            f"{path} cannot be written down: it is not a dataclass. Decorate it with @dataclass(frozen=True)."
        )
    if getattr(importlib.import_module(_PACKAGE), kind.__name__, None) is kind:
        path = f"{_PACKAGE}.{kind.__name__}"
    elif "<locals>" in path:
        raise PlanError(f"{path} cannot be written down: it is defined inside a function. Move it to a module.")
    arguments = settings_of(value)
    return {"class_path": path, "init_args": {k: _plain(v, f"{path}: {k}") for k, v in arguments.items()}}


def build(data: object, kind: type[T], where: str) -> T:
    """The object that :func:`describe` has written down. The class is imported: read only files that you trust.

    Raises:
        PlanError: If there is no such class, it is not a dataclass of this ``kind``, or it refuses the arguments.
    """
    entries = read_mapping(data, where, ["class_path"], ["init_args"])
    path = read_text(entries["class_path"], f"{where}: class_path")
    where = f"{where} {path}"
    return make(_import_dataclass(path, kind, where), entries.get("init_args") or {}, where)


def make(kind: type[T], data: object, where: str) -> T:
    """An object of a dataclass from its arguments as plain data, as :func:`describe` has them under ``init_args``.

    Raises:
        PlanError: If an argument is unknown or of another type, or the class refuses it.
    """
    names = [field.name for field in fields(kind) if field.init]  # type: ignore[arg-type]  # only dataclasses come here
    arguments = read_mapping(data, where, [], names)
    hints = _hints(kind)
    values = {name: _from_plain(value, hints.get(name, Any), f"{where}: {name}") for name, value in arguments.items()}
    try:
        return kind(**values)
    except (PrehabError, TypeError, ValueError) as error:
        raise PlanError(f"{where} does not accept {show(values)}: {error}") from error


def format_yaml(key: str, value: object, one_line: bool = False) -> str:
    """One entry of a YAML mapping; with ``one_line`` a list or mapping without others in it stays on the line.

    The text is ASCII: PyYAML reads some of the other line separators back as spaces.
    """
    import yaml  # type: ignore[import-untyped]  # comes with lightning

    style = None if one_line and isinstance(value, list | dict) else False
    text = yaml.safe_dump({key: value}, default_flow_style=style, sort_keys=False, width=math.inf)
    return str(text)


def parse_yaml(text: str, *, whole: bool = True) -> object:
    """The one document of a text that ends with the line ``...``, unless ``whole`` is false.

    Raises:
        PlanError: If it is not YAML, not complete, or a key stands twice in one place.
    """
    import yaml

    try:
        _refuse_repeated_keys(yaml, yaml.compose(text, Loader=yaml.SafeLoader))
        data: object = yaml.safe_load(text)
    except PlanError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        raise PlanError(f"This is not a YAML document ({type(error).__name__}: {error}).") from error
    if whole and not text.rstrip().endswith("\n..."):
        raise PlanError(
            "The last line is not '...', which ends such a document: it is cut off, or another one. If it is complete, "
            "add that line."
        )
    return data


def read_file(path: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises:
        PlanError: If it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path, once more
        raise PlanError(f"{show(os.fspath(path))} cannot be read: {reason}.") from error


def _near(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _plain(value: object, where: str) -> object:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, float):  # NumPy's is one
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return describe(value)
    raise PlanError(
        f"{where} = {show(value)} cannot be written down: use numbers, text, lists, mappings with text for "
        "keys, or dataclasses of these."
    )


def _from_plain(value: object, hint: Any, where: str) -> object:
    if isinstance(value, Mapping) and "class_path" in value:
        return build(value, object, where)
    kinds = _kinds(hint)
    if kinds <= _PLAIN and type(value) not in kinds:
        is_number = type(value) is int and float in kinds
        is_sequence = type(value) is list and tuple in kinds
        if not (is_number or is_sequence):
            raise PlanError(f"{where} must be {_names(kinds)}, got {show(value)}.{_number_as_text(value, kinds)}")
    if isinstance(value, list):
        items = [_from_plain(item, Any, where) for item in value]
        return tuple(items) if tuple in kinds else items
    if isinstance(value, Mapping):
        return {key: _from_plain(item, Any, where) for key, item in value.items()}
    return value


def _kinds(hint: Any) -> set[Any]:
    """The classes of a type hint: ``float | None`` has two."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(hint) for kind in _kinds(part)}
    return {hint if origin is None else origin}


def _names(kinds: set[Any]) -> str:
    return " or ".join(sorted("null" if kind is types.NoneType else kind.__name__ for kind in kinds))


def _number_as_text(value: object, kinds: set[Any]) -> str:
    """A hint: YAML 1.1 reads 1e-4 as text."""
    if not isinstance(value, str) or float not in kinds:
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return " In YAML numbers have no quotes, and those with an exponent need a dot and a sign: 1.0e-4."


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except Exception:  # names that exist for the type checker alone
        return {}


def _import_dataclass(path: str, kind: type[T], where: str) -> type[T]:
    try:
        found: object = pkgutil.resolve_name(path)
    except Exception as error:  # whatever the import of a module leads to
        module, _, name = path.rpartition(".")
        near = _near(name, dir(sys.modules.get(module)))
        raise PlanError(f"{where} cannot be imported ({type(error).__name__}: {error}).{near}") from error
    if not (isinstance(found, type) and is_dataclass(found) and issubclass(found, kind)):
        wanted = "a dataclass" if kind is object else f"a {kind.__name__} that is a dataclass"
        raise PlanError(f"{where} is {show(found)}, not {wanted}.")
    return found


def _refuse_repeated_keys(yaml: Any, root: Any) -> None:
    seen: set[int] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    line = key.start_mark.line + 1
                    raise PlanError(f"Line {line}: the key {key.value!r} stands twice; leave one of the two.")
                keys.add(str(key.value))
                todo.append(value)
