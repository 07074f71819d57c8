"""From two factors to the pivot layout in a model, and back: the same function, with optimizers that go on."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import TargetError, UnsupportedError
from lightning_prehab.layers.linear import LowRankLayer, weights_in
from lightning_prehab.layers.packing import packed, unpacked, why_not_packed, why_not_unpacked
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.linalg.matrices import to_float64
from lightning_prehab.linalg.modes import in_full_precision, outside_inference_mode
from lightning_prehab.surgery.holders import names_holders
from lightning_prehab.surgery.hooks import lost_hooks
from lightning_prehab.surgery.moments import mixed_state
from lightning_prehab.surgery.optimizers import inherited_states, listed_optimizers, plan_edits
from lightning_prehab.surgery.pretrained import note_structure_
from lightning_prehab.surgery.replacement import StateOf
from lightning_prehab.surgery.swap import replace_modules_
from lightning_prehab.targets.adapters import adapted_modules
from lightning_prehab.targets.find import check_model
from lightning_prehab.targets.locate import low_rank_layers
from lightning_prehab.targets.names import Patterns, clean_name, join, match_names
from lightning_prehab.targets.shards import check_not_in_shards
from lightning_prehab.targets.weights import parameter_owners


@names_holders
def to_pivot_(model: nn.Module, names: Patterns = None, optimizers: Iterable[torch.optim.Optimizer] = ()) -> list[str]:
    """Stores low-rank layers in the pivot layout, in place: ``r (m + n - r)`` numbers instead of ``r (m + n)``.

    The function stays the same to rounding.

    Args:
        model: Any module. A layer that is the model itself cannot be replaced: use
            :func:`lightning_prehab.layers.packed`.
        names: Names or patterns of the layers, as for :func:`~lightning_prehab.find_targets`; None takes all that have
            such a layout and share their weights with no other.
        optimizers: Those that train the layers. First moments move exactly, second moments as if the entries of the
            gradients were uncorrelated.

    Returns:
        The names of the changed layers, in model order.

    Raises:
        ArgumentError: If an argument is something else.
        TargetError: If a pattern matches no low-rank layer, or an adapter of peft is on the factors of one.
        UnsupportedError: If a layer that is named has no pivot layout (as one of whose factors just one is frozen) or
            shares its weights, somebody has put hooks on the parts of one, or an optimizer cannot follow. The model is
            then as it was.

    >>> from lightning_prehab import LowRankLinear
    >>> model = nn.Sequential(LowRankLinear(8, 8, rank=4))
    >>> to_pivot_(model), type(model[0]).__name__, sum(p.numel() for p in model.parameters())
    (['0'], 'PivotLinear', 56)
    """
    return _relay_(model, names, optimizers, packed, why_not_packed, "has no pivot layout", leave_out=True)


@names_holders
def to_factors_(
    model: nn.Module, names: Patterns = None, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> list[str]:
    """Stores layers in the pivot layout as two balanced factors again, in place: the way back from :func:`to_pivot_`.

    Args:
        model: Any module.
        names: As for :func:`to_pivot_`; None takes all, and raises if one of them cannot be changed.
        optimizers: As for :func:`to_pivot_`.

    Returns:
        The names of the changed layers, in model order.

    Raises:
        ArgumentError: As :func:`to_pivot_`.
        TargetError: As :func:`to_pivot_`.
        UnsupportedError: As :func:`to_pivot_`.

    >>> from lightning_prehab import PivotLinear
    >>> model = nn.Sequential(PivotLinear(8, 8, rank=4))
    >>> to_factors_(model), type(model[0]).__name__
    (['0'], 'LowRankLinear')
    """
    refusal = "cannot be made into two factors"
    return _relay_(model, names, optimizers, unpacked, why_not_unpacked, refusal, leave_out=False)


@outside_inference_mode
@in_full_precision
def _relay_(
    model: nn.Module,
    names: Patterns,
    optimizers: Iterable[torch.optim.Optimizer],
    change: Callable[[LowRankLayer], LowRankLayer],
    why_not: Callable[[LowRankLayer], str | None],
    refusal: str,
    leave_out: bool,
) -> list[str]:
    """Changes the layout of some layers, and without names of all, where that can leave those out that have none."""
    check_model(model)
    check_not_in_shards(model, "A change of the layout")
    optimizers = listed_optimizers(optimizers)
    layers = {clean_name(name): layer for name, layer in low_rank_layers(model) if name}
    wanted = list(layers) if names is None else match_names(names, list(layers), "names")
    owners = parameter_owners(model)
    exchanges = {}
    for name in wanted:
        layer = layers[name]
        reason = why_not(layer)
        new = layer if reason is not None else change(layer)
        replaced = {id(one) for one in weights_in(layer)} - {id(one) for one in weights_in(new)}
        inside = {id(module) for module in layer.modules()}
        if any(owners[one] - inside for one in replaced):
            reason = "its weights are shared with another layer"
        if reason is not None and names is None and leave_out:
            continue
        if reason is not None:
            raise UnsupportedError(f"Layer {name!r} {refusal}: {reason}. Leave it out of names.")
        if not replaced:
            continue  # it is stored like that
        if adapted_modules(layer):
            raise TargetError(
                f"Layer {name!r} has an adapter of peft on its factors, which would be lost; merge it first "
                "(merge_and_unload)."
            )
        lost = lost_hooks(name, layer, new)
        if lost:
            raise UnsupportedError(
                f"Layer {name!r} has hooks on {', '.join(lost)}, which would see other values in the other layout; "
                "remove them first, and put such on the parts that are there then."
            )
        exchanges[name] = Relaid(layer, new)
    relaid = list(exchanges.values())
    edits = [edit for optimizer in optimizers for edit in plan_edits(optimizer, relaid, inherited_states)]
    replace_modules_(model, {id(one.old): one.new for one in relaid})
    for edit in edits:
        edit.commit()
    note_structure_(model)
    return list(exchanges)


@dataclass
class Relaid:
    """A low-rank layer and the same one in another layout; nothing is changed yet.

    With ``B = M P`` and ``D = P A``, where ``P`` are the pivot rows of ``B`` and the rows of ``M`` are those of the
    identity and of ``C``, the gradients ``g`` belong together by

        ``g_D = P^-T g_A``,  ``g_C = (g_B)[rest] P^T``;
        ``g_A = P^T g_D``,  ``(g_B)[rest] = g_C P^-T``,  ``(g_B)[pivots] = (g_D D^T - C^T g_C) P^-T``.
    """

    old: LowRankLayer
    new: LowRankLayer

    def replaced(self) -> list[nn.Parameter]:
        """The matrices that the new layer does not hold any more."""
        kept = {id(parameter) for parameter in self.new.parameters()}
        return [parameter for parameter in self.old.parameters() if id(parameter) not in kept]

    def parameters(self, weight: Tensor) -> dict[str, Tensor]:
        """The first of two matrices takes the place of the first, the second of the second."""
        for name, old, new in self._parts():
            for theirs, ours in zip(_matrices(old), _matrices(new), strict=True):
                if theirs[1] is weight:
                    return {join(name, f"{ours[0]}.weight"): ours[1]}
        return {}

    def states(self, weight: Tensor, state: Mapping[str, Any], of: StateOf) -> dict[Tensor, dict[str, Any]]:
        """What an optimizer knows of the parameter in the place of one."""
        for _, old, new in self._parts():
            first, second = (matrix for _, matrix in _matrices(old))
            if weight is first or weight is second:
                found = _to_pivot if isinstance(new, PivotLayer) else _to_factors
                value, terms = found(old, new, weight is first, state, of(first))
                shape = value.shape
                moved = mixed_state(terms, value.flatten(1)) if terms else {}
                matrices = {key: entry.reshape(shape) if _is_matrix(entry) else entry for key, entry in moved.items()}
                return {value: matrices} if moved else {}
        return {}

    def shifts(self, parameter: Tensor) -> list[tuple[slice, Tensor]]:
        """None: biases stay as they are."""
        return []

    def _parts(self) -> Iterator[tuple[str, Any, Any]]:
        """Each matrix that is stored otherwise: its name in the layer, its old and its new module."""
        new = dict(self.new.named_modules())
        for name, part in self.old.named_modules():
            if isinstance(part, LowRankLayer) and name in new and new[name] is not part and _matrices(part):
                yield name, part, new[name]


#: A sum of products ``L g R``: see :func:`~lightning_prehab.surgery.moments.mixed_state`.
_Terms = list[tuple[Mapping[str, Any], Tensor, Tensor]]


def _to_pivot(
    old: Any, new: Any, first: bool, state: Mapping[str, Any], of_first: Mapping[str, Any] | None
) -> tuple[nn.Parameter, _Terms]:
    """The gradient of D from that of A, or of C from that of B."""
    pivots, others, rows = _rows(new, old)
    if first:
        left = torch.linalg.pinv(rows).mT
        return new.D.weight, [(state, left, torch.eye(old.A.weight[0].numel()).to(left))]
    chosen = torch.eye(len(pivots) + len(others)).to(rows)[others]
    return new.C.weight, [(state, chosen, rows.mT)]


def _to_factors(
    old: Any, new: Any, first: bool, state: Mapping[str, Any], of_first: Mapping[str, Any] | None
) -> tuple[nn.Parameter, _Terms]:
    """The gradient of A from that of D, or of B from those of C and D."""
    pivots, others, rows = _rows(old, new)
    d, c = to_float64(old.D.weight).flatten(1), to_float64(old.C.weight).flatten(1)
    if first:
        return new.A.weight, [(state, rows.mT, torch.eye(d.shape[1]).to(d))]
    if of_first is None:
        return new.B.weight, []
    inverse = torch.linalg.pinv(rows).mT
    identity = torch.eye(len(pivots) + len(others)).to(d)
    of_c = identity[:, others] - identity[:, pivots] @ c.mT
    return new.B.weight, [(of_first, identity[:, pivots], d.mT @ inverse), (state, of_c, inverse)]


def _rows(packed_layer: Any, factors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are pivots, which are not, and the pivot rows of ``B``."""
    rows = packed_layer.order.argsort()
    pivots, others = rows[: packed_layer.rank], rows[packed_layer.rank :]
    return pivots, others, to_float64(factors.B.weight).flatten(1)[pivots]


def _matrices(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The two matrices of a layer that is one product, by name; none of one that holds several."""
    keys = ("D", "C") if isinstance(layer, PivotLayer) else ("A", "B")
    children: Any = layer._modules
    return [(key, children[key].weight) for key in keys if key in children]


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
