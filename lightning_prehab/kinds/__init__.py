"""Kinds of layers: how each shows its weight matrices, and what takes its place. One file per kind."""

from torch import nn

from lightning_prehab.errors import ArgumentError
from lightning_prehab.kinds.attention import MultiheadAttentionKind
from lightning_prehab.kinds.base import Kind, MatrixView
from lightning_prehab.kinds.conv import ConvKind
from lightning_prehab.kinds.linear import LinearKind
from lightning_prehab.kinds.low_rank import cut_kind_of
from lightning_prehab.kinds.transformers_conv1d import Conv1DKind

_kinds: list[Kind] = [LinearKind(), ConvKind(), Conv1DKind(), MultiheadAttentionKind()]


def register_kind(kind: Kind) -> None:
    """Makes a kind of layer known to everything in this package; the last one registered is asked first.

    Raises:
        ArgumentError: If it is no :class:`Kind`.
    """
    if not isinstance(kind, Kind):
        raise ArgumentError(f"Expected a Kind, got {kind!r}.")
    _kinds.insert(0, kind)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None if it is none that can be cut."""
    return next((kind for kind in _kinds if kind.fits(module)), None)


def kind_again(module: nn.Module) -> Kind | None:
    """The kind of a module, also of a low-rank layer of one matrix, which can be cut once more; see :func:`kind_of`."""
    return kind_of(module) or cut_kind_of(module)


def view_of(target: nn.Module | MatrixView) -> MatrixView:
    """The matrix of a target: of a layer that is one matrix, or the view that stands for a part of a layer.

    Raises:
        ArgumentError: If it is no layer that is one matrix.
    """
    if isinstance(target, MatrixView):
        return target
    kind = kind_of(target)
    views = {} if kind is None else kind.views(target)
    if list(views) != [""]:
        raise ArgumentError(
            f"{type(target).__name__} is not a layer of one matrix that can be cut; find_targets gives its parts."
        )
    return views[""]


__all__ = ["ConvKind", "Kind", "MatrixView", "kind_again", "kind_of", "register_kind", "view_of"]
