"""How many numbers a matrix of some rank is stored in, and the way back: what rank fits into so many.

Two factors of an ``m x n`` matrix hold ``r (m + n)`` numbers. Any matrix of rank ``r`` has ``r`` rows that the others
are combinations of; those rows and the combinations are ``r (m + n - r)`` numbers, never more than ``m n`` (Zhao et
al., "Pivoting Factorization", ICML 2025, https://arxiv.org/abs/2501.19090).
"""

import math
from typing import Literal

#: How a matrix of some rank is stored: as the two factors A and B, or as pivot rows and what combines them.
Layout = Literal["factors", "pivot"]


def stored_parameters(
    out_features: int, in_features: int, rank: int, layout: Layout = "factors", groups: int = 1
) -> int:
    """Numbers that a matrix of a rank is stored in.

    Args:
        out_features: ``m``.
        in_features: ``n``.
        rank: ``r``, at most ``min(m, n)``.
        layout: How it is stored.
        groups: The matrix is a stack of so many, each with two factors of its own, all of the same rank.

    >>> stored_parameters(768, 768, 300), stored_parameters(768, 768, 300, "pivot")
    (460800, 370800)
    """
    if layout == "pivot":
        return rank * (out_features + in_features - rank)
    return rank * (out_features + groups * in_features)


def rank_within(
    parameters: float, out_features: int, in_features: int, layout: Layout = "factors", groups: int = 1
) -> int:
    """The largest rank that is stored in at most so many numbers; 0 if there is none.

    A product that misses an integer by rounding alone counts as that integer.

    >>> rank_within(0.5 * 768 * 768, 768, 768), rank_within(0.5 * 768 * 768, 768, 768, "pivot")
    (192, 224)
    >>> rank_within(768 * 768 - 1, 768, 768), rank_within(768 * 768 - 1, 768, 768, "pivot")
    (383, 767)
    """
    m, n = out_features, in_features
    budget = max(math.floor(parameters + 1e-6), 0)
    if layout == "factors":
        return min(budget // (m + groups * n), m // groups, n)
    if budget >= m * n:
        return min(m, n)
    rank = (m + n - math.isqrt((m + n) ** 2 - 4 * budget)) // 2  # the root of r (m + n - r) = budget, or one above
    return rank if stored_parameters(m, n, rank, layout) <= budget else rank - 1


def largest_saving_rank(
    out_features: int, in_features: int, layout: Layout = "factors", groups: int = 1, beside: int = 0
) -> int:
    """The largest rank that is stored in fewer numbers than the dense matrix; 0 if there is none.

    Args:
        out_features: ``m``.
        in_features: ``n``.
        layout: How it is stored.
        groups: As in :func:`stored_parameters`.
        beside: What a cut adds beside the low-rank matrix.
    """
    return rank_within(out_features * in_features - beside - 1, out_features, in_features, layout, groups)
