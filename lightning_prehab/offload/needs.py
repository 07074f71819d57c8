"""What a folder takes in memory and on disk, said before it is compressed, and batches that fit."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.storage import Layout, rank_within
from lightning_prehab.offload.chain import Chain
from lightning_prehab.offload.parts import highest_rank, sums_of
from lightning_prehab.offload.skeleton import Skeleton
from lightning_prehab.offload.work import Work
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.progress.words import in_words
from lightning_prehab.refinement.sequences import Sequences
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.statistics.batches import batch_size, count_positions, padding_mask
from lightning_prehab.statistics.sums import Wanted
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.locate import Target

#: Bytes for each entry of the logits of a batch while the loss and its gradient are computed (measured: 14.5).
LOSS = 15
#: Numbers that a block keeps of each token for the backward pass, for each input and output of its matrices (measured).
GRAPH = 2.0
#: Copies, in float32, of the largest Gram matrix of a layer that is decomposed: as it is read, as a mean, shrunk.
COPIES = 3.0
#: Share by which low-rank layers keep more for a backward pass: what lies between their factors.
BETWEEN = 1.25
#: Bytes for each number that is trained: gradient, two moments, the best state, the first one.
TRAINED = 5 * 4
#: What a layer may keep, at most, relative to the share of the budget.
UNEVEN = 1.5
#: Share of the estimate that nobody knows where it goes: memory in pieces.
REST = 0.05
#: Bytes that libraries take only when they begin to compute (measured).
LATER = 150 * 10**6
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def bytes_in(memory: int | str | None) -> int | None:
    """An amount of memory as people write it.

    >>> bytes_in("3GB"), bytes_in("1.5 GiB"), bytes_in(10**9)
    (3000000000, 1610612736, 1000000000)
    """
    if memory is None:
        return None
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]i?)?b?\s*", str(memory).lower())
    try:
        if isinstance(memory, bool) or found is None:
            raise ValueError
        value = round(float(found[1]) * _UNITS[found[2] or ""])
    except ValueError:
        raise ArgumentError(f"memory must be bytes or words such as '3GB' or '2.5GiB', got {show(memory)}.") from None
    if value < 2**20:
        raise ArgumentError(f"memory must be enough to work with, got {show(memory)} ({value:,} bytes).")
    return value


@dataclass(frozen=True)
class Needs:
    """What is known of a folder and of data before the work begins.

    Attributes:
        base: Memory of the process as it is, with all libraries loaded.
        around: Bytes of what lies outside of the blocks.
        block: Bytes of the largest block.
        sums: Bytes of the statistics of the largest block.
        largest: Bytes of the statistics of the largest layer: less cannot be in memory.
        temporary: Bytes that adding to the statistics of a layer takes for a while.
        decomposition: Bytes that decomposing the largest layer takes, with its statistics.
        size: Bytes of a number of the weights.
        row: Bytes that a block takes for each token while it runs.
        vocabulary: Entries of the logits of a token; 0 where there are none.
        tokens: Of the largest batch.
        total: Tokens of all batches.
        state: Bytes of the hidden states of a token.
        blocks: How many there are.
        factors: Bytes of the factors of all targets that are kept.
        stored: Bytes of the statistics on disk at a time: of a block, and all of those that are read again because
            factors of one rank are no part of others.
        wanted: What is collected.
        masks: Bytes of the attention masks of all batches, where there is padding.
        output: Bytes of the new folder, at most.
        training: Bytes that a block takes to be refined beside activations: its weights in float32, gradients, two
            moments, the best state and the first one; 0 without a refinement.
        step: Tokens of a step of it.
        sums_at_most: Bytes of the statistics that are in memory at a time; None: those of a block.
        rows: That batches have been cut into, to fit; None: they are as they were.
    """

    base: int
    around: int
    block: int
    sums: int
    largest: int
    temporary: int
    decomposition: int
    size: int
    row: int
    vocabulary: int
    tokens: int
    total: int
    state: int
    blocks: int
    factors: int
    stored: int
    wanted: Wanted
    masks: int
    output: int
    training: int = 0
    step: int = 0
    sums_at_most: int | None = None
    rows: int | None = None

    @property
    def fit(self) -> dict[str, int | None]:
        """What was chosen to fit into memory."""
        return {"sums_at_most": self.sums_at_most, "rows": self.rows}

    @classmethod
    def of(
        cls,
        skeleton: Skeleton,
        chain: Chain,
        recipe: Recipe,
        batches: Sequence[Any] | None,
        refinement: Refinement | None = None,
    ) -> "Needs":
        """What the model, the wish and the data say."""
        model: Any = skeleton.model
        targets = recipe.find_targets(model)
        wanted = recipe.wanted
        places: dict[int | None, dict[str, Target]] = {}
        for name, target in targets.items():
            places.setdefault(chain.place_of(name), {})[name] = target
        layers = [sums_of({name: target}, wanted) for name, target in targets.items()]
        shapes = [view_of(target).shape for target in targets.values()]
        size = next(iter(model.parameters())).element_size()
        inside = [sum(sum(view_of(one).shape) for one in place.values()) for place in places.values()]
        hidden = _hidden_size(model, targets)
        grams = [max(max(m, n) ** 2, 1) for m, n in shapes]
        method = recipe.factorization_or_default

        def nested(target: Target) -> bool:
            view = view_of(target)
            return view.group_count == 1 and method.is_nested(*view.shape)

        sizes = [sums_of(place, wanted) if any(wanted) else 0 for place in places.values()]
        again = [one for one, place in zip(sizes, places.values(), strict=True) if not all(map(nested, place.values()))]
        has_head = model.get_output_embeddings() is not None if hasattr(model, "get_output_embeddings") else False
        return cls(
            base=resident(),
            around=skeleton.bytes_of(chain.around.values()),
            block=max(skeleton.bytes_of([block]) for block in chain.blocks),
            sums=max(sizes),
            largest=max(layers) if any(wanted) else 0,
            temporary=8 * max(grams) if any(wanted) else 0,
            decomposition=_decomposition(shapes, any(wanted)),
            size=size,
            row=round(GRAPH * size * max(inside, default=0)),
            vocabulary=(getattr(model.config, "vocab_size", 0) or 0) if has_head and wanted.backward else 0,
            tokens=max(map(count_positions, batches)) if batches else 0,
            total=sum(map(count_positions, batches)) if batches else 0,
            state=size * hidden,
            blocks=len(chain.blocks),
            factors=sum(_factors(target, size, recipe.layout) for target in targets.values() if nested(target)),
            stored=max(sizes) + sum(again),
            wanted=wanted,
            masks=sum(map(_mask, batches or [])),
            output=sum(entry.nbytes for entry in skeleton.source.entries.values())
            + sum(_beside(target, recipe) for target in targets.values()),
            training=0
            if refinement is None
            else max(_training(*one, places, recipe) for one in enumerate(chain.blocks)),
            step=0 if refinement is None else _step(batches, refinement),
        )

    def stages(self) -> dict[str, int]:
        """Bytes of memory that each kind of work takes, with everything else."""
        sums = self.sums if self.sums_at_most is None else min(self.sums, max(self.sums_at_most, self.largest))
        found = {
            "the parts before the blocks": self.around + self.block,
            "a block with its statistics": self.block + sums + self.temporary + self.tokens * self.row,
            "the loss": self.around + LOSS * self.tokens * self.vocabulary,
            "a decomposition": self.decomposition,
        }
        if self.training:
            tokens = min(self.step, self.tokens)
            wide = max(4 * self.row // self.size, self.row)
            found["the refinement of a block"] = self.training + round(BETWEEN * tokens * wide) + self.masks
        rest = self.base + LATER + self.masks
        return {name: round(rest + size * (1 + REST)) for name, size in found.items()}

    @property
    def memory(self) -> int:
        """Bytes of memory at the peak."""
        return max(self.stages().values())

    @property
    def disk(self) -> int:
        """Bytes on disk at the peak, beside the source."""
        files = 0 if not any(self.wanted) else self.blocks + 3 if self.wanted.backward else 2
        between = self.total * self.state * files
        if self.training:  # two states of two chains, and refined blocks beside those that are not
            between += 4 * self.total * self.state + self.output
        return between + self.factors + self.stored + self.output

    def check_disk(self, output: Path, work: Work) -> None:
        """Raises :class:`ArgumentError` if there is not so much room, less what lies there already."""
        there = sum(path.stat().st_size for path in work.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(work.folder).free
        if free + there < self.disk:
            raise ArgumentError(
                f"{output.parent} has {_gigabytes(free)} left, and about {_gigabytes(self.disk)} are needed there for "
                "unfinished work and the result; give an output on another disk, or fewer batches."
            )

    def lines(self, work: Work, seconds: float) -> list[str]:
        """What is said before the work begins.

        Args:
            work: The folder of it.
            seconds: About how long it takes.
        """
        what = max(self.stages(), key=lambda name: self.stages()[name])
        data = f"; batches of at most {self.tokens:,} tokens, {self.total:,} in all" if self.tokens else ""
        found = [
            f"{self.blocks} blocks, one at a time: about {_gigabytes(self.memory)} of memory (for {what}) and "
            f"{_gigabytes(self.disk)} of disk{data}.",
            f"{in_words(seconds).capitalize()} of computing, by a short measurement: an estimate, more if others work.",
        ]
        if work.resumed:
            found.append(f"Going on with the unfinished work in {work.folder}.")
        found += [
            f"There is unfinished work of another wish in {other}; delete it if it is not needed."
            for other in work.others()
        ]
        return found


def fitting_batches(
    needs: Needs, batches: list[Any] | None, limit: int | None, known: Mapping[str, int | None] | None = None
) -> tuple[list[Any] | None, Needs]:
    """Batches of so few rows, and so few layers at a time, that a limit is kept.

    Args:
        needs: With the batches as they are.
        batches: As they were given.
        limit: In bytes, or None.
        known: :attr:`Needs.fit` of work that is taken up again, which began with more or less memory in use.

    Raises:
        ArgumentError: If nothing helps.
    """
    if known is not None:
        return _fitted(replace(needs, sums_at_most=known["sums_at_most"]), batches, known["rows"])
    if limit is None or needs.memory <= limit:
        return batches, needs
    rows = max(batch_size(batch) for batch in batches or [0])
    while True:
        over = round((needs.memory - limit) / (1 + REST))
        smaller = replace(needs, sums_at_most=max(needs.sums - over, needs.largest))
        if smaller.memory <= limit:
            return batches, smaller
        if batches is None or rows <= 1:
            needs = smaller
            break
        rows = max(rows // 2, 1)
        batches, needs = _fitted(needs, batches, rows)
        assert batches is not None
        if needs.memory <= limit:
            return batches, needs
    what = max(needs.stages(), key=lambda name: needs.stages()[name])
    raise ArgumentError(
        f"memory={_gigabytes(limit)} is too little: about {_gigabytes(needs.memory)} are needed for {what}"
        f"{_of_rows(needs)}, {_gigabytes(needs.base)} of which are Python and its libraries. Give more, or shorter "
        "rows of data."
    )


def _fitted(needs: Needs, batches: list[Any] | None, rows: int | None) -> tuple[list[Any] | None, Needs]:
    """Batches of at most so many rows; as they are for None."""
    if rows is None or batches is None:
        return batches, needs
    batches = [part for batch in batches for part in _in_rows(batch, rows)]
    return batches, replace(needs, tokens=max(map(count_positions, batches)), rows=rows)


def _of_rows(needs: Needs) -> str:
    return f", with one row of {needs.tokens:,} tokens at a time" if needs.tokens else ""


def resident() -> int:
    """Memory of this process that is there, in bytes."""
    import resource  # Windows has none

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except (OSError, LookupError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if peak > 2**26 else 1024 * peak  # bytes on macOS


def _in_rows(batch: Any, rows: int) -> list[Any]:
    """A batch in smaller ones; as it is where its rows cannot be told apart."""
    count = batch_size(batch)
    parts = (
        list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    )
    if count <= rows or not all(isinstance(one, Tensor) and one.dim() > 0 and len(one) == count for one in parts):
        return [batch]
    starts = range(0, count, rows)
    if isinstance(batch, Tensor):
        return [batch[start : start + rows] for start in starts]
    if isinstance(batch, Mapping):
        return [{key: one[start : start + rows] for key, one in batch.items()} for start in starts]
    return [type(batch)(one[start : start + rows] for one in batch) for start in starts]


def _mask(batch: Any) -> int:
    """Bytes of a mask of positions by positions, for a batch with padding."""
    mask = padding_mask(batch)
    return 0 if mask is None or bool(mask.all()) else mask.shape[0] * mask.shape[1] ** 2


def _hidden_size(model: Any, targets: Targets) -> int:
    size = getattr(model.config, "hidden_size", None)
    return size if isinstance(size, int) else max(min(view_of(target).shape) for target in targets.values())


def _decomposition(shapes: Sequence[tuple[int, int]], observed: bool) -> int:
    """Of the largest layer: copies of its Gram matrices, roots and eigenvectors of the smaller side in float64."""
    return max(
        round(4 * COPIES * max(m, n) ** 2 if observed else 0) + 8 * 8 * min(m, n) ** 2 + 24 * m * n for m, n in shapes
    )


def _training(number: int, block: nn.Module, places: Mapping[int | None, Mapping[str, Target]], recipe: Recipe) -> int:
    """Of a block, if each of its layers keeps :data:`UNEVEN` times its share of the budget."""
    keep = UNEVEN * getattr(recipe.policy_or_default, "keep", recipe.keep)
    trained = sum(one.numel() for one in block.parameters() if one.dim() <= 1)
    for target in places.get(number, {}).values():
        (m, n), groups = view_of(target).shape, view_of(target).group_count
        layout: Layout = recipe.layout if groups == 1 else "factors"
        rank = min(rank_within(keep * m * n, m, n, layout, groups), highest_rank(target, layout))
        trained += rank * (m + groups * n)
    weights = 4 * sum(one.numel() for one in block.parameters())
    return weights + TRAINED * trained


def _step(batches: Sequence[Any] | None, refinement: Refinement) -> int:
    """Tokens of the largest step."""
    sequences = Sequences(batches, refinement)
    return max(map(count_positions, [*sequences.training, *sequences.held_back]))


def _factors(target: Target, size: int, layout: str) -> int:
    return max(size, 4) * highest_rank(target, layout) * sum(view_of(target).shape)


def _beside(target: Target, recipe: Recipe) -> int:
    """Of what a layer stores that is no parameter: places of entries, the order of rows."""
    m, n = view_of(target).shape
    return 4 * recipe.factorization_or_default.nonzeros(m, n) + (8 * m if recipe.layout == "pivot" else 0)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.0f} MB"
