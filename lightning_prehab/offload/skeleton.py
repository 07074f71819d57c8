"""A transformers model without its weights: all modules, none of the memory, and each part loaded when it is needed."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prehab.errors import ArgumentError, CheckpointError, PrehabError, UnsupportedError
from lightning_prehab.offload.tensors import Entry, Written, entries_in, same

INDEX = "model.safetensors.index.json"


class Source:
    """The weights of a Hugging Face folder, in one file of safetensors or in several.

    Args:
        folder: The folder.

    Attributes:
        folder: The folder.
        entries: ``{name: entry}``.

    Raises:
        ArgumentError: If there are none.
        CheckpointError: If a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            what = "holds no config.json" if folder.is_dir() else "is no folder"
            raise ArgumentError(f"{folder} {what}; give a Hugging Face folder, as save_pretrained writes it.")
        if (folder / "model.safetensors").is_file():  # from_pretrained prefers it to an index, too
            files = ["model.safetensors"]
        elif (folder / INDEX).is_file():
            files = _named_in(folder / INDEX)
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise ArgumentError(
                f"{folder} holds no weights in safetensors; save them anew in Python: "
                f'model.save_pretrained("{folder}").'
            )
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ArgumentError(f"{folder} lacks {missing[0]}, which its index names; copy the folder again.")
        self.files = files
        self.entries: dict[str, Entry] = {}
        for name in files:
            self.entries |= entries_in(folder / name)

    def facts(self) -> list[Any]:
        """What would differ if it were another model: names, sizes and times of the files."""
        paths = [self.folder / name for name in ("config.json", *self.files)]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _named_in(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({type(error).__name__}: {error}); copy it again.") from error


class Skeleton:
    """A model of transformers whose parameters hold nothing until they are loaded, and nothing afterwards.

    A parameter that is not loaded has its shape, four bytes of memory, and NaN wherever one looks. Buffers that are in
    the file are read at once; others (frequencies of rotary embeddings, say) are what the class computes.

    Args:
        source: The weights.

    Attributes:
        source: The weights.
        model: The model, in eval mode.

    Raises:
        ArgumentError: If transformers does not know the model.
        UnsupportedError: If the file lacks some of its weights, lays them out in another way, or has two where the
            model has one.
        PrehabError: If transformers is missing.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.model = _without_weights(source)
        self._entries = self._found()

    def _found(self) -> dict[int, tuple[Tensor, Entry]]:
        """Each parameter, by id, with its place in the file; buffers that are there have been read then."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
        found: dict[int, tuple[Tensor, Entry]] = {}
        for key, known in names.items():
            spelled = [other for name in known for other in (name, name.removeprefix(prefix), prefix + name)]
            entry = next((self.source.entries[name] for name in spelled if name in self.source.entries), None)
            stored = [name for name in known if name in self.source.entries]
            for other in stored[1:]:
                if not same(self.source.entries[other], self.source.entries[stored[0]]):
                    raise UnsupportedError(
                        f"{stored[0]!r} and {other!r} are one weight of {type(self.model).__name__} by config.json, "
                        f"and differ in {self.source.folder}; set tie_word_embeddings to false in its config.json, or "
                        "compress it in memory, with compress_."
                    )
            valueless = isinstance(tensors[key], nn.Parameter) or (tensors[key].dim() > 0 and _is_empty(tensors[key]))
            if entry is None and valueless:
                raise UnsupportedError(
                    f"{self.source.folder} holds no {known[0]!r}, a weight of {type(self.model).__name__}: the file is "
                    "of another architecture, or lays the weights out in another way than the model does. Load it with "
                    "from_pretrained, and save it with save_pretrained; or compress it in memory, with compress_."
                )
            if entry is None:
                continue
            if entry.shape != tuple(tensors[key].shape):
                raise UnsupportedError(
                    f"{known[0]!r} is {list(entry.shape)} in {entry.path.name} and {list(tensors[key].shape)} in "
                    f"{type(self.model).__name__}; the file is of another architecture than config.json."
                )
            if isinstance(tensors[key], nn.Parameter):
                found[key] = tensors[key], entry
            else:
                tensors[key].data = entry.read().to(tensors[key].dtype)
        return found

    def adopt(self, entries: Mapping[str, Entry]) -> None:
        """From now on parameters of these names, new ones too, are loaded from there."""
        for name, parameter in self.model.named_parameters():
            if name in entries:
                self._entries[id(parameter)] = parameter, entries[name]

    def bytes_of(self, modules: Iterable[nn.Module]) -> int:
        """What the parameters and buffers of some modules take when they are loaded, shared ones once."""
        seen = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())

    def load(self, module: nn.Module, *, recurse: bool = True) -> None:
        """Reads what belongs to a module, and to those inside of it."""
        for tensor in _tensors_of(module, recurse):
            entry = self._entry_of(tensor)
            if entry is not None and _is_empty(tensor):
                tensor.data = entry.read().to(tensor.dtype)

    def unload(self, module: nn.Module, *, recurse: bool = True) -> None:
        """Lets go of it again, and of what has taken its place; what shares a parameter with it loses it too."""
        for tensor in _tensors_of(module, recurse):
            _forget(tensor)

    @contextmanager
    def loaded(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, the modules have their weights; outside, neither these nor what has taken their place."""
        before = [tensor for module in modules for tensor in _tensors_of(module, True)]
        try:
            for module in modules:
                self.load(module)
            yield
        finally:
            for tensor in before:
                _forget(tensor)
            for module in modules:
                self.unload(module)

    def written(self, tensor: Tensor) -> Written:
        """A tensor of the state dict, to be read when it is written; as it is if it is not in the file."""
        entry = self._entry_of(tensor)
        if entry is None or not _is_empty(tensor):
            return Written.of(tensor.detach())
        return Written(tuple(tensor.shape), tensor.dtype, lambda: entry.read().to(tensor.dtype))

    def _entry_of(self, tensor: Tensor) -> Entry | None:
        return self._entries.get(id(tensor), (None, None))[1]


class _Without(TorchFunctionMode):
    """Inside, what is allocated without a value has no memory: that is how torch makes weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _without_weights(source: Source) -> nn.Module:
    """The model that ``config.json`` names, its parameters without memory, in the dtype of the config or the file."""
    folder = source.folder
    try:
        import transformers
    except ImportError as error:
        raise PrehabError("Hugging Face folders need transformers: pip install 'lightning-prehab[hf]'.") from error
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged folder leads to
        raise ArgumentError(f"{folder}: config.json cannot be read ({type(error).__name__}: {error}).") from error
    names = config.architectures or []
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{folder} is quantized or compressed already; give the dense model.")
    found: Any = getattr(transformers, names[0], None) if names else None
    if found is None:
        who = f"{names[0]!r}" if names else "no class"
        raise ArgumentError(f"{folder}: config.json names {who} (architectures), which transformers does not know.")
    stored = (entry.dtype for entry in source.entries.values() if entry.dtype.is_floating_point)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or next(stored, torch.float32)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Without():
            model: nn.Module = found(config)
    finally:
        torch.set_default_dtype(default)
    memo: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(nothing_like(parameter), requires_grad=parameter.requires_grad)
                setattr(module, name, memo.setdefault(id(parameter), empty))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                if name in module._non_persistent_buffers_set:
                    raise UnsupportedError(
                        f"{type(module).__name__} of {type(model).__name__} has a buffer {name!r} that is neither in "
                        "the file nor computed when the model is made; compress it in memory, with compress_."
                    )
                module.register_buffer(name, nothing_like(buffer))
    return model.eval()


def _tensors_of(module: nn.Module, recurse: bool) -> Iterator[Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def _forget(tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        tensor.data = nothing_like(tensor)


def nothing_like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype that takes no memory: NaN, or 0, wherever one looks."""
    return nothing_of(tuple(tensor.shape), tensor.dtype)


def nothing_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same of a shape and a dtype."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device="cpu").expand(shape)


def _is_empty(tensor: Tensor) -> bool:
    """Whether a tensor is one of :func:`nothing_like`: all of it is one place in memory."""
    return not any(tensor.stride()) and tensor.untyped_storage().nbytes() <= tensor.element_size()
