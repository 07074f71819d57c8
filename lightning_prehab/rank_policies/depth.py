"""Where in the depth of a model its layers stand, and how much more some of that depth counts."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lightning_prehab.rank_policies.base import LayerChoices


def blocks_of(layers: Iterable[LayerChoices]) -> list[int]:
    """For each layer the number of its block, from 0, in the order in which blocks come first.

    A block is an element of a numbered list of modules of which at least two hold layers of the same names and shapes,
    as ``model.layers.3`` does; of lists inside each other the outermost one counts. A layer outside of them is a block
    of its own.

    >>> import torch
    >>> names = ["embed", "model.layers.0.q", "model.layers.0.k", "model.layers.1.q", "model.layers.1.k", "head"]
    >>> blocks_of(LayerChoices(name, 1, 1, torch.ones(1), ()) for name in names)
    [0, 1, 1, 2, 2, 3]
    """
    layers = list(layers)
    contents: dict[str, dict[str, set[tuple[str, int, int]]]] = defaultdict(lambda: defaultdict(set))
    for layer in layers:
        for where, number, rest in _numbered(layer.name):
            contents[where][number].add((rest, layer.out_features, layer.in_features))
    repeated = {
        where for where, elements in contents.items() if len({*map(frozenset, elements.values())}) < len(elements)
    }
    order: dict[object, int] = {}
    return [order.setdefault(_block(layer.name, repeated), len(order)) for layer in layers]


def _numbered(name: str) -> Iterable[tuple[str, str, str]]:
    """Each place of a name where a list stands: the name of the list, the number in it, what comes after it."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            yield ".".join(parts[:index]), part, ".".join(parts[index + 1 :])


def _block(name: str, repeated: set[str]) -> object:
    return next(((where, number) for where, number, _ in _numbered(name) if where in repeated), name)


def multipliers(blocks: int, alpha: float, gamma: float) -> list[float]:
    """How much the loss of each block counts: ``m_b = 1 + |gamma| norm01(sum of (k + 1)^-alpha over k >= b)``.

    ``norm01`` makes the largest of these sums 1 and the smallest 0. So the first block counts ``1 + gamma`` times, the
    last one once; the larger ``alpha``, the sooner it falls. With a negative ``gamma`` it is the other way round.

    >>> multipliers(3, 0.0, 2.0), multipliers(3, 0.0, -2.0), multipliers(1, 0.0, 2.0)
    ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0])
    """
    sums = [sum((k + 1) ** -alpha for k in range(block, blocks)) for block in range(blocks)]
    spread = max(sums) - min(sums)
    shares = [(one - min(sums)) / spread if spread else 0.0 for one in sums]
    return [1.0 + abs(gamma) * share for share in (shares if gamma >= 0.0 else reversed(shares))]


def weigh(layer: LayerChoices, factor: float) -> LayerChoices:
    """The layer as if all that is lost by a cut of it counted so many times."""
    probe = layer.probe
    return replace(
        layer,
        singular_values=layer.singular_values * factor**0.5,
        components=None if layer.components is None else layer.components * factor,
        probe=None if probe is None else probe._replace(loss_increase=probe.loss_increase * factor),
    )


def weighed(layers: Sequence[LayerChoices], alpha: float, gamma: float) -> list[LayerChoices]:
    """All layers with the losses of their blocks multiplied."""
    blocks = blocks_of(layers)
    factors = multipliers(max(blocks) + 1, alpha, gamma)
    return [weigh(layer, factors[block]) for layer, block in zip(layers, blocks, strict=True)]
