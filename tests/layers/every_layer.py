"""One of each low-rank layer, for tests of what must be true of all of them."""

import importlib
import inspect
import pkgutil

import torch
from torch import nn

import lightning_prehab.layers
from lightning_prehab.layers import (
    LowRankBlocks,
    LowRankConv1d,
    LowRankConv2d,
    LowRankLayer,
    LowRankLinear,
    LowRankMultiheadAttention,
    LowRankPlusSparseLinear,
    PivotConv1d,
    PivotConv2d,
    PivotLayer,
    PivotLinear,
)
from lightning_prehab.layers.blocks import LowRankConv1D, LowRankConv1DBlocks, PivotConv1D
from lightning_prehab.layers.conv import LowRankConv
from lightning_prehab.layers.pivot import PivotConv

BASES = {LowRankLayer, LowRankConv, PivotLayer, PivotConv}


def blocks():
    return {"q": LowRankLinear(12, 8, 2, bias=False), "k": nn.Linear(12, 4, bias=False)}


def mixed(layer):
    """A layer in the pivot layout, with its rows in another order than that of its parts."""
    torch.randperm(len(layer.order), out=layer.order)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def in_blocks(bias=True, kind=LowRankBlocks):
    return kind(blocks(), nn.Parameter(torch.randn(12)) if bias else None)


def attention(**settings):
    layer = LowRankMultiheadAttention(12, 3, {"q_proj": 2, "v_proj": 3, "out_proj": 2}, **settings)
    for parameter in (layer.in_proj_bias, layer.bias_k, layer.bias_v):
        if parameter is not None:
            nn.init.normal_(parameter)
    return layer


#: ``{class: [(how to make one, shapes of its inputs)]}``
CASES = {
    LowRankLinear: [
        (lambda: LowRankLinear(12, 8, 3), [(5, 12)]),
        (lambda: LowRankLinear(12, 8, 3, bias=False), [(5, 12)]),
    ],
    PivotLinear: [
        (lambda: mixed(PivotLinear(12, 8, 3)), [(5, 12)]),
        (lambda: mixed(PivotLinear(12, 8, 3, bias=False)), [(5, 12)]),
    ],
    LowRankPlusSparseLinear: [
        (lambda: LowRankPlusSparseLinear(12, 8, 3, 6), [(5, 12)]),
        (lambda: LowRankPlusSparseLinear(12, 8, 3, bias=False), [(5, 12)]),
    ],
    LowRankBlocks: [
        (in_blocks, [(5, 12)]),
        (lambda: in_blocks(bias=False), [(5, 12)]),
        (lambda: LowRankBlocks({"q": mixed(PivotLinear(12, 8, 2, bias=False))}), [(5, 12)]),
    ],
    LowRankConv1D: [(lambda: LowRankConv1D(12, 8, 3), [(5, 12)])],
    PivotConv1D: [(lambda: mixed(PivotConv1D(12, 8, 3)), [(5, 12)])],
    LowRankConv1DBlocks: [(lambda: in_blocks(kind=LowRankConv1DBlocks), [(5, 12)])],
    LowRankConv1d: [
        (lambda: LowRankConv1d(6, 8, 3, 2, padding="same"), [(5, 6, 7)]),
        (lambda: LowRankConv1d(6, 8, 3, 2, 2, groups=2, bias=False), [(5, 6, 7)]),
    ],
    LowRankConv2d: [
        (lambda: LowRankConv2d(6, 8, (3, 2), 2, padding=1, groups=2), [(5, 6, 7, 7)]),
        (lambda: LowRankConv2d(6, 8, 3, 2, 2, 1, scheme="spatial", padding_mode="reflect"), [(5, 6, 7, 7)]),
        (lambda: LowRankConv2d(6, 8, 3, 2, bias=False), [(5, 6, 7, 7)]),
    ],
    PivotConv1d: [(lambda: mixed(PivotConv1d(6, 8, 3, 2, padding="same")), [(5, 6, 7)])],
    PivotConv2d: [
        (lambda: mixed(PivotConv2d(6, 8, (3, 2), 2, 2, padding=1, padding_mode="reflect")), [(5, 6, 7, 7)]),
        (lambda: mixed(PivotConv2d(6, 8, 3, 3, bias=False)), [(6, 7, 7)]),
    ],
    LowRankMultiheadAttention: [
        (lambda: attention(batch_first=True), [(5, 7, 12)] * 3),
        (lambda: attention(bias=False, kdim=6, vdim=4), [(7, 5, 12), (4, 5, 6), (4, 5, 4)]),
        (lambda: attention(add_bias_kv=True, add_zero_attn=True), [(7, 5, 12)] * 3),
    ],
}


class Case:
    """A layer, made anew for each test, and inputs for it."""

    def __init__(self, kind, number):
        make, self.shapes = CASES[kind][number]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = make().eval()
            for part in self.layer.modules():
                if isinstance(part, LowRankPlusSparseLinear):
                    nn.init.normal_(part.values)
            self.inputs = [torch.randn(shape) for shape in self.shapes]

    def run(self, layer=None, inputs=None):
        """The output; of an attention layer without the weights."""
        output = (self.layer if layer is None else layer)(*(self.inputs if inputs is None else inputs))
        return output if isinstance(output, torch.Tensor) else output[0]

    def shown(self):
        """The tensors that the layer shows under the names of a dense one and that are no parameters, by name."""
        names = [name for name, _ in inspect.getmembers(type(self.layer), lambda one: isinstance(one, property))]
        values = {name: getattr(self.layer, name) for name in names}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def every_case():
    """The parameters for ``pytest.mark.parametrize``: the class and the number of each case."""
    return [(kind, number) for kind, cases in CASES.items() for number in range(len(cases))]


def name_of(value):
    """An id for pytest."""
    return value.__name__ if isinstance(value, type) else None


def every_class():
    """The layers of the package, whoever defines them."""
    found = set()
    for module in pkgutil.iter_modules(lightning_prehab.layers.__path__, "lightning_prehab.layers."):
        for _, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(value, LowRankLayer):
                found.add(value)
    return found - BASES
