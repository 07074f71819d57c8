"""One model for each kind of layer that can be replaced, and every call that replaces one."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prehab as lp
from lightning_prehab.surgery.structure import follow_state_dict_

#: All that puts a hook on a module, but for the old one of the backward pass, which torch refuses beside a full one.
HOOK_METHODS = [name for name in dir(nn.Module) if re.fullmatch(r"_?register_(?!backward_hook).*hook", name)]


class Around(nn.Module):
    """A model around one layer, under the name that the layer has in practice."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)

    @property
    def layer(self) -> Any:
        return self._modules[self.name]

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, x, x)[0] if self.name == "attention" else self.layer(x)
        return y.flatten(1)


def transposed(out_features: int, in_features: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(out_features, in_features)


@dataclass
class Case:
    make_layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    name: str = "inner"
    split_fused: bool = False

    def model(self) -> Around:
        return Around(self.name, self.make_layer())

    def x(self) -> Tensor:
        return torch.randn(32, *self.shape)


CASES = {
    "linear": Case(lambda: nn.Linear(16, 16), (4, 16)),
    "linear, no bias": Case(lambda: nn.Linear(16, 16, bias=False), (4, 16)),
    "fused, whole": Case(lambda: nn.Linear(16, 48), (4, 16), "qkv"),
    "fused, split": Case(lambda: nn.Linear(16, 48), (4, 16), "qkv", True),
    "conv1d": Case(lambda: nn.Conv1d(8, 16, 3), (8, 6)),
    "conv2d": Case(lambda: nn.Conv2d(8, 16, 3), (8, 4, 4)),
    "attention": Case(lambda: nn.MultiheadAttention(16, 2, batch_first=True), (4, 16), "attention"),
    "attention, other keys": Case(
        lambda: nn.MultiheadAttention(16, 2, batch_first=True, kdim=16, vdim=16), (4, 16), "attention"
    ),
    "transposed": Case(lambda: transposed(16, 16), (4, 16)),
    "transposed, split": Case(lambda: transposed(48, 16), (4, 16), "c_attn", True),
}


def by_compress(model: Around, case: Case, folder: Path, **settings: Any) -> None:
    lp.compress_(model, 0.5, split_fused=case.split_fused, **settings)


def by_plan(model: Around, case: Case, folder: Path, **settings: Any) -> None:
    targets = lp.find_targets(model, split_fused=case.split_fused)
    lp.apply_plan_(model, lp.make_plan(targets, 0.5, lp.SVD()), **settings)


def _small(case: Case) -> Around:
    small = case.model()
    lp.compress_(small, 0.5, split_fused=case.split_fused)
    return small


def by_folder(model: Around, case: Case, folder: Path) -> None:
    pytest.importorskip("safetensors")
    lp.load_compressed(lp.save_compressed(_small(case), folder), model)


def by_state_dict(model: Around, case: Case, folder: Path) -> None:
    state = _small(case).state_dict()
    follow_state_dict_(model, state)
    model.load_state_dict(state)


def there_and_back(model: Around, case: Case, folder: Path) -> None:
    lp.compress_(model, 0.5, split_fused=case.split_fused)
    lp.to_dense_(model)


def other_ranks(model: Around, case: Case, folder: Path) -> None:
    lp.compress_(model, 0.5, split_fused=case.split_fused)
    other = case.model()
    lp.compress_(other, 0.3, split_fused=case.split_fused)
    follow_state_dict_(model, other.state_dict())


WAYS = {
    "compress_": by_compress,
    "apply_plan_": by_plan,
    "load_compressed": by_folder,
    "follow_state_dict_": by_state_dict,
    "to_dense_": there_and_back,
    "other ranks": other_ranks,
}
