"""Whether calibration has seen enough."""

from collections.abc import Mapping

from lightning_prehab.statistics.sums import LayerStatistics

#: Tokens for each input of a layer below which its input moments are mostly noise.
TOKENS_PER_INPUT = 4
#: Parameters of all targets from which on a model is not one of a test or an example.
REAL_SIZE = 1_000_000


def starved(statistics: Mapping[str, LayerStatistics]) -> dict[str, int]:
    """For each layer that saw fewer tokens than four times its input size, though some, how many are needed; else 0.

    Args:
        statistics: By the name of the matrix; a layer is named without the form or group after the colon.
    """
    found: dict[str, int] = {}
    for name, seen in statistics.items():
        needed = TOKENS_PER_INPUT * seen.in_features
        layer = name.partition(":")[0]
        found[layer] = max(found.get(layer, 0), needed if 0 < int(seen.tokens) < needed else 0)
    return found


def warning_of_few_tokens(layers: Mapping[str, int], remedy: str) -> str | None:
    """A warning that names layers which saw few tokens; None if there is nothing to say.

    Args:
        layers: As from :func:`starved`.
        remedy: What to do, a sentence.
    """
    few = [name for name, little in layers.items() if little]
    if not few:
        return None
    return (
        f"{len(few)} of {len(layers)} layers saw fewer calibration tokens than four times their input size "
        f"(first: {few[0]!r}; {max(layers.values()):,} tokens are enough for all). {remedy}"
    )


def warning_of_no_data(parameters: int) -> str | None:
    """A warning for so many parameters that are cut without data; None if they are too few to matter.

    The numbers are those of SmolLM2-135M-Instruct, on WikiText-2.
    """
    if parameters < REAL_SIZE:
        return None
    return (
        f"{parameters:,} parameters are cut by plain SVD, without data: it does not know what the layers are fed with, "
        "and took a language model (SmolLM2-135M, keep 0.6) from perplexity 25 to 60,000,000, where calibration led to "
        "64. Give calibration batches, compress_(model, keep, batches), or --data on the command line; some thousand "
        "tokens are enough."
    )
