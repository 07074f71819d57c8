"""A backward pass that computes the gradients of what layers return, and none of their matrices."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prehab.errors import ArgumentError
from lightning_prehab.kinds import Kind, kind_of, view_of
from lightning_prehab.statistics.collector import run_eagerly
from lightning_prehab.targets.attached import has_hooks
from lightning_prehab.targets.locate import Target

T = TypeVar("T")


def cheaply_if_possible(run: Callable[[bool], T]) -> T:
    """``run(True)``, without weight gradients; ``run(False)`` where a loss asks for the gradient in a weight itself."""
    try:
        return run(True)
    except (RuntimeError, ArgumentError) as error:  # of the loss, or of the model that makes it
        if not any("does not require grad" in str(one) for one in _causes_of(error)):
            raise
    return run(False)


def _causes_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def gradients_for(
    model: nn.Module, targets: Mapping[str, Target], wanted: bool, cheap: bool
) -> AbstractContextManager[None]:
    """What a backward pass for statistics is made in: nothing if none is wanted, else one of the two below."""
    if not wanted:
        return nullcontext()
    return no_weight_gradients(model, targets) if cheap else all_weight_gradients(targets)


@contextmanager
def no_weight_gradients(model: nn.Module, targets: Mapping[str, Target]) -> Iterator[None]:
    """Inside, the graph begins at the outputs of layers rather than at their matrices: a third of the work less.

    That holds for layers that can be cut and for embeddings. Whatever else is trainable stays so: biases, norms, the
    matrices of unknown modules, and what is multiplied inside of functions of torch that look whether it is trainable.
    The outputs of targets are differentiable wherever autograd is on, also those of frozen parts of the model. All
    flags are as before in the end. A parameter with hooks of its own (of an optimizer that steps inside backward, say)
    has no gradient, and the hooks are not called. Hooks of the layers see differentiable outputs.

    Args:
        model: The module that holds the targets.
        targets: ``{name: layer}``.
    """
    weights = {id(view_of(target).parameter): view_of(target).parameter for target in targets.values()}
    hooked = [parameter for parameter in model.parameters() if has_hooks(parameter)]
    begin = run_eagerly(_begin)
    flags, handles = [(parameter, parameter.requires_grad) for parameter in hooked], []
    try:
        for parameter in hooked:
            parameter.requires_grad_(False)
        for module in {id(m): m for m in (*model.modules(), *(view_of(t).module for t in targets.values()))}.values():
            own = [p for p in module._parameters.values() if p is not None and not is_lazy(p) and p.dim() > 1]
            if not any(p.requires_grad or id(p) in weights for p in own):
                continue
            known = _shows_its_output(module)
            flags += [(p, p.requires_grad) for p in own]
            for parameter in own:
                if known:
                    parameter.requires_grad_(False)
                elif id(parameter) in weights:
                    parameter.requires_grad_(True)
            if known:
                handles.append(module.register_forward_hook(begin, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in reversed(flags):  # a tied one has been noted more than once
            parameter.requires_grad_(requires_grad)


@contextmanager
def all_weight_gradients(targets: Mapping[str, Target]) -> Iterator[None]:
    """Inside, the weights of all targets are trainable, and so their outputs differentiable."""
    flags = [(parameter := view_of(target).parameter, parameter.requires_grad) for target in targets.values()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, requires_grad in reversed(flags):
            parameter.requires_grad_(requires_grad)


def _shows_its_output(module: nn.Module) -> bool:
    """Whether what a forward hook is given is where the matrices of the module act."""
    kind = kind_of(module)
    return isinstance(module, nn.Embedding) or (kind is not None and type(kind).watch is Kind.watch)


def _begin(_: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """Lets the graph begin at an output that is not part of it already."""
    if not torch.is_grad_enabled() or not isinstance(output, Tensor) or output.requires_grad:
        return None
    if not output.is_floating_point():
        return None
    return output.detach().requires_grad_().clone()  # a leaf cannot be changed in place, as a ReLU does
