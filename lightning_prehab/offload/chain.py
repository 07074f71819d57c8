"""The blocks of a model, run one at a time: what each is called with is learned from the model's own forward pass.

Nothing here knows an architecture. The model is called as always, with something else in the place of its blocks:
first something that writes down what each block is given, later something that hands over what the blocks have
returned elsewhere. Before that it is checked that they can be driven so: each is called once, in order, on what the one
before it has returned, and on nothing else that comes from other blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.offload.skeleton import Skeleton
from lightning_prehab.refinement.blocks import find_blocks
from lightning_prehab.refinement.trained import is_short
from lightning_prehab.statistics.batches import call_model, tensors


class _Here:
    """Stands where the hidden states are, in what a block is called with."""


@dataclass(frozen=True, eq=False)
class Call:
    """What a block is called with, beside the hidden states.

    Attributes:
        args: By position; ``_Here`` stands for the hidden states.
        settings: By name.
    """

    args: tuple[Any, ...]
    settings: dict[str, Any]

    def with_states(self, states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with hidden states."""
        args = tuple(states if one is _Here else one for one in self.args)
        return args, {name: states if one is _Here else one for name, one in self.settings.items()}

    def again(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What a block, which is loaded, makes of hidden states."""
        args, settings = self.with_states(hidden)
        found = _states_in(block(*args, **settings))
        assert found is not None  # Chain.run has looked
        return found

    def lifted(self) -> "Call":
        """The same with tensors of less than 32 bits in float32."""
        return Call(_lifted(self.args), _lifted(self.settings))

    def is_like(self, other: "Call") -> bool:
        """Whether both hold the same objects."""
        same = len(self.args) == len(other.args) and self.settings.keys() == other.settings.keys()
        pairs = [*zip(self.args, other.args, strict=False)]
        pairs += [(one, other.settings.get(name)) for name, one in self.settings.items()]
        return same and all(mine is theirs for mine, theirs in pairs)


@dataclass
class Entrance:
    """What the first block of a model is given for a batch, and what all of them are called with.

    Attributes:
        states: Hidden states before the first block.
        calls: One for each block; blocks that are called alike share one.
    """

    states: Tensor
    calls: list[Call] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Memory of what the blocks are called with beside the hidden states."""
        seen = {id(t): t for call in self.calls for t in tensors([*call.args, *call.settings.values()])}
        return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


class _Arrived(Exception):  # no error: the part of the model before the last block is over
    """Ends a forward pass that nobody needs the rest of."""


class Chain:
    """The blocks of a model, and what lies before and after them.

    Args:
        skeleton: The model.

    Attributes:
        names: Of the blocks.
        blocks: The blocks.
        around: The modules outside of the blocks that hold parameters or buffers themselves.
        front: Names of those of them that were called before the first block; known after :meth:`enter`.

    Raises:
        TargetError: If there are no blocks.
        UnsupportedError: If there is one alone.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._model = skeleton.model
        found = find_blocks(self._model)
        if len(found) < 2:
            raise self._refusal("it has one block alone")
        self.names = [name for name, _ in found]
        self.blocks = [block for _, block in found]
        inside = {id(inner) for block in self.blocks for inner in block.modules()}
        self.around = {
            name: module
            for name, module in self._model.named_modules()
            if id(module) not in inside and (module._parameters or module._buffers)
        }
        self.front: set[str] = set()
        self._form: Callable[[Tensor], Any] | None = None

    def place_of(self, name: str) -> int | None:
        """The number of the block that a module lies in, by the name of the module; None outside of all."""
        return next((i for i, block in enumerate(self.names) if name == block or name.startswith(f"{block}.")), None)

    def enter(self, batch: Any, *, differentiable: bool = False) -> Entrance:
        """Runs the part before the blocks on a batch, and sees what the blocks are called with.

        Args:
            batch: As calibration gets it.
            differentiable: Keep the graph of the hidden states before the first block.

        Raises:
            UnsupportedError: If the blocks cannot be run one at a time.
        """
        entrance: Entrance | None = None
        current: Tensor | None = None
        flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]

        def stub(number: int) -> Callable[..., Any]:
            def called(*args: Any, **settings: Any) -> Any:
                nonlocal entrance, current
                states = next((one for one in (*args, *settings.values()) if isinstance(one, Tensor)), None)
                seen = 0 if entrance is None else len(entrance.calls)
                if states is None or seen != number:
                    raise self._refusal(f"its blocks are not called one after the other ({self.names[number]!r})")
                if entrance is not None and states is not current:
                    raise self._refusal(
                        f"{self.names[number]!r} is given something else than what {self.names[number - 1]!r} returns"
                    )
                others = [one for one in tensors([*args, *settings.values()]) if one is not states]
                if any(one.requires_grad for one in others):
                    raise self._refusal(f"{self.names[number]!r} is given more than the states of the block before it")
                call = Call(
                    tuple(_Here if one is states else one for one in args),
                    {name: _Here if one is states else one for name, one in settings.items()},
                )
                if entrance is None:
                    entrance = Entrance(states if differentiable else states.detach())
                entrance.calls.append(next((one for one in entrance.calls if one.is_like(call)), call))
                if number + 1 == len(self.blocks):
                    raise _Arrived
                if self._form is None:
                    self._form = self._form_of(number, states.detach(), call)
                with torch.enable_grad():  # what depends on it tells so
                    current = torch.empty_like(states, requires_grad=True) + 0
                return self._form(current)

            return called

        front = set()

        def note(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if entrance is None:
                    front.add(name)

            return hook

        handles = [module.register_forward_pre_hook(note(name)) for name, module in self.around.items()]
        try:
            if not differentiable:
                for parameter, _ in flags:
                    parameter.requires_grad_(False)
            stubs = [stub(number) for number in range(len(self.blocks))]
            with self._instead(stubs), self._as_needed(), torch.enable_grad():
                call_model(self._model, batch)
        except _Arrived:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for parameter, wanted in flags:
                parameter.requires_grad_(wanted)
        if entrance is None or len(entrance.calls) < len(self.blocks):
            raise self._refusal("some of its blocks are not called")
        self.front |= front
        return entrance

    def run(self, number: int, states: Tensor, call: Call) -> Tensor:
        """What a block, which is loaded, makes of hidden states.

        Raises:
            UnsupportedError: If they are of another shape then.
        """
        args, settings = call.with_states(states)
        with _without_cache(self._model):
            found = _states_in(self.blocks[number](*args, **settings))
        if found is not None and torch.is_autocast_enabled("cpu"):
            found = found.to(states.dtype)
        if found is None or found.shape != states.shape or found.dtype != states.dtype:
            raise self._refusal(f"{self.names[number]!r} does not return hidden states like those that it is given")
        return found

    def leave(self, batch: Any, states: Tensor) -> Any:
        """What the model returns for a batch if its last block has returned these hidden states."""
        assert self._form is not None
        form = self._form
        with self._instead([lambda *_, **__: form(states)] * len(self.blocks)), self._as_needed():
            return call_model(self._model, batch)

    def rest(self) -> None:
        """Lets go of everything outside of the blocks."""
        for module in self.around.values():
            self._skeleton.unload(module, recurse=False)

    def _form_of(self, number: int, states: Tensor, call: Call) -> Callable[[Tensor], Any]:
        """How blocks return their hidden states: by themselves, or first of several. One is called to see it."""
        block = self.blocks[number]
        stub = vars(block).pop("forward")
        try:
            with self._skeleton.loaded(block), torch.no_grad():
                args, settings = call.with_states(states)
                output = block(*args, **settings)
        finally:
            vars(block)["forward"] = stub
        if isinstance(output, Tensor):
            return lambda states: states
        if _states_in(output) is None or any(True for _ in tensors(list(output)[1:])):
            raise self._refusal(f"{self.names[number]!r} returns more than hidden states")
        kind, more = type(output), list(output)[1:]
        return lambda states: kind((states, *more))

    @contextmanager
    def _instead(self, stubs: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Inside, other functions are called in the place of the blocks."""
        try:
            for block, stub in zip(self.blocks, stubs, strict=True):
                vars(block)["forward"] = stub
            with _without_cache(self._model):
                yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)

    @contextmanager
    def _as_needed(self) -> Iterator[None]:
        """Inside, modules outside of the blocks are loaded when they are called; they stay until :meth:`rest`."""

        def load(module: nn.Module, _: Any) -> None:
            self._skeleton.load(module, recurse=False)

        handles = [module.register_forward_pre_hook(load) for module in self.around.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _refusal(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{type(self._model).__name__} cannot be run block by block: {why}. Compress it in memory, with compress_ "
            "(layers_at_once= keeps the statistics small)."
        )


def _lifted(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.float() if is_short(part) else part
    if isinstance(part, dict):
        return {name: _lifted(one) for name, one in part.items()}
    return type(part)(map(_lifted, part)) if type(part) in (tuple, list) else part


def _states_in(output: Any) -> Tensor | None:
    """The hidden states in what a block returns."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor) else None


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, the model keeps no keys and values for later tokens."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    asked = [config for config in configs.values() if getattr(config, "use_cache", False)]
    try:
        for config in asked:
            config.use_cache = False
        yield
    finally:
        for config in asked:
            config.use_cache = True
