"""What a transformers model says about its low-rank layers in ``config.json``; transformers itself is not imported.

``quantization_config`` is the place where transformers looks for the structure of a file that differs from the class.
A transformers without this package only warns of an unknown method there and would leave the layers at random; so a
second entry, in ``fusion_config``, makes it stop with an error that names this package.
"""

import copy
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.layers.linear import LowRankLayer, LowRankPlusSparseLinear
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.targets.weights import why_not_tensor

#: ``quant_method`` in ``config.json``.
METHOD = "lightning_prehab"
#: Of the entry in ``config.json``; 2 where a layer has another layout than two factors.
FORMAT_VERSIONS = (1, 2)
#: An entry of ``fusion_config`` that transformers refuses by its name unless this package has taken it away.
GUARD = "lightning_prehab (pip install 'lightning-prehab[hf]', and import lightning_prehab before from_pretrained)"


def note_structure_(model: nn.Module) -> None:
    """Writes the low-rank layers of every transformers model in ``model`` into its config, or takes the entry away.

    Only the outermost transformers models are looked at; ``model`` may be one, or hold some (a LightningModule does).
    What says that such a model is quantized goes: it is an ordinary one, see :func:`check_pretrained`.
    """
    for pretrained in _outermost(model):
        config: Any = pretrained.config
        layers = describe_layers(pretrained)
        fusions = {key: value for key, value in (getattr(config, "fusion_config", None) or {}).items() if key != GUARD}
        if layers or _method(pretrained) == METHOD:
            _lift_marks_(pretrained)
        if layers:
            config.quantization_config = {
                "quant_method": METHOD,
                "format_version": 2 if any("layout" in layer for layer in layers.values()) else 1,
                "layers": layers,
            }
            fusions[GUARD] = True
        if fusions:
            config.fusion_config = fusions
        elif "fusion_config" in vars(config):
            del config.fusion_config


def check_pretrained(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Raises :class:`UnsupportedError` if a cut would lie in a transformers model that cannot be saved after it.

    That is one with another method of quantization. A model whose weights transformers has dequantized when it loaded
    them (from a GGUF file, for one) is an ordinary model, though it may still say that it is quantized.

    Args:
        model: A transformers model, or a module that holds some; those without a cut do not matter.
        layers: What is cut, or is going to be.
    """
    cut = {id(layer) for layer in layers}
    for pretrained in _outermost(model):
        method = _method(pretrained)
        if method in (None, METHOD) or not any(id(module) in cut for module in pretrained.modules()):
            continue
        if not _is_dequantized(pretrained):
            raise UnsupportedError(
                f"{type(pretrained).__name__} is quantized with {method!r}, and config.json has room for one method; "
                "load it without quantization (or dequantized, where its quantization config has dequantize=True), "
                "compress it, and quantize the factors afterwards."
            )


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """``{name: {shape, rank, bias}}`` of the low-rank layers.

    With ``nonzeros`` where there is a sparse part, ``layout`` where it is not that of two factors, and ``factors``,
    their shapes, where these are no matrices.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        children: Any = module
        if isinstance(module, PivotLayer):
            d, c = children.D.weight, children.C.weight
            shape = [len(d) + len(c), d[0].numel()]
            layers[name] = {"shape": shape, "rank": len(d), "bias": children.bias is not None, "layout": "pivot"}
            if d.dim() > 2:
                layers[name]["factors"] = [list(d.shape), list(c.shape)]
        elif isinstance(module, LowRankLayer) and {"A", "B"} <= module._modules.keys():
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
    kind = _pretrained_class()
    if kind is None:
        return
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, kind) and id(module) not in inside:
            inside.update(id(inner) for inner in module.modules())
            yield module


def _pretrained_class() -> Any:
    """``transformers.PreTrainedModel``, or None if nobody can have made one."""
    return getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)


def _method(pretrained: nn.Module) -> str | None:
    """How a transformers model is quantized, as its config or the model says."""
    quantizer = vars(pretrained).get("hf_quantizer")
    entry = getattr(pretrained.config, "quantization_config", None) or getattr(quantizer, "quantization_config", None)
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return str(getattr(method, "value", method))


def _is_dequantized(pretrained: nn.Module) -> bool:
    """Whether a model that says it is quantized has the modules of its class all the same, and ordinary weights."""
    if any(why_not_tensor(parameter, "") is not None for parameter in pretrained.parameters()):
        return False
    config: Any = copy.deepcopy(pretrained.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            plain = type(pretrained)(config)
    except Exception:  # a class of somebody's own that takes more than a config
        return False
    kinds = {name: type(module) for name, module in plain.named_modules()}
    inside: set[int] = set()
    for name, module in pretrained.named_modules():
        if isinstance(module, LowRankLayer):
            inside.update(id(inner) for inner in module.modules())
        elif id(module) not in inside and kinds.get(name) is not type(module):
            return False
    return True


def _lift_marks_(pretrained: nn.Module) -> None:
    """Takes away what makes transformers refuse to save, train or cast a model; see ``remove_quantization_config``."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(pretrained):
            delattr(pretrained, name)
    if hasattr(pretrained.config, "quantization_config"):
        del pretrained.config.quantization_config
    for module in pretrained.modules():
        if isinstance(module, _pretrained_class() or ()):
            vars(module.config).pop("_is_quantized", None)
