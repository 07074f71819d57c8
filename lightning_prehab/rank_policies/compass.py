"""A search for the depth multiplier that does best, in a few trials; always the same one for the same answers."""

from collections.abc import Generator
from typing import NamedTuple

#: How far ``alpha`` and ``gamma`` may go.
LARGEST_ALPHA, LARGEST_GAMMA = 3.0, 7.0
#: Points of the grid between 0 and these.
_ALPHAS, _GAMMAS = 12, 8
_FIRST_STEP = 4


class Lean(NamedTuple):
    """A depth multiplier as a point of a grid: ``gamma`` grows by the same factor from one to the next.

    Attributes:
        gamma_step: From -8 to 8.
        alpha_step: From 0 to 12; without a meaning where ``gamma_step`` is 0.
    """

    gamma_step: int = 0
    alpha_step: int = 8

    @property
    def alpha(self) -> float:
        """In [0, 3]."""
        return LARGEST_ALPHA * self.alpha_step / _ALPHAS

    @property
    def gamma(self) -> float:
        """In [-7, 7]."""
        size: float = (1.0 + LARGEST_GAMMA) ** (abs(self.gamma_step) / _GAMMAS) - 1.0
        return round(size if self.gamma_step >= 0 else -size, 3)

    def moved(self, gamma_steps: int, alpha_steps: int) -> "Lean":
        """Another point, inside of the grid."""
        gamma = max(-_GAMMAS, min(self.gamma_step + gamma_steps, _GAMMAS))
        alpha = max(0, min(self.alpha_step + alpha_steps, _ALPHAS))
        return Lean(gamma, alpha)


def search(trials: int) -> Generator[Lean, float, None]:
    """Points to be tried, each answered with what it costs; the first one is no multiplier at all.

    A compass search (Kolda, Lewis and Torczon, 2003, https://doi.org/10.1137/S003614450242889): from the best point so
    far a step toward either end of the depth, then toward a steeper or flatter multiplier, on in the direction that has
    helped; where none does, steps of half the size.

    Args:
        trials: How many points, at most.
    """
    best, step = Lean(), _FIRST_STEP
    costs = {best: (yield best)}
    directions = [(1, 0), (-1, 0), (0, 1), (0, -1)]
    while step >= 1 and len(costs) < trials:
        for gamma, alpha in directions:
            point = best.moved(step * gamma, step * alpha)
            if point.gamma_step == 0 or point in costs:
                continue
            costs[point] = yield point
            if costs[point] < costs[best]:
                best = point
                directions.sort(key=lambda one: one != (gamma, alpha))
                break
            if len(costs) >= trials:
                return
        else:
            step //= 2
