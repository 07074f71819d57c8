"""Second moments that are kept as means of rows and of columns (Adafactor): there and back to the whole matrix.

The matrix is what :mod:`~lightning_prehab.surgery.moments` can carry to factors; it is there at the cut alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Names(NamedTuple):
    """What an implementation of Adafactor calls them.

    Attributes:
        rows: Means over the last dimension.
        columns: Means over the one before.
        whole: What it keeps of a vector instead.
        keepdim: Whether the means have all dimensions.
    """

    rows: str
    columns: str
    whole: str
    keepdim: bool


#: Of torch; of transformers and timm.
_KNOWN = (
    Names("row_var", "col_var", "variance", True),
    Names("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", False),
)


def whole(weight: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a weight with the product of rows and columns in their place.

    ``v = r c^T / mean(r)``, where ``r`` and ``c`` are the means of the rows and columns of the gradient's squares
    (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235).

    Args:
        weight: The weight.
        state: What an optimizer keeps of it.

    Returns:
        The state; as it is, if it has no rows and columns, or some of other shapes.

    >>> state = {"row_var": torch.tensor([[1.0], [3.0]]), "col_var": torch.tensor([[2.0, 2.0]])}
    >>> whole(torch.zeros(2, 2), state)
    {'variance': tensor([[1., 1.],
            [3., 3.]])}
    """
    names = _names(state)
    if names is None:
        return dict(state)
    rows, columns = state[names.rows], state[names.columns]
    if not names.keepdim:
        rows, columns = rows.unsqueeze(-1), columns.unsqueeze(-2)
    if weight.dim() < 2 or (rows.shape, columns.shape) != _shapes(weight):
        return dict(state)
    size = rows.mean(-2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rest = {key: value for key, value in state.items() if key not in (names.rows, names.columns)}
    return {**rest, names.whole: rows * columns / size}


def parted(parameter: Tensor, state: Mapping[str, Any], old: Mapping[str, Any], least: int = 0) -> dict[str, Any]:
    """The state of what takes the place of a weight, with rows and columns if the weight had them.

    Args:
        parameter: What takes the place.
        state: Its state, with a whole matrix.
        old: What the optimizer kept of the weight.
        least: Both sides of a matrix have to be larger than this to be parted.

    Returns:
        The state; vectors and small matrices keep it whole.

    >>> parted(torch.zeros(2, 2), {"variance": torch.tensor([[1.0, 1.0], [3.0, 3.0]])}, {"row_var": 0, "col_var": 0})
    {'row_var': tensor([[1.],
            [3.]]), 'col_var': tensor([[2., 2.]])}
    """
    names = _names(old)
    if names is None or names.whole not in state or parameter.dim() < 2 or min(parameter.shape[-2:]) <= least:
        return dict(state)
    square = state[names.whole]
    means = {names.rows: square.mean(-1, names.keepdim), names.columns: square.mean(-2, names.keepdim)}
    return {**{key: value for key, value in state.items() if key != names.whole}, **means}


def _names(state: Mapping[str, Any]) -> Names | None:
    return next((names for names in _KNOWN if names.rows in state and names.columns in state), None)


def _shapes(weight: Tensor) -> tuple[torch.Size, torch.Size]:
    *others, rows, columns = weight.shape
    return torch.Size((*others, rows, 1)), torch.Size((*others, 1, columns))
