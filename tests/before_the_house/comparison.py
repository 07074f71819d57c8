"""How results are compared with the stored ones: bit by bit on the machine that made them, else to rounding."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.before_the_house.make import State, machine

HERE = Path(__file__).parent
FILES = HERE / "files"


@cache
def expected() -> dict[str, Any]:
    """What the code before computed."""
    return torch.load(HERE / "expected.pt", weights_only=True)


@cache
def same_machine() -> bool:
    """Whether bits are comparable."""
    return machine() == expected()["machine"]


def assert_same_data(found: Any, stored: Any, where: str = "", more: bool = False) -> None:
    """Plain data, equal but for the rounding of floats on another machine; ``more``: keys may have been added since.

    On another machine a predicted error, a difference of sums of squares, is rounded more roughly than on the same one.
    """
    if isinstance(stored, dict):
        assert isinstance(found, dict), where
        assert found.keys() >= stored.keys() if more else found.keys() == stored.keys(), where
        for key, value in stored.items():
            assert_same_data(found[key], value, f"{where}/{key}", more)
    elif isinstance(stored, list):
        assert isinstance(found, list), where
        assert len(found) == len(stored), where
        for index, value in enumerate(stored):
            assert_same_data(found[index], value, f"{where}/{index}", more)
    elif isinstance(stored, float):
        assert isinstance(found, float), where
        share = where.endswith("/loss_increase") and not more  # a quotient
        rel_tol, abs_tol = ((1e-9, 0.0) if share else (0.0, 0.0)) if same_machine() else (1e-4, 1e-7)
        assert math.isclose(found, stored, rel_tol=rel_tol, abs_tol=abs_tol), f"{where}: {found} instead of {stored}"
    else:
        assert type(found) is type(stored), where
        assert found == stored, where


def in_shares(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan, with the share of each layer in the predicted increase of the loss.

    The increase itself was predicted in another unit before it was measured.
    """
    increases = [layer["predicted"]["loss_increase"] for layer in plan["layers"]]
    total = math.fsum(increase or 0.0 for increase in increases) or 1.0
    layers = [
        {**layer, "predicted": {**layer["predicted"], "loss_increase": increase and increase / total}}
        for layer, increase in zip(plan["layers"], increases, strict=True)
    ]
    return {**plan, "layers": layers}


def assert_same_weights(found: State, stored: State) -> None:
    """The same tensors; on another machine the factors of a layer may differ where their product does not."""
    assert list(found) == list(stored)
    assert [(value.shape, value.dtype) for value in found.values()] == [(v.shape, v.dtype) for v in stored.values()]
    assert all(value.isfinite().all() for value in stored.values())
    if same_machine():
        assert [name for name in stored if not torch.equal(found[name], stored[name])] == []
    else:
        ours, theirs = multiplied(found), multiplied(stored)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def multiplied(state: State) -> State:
    """Each pair of factors as the dense weight of its layer."""
    cut = cuts(state)
    factors = {f"{name}.{side}.weight" for name in cut for side in "AB"}
    rest = {name: value for name, value in state.items() if name not in factors}
    # of convolutions too: where one factor has a kernel of size 1, it is the same at all places of the other
    products = {
        name: torch.einsum("or...,ri...->oi...", state[f"{name}.B.weight"], state[f"{name}.A.weight"]) for name in cut
    }
    return rest | products


def cuts(state: State) -> dict[str, int]:
    """The layers that are held as factors, with their ranks."""
    ends = ".A.weight"
    return {name.removesuffix(ends): len(value) for name, value in state.items() if name.endswith(ends)}


def ranks(plan: dict[str, Any]) -> dict[str, int]:
    """The layers that a plan cuts, with their ranks."""
    return {layer["name"]: layer["rank"] for layer in plan["layers"] if layer["rank"] != "dense"}
