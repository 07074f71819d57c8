"""A model in parts, each worked on at a time: its blocks, what lies before them, what lies after them."""

from collections.abc import Mapping
from typing import NamedTuple

from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.matrices import break_even_rank, working_dtype
from lightning_prehab.offload.chain import Chain
from lightning_prehab.statistics.sums import Wanted, statistics_bytes
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import in_all_forms
from lightning_prehab.targets.locate import Target


class Part(NamedTuple):
    """Some targets that are observed together.

    Attributes:
        key: A name for it.
        block: The number of their block, or None outside of the blocks.
        front: Outside of the blocks: whether they lie before the first one.
        targets: They themselves; there may be none, where a pass is needed all the same.
        last: Whether they are the last ones of their place.
    """

    key: str
    block: int | None
    front: bool
    targets: Targets
    last: bool


def parts_of(targets: Targets, chain: Chain, wanted: Wanted, at_most: int | None) -> list[Part]:
    """The parts in the order of the passes: with a backward pass from the end of the model.

    Args:
        targets: Of the whole model.
        chain: Its blocks.
        wanted: What is collected.
        at_most: Bytes that the statistics of a part may take, if it has more than one target.
    """
    names = {id(module): name for name, module in chain.around.items()}
    places: dict[tuple[int | None, bool], dict[str, Target]] = {}
    if wanted.backward:
        places[None, False] = {}
    for name, target in targets.items():
        block = chain.place_of(name)
        front = block is None and names.get(id(view_of(target).module)) in chain.front
        places.setdefault((block, front), {})[name] = target
    if any(wanted):  # the way leads through all of them
        for number in range(len(chain.blocks)):
            places.setdefault((number, False), {})
    order = sorted(places, key=lambda place: (-1 if place[1] else len(chain.blocks)) if place[0] is None else place[0])
    parts = []
    for place in reversed(order) if wanted.backward else order:
        groups = _groups(places[place], wanted, at_most)
        for number, group in enumerate(groups):
            where = f"block-{place[0]}" if place[0] is not None else "front" if place[1] else "head"
            found = Targets(group, targets.skipped, targets.model_parameters)
            parts.append(Part(f"{where}-{number}", *place, found, number + 1 == len(groups)))
    while parts and not parts[-1].targets:  # nobody needs what would come of it
        parts.pop()
    return parts


def sums_of(targets: Mapping[str, Target], wanted: Wanted) -> int:
    """Bytes of the statistics of some targets, in all forms."""
    views = [view_of(target) for target in in_all_forms(targets).values()]
    return sum(statistics_bytes([view.shape], wanted, working_dtype(view.parameter.dtype)) for view in views)


def highest_rank(target: Target, layout: str) -> int:
    """The highest rank that a plan can choose: with two factors break-even, else that of the matrix."""
    view = view_of(target)
    m, n, groups = *view.shape, view.group_count
    return min(m // groups, n) if layout == "pivot" else max(break_even_rank(m, n, groups), 1)


def _groups(targets: Mapping[str, Target], wanted: Wanted, at_most: int | None) -> list[dict[str, Target]]:
    groups: list[dict[str, Target]] = [{}]
    for name, target in targets.items():
        if groups[-1] and at_most is not None and sums_of({**groups[-1], name: target}, wanted) > at_most:
            groups.append({})
        groups[-1][name] = target
    return groups
