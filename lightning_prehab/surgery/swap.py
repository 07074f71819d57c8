"""The only file that changes a model.

Everything is computed and checked before the first change; the changes themselves are assignments that cannot fail
halfway.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.origin import Origin
from lightning_prehab.surgery.factors import planned_targets, stays_as_it_is
from lightning_prehab.surgery.holders import note_gone, note_replaced
from lightning_prehab.surgery.hooks import hand_over_, lost_hooks, own_content
from lightning_prehab.surgery.optimizers import GroupEdit, inherited_states, plan_edits
from lightning_prehab.surgery.pretrained import check_pretrained, note_structure_
from lightning_prehab.surgery.recut import Recut
from lightning_prehab.surgery.replacement import Replacement
from lightning_prehab.surgery.stored import shapes_of
from lightning_prehab.targets.attached import has_hooks
from lightning_prehab.targets.find import count_dense_parameters, count_parameters
from lightning_prehab.targets.locate import locate


def swap_(
    model: nn.Module,
    plan: CompressionPlan,
    factors: Mapping[str, Factors],
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> CompressionReport:
    """Puts factors in the place of the planned layers, and of their weights in the optimizers.

    Raises:
        PrehabError: As :func:`prepare_swap`. Model and optimizers are then as they were.
    """
    return prepare_swap(model, plan, factors, optimizers).commit()


@dataclass
class PreparedSwap:
    """A swap that is ready to be made: :meth:`commit` consists of assignments alone, and cannot fail halfway.

    On several processes all prepare, and commit when they know that all are ready.
    """

    model: nn.Module
    plan: CompressionPlan
    replacements: list[Replacement]
    slots: list[tuple[nn.Module, str, nn.Module]]
    edits: list[GroupEdit]
    errors: Mapping[str, float]

    def commit(self) -> CompressionReport:
        """Changes the model and the optimizers."""
        before = count_dense_parameters(self.model)
        _shift_biases_(self.replacements)
        put_(self.slots, [(one.old, one.new) for one in self.replacements])
        for edit in self.edits:
            edit.commit()
        note_structure_(self.model)
        origin = Origin.of(self.model)
        return CompressionReport(self.plan, self.errors, before, count_parameters(self.model), origin=origin)


@in_full_precision
def prepare_swap(
    model: nn.Module,
    plan: CompressionPlan,
    factors: Mapping[str, Factors],
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> PreparedSwap:
    """All that a swap computes and checks; nothing is changed yet.

    Args:
        model: The module that the plan was made for.
        plan: What is cut to which rank.
        factors: As from :func:`~lightning_prehab.surgery.factors.compute_factors`.
        optimizers: Those that hold the weights.

    Raises:
        PlanError: If the plan does not fit the model.
        UnsupportedError: If an optimizer cannot be edited, a weight has hooks of its own, or the model could not be
            saved afterwards.
    """
    targets = planned_targets(model, plan)
    cut = {layer.name: factors[layer.name] for layer in plan.layers if layer.rank is not None}
    same = {layer.name for layer in plan.layers if stays_as_it_is(layer, view_of(targets[layer.name]))}
    changed = {name: one for name, one in cut.items() if name not in same or one.bias_shift is not None}
    located = locate(model, shapes_of(changed)).values()
    check_pretrained(model, (layer.module for layer, _ in located))
    replacements = [kind_of_exchange(views).prepare(layer, views, changed) for layer, views in located]
    check_hooks(replacements)
    edits = [edit for optimizer in optimizers for edit in plan_edits(optimizer, replacements, inherited_states)]
    slots = slots_of(model, {id(one.old): one.new for one in replacements})
    errors = {name: error for one in replacements for name, error in one.errors().items()}
    return PreparedSwap(model, plan, replacements, slots, edits, {name: errors.get(name, 0.0) for name in cut})


def kind_of_exchange(views: Mapping[str, MatrixView]) -> type[Replacement]:
    """What prepares a layer: one that has been cut before, or a dense one."""
    return Recut if any(view.rank is not None for view in views.values()) else Replacement


def replace_modules_(model: nn.Module, replacement: Mapping[int, nn.Module]) -> None:
    """Puts modules in the place of others, told by their id, wherever those hang in the model."""
    named = {name: module for name, module in model.named_modules() if id(module) in replacement}
    pairs = [(module, replacement[id(module)]) for module in named.values()]
    lost = [lost for name, old in named.items() for lost in lost_hooks(name, old, replacement[id(old)])]
    put_(slots_of(model, replacement), pairs, lost)


def slots_of(model: nn.Module, replacement: Mapping[int, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every place where a module hangs that is to be replaced (by id); shared modules hang in several."""
    return [
        (parent, key, replacement[id(child)])
        for parent in model.modules()
        for key, child in parent._modules.items()
        if id(child) in replacement
    ]


def put_(
    slots: Iterable[tuple[nn.Module, str, nn.Module]],
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    lost: Sequence[str] = (),
) -> None:
    """Fills the slots; the new layers get what others have put on the old ones, each in a pair."""
    for parent, key, new in slots:
        parent._modules[key] = new
    for old, new in pairs:
        hand_over_(old, new)
    note_replaced(pairs, lost)


def become_(layer: nn.Module, new: nn.Module) -> None:
    """Gives a layer the parts and settings of another one, but for its class, where others know it by its identity.

    Its own hooks and its class stay; assignments alone.
    """
    gone = [*list(layer.modules())[1:], *layer.parameters()]
    kept = {id(thing) for thing in (*new.modules(), *new.parameters())}
    hand_over_(layer, new, itself=False)
    vars(layer).update(own_content(new))
    note_gone(thing for thing in gone if id(thing) not in kept)


def check_hooks(replacements: Iterable[Replacement]) -> None:
    """Raises :class:`UnsupportedError` for hooks that came after the targets were found."""
    for one in replacements:
        if any(has_hooks(weight) for weight in one.replaced()):
            raise UnsupportedError(
                f"Layer {one.layer.name!r}: its weight has hooks of its own, which cannot follow it to the factors; "
                "remove them first, and put such on the factors after the cut."
            )


@torch.no_grad()
def _shift_biases_(replacements: Iterable[Replacement]) -> None:
    """Adds to the biases that are there already, and that both layers share."""
    for one in replacements:
        for part, found in one.factors.items():
            bias = one.views[part].bias
            if found.bias_shift is not None and bias is not None:
                bias += found.bias_shift
