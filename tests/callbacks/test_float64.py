"""A run in float64 is computed in float64: what goes through float32 is rounded, and training makes more of that.

On several processes such roundings are others than on one (``tests/sharded/test_acts.py`` compares the ends).
"""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_prehab as lp
from tests.sharded.acts_worker import ACTS, fit

PACKAGE = str(Path(lp.__file__).parent)


#: Functions that may: what they find is shown, or is a power of two.
MAY = {"errors", "note_spectra", "even_scales"}


class Narrow(TorchDispatchMode):
    """Notes the lines of the package that make floating tensors of less than float64; single numbers may be."""

    def __init__(self):
        super().__init__()
        self.lines = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves(made) if isinstance(one, torch.Tensor) and not one.is_meta]
        if any(one.is_floating_point() and one.dtype != torch.float64 and one.numel() > 1 for one in tensors):
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
            if frames and not MAY & {frame.name for frame in frames}:
                self.lines.add(f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}")
        return made


PREHABS = {
    "StableRank": lambda: lp.PrehabCallback(lp.StableRank(), space="loss", update_steps=4),
    "TailEnergy": lambda: lp.PrehabCallback(lp.TailEnergy(refresh=2), space="activation"),
    "NuclearNorm": lambda: lp.PrehabCallback(lp.NuclearNorm(refresh=2), strength_share=0.2, space="loss"),
    "EffectiveRank": lambda: lp.PrehabCallback(lp.EffectiveRank(refresh=2), space="loss"),
    "SpectralWeightDecay": lambda: lp.PrehabCallback(lp.SpectralWeightDecay(every=3), space="loss"),
    "PaperPrehab": lp.PaperPrehab,
}
CUTS = {
    "ActivationSVD": {"factorization": lp.ActivationSVD()},
    "FisherSVD": {"factorization": lp.FisherSVD()},
    "KroneckerSVD": {"factorization": lp.KroneckerSVD("auto", "auto", gradient_trim=0.1, gradient_clip=2.0)},
    "LowRankPlusSparse": {"factorization": lp.LowRankPlusSparse()},
    "SVD": {"factorization": lp.SVD()},
    "WhitenedSVD": {"factorization": lp.WhitenedSVD()},
    "ProbeBudget": {"policy": lp.ProbeBudget(0.5)},
    "ZeroSum": {"policy": lp.ZeroSum(0.5)},
    "CalibratedBudget": {"policy": lp.CalibratedBudget(0.5, trials=2)},
    "pivot": {"layout": "pivot"},
}
RUNS = {
    **ACTS,
    **{name: lambda make=make: [make(), lp.CompressionCallback(2, 0.5)] for name, make in PREHABS.items()},
    **{name: lambda settings=settings: [lp.CompressionCallback(1, 0.5, **settings)] for name, settings in CUTS.items()},
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_narrower_than_the_weights(name):
    callbacks = RUNS[name]()
    cut = next(one for one in callbacks if isinstance(one, lp.CompressionCallback))
    with Narrow() as narrow:
        lit, _ = fit(callbacks, "one", epochs=cut.last_epoch + 1)
    assert cut.done
    assert all(parameter.dtype == torch.float64 for parameter in lit.parameters())
    assert narrow.lines == set()
