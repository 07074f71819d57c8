"""A step of an optimizer on copies: whether it can start with a state, known before anything is changed."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.surgery.meanings import flags
from lightning_prehab.surgery.wrapped import family

_SEED = 0


def fresh_states(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    weight: Tensor,
    state: Mapping[str, Any],
    parameters: Iterable[Tensor],
) -> dict[Tensor, dict[str, Any]]:
    """What new parameters have to start with, where the state of the weight cannot be carried.

    Flags that were set when the optimizer was made stay, unless the optimizer takes a state that is not empty for one
    that is complete. Which of the two it is, a step on copies tells.

    Args:
        optimizer: The one that keeps the state.
        group: The group of the weight.
        weight: The weight that is replaced.
        state: ``optimizer.state[weight]``.
        parameters: Those that take its place.

    Returns:
        Their states; those that are empty are left out.

    Raises:
        UnsupportedError: If a step fails with either, though a step of the weight does not.
    """
    starts = [flags(state), {}] if flags(state) else [{}]
    found = {}
    for parameter in parameters:
        failures = []
        for start in starts:
            failure = rehearse(optimizer, group, {parameter: start})
            if failure is None:
                found[parameter] = dict(start)
                break
            failures.append(failure)
        if len(failures) < len(starts):
            continue
        if rehearse(optimizer, group, {weight: state}) is None:
            error = failures[0]
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps {', '.join(map(str, state))} for a weight, which cannot be carried "
                f"to its factors, and cannot start without ({type(error).__name__}: {error}); use another optimizer "
                "for the targets, or compress after training with compress_()."
            )
        found[parameter] = dict(starts[0])  # it takes no step by itself, so nothing can be known
    return {parameter: start for parameter, start in found.items() if start}


def rehearse(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], states: Mapping[Tensor, Mapping[str, Any]]
) -> Exception | None:
    """Takes a step on copies of parameters, with random gradients; the optimizer itself stays as it is.

    Args:
        optimizer: Any.
        group: One of its groups, for the settings.
        states: The parameters, with what is known of them.

    Returns:
        What the step raised; None if it went well.
    """
    if len(family(optimizer)) > 1:
        return None  # a wrapper: the step is that of another one, which is rehearsed for itself
    devices = {parameter.device for parameter in states if parameter.device.type == "cuda"}
    try:
        twin = _twin(optimizer, group, states)
        with torch.random.fork_rng(list(devices)):
            type(twin).step(twin)
    except Exception as error:  # whatever it is: it would be raised in training
        return error
    return None


def _twin(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], states: Mapping[Tensor, Mapping[str, Any]]
) -> torch.optim.Optimizer:
    """A copy of an optimizer that holds copies of some parameters and nothing else; hooks stay behind."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): twin}
    empty = {name: value for name, value in vars(optimizer).items() if name.endswith("_hooks")}
    left = {"param_groups", "state", "step", *empty}
    copies = _copies(list(states))
    twin.__dict__.update({name: type(value)() for name, value in empty.items()})
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    twin.param_groups = [{**copy.deepcopy(settings), "params": copies}]
    twin.state = defaultdict(dict, {own: copy.deepcopy(dict(states[p])) for own, p in zip(copies, states, strict=True)})
    rest = {name: _without_parameters(value) for name, value in vars(optimizer).items() if name not in left}
    twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in rest.items()})
    return twin


def _without_parameters(value: Any) -> Any:
    """What a dictionary knows of parameters, it does not know of new ones."""
    return {key: one for key, one in value.items() if not isinstance(key, Tensor)} if type(value) is dict else value


def _copies(parameters: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters with gradients, on CPUs made of the same numbers everywhere."""
    generator = torch.Generator().manual_seed(_SEED)
    copies = []
    for parameter in parameters:
        own = nn.Parameter(parameter.detach().clone())
        own.grad = torch.randn(own.shape, generator=generator, device="cpu").to(own)
        copies.append(own)
    return copies
