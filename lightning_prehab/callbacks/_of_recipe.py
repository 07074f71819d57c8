"""Attributes of a callback that are fields of its recipe."""

from typing import Any


class OfRecipe:
    """An attribute of a callback that is a field of its recipe; setting it makes new recipes for all of its cuts."""

    def __init__(self, shown: str = "") -> None:
        self._shown = shown  # what is read instead of the field

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, callback: Any, owner: type) -> Any:
        return self if callback is None else getattr(callback.recipe, self._shown or self._name)

    def __set__(self, callback: Any, value: object) -> None:
        callback.change_recipes(**{self._name: value})
