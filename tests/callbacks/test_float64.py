"""A run in float64 is computed in float64 throughout: sums in another order do not show.

Anything that goes through float32 on the way is rounded there by 1e-7 of itself, and training makes more of it.
"""

import pytest

import lightning_prehab as lp
from tests.sharded.acts_worker import assert_same_end, run

PREHABS = {
    "default": lp.PrehabCallback,
    "StableRank": lambda: lp.PrehabCallback(lp.StableRank(), space="loss", update_steps=4),
    "TailEnergy": lambda: lp.PrehabCallback(lp.TailEnergy(refresh=2), space="activation"),
    "NuclearNorm": lambda: lp.PrehabCallback(lp.NuclearNorm(refresh=2), strength_share=0.2, space="loss"),
    "EffectiveRank": lambda: lp.PrehabCallback(lp.EffectiveRank(refresh=2), space="loss"),
    "SpectralWeightDecay": lambda: lp.PrehabCallback(lp.SpectralWeightDecay(decay=1.0, every=3), space="loss"),
    "PaperPrehab": lp.PaperPrehab,
}
FACTORIZATIONS = [
    lp.SVD(),
    lp.ActivationSVD(),
    lp.FisherSVD(),
    lp.WhitenedSVD(),
    lp.KroneckerSVD("auto", "auto"),
    lp.LowRankPlusSparse(),
]
TOLERANCE = 1e-9


def ends(callbacks):
    return [run(callbacks(), way)[1] for way in ("one", "turned")]


@pytest.mark.parametrize("name", PREHABS)
def test_whatever_prepares(name):
    assert_same_end(*ends(lambda: [PREHABS[name](), lp.CompressionCallback(2, 0.5)]), TOLERANCE)


@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=lambda one: type(one).__name__)
def test_whatever_cuts(factorization):
    penalty = lambda: lp.PrehabCallback(lp.StableRank(), 0.1)  # noqa: E731
    assert_same_end(*ends(lambda: [penalty(), lp.CompressionCallback(2, 0.5, factorization=factorization)]), TOLERANCE)
