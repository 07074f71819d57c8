"""What a model is calibrated with: data, text that it writes itself, both, or nothing."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.cli.inputs import Batches, can_write, describe, read_batches, read_tokenizer
from lightning_prehab.cli.outputs import beside, note
from lightning_prehab.errors import ArgumentError
from lightning_prehab.files.statistics import fingerprint, save_tensors
from lightning_prehab.integrations.own_samples import check_writes, own_samples, tokens_of
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.statistics.scarce import REAL_SIZE

#: Words for ``--data`` that are no files.
SELF, NONE = "self", "none"
#: Sequences that it writes where nothing else is said.
SEQUENCES = 64
#: Tokens of a sequence that the model writes, if it has positions for them.
LENGTH = 512
_SAID = "no --data: calibrated with text that the model writes; --data FILE takes yours, --data none cuts without."
_WHY = "to write own samples with; save it there, "


def settle_data(settings: Any, wish: object) -> None:
    """Before any work: writes into the settings what ``--data`` means where it is not given, or ``none``.

    Args:
        settings: Parsed options.
        wish: The recipe; anything else, such as a plan, brings what it needs.

    Raises:
        ArgumentError: If ``--self-share`` has nothing to be a share of, or ``--self-sequences`` no effect.
    """
    if settings.self_share is not None and settings.data in (None, SELF, NONE):
        raise ArgumentError("--self-share is the part of own samples beside a text; give --data FILE too.")
    refines = getattr(settings, "refine", None) is not None
    profits = isinstance(wish, Recipe) and (refines or _profits(wish))
    if settings.data is None and profits and can_write(settings.source):
        try:
            read_tokenizer(Path(settings.source), _WHY)
        except ArgumentError as error:
            note(f"no own samples: {error}")
        else:
            settings.data = SELF
            note(_SAID)
    elif settings.data == NONE:
        settings.data = None
    if settings.self_sequences is not None and settings.data != SELF:
        raise ArgumentError(
            "--self-sequences says how many --data self has, and has no effect here; leave it out"
            + (" (--self-share says how much there is beside a text)." if settings.data is not None else ".")
        )


def _profits(recipe: Recipe) -> bool:
    """Whether the recipe would look at data."""
    return recipe.factorization is None or any(recipe.wanted) or recipe.policy_or_default.needs_probes


def check_data(recipe: Recipe, settings: Any) -> None:
    """Before any work: what is asked for by name may need data."""
    if settings.data is not None:
        return
    if recipe.factorization is not None and recipe.factorization.needs_statistics:
        raise ArgumentError(f"{recipe.factorization} needs --data, text or batches; --method svd needs none.")
    policy = recipe.policy
    if policy is not None and policy.trials:
        raise ArgumentError("--trials tries cuts on a part of the data; give --data, text or batches, or no --trials.")
    if policy is not None and (policy.needs_probes or policy.needs_weight_gradients):
        raise ArgumentError(f"{policy} needs --data, text or batches; --policy ratio needs none.")


def note_of_no_data(settings: Any, plan: CompressionPlan) -> None:
    """Says what a cut was made without, where no warning has said it."""
    if settings.data is None and plan.dense_parameters < REAL_SIZE:
        note("without --data plain SVD is used: it does not know what matters to the model, and can ruin it.")


def own_text(model: nn.Module, settings: Any) -> Batches:
    """Text that the model writes, for ``--data self``; in the settings its file stands for it from now on."""
    batches, file = _written(model, settings, settings.self_sequences or SEQUENCES, _longest(model))
    settings.data = "own samples" if file is None else str(file)
    note(f"{settings.data}: {describe(batches, text=False)}")
    return batches


def with_own_text(model: nn.Module, batches: Batches | None, settings: Any) -> Batches | None:
    """The batches, with so many of the model's own between them that these have the asked share of all tokens.

    Raises:
        ArgumentError: If the tokens of the batches cannot be counted.
    """
    share = settings.self_share
    if share is None or batches is None:
        return batches
    batches = [{"input_ids": one} if _is_tokens(one) else one for one in batches]  # as the own samples are
    wanted = round(share / (1.0 - share) * sum(_count(batch, settings.data) for batch in batches))
    longest = _longest(model)
    sequences = max(-(-wanted // longest), 1)
    own, _ = _written(model, settings, sequences, max(round(wanted / sequences), 2))
    note(f"own samples beside {settings.data}: {describe(own, text=False)}")
    places = [
        ((2 * number + 1) / len(part), which, number)
        for which, part in enumerate((batches, own))
        for number in range(len(part))
    ]
    return [(batches, own)[which][number] for _, which, number in sorted(places)]


def _written(model: nn.Module, settings: Any, sequences: int, length: int) -> tuple[Batches, Path | None]:
    """The model's own text, and the file beside the output that keeps it: made once for the same model and settings."""
    tokenizer = read_tokenizer(Path(settings.source), _WHY)
    check_writes(model)
    made = {"sequences": sequences, "length": length, "seed": 0, "temperature": 1.0}
    file = None
    if settings.output is not None:
        facts = [fingerprint(model), made, *tokens_of(model, tokenizer)]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
        name = f"{Path(settings.source).resolve().name}-own-samples-{key}.safetensors"
        file = Path(settings.output).parent / name
    if file is None or not file.is_file():
        batches: Batches = own_samples(model, tokenizer, **made, batch_size=settings.batch_size)  # type: ignore[arg-type]
        if file is None:
            return batches, None
        _keep(batches, file)
    return read_batches(str(file), settings.source, settings.batch_size, length), file


def _keep(batches: Batches, file: Path) -> None:
    """Writes one file, whole or not at all."""
    with beside(file) as work:
        made = work / file.name
        save_tensors({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, made)
        (work / "like").touch()
        made.chmod((work / "like").stat().st_mode)  # safetensors makes files that nobody else can read
        os.replace(made, file)


def _longest(model: nn.Module) -> int:
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(LENGTH, positions) if isinstance(positions, int) and positions > 0 else LENGTH


def _is_tokens(batch: Any) -> bool:
    return isinstance(batch, Tensor) and batch.dim() == 2 and not batch.is_floating_point()


def _count(batch: Any, data: str) -> int:
    """Tokens of a batch, padding left out."""
    tokens = batch.get("attention_mask", batch.get("input_ids")) if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor):
        raise ArgumentError(f"--self-share counts tokens, and batches of {data} have no input_ids; give text.")
    return int(tokens.bool().sum()) if "attention_mask" in batch else tokens.numel()
