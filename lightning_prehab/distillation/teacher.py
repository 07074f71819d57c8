"""The teacher: a model that goes on to answer as another one did, whatever is cut or trained."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.distillation.calls import Call, by_clean_name
from lightning_prehab.errors import CheckpointError, TargetError, UnsupportedError
from lightning_prehab.kinds import kind_of
from lightning_prehab.linalg.matrices import is_quantized
from lightning_prehab.linalg.modes import in_full_precision, outside_inference_mode
from lightning_prehab.statistics.collector import unseen
from lightning_prehab.surgery.hooks import makes_weight, without_hooks
from lightning_prehab.surgery.structure import follow_state_dict_
from lightning_prehab.targets.names import clean_name


class Teacher:
    """A module in eval mode, without gradients.

    Args:
        module: The teacher; it is put into eval mode, and moved to the device.
        device: Where it computes; None leaves it where it is.
        half: The dtype of autocast that it computes under, whatever the student does; None follows the student.
        by_name: It has the modules of the student, under the same names. Else it is called itself.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        device: torch.device | None = None,
        half: torch.dtype | None = None,
        by_name: bool = True,
    ) -> None:
        self._before = [(one, one.training) for one in module.modules()]
        self._trained = [one for one in module.parameters() if one.requires_grad]
        self._cached: list[Any] = []
        self.module = module.eval().requires_grad_(False)
        if device is not None:
            self.module.to(device)
        self.half, self.by_name = half, by_name
        for config in (getattr(one, "config", None) for one in module.modules()):
            if getattr(config, "use_cache", None) is True:  # of keys and values
                config.use_cache = False  # type: ignore[union-attr]
                self._cached.append(config)

    def give_back(self) -> None:
        """Leaves a module of the user's as it was, on whatever device it is now."""
        for module, training in self._before:
            module.training = training
        for parameter in self._trained:
            parameter.requires_grad_(True)
        for config in self._cached:
            config.use_cache = True

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        found: Tensor | None = next(iter(self.module.parameters()), None)
        return torch.device("cpu") if found is None else found.device

    @property
    def bytes(self) -> int:
        """What its weights and buffers take."""
        return sum({one.data_ptr(): one.numel() * one.element_size() for one in self.tensors().values()}.values())

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers, by all their names, as they are: those that are tied share their memory."""
        named: list[tuple[str, Tensor]] = [*self.module.named_parameters(remove_duplicate=False)]
        named += self.module.named_buffers(remove_duplicate=False)
        return {clean_name(name): tensor.detach() for name, tensor in named}

    def module_for(self, call: Call) -> nn.Module:
        """What answers in the place of the module of a call.

        Raises:
            TargetError: If it has no such module.
        """
        if not self.by_name or not call.name:
            return self.module
        module = by_clean_name(self.module).get(call.name)
        if module is None:
            raise TargetError(
                f"The teacher has no module {call.name!r}, which training_step calls; it must be the dense form of the "
                "model, or a module that is called on the same inputs."
            )
        return module

    @contextmanager
    def at_work(self, autocast: torch.dtype | None) -> Iterator[None]:
        """Inside, it answers as in the student's precision, and nobody counts what goes through it."""
        dtype = autocast if self.half is None else self.half
        kind = self.device.type
        if kind == "cpu" and dtype is torch.float16:
            dtype = torch.bfloat16
        self.module.eval()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(unseen())
            stack.enter_context(torch.autocast(kind, dtype, enabled=dtype is not None))
            stack.enter_context(_without_fast_path())
            yield


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Inside, attention computes as in training.

    The fast path of torch for eval mode leaves 0 at padded positions and rounds otherwise, and it is taken only by
    modules without hooks: a teacher that is rebuilt would not answer bit by bit like one that was copied with them.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@outside_inference_mode
