"""The weights that a module holds itself, and why some of them cannot be cut."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_prehab.kinds import Kind
from lightning_prehab.linalg.matrices import break_even_rank, is_quantized
from lightning_prehab.linalg.sharding import is_distributed, local_part, why_not_shards

#: Parameters that torch.nn.utils.prune, spectral_norm and weight_norm leave in place of the weight.
_REPARAMETRIZED = {"weight_orig", "weight_v"}
#: Numbers that can be decomposed, trained as factors and stored.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def parameter_owners(model: nn.Module) -> dict[int, set[int]]:
    """For the id of each parameter the ids of the modules that hold it."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].add(id(module))
    return owners


def has_matrix(module: nn.Module) -> bool:
    """A leaf-like module with a weight of two or more dimensions of its own (norms and activations have none)."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    own = _own_parameters(module)
    if is_parametrized(module) or _REPARAMETRIZED & own.keys():
        return True
    scripted = isinstance(module, torch.jit.ScriptModule)  # it does not tell what its parameters are for
    weights = [weight for name, weight in own.items() if scripted or name.startswith("weight")]
    return any(is_lazy(weight) or weight.dim() >= 2 for weight in weights) or _stacked_weight(module) is not None


def why_not(module: nn.Module, kind: Kind | None) -> str | None:
    """Why a module with a weight matrix cannot be cut, whatever its matrices look like, or None if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript; compress the model first, then script or trace it"
    if is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    own = _own_parameters(module)
    if _REPARAMETRIZED & own.keys():
        return "its weight is pruned or normalized by a hook; make that permanent or remove it first"
    if isinstance(module, nn.Embedding):
        return "embeddings are looked up, not multiplied"
    if kind is None and not any(name.startswith("weight") for name in own) and _stacked_weight(module):
        return f"it holds stacked matrices ({_stacked_weight(module)}), which are not cut"
    if kind is None:
        return f"{type(module).__name__} is not a layer kind that can be cut"
    odd = (why_not_tensor(tensor, f"its {name}") for name, tensor in module.named_parameters())
    return next((reason for reason in odd if reason is not None), None) or kind.refusal(module)


def why_not_tensor(tensor: Tensor, what: str) -> str | None:
    """Why a tensor is no weight that can be decomposed and take part in training, or None if it is one.

    Args:
        tensor: Any tensor; nothing but its description is read.
        what: How the sentence begins.

    >>> why_not_tensor(torch.zeros(2, 2, dtype=torch.complex64), "its weight")
    'its weight is complex (torch.complex64)'
    """
    if is_lazy(tensor):
        return f"{what} is not initialized"
    if is_quantized(tensor) or tensor.is_quantized:
        return f"{what} is quantized; compress the model first, then quantize the factors"
    if is_distributed(tensor):
        return why_not_shards(tensor, what) or why_not_tensor(local_part(tensor), what)
    if _has_own_operations(type(tensor)):
        return f"{what} is a {type(tensor).__name__}, which follows rules of its own"
    if tensor.is_nested:
        return f"{what} is a nested tensor"
    if tensor.layout != torch.strided:
        return f"{what} is not stored as a dense matrix ({tensor.layout})"
    if tensor.is_complex():
        return f"{what} is complex ({tensor.dtype})"
    if tensor.dtype not in _DTYPES:
        return f"{what} is of {tensor.dtype}, in which nothing is trained; cast it first"
    return None


def _own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are no child's; a scripted module has its own kind of dictionary for them."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def _has_own_operations(kind: type) -> bool:
    """Whether a class of tensors changes what operations do: sharded, masked, fake ones and many more."""
    plain = {*Tensor.__mro__, nn.Parameter}
    changed = {"__torch_function__", "__torch_dispatch__"}
    return any(changed & vars(base).keys() for base in kind.__mro__ if base not in plain)


def _stacked_weight(module: nn.Module) -> str | None:
    """Names and shapes of parameters that are stacks of matrices, such as the experts of a mixture; None if none is."""
    found = [
        f"{name}: {'x'.join(map(str, parameter.shape))}"
        for name, parameter in _own_parameters(module).items()
        if not is_lazy(parameter) and not parameter.is_nested and parameter.dim() == 3 and parameter.shape[0] > 1
        if break_even_rank(*parameter.shape[1:]) > 0  # a scale of shape (channels, 1, 1) is no stack
    ]
    return ", ".join(found) or None
