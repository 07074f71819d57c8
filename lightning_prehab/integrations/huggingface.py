"""``save_pretrained`` and ``from_pretrained`` of compressed transformers models.

Importing this module registers the method with transformers; ``import lightning_prehab`` does that for you. The surgery
notes the layers in the model's config, so ``model.save_pretrained(folder)`` needs no preparation.
"""

from typing import Any

import torch
from torch import nn

from lightning_prehab.errors import CheckpointError, PrehabError
from lightning_prehab.kinds import kind_of
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.surgery.pretrained import FORMAT_VERSIONS, GUARD, METHOD, check_pretrained, note_structure_
from lightning_prehab.surgery.structure import follow_state_dict_

try:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise PrehabError(
        "transformers models need a transformers with register_quantizer: pip install 'lightning-prehab[hf]'."
    ) from error


def prepare_for_saving(model: nn.Module) -> None:
    """Brings the config of a transformers model up to date with its low-rank layers.

    Needed only if layers were exchanged by hand, or if ``compress_`` was given a part of the model.

    Args:
        model: A transformers model, or a module that holds some.

    Raises:
        UnsupportedError: If a model with low-rank layers is quantized by another method; it is then as it was.
    """
    check_pretrained(model, (module for module in model.modules() if isinstance(module, LowRankLayer)))
    note_structure_(model)


class LowRankConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of ``config.json``.

    Args:
        format_version: Of the entry.
        layers: ``{name: {"shape": [out, in], "rank": r, "bias": bool}}``, with ``"nonzeros"`` for a sparse part,
            ``"layout": "pivot"`` and ``"factors": [shape of A, shape of B]`` (of D and C) where these are no matrices.
        quant_method: Always ``"lightning_prehab"``.
        unknown: Anything else is refused.

    Raises:
        CheckpointError: If the entry comes from another version of the format, or cannot be read.
    """

    def __init__(self, format_version: int = 0, layers: Any = None, quant_method: str = METHOD, **unknown: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        if format_version not in FORMAT_VERSIONS or unknown:
            raise CheckpointError(
                f"config.json has the entry of lightning_prehab in version {format_version!r}"
                f"{f' with {sorted(unknown)}' if unknown else ''}, this package reads versions {FORMAT_VERSIONS[0]} to "
                f"{FORMAT_VERSIONS[-1]}. "
                "Install the version of lightning-prehab that wrote it."
            )
        if not isinstance(layers, dict) or not all(map(_is_layer, layers.values())):
            raise CheckpointError("config.json: the layers of lightning_prehab cannot be read. Save the model again.")
        self.layers = layers


class LowRankQuantizer(HfQuantizer):
    """Puts empty low-rank layers into a new model before transformers loads the weights; nothing is quantized."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Takes the guard away: this package is here. Called before transformers reads ``fusion_config``."""
        fusions = getattr(config, "fusion_config", None)
        if fusions:
            config.fusion_config = {key: value for key, value in fusions.items() if key != GUARD} or None
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        modules = dict(model.named_modules())
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        state: dict[str, torch.Tensor] = {}
        assert isinstance(self.quantization_config, LowRankConfig)
        for stored, layer in self.quantization_config.layers.items():
            # a base model may be loaded from the file of a model with a head, and the other way round
            names = (stored, stored.removeprefix(prefix), prefix + stored)
            # a part of a fused layer has no module of its own before the surgery
            name = next((name for name in names if name in modules or _is_part(name, modules)), None)
            if name is not None:
                state |= _empty_state(name, layer)
            elif any(other.split(".")[0] in modules for other in names):
                raise CheckpointError(
                    f"Layer {stored!r} of config.json is not in {type(model).__name__}; load the architecture that was "
                    "saved."
                )
        follow_state_dict_(model, state)
        return model

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> None:
        """Leaves an ordinary model: nothing is quantized, so training, ``half()`` and ``to()`` are allowed."""
        note_structure_(model)

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes."""
        return True


def _is_part(name: str, modules: dict[str, nn.Module]) -> bool:
    layer = modules.get(name.rpartition(".")[0])
    return layer is not None and kind_of(layer) is not None


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict) or not isinstance(layer.get("shape"), list) or len(layer["shape"]) != 2:
        return False
    numbers = [*layer["shape"], layer.get("rank"), layer.get("nonzeros", 0)]
    sizes = layer.get("factors", [[1, 1], [1, 1]])  # of factors that are no matrices
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(isinstance(size, list) for size in sizes):
        return False
    if not all(type(number) is int and number > 0 for size in sizes for number in size):
        return False
    if layer.get("layout", "pivot") != "pivot":
        return False
    return all(type(number) is int for number in numbers) and 1 <= numbers[2] <= min(numbers[:2]) and numbers[3] >= 0


def _empty_state(name: str, layer: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the state dict of the layer would hold, on the meta device but for places and orders."""
    (m, n), rank = layer["shape"], layer["rank"]
    if layer.get("layout") == "pivot":
        d, c = layer.get("factors", [[rank, n], [m - rank, rank]])
        state = {f"{name}.D.weight": torch.empty(d, device="meta"), f"{name}.C.weight": torch.empty(c, device="meta")}
        state[f"{name}.order"] = torch.arange(m, device="cpu")
        return state | ({f"{name}.bias": torch.empty(m, device="meta")} if layer.get("bias") else {})
    a, b = layer.get("factors", [[rank, n], [m, rank]])
    state = {
        f"{name}.A.weight": torch.empty(a, device="meta"),
        f"{name}.B.weight": torch.empty(b, device="meta"),
    }
    if layer.get("bias"):
        state[f"{name}.B.bias"] = torch.empty(m, device="meta")
    if "nonzeros" in layer:
        state[f"{name}.indices"] = torch.arange(layer["nonzeros"], device="cpu")
        state[f"{name}.values"] = torch.empty(layer["nonzeros"], device="meta")
    return state


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LowRankConfig)
    register_quantizer(METHOD)(LowRankQuantizer)
