"""The layers of a model that hold weight matrices, and the matrices that each shows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_prehab.kinds import Kind, MatrixView, kind_again, kind_of, view_of
from lightning_prehab.kinds.fused import fused_blocks
from lightning_prehab.kinds.inside import inside_kind
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.targets.names import clean_name, join
from lightning_prehab.targets.weights import has_matrix, why_not

#: A layer that is one matrix, or one matrix of a layer; :func:`~lightning_prehab.kinds.view_of` shows both alike.
Target = nn.Module | MatrixView


@dataclass(frozen=True)
class Layer:
    """A layer of a model that may hold weight matrices.

    Attributes:
        name: Dotted name, without what ``torch.compile`` puts around.
        module: The layer.
        kind: What it is, or None for a kind that cannot be cut.
        reason: Why it cannot be cut, whatever its matrices look like, or None. It then shows no matrices.
        blocks: ``{part: rows}`` if it is a fused projection, else None.
    """

    name: str
    module: nn.Module
    kind: Kind | None
    reason: str | None
    blocks: dict[str, int] | None

    @classmethod
    def at(cls, name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> "Layer":
        """The layer that stands, or stood, at a place of a model, ``{name: module}``."""
        path, _, key = name.rpartition(".")
        kind, blocks = inside_kind(kind_again(module), modules.get(path), key), None
        reason = why_not(module, kind)
        if reason is None and kind is not None and kind.linear and "weight" in module._parameters:
            blocks = fused_blocks(key, kind.views(module)[""].out_features, modules.get(path))
        return cls(clean_name(name), module, kind, reason, blocks)

    def views(self, split_fused: bool) -> dict[str, MatrixView]:
        """Its matrices by part; the part of a layer that is one matrix is ``""``."""
        return self.candidates(split_fused)[0]

    def candidates(self, split_fused: bool) -> list[dict[str, MatrixView]]:
        """All ways to see it, the one that is used when there is a choice first."""
        if self.kind is None or self.reason is not None:
            return [{}]
        found = list(self.kind.candidates(self.module, self.blocks if split_fused else None))
        for views in found:
            for part, view in views.items():
                view.part = part
        return found


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """What may be a target: modules with a weight matrix of their own, but for those inside of another such layer."""
    modules = dict(model.named_modules())
    inside: set[int] = set()
    for name, module in modules.items():
        if id(module) in inside:
            continue
        kind = kind_of(module)
        if isinstance(module, LowRankLayer) or kind is not None:
            inside.update(id(inner) for inner in module.modules())
        if not name or isinstance(module, LowRankLayer) or not (kind is not None or has_matrix(module)):
            continue
        yield Layer.at(name, module, modules)


def cut_layers_of(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """What has been cut already, seen as what may be cut once more: low-rank layers of one matrix.

    Of a layer of several matrices (a fused projection, attention) those inside of it, and what is dense there.

    Yields:
        The name of the outermost low-rank layer, and the layer itself or one inside.
    """
    modules = dict(model.named_modules())
    for path, outermost in low_rank_layers(model):
        inside: set[int] = set()
        for inner, module in outermost.named_modules():
            name = join(path, inner)
            if not name or id(module) in inside or kind_again(module) is None:
                continue
            inside.update(id(part) for part in module.modules())
            yield clean_name(path), Layer.at(name, module, modules)


def low_rank_layers(model: nn.Module) -> list[tuple[str, LowRankLayer]]:
    """The outermost low-rank layers, each under its first name."""
    inside: set[int] = set()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer) and id(module) not in inside:
            inside.update(id(inner) for inner in module.modules())
            found.append((name, module))
    return found


def locate(
    model: nn.Module, shapes: Mapping[str, tuple[int, int] | None]
) -> dict[str, tuple[Layer, dict[str, MatrixView]]]:
    """The layers that hold some targets, by the name of the layer, with all of their matrices by part.

    A layer is seen whole if its own name is among the names, else as its parts; where there are several ways to see it,
    in the one whose matrices have the given shapes (None: any). Names that are not found are left out. Layers that have
    been cut already are found too.
    """
    found: dict[str, tuple[Layer, dict[str, MatrixView]]] = {}
    for layer in (*layers_of(model), *(layer for _, layer in cut_layers_of(model))):
        views = _of_shapes(layer.name, layer.candidates(split_fused=layer.name not in shapes), shapes)
        if any(join(layer.name, part) in shapes for part in views):
            found[layer.name] = layer, views
    return found


def same_targets(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The same targets in another copy of the model that they were found in; see :func:`locate`."""
    located = locate(model, {name: view_of(target).shape for name, target in targets.items()})
    found = {join(name, part): view for name, (_, views) in located.items() for part, view in views.items()}
    views = {name: found[name] for name in targets if name in found}
    return {name: view if isinstance(targets[name], MatrixView) else view.module for name, view in views.items()}


def group_names(name: str, target: Target) -> list[str]:
    """Names under which the statistics of a target stand: its own, or one for each group of a grouped convolution."""
    count = view_of(target).group_count
    return [name] if count == 1 else [f"{name}:{index}" for index in range(count)]


def layer_names(targets: Mapping[str, Target]) -> dict[str, str]:
    """Name of the layer of each target."""
    parts = {name: target.part if isinstance(target, MatrixView) else "" for name, target in targets.items()}
    return {name: name.removesuffix(f".{part}") if part else name for name, part in parts.items()}


def _of_shapes(
    name: str, candidates: Sequence[dict[str, MatrixView]], shapes: Mapping[str, tuple[int, int] | None]
) -> dict[str, MatrixView]:
    for views in candidates:
        if all(shapes.get(join(name, part)) in (None, view.shape) for part, view in views.items()):
            return views
    return candidates[0]
