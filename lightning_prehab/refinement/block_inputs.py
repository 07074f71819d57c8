"""What the blocks of a network are called with, and what they make of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_prehab.errors import UnsupportedError


class Calling(Protocol):
    """How a block is called, but for the hidden state."""

    def again(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What a block makes of another hidden state."""


@dataclass
class Call:
    """How a block was called.

    Attributes:
        args: The arguments, without the first one if that is the hidden state.
        kwargs: The others, without ``hidden_states``.
        named: Whether the hidden state was given by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    def again(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What a block makes of another hidden state."""
        if self.named:
            return _hidden_in(block(*self.args, hidden_states=hidden, **self.kwargs))
        return _hidden_in(block(hidden, *self.args, **self.kwargs))


def record_calls(blocks: Sequence[tuple[str, nn.Module]], run: Callable[[], Any]) -> tuple[Tensor, list[Call]]:
    """Runs a model once, and says what its blocks were called with.

    Args:
        blocks: In the order in which they should be called, each once, each with what the one before it returns.
        run: Calls the model.

    Returns:
        The hidden state that the first block was given, and the call of each.

    Raises:
        UnsupportedError: If the blocks are called in another way.
    """
    calls: list[tuple[int, Tensor, Call]] = []
    outputs: list[Tensor] = []

    def before(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = not args
            hidden = kwargs.get("hidden_states") if named else args[0]
            if not isinstance(hidden, Tensor):
                raise UnsupportedError(f"Block {blocks[place][0]!r} is not given a hidden state first. {_WAY_OUT}")
            rest = {name: value for name, value in kwargs.items() if not (named and name == "hidden_states")}
            calls.append((place, hidden, Call(args[1:], rest, named)))

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(_hidden_in(output))

    handles = [block.register_forward_pre_hook(before(i), with_kwargs=True) for i, (_, block) in enumerate(blocks)]
    handles += [block.register_forward_hook(after) for _, block in blocks]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if [place for place, _, _ in calls] != list(range(len(blocks))):
        raise UnsupportedError(f"The blocks {blocks[0][0]!r} ... are not called one after the other. {_WAY_OUT}")
    for place, hidden, _ in calls[1:]:
        if hidden is not outputs[place - 1]:
            raise UnsupportedError(
                f"Block {blocks[place][0]!r} is not given what the one before it returns. {_WAY_OUT}"
            )
    return calls[0][1], [call for _, _, call in calls]


_WAY_OUT = "Refine it with scope='model'."


def _hidden_in(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise UnsupportedError(f"A block returns {type(output).__name__}, no hidden state. {_WAY_OUT}")
    return found
