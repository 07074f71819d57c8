"""The public names are a contract."""

import inspect

import lightning_prehab as lp

NAMES = {
    "SVD",
    "ActivationSVD",
    "CalibratedBudget",
    "CompressionCallback",
    "CompressionPlan",
    "CompressionReport",
    "EffectiveRank",
    "EffectiveRankMetric",
    "EnergyThreshold",
    "FactorTraining",
    "FisherSVD",
    "KroneckerSVD",
    "LayerPlan",
    "LayerStatistics",
    "LowRankBlocks",
    "LowRankCheckpointMixin",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "NuclearNorm",
    "LowRankPlusSparse",
    "LowRankPlusSparseLinear",
    "PaperPrehab",
    "ParameterBudget",
    "PivotConv1d",
    "PivotConv2d",
    "PivotLinear",
    "PrehabCallback",
    "PrehabError",
    "ProbeBudget",
    "RankRatio",
    "Recipe",
    "Refinement",
    "RehabSchedule",
    "SpectralWeightDecay",
    "StableRank",
    "StableRankMetric",
    "TailEnergy",
    "TailShrinkage",
    "WhitenedSVD",
    "ZeroSum",
    "apply_plan_",
    "collect_statistics",
    "compress_",
    "compress_folder",
    "find_targets",
    "load_compressed",
    "load_from_checkpoint",
    "make_plan",
    "own_samples",
    "print_compression",
    "refine_",
    "save_compressed",
    "to_dense_",
    "to_factors_",
    "to_pivot_",
}


def test_public_names():
    assert set(lp.__all__) == NAMES
    assert set(dir(lp)) > NAMES
    assert all(inspect.getdoc(getattr(lp, name)) for name in NAMES)


def test_signatures_of_the_callbacks():
    def arguments(function):
        return [name for name in inspect.signature(function).parameters if name != "self"]

    assert arguments(lp.PrehabCallback) == [
        "regularizer",
        "strength",
        "ramp_steps",
        "space",
        "start_epoch",
        "stop_epoch",
        "every_n_steps",
        "injection",
        "target_modules",
        "exclude_modules",
        "strength_share",
        "update_steps",
        "forecast_every_n_steps",
    ]
    assert arguments(lp.CompressionCallback) == [
        "epoch",
        "keep",
        "policy",
        "factorization",
        "calibration_batches",
        "target_modules",
        "exclude_modules",
        "rank_overrides",
        "rank_multiple_of",
        "reset_scores",
        "forecast_below",
        "split_fused",
        "layout",
    ]
    assert arguments(lp.FactorTraining) == [
        "product_decay",
        "decay_form",
        "rebalance_every",
        "rate_A",
        "rate_B",
        "alternate",
        "train",
    ]
    assert arguments(lp.RehabSchedule) == [
        "warmup_steps",
        "warmup_epochs",
        "start_factor",
        "peak_factor",
        "shape",
        "end_factor",
        "decay_steps",
        "decay_epochs",
        "group_factors",
    ]


def test_defaults_are_what_the_documentation_says():
    compression = lp.CompressionCallback(epoch=3)
    assert compression.factorization == lp.KroneckerSVD()
    assert compression.policy == lp.ParameterBudget(0.5)
    assert lp.CompressionCallback(epoch=3, keep=0.3, factorization=lp.SVD()).policy == lp.RankRatio(0.3)


def test_every_error_is_a_prehab_error():
    from lightning_prehab import errors

    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert len(kinds) > 3
    assert all(issubclass(kind, lp.PrehabError) for kind in kinds)


def test_the_version_is_told():
    from lightning_prehab.__about__ import __version__

    assert lp.__version__ == __version__
