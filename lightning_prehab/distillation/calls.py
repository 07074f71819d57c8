"""What a training step asks of a model, seen from outside: the calls that it makes itself, not those inside of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prehab.distillation.values import all_tensors, held
from lightning_prehab.errors import TargetError
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.statistics.collector import run_eagerly
from lightning_prehab.targets.names import clean_name, join

#: A step may call modules that lie so deep in the model; those further inside have to be named.
LEVELS = 2
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(eq=False)
class Call:
    """A call of a module.

    Attributes:
        name: Dotted name of the module; empty for the model itself.
        args: As it was called.
        kwargs: As it was called.
        autocast: The dtype of autocast around it, on its device; None if that was off.
        output: What it returned.
        features: What watched modules inside of it have returned, by name, in the order of their calls.
        copies: By the id of a tensor that it was given: what that was, if the module changes it in place.
        spoiled: Whether it has changed such a tensor, and nobody knows what that was.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None
    output: Any = None
    features: dict[str, list[Any]] = field(default_factory=dict)
    copies: dict[int, Tensor] = field(default_factory=dict)
    spoiled: bool = False


class Calls:
    """Hooks that note the outermost calls of the modules of a model, and what they return.

    Calls that return nothing with a gradient are left out: they are no part of the loss.

    Args:
        model: The model.
        module: Dotted name of the module whose calls count; None takes all that a step calls itself.
        features: Names of modules whose outputs are noted with the call that they happen in.

    Attributes:
        found: The calls so far.
        listening: Whether calls are noted; not while a backward pass computes some of them anew.

    Raises:
        TargetError: If there is no such module.
    """

    def __init__(self, model: nn.Module, module: str | None = None, features: Sequence[str] = ()) -> None:
        self._model, self._module, self._features = model, module, features
        if module is not None:
            named(model, module)
        self._handles: list[RemovableHandle] = []
        self._compiled: list[tuple[nn.Module, Any]] = []
        self.found: list[Call] = []
        self.listening = False
        self._open: list[tuple[nn.Module, Call, list[int]]] = []
        self._wrapped = self._inside_wrapper = False
        self._in_place: dict[str, bool] = {}  # by name: whether it changes what it is given

    @property
    def attached(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    def attach(self) -> None:
        """Puts the hooks on the modules of now; they are idle until :meth:`begin`."""
        self.detach()
        doors = _doors(self._model) if self._module is None else [(self._module, named(self._model, self._module))]
        names = {module: name for name, module in reversed(list(doors))}  # one of several names
        for module in {self._model: None, **names}:
            before, after = self._hooks_for(module, names.get(module))
            impl = vars(module).get("_compiled_call_impl")
            if impl is None:
                self._handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                self._handles.append(module.register_forward_hook(after))
            else:  # of module.compile(): hooks would be inside of the compiled code
                self._compiled.append((module, impl))
                module._compiled_call_impl = _around(module, impl, before, after)
        for name in self._features:
            module = named(self._model, name)
            self._handles.append(module.register_forward_hook(run_eagerly(self._feature_hook(name))))

    def detach(self) -> None:
        """Takes them off."""
        for handle in self._handles:
            handle.remove()
        for module, impl in self._compiled:
            module._compiled_call_impl = impl
        self._handles, self._compiled, self.listening = [], [], False
        self.found, self._open = [], []

    def begin(self, *, wrapped: bool) -> None:
        """A batch begins.

        Args:
            wrapped: The step itself runs as a call of the model, as DistributedDataParallel makes it run.
        """
        self.found, self._open = [], []
        self.listening, self._wrapped, self._inside_wrapper = True, wrapped, False

    def take(self) -> list[Call]:
        """The calls so far, which are forgotten."""
        found, self.found = self.found, []
        return found

    def _hooks_for(self, ours: nn.Module, name: str | None) -> tuple[Any, Any]:
        """For a module, not for copies that somebody makes of it, hooks and all; without a name it does not count."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.listening or module is not ours:
                return
            if self._wrapped and module is self._model and not self._inside_wrapper:
                self._inside_wrapper = True
            elif name is not None:
                call = Call(clean_name(name), held(args), held(kwargs), autocast_of(module))
                versions = [] if self._open else self._versions(call)  # only the outermost one is asked of the teacher
                self._open.append((module, call, versions))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._open and self._open[-1][0] is module:
                _, call, versions = self._open.pop()
                if not self._open:
                    self._note_changes(call, versions)
                if self.listening and not self._open and any(one.requires_grad for one in all_tensors(output)):
                    call.output = output
                    self.found.append(call)
            elif module is self._model and not self._open:
                self._inside_wrapper = False

        return run_eagerly(before), run_eagerly(after)

    def _versions(self, call: Call) -> list[int]:
        """How often what a call is given has been changed; with copies of it, unless it is known to stay."""
        given = _inputs(call)
        if self._in_place.get(call.name, True):
            call.copies = {id(one): one.detach().clone() for one in given}
        return [one._version for one in given]

    def _note_changes(self, call: Call, versions: list[int]) -> None:
        changed = [one._version for one in _inputs(call)] != versions
        call.spoiled = changed and not call.copies
        self._in_place[call.name] = changed or self._in_place.get(call.name, False)
        if not changed:
            call.copies = {}

    def _feature_hook(self, name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.listening and self._open:
                self._open[0][1].features.setdefault(name, []).append(output)

        return after


def _inputs(call: Call) -> list[Tensor]:
    """What a call was given that no module has computed."""
    given = all_tensors((call.args, call.kwargs))
    return [one for one in given if one.grad_fn is None and not one.is_inference()]


def _doors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, and what lies in it so near that a step may call it; nothing inside of what is compiled."""
    yield "", model
    yield from _inside("", model, 1)


def _inside(prefix: str, module: nn.Module, level: int) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full, container = join(prefix, name), isinstance(child, _CONTAINERS)
        if not container:
            yield full, child
        if (container or level < LEVELS) and not isinstance(child, LowRankLayer) and not _is_compiled(child):
            yield from _inside(full, child, level + (not container))


def _is_compiled(module: nn.Module) -> bool:
    """Whether it was made by ``torch.compile``, or compiled in place."""
    return hasattr(module, "_orig_mod") or vars(module).get("_compiled_call_impl") is not None


def named(model: nn.Module, name: str) -> nn.Module:
    """The module of a name, with or without what ``torch.compile`` puts around."""
    module = by_clean_name(model).get(clean_name(name))
    if module is not None:
        return module
    raise TargetError(f"There is no module {name!r} in {type(model).__name__}; print(model) shows their names.")


def _around(module: nn.Module, impl: Any, before: Any, after: Any) -> Any:
    """A compiled call with our hooks around it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before(module, args, kwargs)
        output = impl(*args, **kwargs)
        after(module, args, output)
        return output

    return call


def by_clean_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name, without what ``torch.compile`` puts around: of two of a name the outer one."""
    return {clean_name(name): module for name, module in reversed([*model.named_modules(remove_duplicate=False)])}


def autocast_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of autocast on the device of a module; None if it is off."""
    first: Tensor | None = next(iter(module.parameters()), None)
    kind = "cpu" if first is None else first.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
