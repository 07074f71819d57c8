"""What a transformers model says about its low-rank layers in ``config.json``; transformers itself is not imported.

``quantization_config`` is the place where transformers looks for the structure of a file that differs from the class.
A transformers without this package only warns of an unknown method there and would leave the layers at random; so a
second entry, in ``fusion_config``, makes it stop with an error that names this package.
"""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.layers.linear import LowRankLayer, LowRankPlusSparseLinear

#: ``quant_method`` in ``config.json``.
METHOD = "lightning_prehab"
#: Of the entry in ``config.json``.
FORMAT_VERSION = 1
#: An entry of ``fusion_config`` that transformers refuses by its name unless this package has taken it away.
GUARD = "lightning_prehab (pip install 'lightning-prehab[hf]', and import lightning_prehab before from_pretrained)"


def note_structure_(model: nn.Module) -> None:
    """Writes the low-rank layers of every transformers model in ``model`` into its config, or takes the entry away.

    Only the outermost transformers models are looked at; ``model`` may be one, or hold some (a LightningModule does).
    """
    for pretrained in _outermost(model):
        config: Any = pretrained.config
        layers = describe_layers(pretrained)
        fusions = {key: value for key, value in (getattr(config, "fusion_config", None) or {}).items() if key != GUARD}
        if layers:
            config.quantization_config = {
                "quant_method": METHOD,
                "format_version": FORMAT_VERSION,
                "layers": layers,
            }
            fusions[GUARD] = True
        elif _method(config) == METHOD:
            del config.quantization_config
        if fusions:
            config.fusion_config = fusions
        elif "fusion_config" in vars(config):
            del config.fusion_config


def check_pretrained(model: nn.Module) -> None:
    """Raises :class:`UnsupportedError` for a transformers model whose config has another quantization method."""
    for pretrained in _outermost(model):
        method = _method(pretrained.config)
        if method not in (None, METHOD):
            raise UnsupportedError(
                f"{type(pretrained).__name__} is quantized with {method!r}, and config.json has room for one method; "
                "load it without quantization, compress it, and quantize the factors afterwards."
            )


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """``{name: {shape, rank, bias}}`` of the low-rank layers.

    With ``nonzeros`` where there is a sparse part, and ``factors``, their shapes, where these are no matrices.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer) and {"A", "B"} <= module._modules.keys():
            children: Any = module
            a, b = children.A.weight, children.B.weight
            shape = [b.shape[0], a[0].numel()]
            layers[name] = {"shape": shape, "rank": b.shape[1], "bias": children.B.bias is not None}
            if a.dim() > 2:
                layers[name]["factors"] = [list(a.shape), list(b.shape)]
            if isinstance(module, LowRankPlusSparseLinear):
                layers[name]["nonzeros"] = module.nonzeros
    return layers


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """The transformers models that do not lie inside another one."""
    modeling = sys.modules.get("transformers.modeling_utils")
    kind = getattr(modeling, "PreTrainedModel", None)
    if kind is None:  # nobody can have made one
        return
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, kind) and id(module) not in inside:
            inside.update(id(inner) for inner in module.modules())
            yield module


def _method(config: Any) -> str | None:
    entry = getattr(config, "quantization_config", None)
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return str(getattr(method, "value", method))
