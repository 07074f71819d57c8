"""Finds the blocks of a network: the layers of a transformer, the stages of an image model."""

from collections import Counter
from itertools import groupby

from torch import nn

from lightning_prehab.errors import TargetError
from lightning_prehab.layers import LowRankLayer

Blocks = list[tuple[str, nn.Module]]


def find_blocks(model: nn.Module) -> Blocks:
    """The repeated blocks that hold most of a network, in the order in which they stand.

    They stand side by side in one ``nn.ModuleList`` or ``nn.Sequential``, each is made of other modules, and each class
    among them is there more than once. Where there are several such rows, as layers and the experts inside of them, it
    is the one with the most parameters. A single block is taken if nothing is repeated.

    That the blocks run one after the other, each on what the one before it returns, is not known from the modules
    alone: whoever relies on it has to look.

    Returns:
        Dotted names and modules; at least one.

    Raises:
        TargetError: If there are none.

    >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> [name for name, _ in find_blocks(nn.Sequential(nn.Linear(2, 4), block(), block(), nn.Linear(4, 2)))]
    ['1', '2']
    """
    ours = {id(inner) for module in model.modules() if isinstance(module, LowRankLayer) for inner in module.modules()}
    rows: list[Blocks] = []
    for name, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential) and id(container) not in ours:
            entries = [(f"{name}.{place}" if name else place, entry) for place, entry in container.named_children()]
            rows += [list(row) for blocks, row in groupby(entries, lambda entry: _is_block(entry[1])) if blocks]
    if not rows:
        raise TargetError(
            f"{type(model).__name__} has no blocks: modules that are made of other modules, side by side in an "
            "nn.ModuleList or nn.Sequential."
        )
    return max(rows, key=_size)  # the first of equals


def _is_block(entry: nn.Module) -> bool:
    """Whether it is made of other modules, with something to learn."""
    return (
        not isinstance(entry, LowRankLayer)
        and any(True for _ in entry.children())
        and any(True for _ in entry.parameters())
    )


def _size(row: Blocks) -> tuple[bool, int]:
    """Whether the blocks repeat, and how many parameters they have."""
    repeated = min(Counter(type(block) for _, block in row).values()) > 1
    return repeated, sum(parameter.numel() for _, block in row for parameter in block.parameters())
