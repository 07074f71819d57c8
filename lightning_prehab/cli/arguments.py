"""What the command line understands, and the recipe that it means."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_prehab.errors import ArgumentError, PrehabError
from lightning_prehab.factorizations import SVD, ActivationSVD, Factorization, FisherSVD, KroneckerSVD, WhitenedSVD
from lightning_prehab.plan.recipe import RankOverride, Recipe
from lightning_prehab.rank_policies import BudgetPolicy, ParameterBudget, ProbeBudget, RankRatio, ZeroSum
from lightning_prehab.report.figures import FIGURES

METHODS: dict[str, Callable[[], Factorization]] = {
    "svd": SVD,
    "activation": ActivationSVD,
    "fisher": FisherSVD,
    "whitened": WhitenedSVD,
    "kronecker": KroneckerSVD,
}
#: Policies of a share to keep; others are named in a recipe.
POLICIES: dict[str, Callable[[float], BudgetPolicy]] = {
    "budget": ParameterBudget,
    "ratio": RankRatio,
    "probe": ProbeBudget,
    "zero-sum": ZeroSum,
}


def read_recipe(settings: Any, keep: float | None) -> Recipe:
    """The recipe of the options that were given: those of a file, those of the command line in their place.

    Args:
        settings: Parsed options of ``plan`` or ``compress``.
        keep: One of the shares to keep, or None if none was given.

    Raises:
        ArgumentError: If a value cannot be used.
    """
    recipe = Recipe() if settings.recipe is None else Recipe.from_yaml(settings.recipe)
    options = {
        "keep": keep,
        "factorization": None if settings.method is None else METHODS[settings.method](),
        "target_modules": settings.target_modules,
        "exclude_modules": settings.exclude_modules,
        "rank_overrides": None if settings.rank_override is None else _overrides(settings.rank_override),
        "rank_multiple_of": settings.rank_multiple_of,
        "split_fused": settings.split_fused or None,
    }
    recipe = replace(recipe, **{name: value for name, value in options.items() if value is not None})
    if settings.policy is not None:
        stored = recipe.policy.keep if isinstance(recipe.policy, BudgetPolicy) else recipe.keep
        return replace(recipe, policy=POLICIES[settings.policy](stored if keep is None else keep))
    if keep is None or recipe.policy is None:
        return recipe
    if not isinstance(recipe.policy, BudgetPolicy):
        raise ArgumentError(f"--keep has no effect on {recipe.policy}, the policy of {settings.recipe}; leave it out.")
    return replace(recipe, policy=replace(recipe.policy, keep=keep))


def _overrides(wishes: list[str]) -> dict[str, RankOverride]:
    """``PATTERN=RANK`` each."""
    found: dict[str, RankOverride] = {}
    for wish in wishes:
        pattern, _, rank = wish.rpartition("=")
        if not pattern:
            raise ArgumentError(f"--rank-override takes PATTERN=RANK, got {wish!r}.")
        try:
            found[pattern] = rank if rank == "dense" else int(rank) if rank.lstrip("+-").isdigit() else float(rank)
        except ValueError as error:
            raise ArgumentError(
                f"--rank-override {wish!r}: give a rank, a share of the parameters such as 0.3, or dense."
            ) from error
    return found


def build_parser() -> Any:
    """The parser of all commands.

    Raises:
        PrehabError: If a package is missing; the extra is named.
    """
    try:
        import rich  # noqa: F401
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise PrehabError(
            f"The command line needs the {error.name} package: pip install 'lightning-prehab[cli]'."
        ) from error
    from jsonargparse.typing import ClosedUnitInterval as Share

    def command(name: str, text: str) -> Any:
        made = ArgumentParser(description=text)
        made.add_argument("--json", action="store_true", help="print JSON instead of text")
        parsers[name] = made, text
        return made

    parsers: dict[str, tuple[Any, str]] = {}
    planning = command("plan", "Show what a budget would do to each layer; nothing is changed.")
    compressing = command("compress", "Write a compressed model and its report into a new folder.")
    reporting = command("report", "Show a report that compress has written.")
    measuring = command("bench", "Measure the dense against the compressed model on this machine.")
    for made in (planning, compressing, measuring):
        made.add_argument("source", type=str, help="Hugging Face folder (config.json, safetensors), or a .ckpt file")
        made.add_argument("--model", type=str, help="class of the .ckpt: some.module.ClassName (is imported)")
        made.add_argument("--data", type=str, help="text file (Hugging Face), or .pt or .safetensors of batches")
        made.add_argument("--batch-size", type=int, default=8, help="rows of a calibration batch")
        made.add_argument("--max-length", type=int, default=128, help="tokens of a line of text")
        made.add_argument("--device", type=str, default="cpu", help="where to compute")
    for made in (planning, compressing):
        made.add_argument("--recipe", type=str, help="YAML file of all that follows; options given beside it win")
        made.add_argument("--method", choices=list(METHODS), help="default: kronecker with --data, svd without")
        made.add_argument("--policy", choices=list(POLICIES), help="default: budget for kronecker, ratio for others")
        made.add_argument("--target-modules", type=str, nargs="+", help="names or patterns to take")
        made.add_argument("--exclude-modules", type=str, nargs="+", help="names or patterns to leave")
        made.add_argument("--rank-override", type=str, nargs="+", help="PATTERN=RANK: a rank, a share below 1 or dense")
        made.add_argument("--rank-multiple-of", type=int, help="ranks are multiples of this (default: 1)")
        made.add_argument("--split-fused", action="store_true", help="cut queries, keys and values each for itself")
        made.add_argument("--layers-at-once", type=int, help="calibrate so many layers at a time, to save memory")
    for made in (planning, compressing, reporting):
        made.add_argument("--all", action="store_true", help="a row for each layer, however many there are")
    planning.add_argument("--keep", type=Share, nargs="+", help="shares of the parameters to keep (default: 0.5)")
    compressing.add_argument("--keep", type=Share, help="share of the targets' parameters to keep (default: 0.5)")
    compressing.add_argument("--output", type=str, required=True, help="the folder to write")
    compressing.add_argument("--force", action="store_true", help="replace a compressed model that is there")
    reporting.add_argument("path", type=str, help="report.json, or the folder that holds it")
    reporting.add_argument("--html", type=str, help="write a page with figures too (extra plot)")
    reporting.add_argument("--png", type=str, nargs="+", help=f"NAME=FILE: write a figure; {', '.join(FIGURES)}")
    reporting.add_argument("--bench", type=str, help="what bench --json has printed, for latencies before and after")
    reporting.add_argument("--metrics", type=str, help="metrics.csv of the run's CSVLogger, for a timeline in the page")
    measuring.add_argument("--compressed", type=str, required=True, help="the folder that compress has written")
    measuring.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="rows of the measured batches")

    parser = ArgumentParser(prog="lightning_prehab", description="SVD compression of neural networks.")
    commands = parser.add_subcommands(dest="command", required=True)
    for name, (made, text) in parsers.items():
        commands.add_subcommand(name, made, help=text)
    return parser
