"""What a refinement trains of a model, and how the model is made ready for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.layers import LowRankConv1d, LowRankConv2d, LowRankLayer, LowRankLinear
from lightning_prehab.layers.conv import matrix_to_kernel
from lightning_prehab.linalg.balance import balanced
from lightning_prehab.linalg.matrices import is_quantized
from lightning_prehab.refinement.stand_ins import StandIns, are_plain
from lightning_prehab.statistics.calibration import as_found


def parameters_to_train(module: nn.Module, stand_ins: StandIns | None = None) -> list[nn.Parameter]:
    """The factors of low-rank layers, and all vectors: norms and biases; each once.

    A layer that holds several matrices may hold some that are dense: these are not trained.

    Raises:
        UnsupportedError: If a low-rank layer is quantized.

    Args:
        module: A model or a block.
        stand_ins: What is trained in the place of layers, or None.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LowRankLayer) and not _holds_others(layer)]
    for layer in layers:
        if any(map(is_quantized, layer.parameters())):
            raise UnsupportedError(
                f"A {type(layer).__name__} of the model is quantized, and cannot be trained; refine first, quantize "
                "afterwards."
            )
    ours = {id(one) for layer in layers for one in layer.parameters()}
    found = {id(one): one for one in module.parameters() if one.dim() <= 1 or id(one) in ours}
    for layer in layers:
        instead = None if stand_ins is None else stand_ins.parameters_for(layer)
        if instead is not None:
            for part in layer.children():
                found = {key: one for key, one in found.items() if one is not part.weight}
            found |= {id(one): one for one in instead}
    return [one for one in found.values() if one.is_floating_point()]


def is_short(tensor: Tensor) -> bool:
    """Whether it holds floating numbers of less than 32 bits."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4 and not is_quantized(tensor)


def _holds_others(layer: LowRankLayer) -> bool:
    return any(isinstance(inner, LowRankLayer) for inner in layer.modules() if inner is not layer)


@torch.no_grad()
def balance_(module: nn.Module) -> None:
    """Gives both factors of each product the same singular values; the product stays, to rounding.

    One learning rate then suits both: factors as a metric leaves them can differ in size by orders of magnitude.
    """
    for layer in module.modules():
        if not (isinstance(layer, LowRankLayer) and are_plain(layer.children())):
            continue  # an adapter on one factor is not on the product
        if isinstance(layer, LowRankLinear):
            a, b = layer.A.weight, layer.B.weight
            if a.is_floating_point() and b.is_floating_point():
                new_a, new_b = balanced(a, b)  # float64
                a.copy_(new_a)
                b.copy_(new_b)
        elif isinstance(layer, LowRankConv1d | LowRankConv2d) and layer.groups == 1:
            new_a, new_b = balanced(*layer.factors())
            layer.A.weight.copy_(matrix_to_kernel(new_a, list(layer.A.weight.shape)))
            layer.B.weight.copy_(matrix_to_kernel(new_b, list(layer.B.weight.shape), layer.scheme))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, eval mode and no cache of keys and values; outside all is as it was, gradients and buffers too."""
    found: list[Any] = [getattr(one, "config", None) for one in model.modules()]
    configs = list({id(one): one for one in found if getattr(one, "use_cache", None) is True}.values())
    try:
        for config in configs:
            config.use_cache = False
        with as_found(model):
            yield
    finally:
        for config in configs:
            config.use_cache = True


@contextmanager
def trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, weights and buffers are float32, and what is trained has gradients; outside that is as it was.

    The values of the parameters are those that the training has left, rounded to their own dtype.
    """
    wanted = [(one, one.requires_grad) for one in model.parameters()]
    short = [(one, one.data) for one in model.parameters() if is_short(one)]
    buffers = [
        (owner._buffers, name, buffer)
        for owner in model.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and is_short(buffer)
    ]
    chosen = {id(one) for one in parameters}
    try:
        for one, _ in short:
            one.data = one.data.float()
        for owner, name, buffer in buffers:
            owner[name] = buffer.float()
        for one, _ in wanted:
            if one.is_floating_point():
                one.requires_grad_(id(one) in chosen)
        with torch.enable_grad():
            yield
    finally:
        for one, data in short:  # into the memory that others may see too
            one.data = one.data.to(data.dtype) if data.is_inference() else data.copy_(one.data)
        for owner, name, buffer in buffers:
            owner[name] = buffer
        for one, requires in wanted:
            if one.is_floating_point():
                one.requires_grad_(requires)
