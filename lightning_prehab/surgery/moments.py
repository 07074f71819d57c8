"""Optimizer state of what replaces a dense weight from the optimizer state of that weight: pure functions.

States are such as :func:`~lightning_prehab.surgery.meanings.readable_state` gives them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.linalg.blocks import blocks, row_squares, unchanged, wide_product
from lightning_prehab.linalg.matrices import working_dtype
from lightning_prehab.linalg.pivot import from_factor
from lightning_prehab.surgery.meanings import ITERATES, LARGEST, MEANINGS, SECOND_MOMENTS, STEP_SIZES

#: Second moments beside a first moment of the same gradients, which knows how they are correlated.
CORRELATED = ("exp_avg_sq", "max_exp_avg_sq")
#: They are at least this share of the square of the first moment: no first step is larger than four times the rate.
#: With the whole square, where correlations are counted already, the first 50 steps do a little less.
CORRELATED_FLOOR = 1 / 16
#: Adds up what several processes have.
AddUp = Callable[[Tensor], Tensor]


def factor_states(
    state: Mapping[str, Any], a: Tensor, b: Tensor, add_up: AddUp = unchanged
) -> tuple[dict[str, Any], dict[str, Any]]:
    """States of ``A`` and ``B`` from the state of ``W``, for ``W ~ B A``.

    The gradients are ``dA = B^T dW`` and ``dB = dW A^T``, so a first moment, being linear in them, moves exactly:
    ``exp_avg_A = B^T exp_avg_W`` and ``exp_avg_B = exp_avg_W A^T``. A second moment moves as if the entries of ``dW``
    were uncorrelated, ``(B * B)^T v``, times what the first moment ``M`` of Adam's family says of their correlations,
    ``|(B^T M)_i|^2 / ((B * B)^T (M * M) 1)_i`` for row ``i`` of ``A`` and the same for the columns of ``B``
    (``benchmarks/optimizer_state.py``: as good as with the statistics of the calibration). It is then raised to a share
    of the square of the first moment where that is larger, so that no first step is far larger than usual; without
    such a first moment, to all of it. The variance of centered RMSprop moves the same way, and the mean is added again.
    What is a value of ``W`` itself (the iterate of a schedule-free optimizer, the slow weights of Lookahead) is the
    factor: what is averaged or looked back at starts at the cut. Sizes of steps are the mean over the entries of ``W``
    that the entry of the factor acts on.

    Args:
        state: Of ``W``.
        a: Shape ``(rank, in_features)``.
        b: Shape ``(out_features, rank)``.
        add_up: Given a sum over rows, the sum over those of all processes, where each has the same rows of ``W`` and
            ``B`` and knows nothing of the others. What it is given does not depend on what it has returned.

    Returns:
        ``(state of A, state of B)``. Both are empty, a fresh start, if the state holds a matrix of unknown meaning.

    >>> state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.ones(2, 2)}
    >>> for_a, for_b = factor_states(state, a=torch.ones(1, 2), b=torch.ones(2, 1))
    >>> for_a["exp_avg"], for_b["exp_avg"].mT
    (tensor([[2., 2.]]), tensor([[2., 2.]]))
    """
    for_a: dict[str, Any] = {}
    for_b: dict[str, Any] = {}
    for key, value in _centered(state).items():
        if not _is_matrix(value):
            for_a[key], for_b[key] = _copy(value), _copy(value)
            continue
        if key not in MEANINGS or value.shape != (b.shape[0], a.shape[1]):
            return {}, {}
        for_a[key], for_b[key] = _factored(key, value, a.detach(), b.detach(), add_up)
    if "exp_avg" in state and "exp_avg_sq" in state:
        for_rows = _correlation(state["exp_avg"], b.detach(), inner=add_up)[:, None]
        for_columns = _correlation(state["exp_avg"].mT, a.detach().mT, outer=add_up)
        for key in CORRELATED:
            if key in for_a:
                for_a[key].mul_(for_rows)
                for_b[key].mul_(for_columns)
    for moved in (for_a, for_b):
        _raise_(moved, CORRELATED_FLOOR)
        if "grad_avg" in moved:
            moved["square_avg"] += moved["grad_avg"].square()
    return for_a, for_b


def pivot_states(state: Mapping[str, Any], layer: PivotLayer) -> dict[Tensor, dict[str, Any]]:
    """States of ``D`` and ``C`` from the state of ``W``.

    ``W = M D``, where the rows of ``M`` are those of the identity and of ``C``: see :func:`factor_states`. Only those
    of ``C`` are trained.

    Args:
        state: Of ``W``.
        layer: What holds the two.

    Returns:
        ``{D.weight: its state, C.weight: its state}``; both are empty if the state holds a matrix of unknown meaning.
    """
    factors = layer.factors()
    for_d, for_rows = factor_states(state, factors.A, factors.B)
    assert factors.order is not None
    for_c = {
        key: from_factor(value, factors.order).reshape(layer.C.weight.shape) if _is_matrix(value) else value
        for key, value in for_rows.items()
    }
    for_d = {key: value.reshape(layer.D.weight.shape) if _is_matrix(value) else value for key, value in for_d.items()}
    return {layer.D.weight: for_d, layer.C.weight: for_c}


def mixed_state(terms: Sequence[tuple[Mapping[str, Any], Tensor, Tensor]], value: Tensor) -> dict[str, Any]:
    """State of a matrix whose gradient is a sum of products ``L g R`` with gradients ``g`` that a state is known of.

    First moments move exactly, the others as in :func:`factor_states`.

    Args:
        terms: ``(state, L, R)``; the states are of the same optimizer.
        value: The matrix itself.

    Returns:
        The state; empty, a fresh start, if there is a tensor of unknown meaning.

    >>> mixed_state([({"exp_avg": torch.ones(1, 2)}, 2 * torch.ones(3, 1), torch.eye(2))], torch.zeros(3, 2))
    {'exp_avg': tensor([[2., 2.],
            [2., 2.],
            [2., 2.]])}
    """
    states = [_centered(state) for state, _, _ in terms]
    moved: dict[str, Any] = {}
    for key, first in states[0].items():
        parts = [state.get(key) for state in states]
        if not _is_matrix(first):
            moved[key] = _copy(first)
        elif key not in MEANINGS or not all(isinstance(part, Tensor) for part in parts):
            return {}
        elif key in ITERATES:
            moved[key] = value.detach().to(first.dtype, copy=True)
        elif key in STEP_SIZES:
            moved[key] = first.mean().expand(value.shape).clone()
        else:
            squares = key in SECOND_MOMENTS or key in LARGEST
            total = first.new_zeros(value.shape, dtype=torch.float64)
            for part, (_, *sides) in zip(parts, terms, strict=True):
                assert part is not None
                left, right = (side.double().square() if squares else side.double() for side in sides)
                wide = part.double().reshape(left.shape[1], right.shape[0])
                total += left @ (wide.square() if key in LARGEST else wide) @ right
            moved[key] = (total.sqrt() if key in LARGEST else total).to(first.dtype)
    _raise_(moved)
    if "grad_avg" in moved:
        moved["square_avg"] += moved["grad_avg"].square()
    return moved


def block_state(state: Mapping[str, Any], shape: Sequence[int], part: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """State of a part of ``W``, kept as a parameter of its own, from the state of ``W``: that part of each moment.

    Args:
        state: Of ``W``.
        shape: Of ``W``.
        part: Takes the part out of a tensor of this shape.

    Returns:
        The state; empty, a fresh start, if the state holds a tensor of another shape.

    >>> block_state({"exp_avg": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, (2, 2), lambda moment: moment[1:])
    {'exp_avg': tensor([[3., 4.]])}
    """
    seen = seen_state(state, shape, part)
    return {
        key: value.clone(memory_format=torch.contiguous_format) if _is_matrix(value) else _copy(value)
        for key, value in seen.items()
    }


def seen_state(state: Mapping[str, Any], shape: Sequence[int], part: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same to be looked at alone: the moments themselves, without a copy."""
    seen: dict[str, Any] = {}
    for key, value in state.items():
        if _is_matrix(value) and value.shape != tuple(shape):
            return {}
        seen[key] = part(value) if _is_matrix(value) else value
    return seen


def entry_state(state: Mapping[str, Any], indices: Tensor, shape: tuple[int, ...], values: Tensor) -> dict[str, Any]:
    """State of single entries of ``W``, kept as a parameter of their own, from the state of ``W``.

    Their gradients are those entries of ``dW``, so moments and sizes of steps are those entries of them, exactly.

    Args:
        state: Of ``W``.
        indices: Places in ``W`` read row by row: shape ``(k,)``.
        shape: Of ``W``.
        values: What the parameter holds: shape ``(k,)``. Together with the factors it is ``W``, alone it is not.

    Returns:
        The state; empty, a fresh start, if the state holds a matrix of unknown meaning.

    >>> indices, values = torch.tensor([1, 2]), torch.zeros(2)
    >>> entry_state({"exp_avg": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, indices, (2, 2), values)
    {'exp_avg': tensor([2., 3.])}
    """
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if not _is_matrix(value):
            moved[key] = _copy(value)
        elif value.shape != shape:
            return {}
        elif key in ITERATES:
            moved[key] = values.detach().to(value.dtype, copy=True)
        elif key in MEANINGS:
            moved[key] = value.flatten()[indices]
        else:
            return {}
    return moved


def bias_state(state: Mapping[str, Any], bias: Tensor) -> dict[str, Any]:
    """State of a bias that is new beside the factors of ``W``, where it cannot start afresh.

    That is so if the optimizer counts steps in the group, and would divide a second moment that has seen one gradient
    as if it had seen all; and in Adagrad, which makes its state once and for all. Of the gradients of the bias nothing
    is known, so the second moments of a row of ``W``, summed, stand for them: those of an input of length 1.

    Args:
        state: Of the matrix, shape ``(m, n)``.
        bias: The bias.

    Returns:
        The state; empty, a fresh start, for all other optimizers.

    >>> bias_state({"exp_avg_sq": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, torch.zeros(2))
    {'exp_avg_sq': tensor([3., 7.])}
    >>> bias_state({"exp_avg_sq": torch.ones(2, 2), "step": 3}, torch.zeros(2))
    {}
    """
    squares = [key for key in SECOND_MOMENTS if key in state]
    if not squares or ("step" in state and "sum" not in state):
        return {}
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if not _is_matrix(value):
            moved[key] = _copy(value)
        elif key in ITERATES:
            moved[key] = bias.detach().to(value.dtype, copy=True)
        elif key in squares:
            rows = value.sum(1)
            moved[key] = rows if rows.shape == bias.shape else rows.mean().expand(bias.shape).clone()
        else:
            moved[key] = value.new_zeros(bias.shape)
    return moved


def _factored(key: str, value: Tensor, a: Tensor, b: Tensor, add_up: AddUp) -> tuple[Tensor, Tensor]:
    """What one entry of the state of ``W`` becomes for ``A`` and for ``B``."""
    if key in ITERATES:
        return a.to(value.dtype, copy=True), b.to(value.dtype, copy=True)
    if key in STEP_SIZES:
        mean = add_up(value.sum(0, keepdim=True)) / add_up(value.new_tensor([float(len(value))]))
        return mean.repeat(len(a), 1), value.mean(1, keepdim=True).repeat(1, len(a))
    if key in LARGEST:
        for_a = _sum_of_products(b.square().mT, value, add_up, of=torch.square)
        for_b = wide_product(value, a.square().mT, of=torch.square, dtype=value.dtype)
        return for_a.sqrt(), for_b.sqrt()
    if key in SECOND_MOMENTS:
        a, b = a.square(), b.square()
    return _sum_of_products(b.mT, value, add_up), wide_product(value, a.mT, dtype=value.dtype)


def _sum_of_products(left: Tensor, right: Tensor, add_up: AddUp, of: AddUp = unchanged) -> Tensor:
    """A product whose inner dimension may be spread over processes, in the dtype of the right matrix.

    It is added up in float64, a block of rows at a time, which are the same on all processes.
    """
    answer = right.new_empty(len(left), right.shape[1])
    for rows in blocks(*answer.shape):
        answer[rows] = add_up(wide_product(left[rows], right, of=of))
    return answer


def _squares_of_products(left: Tensor, right: Tensor, add_up: AddUp, dtype: torch.dtype) -> Tensor:
    """The square of each row of such a product: shape ``(m, 1)``."""
    return torch.cat(
        [row_squares(add_up(wide_product(left[rows], right)), dtype) for rows in blocks(len(left), right.shape[1])]
    )


def _correlation(moment: Tensor, factor: Tensor, inner: AddUp = unchanged, outer: AddUp = unchanged) -> Tensor:
    """How much larger the squares of ``factor^T moment`` are than if its entries were uncorrelated.

    Args:
        moment: A mean gradient: shape ``(m, n)``.
        factor: Shape ``(m, rank)``.
        inner: Adds up sums over ``m`` where a process has some of it; see :func:`factor_states`.
        outer: The same for ``n``.

    Returns:
        By row of the product: shape ``(rank,)``; 1 where there is no gradient.
    """
    dtype = working_dtype(moment.dtype)
    together = outer(_squares_of_products(factor.mT, moment, inner, dtype).squeeze(1))
    squares = outer(row_squares(moment, dtype))
    alone = inner(wide_product(factor.square().mT, squares)).to(dtype).squeeze(1)
    return torch.where(together > 0, together / alone.clamp_min(torch.finfo(alone.dtype).tiny), 1.0).to(moment.dtype)


def _raise_(moved: dict[str, Any], share: float = 1.0) -> None:
    """Raises what a first moment is divided by to its size, or a share of its square, in place."""
    if "exp_avg" in moved:
        for key in SECOND_MOMENTS:
            if key in moved:
                least = share if key in CORRELATED else 1.0
                moved[key] = torch.maximum(moved[key], least * moved["exp_avg"].square())
        for key in LARGEST:
            if key in moved:
                moved[key] = torch.maximum(moved[key], moved["exp_avg"].abs())


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _copy(value: Any) -> Any:
    """A counter or a flag of a parameter's own."""
    return value.clone() if isinstance(value, Tensor) else value


def _centered(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state, with the variance in the place of the mean square where a mean is known: centered RMSprop."""
    if "grad_avg" not in state:
        return state
    return {**state, "square_avg": (state["square_avg"] - state["grad_avg"].square()).clamp_min(0.0)}
