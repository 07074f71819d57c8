"""What the command line reads: models and calibration batches from files. Nothing is taken from a network."""

import pickle
import pkgutil
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError, PrehabError
from lightning_prehab.files.checkpoints import load_from_checkpoint
from lightning_prehab.statistics.batches import batch_size

Batches = list[Any]
#: Small files that make a Hugging Face folder usable again.
_SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "special_tokens_map.json")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*")


def load_model(source: str, class_path: str | None) -> nn.Module:
    """The model of a Hugging Face folder, or of a Lightning checkpoint and its class; on the CPU, in eval mode.

    Raises:
        ArgumentError: If there is no such model.
        PrehabError: If a package is missing.
    """
    path = Path(source)
    if path.is_dir():
        if class_path is not None:
            raise ArgumentError(f"--model is for a checkpoint file; {path} is a folder, leave it out.")
        return _hugging_face_model(path).eval()
    if not path.is_file():
        raise ArgumentError(f"{path} does not exist; give a Hugging Face folder or a Lightning checkpoint.")
    if class_path is None:
        raise ArgumentError(f"{path} is a file; for a Lightning checkpoint give --model some.module.ClassName.")
    try:
        found = pkgutil.resolve_name(class_path)
    except Exception as error:  # whatever the import of a module leads to
        raise ArgumentError(f"--model {class_path!r} cannot be imported ({type(error).__name__}: {error}).") from error
    if not (isinstance(found, type) and issubclass(found, pl.LightningModule)):
        raise ArgumentError(f"--model {class_path!r} is not a LightningModule class.")
    try:
        return load_from_checkpoint(found, path, map_location="cpu").eval()
    except PrehabError:
        raise
    except Exception as error:  # whatever a damaged file or the user's class leads to
        raise ArgumentError(f"{path} cannot be loaded as {class_path} ({type(error).__name__}: {error}).") from error


def read_batches(data: str, source: str, rows: int, max_length: int) -> Batches:
    """Calibration batches out of a file.

    Args:
        data: ``.pt`` (read with ``weights_only``): a list of batches, a tensor, or a mapping of tensors.
            ``.safetensors``: tensors by argument name. Any other name: text, one sample a line.
        source: The Hugging Face folder whose tokenizer reads the text.
        rows: Rows of a batch, where the file is one tensor for each argument.
        max_length: Tokens of a line of text; the rest is cut off.

    Raises:
        ArgumentError: If the file cannot be read or holds something else.
    """
    path = Path(data)
    if not path.is_file():
        raise ArgumentError(f"--data {path} does not exist.")
    try:
        if path.suffix == ".pt":
            found = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".safetensors":
            found = _safetensors(path)
        else:
            found = _tokens(path, Path(source), max_length)
    except PrehabError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ArgumentError(f"--data {path} cannot be read ({type(error).__name__}).") from error
    batches = found if isinstance(found, list) else _split(found, rows, path)
    if not batches:
        raise ArgumentError(f"--data {path} holds no batches.")
    return batches


def example_batch(model: nn.Module, batches: Batches | None, rows: int, max_length: int) -> Any:
    """A batch of so many rows: the first rows of the data, repeated where they are too few, or random tokens.

    Raises:
        ArgumentError: If there is no data and the model is not one of tokens.
    """
    if batches:
        return _with_rows(batches[0], rows)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ArgumentError("bench cannot make up inputs for this model; give --data.")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = min(max_length, longest) if isinstance(longest, int) and longest > 0 else max_length
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def copy_settings(source: Path, folder: Path) -> None:
    """Copies configuration and tokenizer of a Hugging Face folder; of a checkpoint there is nothing to copy."""
    if source.is_dir():
        for pattern in (*_SETTINGS, *_TOKENIZER):
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)


def _hugging_face_model(path: Path) -> nn.Module:
    transformers = _transformers()
    if not (path / "config.json").is_file():
        raise ArgumentError(f"{path} holds no config.json; give a Hugging Face folder or a Lightning checkpoint.")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        names = config.architectures or []
        found = getattr(transformers, names[0], None) if names else transformers.AutoModel
        if found is None:
            raise ArgumentError(f"{path}: transformers has no class {names[0]!r} (architectures in config.json).")
        model: nn.Module = found.from_pretrained(path, config=config, local_files_only=True, use_safetensors=True)
    except PrehabError:
        raise
    except Exception as error:  # whatever a damaged folder leads to
        raise ArgumentError(f"{path} cannot be loaded ({type(error).__name__}: {error}).") from error
    return model


def _tokens(path: Path, source: Path, max_length: int) -> dict[str, Tensor]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not source.is_dir():
        raise ArgumentError(f"--data {path}: text needs a Hugging Face folder with a tokenizer; give .pt batches.")
    if not lines:
        raise ArgumentError(f"--data {path} holds no text.")
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        encoded = tokenizer(lines, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    except Exception as error:  # whatever a damaged tokenizer leads to
        raise ArgumentError(f"{source}: its tokenizer cannot be used ({type(error).__name__}: {error}).") from error
    return dict(encoded)


def _split(found: object, rows: int, path: Path) -> Batches:
    """Tensors of all samples, in batches; a mapping of one tensor is that tensor."""
    if isinstance(found, Tensor):
        found = {"": found}
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) and t.dim() > 0 for t in found.values()):
        raise ArgumentError(f"--data {path} must hold a list of batches, a tensor, or a mapping of tensors.")
    if len({len(tensor) for tensor in found.values()}) > 1:
        sizes = ", ".join(f"{name}: {len(tensor)}" for name, tensor in found.items())
        raise ArgumentError(f"--data {path}: the tensors differ in their number of samples ({sizes}).")
    parts = {name: tensor.split(rows) for name, tensor in found.items() if len(tensor)}
    if len(parts) == 1:
        return list(next(iter(parts.values())))
    return [dict(zip(parts, chunk, strict=True)) for chunk in zip(*parts.values(), strict=True)]


def _with_rows(batch: Any, rows: int) -> Any:
    have = batch_size(batch)
    if isinstance(batch, Tensor):
        index = torch.arange(rows) % max(have, 1)
        return batch[index] if batch.dim() > 0 else batch
    if isinstance(batch, Mapping):
        return {key: _with_rows(value, rows) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_with_rows(value, rows) for value in batch]
    return batch


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise PrehabError("Files need the safetensors package: pip install 'lightning-prehab[hf]'.") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArgumentError(f"--data {path} is not a safetensors file ({error}).") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise PrehabError("Hugging Face folders need transformers: pip install 'lightning-prehab[hf]'.") from error
    logging: Any = transformers.logging  # its functions have no types
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers
