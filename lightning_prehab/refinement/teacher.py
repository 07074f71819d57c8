"""The dense model, kept to learn from."""

import copy

import torch
from torch import Tensor, nn

from lightning_prehab.linalg.matrices import is_quantized
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.refinement.trained import is_short, parameters_to_train

#: Ends of the names of what inputs are multiplied with; a token or a mask that is a parameter may be used as it is.
PRODUCTS = ("weight", "proj")


def fast_in_half(device: torch.device) -> bool:
    """Whether products in bfloat16 are fast on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu
    return device.type == "cpu" and (cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())


def in_half(refinement: Refinement, device: torch.device) -> bool:
    """Whether a refinement computes in bfloat16 on a device."""
    return refinement.precision == "half" or (refinement.precision == "auto" and fast_in_half(device))


def keep_teacher(model: nn.Module, half: bool) -> nn.Module:
    """A model that goes on to answer as ``model`` does now, whatever is cut or trained.

    What a refinement changes is copied: vectors (norms, biases), low-rank layers of an earlier cut, and whatever is in
    half precision, which it trains in float32. Other matrices are not: a cut puts others in their place, or they stay.
    With ``half`` float32 matrices, but for those of embeddings, are copies in bfloat16 instead, so that the dense ones
    can go after the cut; the teacher is then to be called under autocast.

    Args:
        model: The dense model.
        half: Keep matrices in bfloat16.

    Returns:
        The teacher, in eval mode.
    """
    known: dict[int, Tensor] = {}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = {id(weight) for table in tables for weight in table.parameters()}
    trained = {id(one) for one in parameters_to_train(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) in trained or is_short(parameter):
            known[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        elif half and name.endswith(PRODUCTS) and id(parameter) not in looked_up and _is_plain(parameter):
            known[id(parameter)] = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
        else:
            known[id(parameter)] = parameter
    return copy.deepcopy(model, dict(known)).eval()


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.dtype == torch.float32 and not is_quantized(parameter)