@in_full_precision
def copy_of(model: nn.Module, device: torch.device | None = None, half: torch.dtype | None = None) -> nn.Module:
    """A copy of a model that shares nothing with it, without the hooks that are on its modules.

    Hooks of the user would count the teacher's calls as the student's, and ours would teach it. One that changes what a
    module returns is lost with them.

    Args:
        model: The model.
        device: Where its weights and buffers go; None leaves them.
        half: Keep float32 weights of layers that compute products in this dtype: autocast would cast them anyway.

    Raises:
        UnsupportedError: If it cannot be copied.
    """
    short = {id(one) for one in of_products(model)} if half is not None else set()
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        tensor = parameter.detach()
        if is_quantized(parameter):
            tensor = tensor.clone()
        else:
            dtype = half if id(parameter) in short else parameter.dtype
            tensor = tensor.to(device=device or parameter.device, dtype=dtype, copy=True)
        known[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    made = _deepcopy(model, known)
    return made if device is None else made.to(device)


@outside_inference_mode
def check_copy(model: nn.Module) -> None:
    """Raises :class:`UnsupportedError` if a model cannot be copied, without the memory that it takes."""
    blank: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        blank[id(tensor)] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
    _deepcopy(model, blank)


def _deepcopy(model: nn.Module, known: dict[int, Any]) -> nn.Module:
    known |= without_hooks(model)
    for module in model.modules():  # weights that a hook has computed, and computes anew
        made_there = [one for one in vars(module).values() if isinstance(one, Tensor) and one.grad_fn is not None]
        known |= {id(one): one.detach().clone() for one in made_there}
    try:
        return copy.deepcopy(model, known)
    except Exception as error:
        raise UnsupportedError(
            f"The dense model cannot be copied to be the teacher: {type(model).__name__} cannot be deep-copied "
            f"({type(error).__name__}: {error}). Give a teacher: teacher=, a checkpoint of the dense model or a module."
        ) from error


def bytes_of_copy(model: nn.Module, half: torch.dtype | None) -> int:
    """What :func:`copy_of` is going to take."""
    short = {id(one) for one in of_products(model)} if half is not None else set()
    size = sum(one.numel() * (2 if id(one) in short else one.element_size()) for one in model.parameters())
    return size + sum(one.numel() * one.element_size() for one in model.buffers())


@outside_inference_mode
@in_full_precision
def rebuilt(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> nn.Module:
    """A copy of a model with other weights and buffers, and the layers that they need: dense ones for dense weights.

    Args:
        model: The model, cut or not.
        tensors: As from :meth:`Teacher.tensors`, or a state dict; they are taken as they are.
        device: Where they go; None means where those of the model are.

    Raises:
        CheckpointError: If weights are missing, or do not fit (the layer is named).
        UnsupportedError: If the model cannot be copied.
    """
    made = copy_of(model, device)
    raw = {clean_name(name): name for name, _ in made.named_modules(remove_duplicate=False)}
    follow_state_dict_(made, {_raw(name, raw): tensor for name, tensor in tensors.items()})
    owners = {clean_name(name): module for name, module in made.named_modules(remove_duplicate=False)}
    missing = {clean_name(name) for name, _ in made.named_parameters(remove_duplicate=False)} - tensors.keys()
    if missing:
        raise CheckpointError(f"The teacher's weights lack {_some(missing)}; they are not those of this model.")
    put: dict[Any, Tensor] = {}  # what is tied stays so
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        old = getattr(owners.get(owner), leaf, None)
        if not isinstance(old, Tensor):
            raise CheckpointError(f"The teacher's weights hold {name!r}, which the model lacks.")
        if old.shape != tensor.shape:
            raise CheckpointError(
                f"The teacher's {name!r} has shape {tuple(tensor.shape)}, that of the model {tuple(old.shape)}."
            )
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), type(old), old.device
        if place not in put or not tensor.numel():
            moved = tensor.detach().to(old.device)
            put[place] = nn.Parameter(moved, requires_grad=False) if isinstance(old, nn.Parameter) else moved
        setattr(owners[owner], leaf, put[place])
    return made


def weights_in_file(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of Lightning, or in what ``torch.save(model.state_dict(), path)`` has written.

    Raises:
        CheckpointError: If there are none (the file is named).
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"The teacher {str(path)!r} cannot be read ({type(error).__name__}: {str(error).partition('. ')[0]}); give "
            "a .ckpt file of the dense model."
        ) from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    tensors = {clean_name(name): one for name, one in found.items() if isinstance(one, Tensor)}
    if not tensors:
        raise CheckpointError(f"The teacher {str(path)!r} holds no weights; give a .ckpt file of the dense model.")
    return tensors


def of_products(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights in float32 that autocast casts in each forward pass; not those that are looked up as well."""
    tables = {id(one) for module in model.modules() if isinstance(module, nn.Embedding) for one in module.parameters()}
    for module in model.modules():
        if any(makes_weight(hook) for hook in module._forward_pre_hooks.values()):
            continue  # they are no factors of a product themselves
        if kind_of(module) is not None or isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            for one in module.parameters(recurse=False):
                if one.dtype == torch.float32 and one.dim() >= 2 and id(one) not in tables and not is_quantized(one):
                    yield one


def _raw(name: str, raw: Mapping[str, str]) -> str:
    owner, _, leaf = name.rpartition(".")
    return f"{raw[owner]}.{leaf}" if raw.get(owner) else name


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(map(repr, first)) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
