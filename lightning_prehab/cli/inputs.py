"""What the command line reads: models and calibration batches from files. Nothing is taken from a network."""

import json
import pickle
import pkgutil
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError, PrehabError, reason
from lightning_prehab.files.checkpoints import load_from_checkpoint
from lightning_prehab.files.folders import STRUCTURE
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.statistics.batches import batch_size, padding_mask
from lightning_prehab.surgery.pretrained import METHOD

Batches = list[Any]
#: Endings of files: no name of a model.
_FILES = (".ckpt", ".pt", ".pth", ".safetensors", ".gguf", ".json")


def load_model(source: str, class_path: str | None, *, cut: bool = False) -> nn.Module:
    """The dense model of a Hugging Face folder, or of a Lightning checkpoint and its class; on the CPU, in eval mode.

    Args:
        source: The folder or the file.
        class_path: Of the class in the file.
        cut: It may be compressed already, for a deeper cut.

    Raises:
        ArgumentError: If there is no such model, or it is compressed already.
        PrehabError: If a package is missing.
    """
    path = Path(source)
    if path.is_dir():
        if class_path is not None:
            raise ArgumentError(f"--model is for a checkpoint file; {path} is a folder, leave it out.")
        if is_compressed(path) and not (cut and (path / "config.json").is_file()):
            raise _compressed_already(source)
        model = _hugging_face_model(path)
    elif not path.is_file():
        raise ArgumentError(_nowhere(source))
    elif path.suffix in (".gguf", ".safetensors", ".bin", ".json"):
        way_out = (
            "load it with transformers (gguf_file=) and save_pretrained a folder"
            if path.suffix == ".gguf"
            else ("give the folder that holds it, with its config.json")
        )
        raise ArgumentError(f"{path} is no Lightning checkpoint; {way_out}.")
    elif class_path is None:
        raise ArgumentError(f"{path} is a file; for a Lightning checkpoint give --model some.module.ClassName.")
    else:
        model = _lightning_model(path, class_path)
    if not cut and any(isinstance(module, LowRankLayer) for module in model.modules()):
        raise _compressed_already(source)
    return model.eval()


def is_compressed(folder: Path) -> bool:
    """Whether a folder holds a compressed model, written by this package or by ``save_pretrained``."""
    if (folder / STRUCTURE).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return bool(config["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_compressed(folder: Path) -> None:
    """Raises :class:`ArgumentError` unless the folder is one that ``compress`` has written."""
    if not folder.is_dir():
        raise ArgumentError(f"--compressed {folder} {'is no folder' if folder.exists() else 'does not exist'}.")
    if not (folder / STRUCTURE).is_file():
        raise ArgumentError(f"--compressed {folder} holds no {STRUCTURE}; give a folder that compress has written.")


def _compressed_already(source: str) -> ArgumentError:
    return ArgumentError(
        f"{source} is compressed already: give the dense model that it was made of, with another --keep. (A folder "
        "with a config.json, and a checkpoint, can be cut deeper: compress with a smaller --keep.)"
    )


def _nowhere(source: str) -> str:
    """What to do about a source that does not exist: it may be the name of a model on the hub."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or Path(source).suffix in _FILES or source.startswith("."):
        return f"{source} does not exist; give a Hugging Face folder or a Lightning checkpoint."
    name = source.rpartition("/")[2]
    return (
        f"There is no folder {source}. If it is a model on the hub, get it first: hf download {source} --local-dir "
        f'{name}, or in Python save_pretrained("{name}") of the model and of the tokenizer; then give {name}.'
    )


def _lightning_model(path: Path, class_path: str) -> nn.Module:
    try:
        found = pkgutil.resolve_name(class_path)
    except Exception as error:  # whatever the import of a module leads to
        raise ArgumentError(f"--model {class_path!r} cannot be imported ({reason(error)}).") from error
    if not (isinstance(found, type) and issubclass(found, pl.LightningModule)):
        raise ArgumentError(f"--model {class_path!r} is not a LightningModule class.")
    try:
        return load_from_checkpoint(found, path, map_location="cpu")
    except PrehabError:
        raise
    except Exception as error:  # whatever a damaged file or the user's class leads to
        raise ArgumentError(f"{path} cannot be loaded as {class_path} ({reason(error)}).") from error


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
    except UnicodeDecodeError as error:
        raise ArgumentError(f"--data {path} is no text in UTF-8, nor .pt or .safetensors.") from error
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ArgumentError(f"--data {path} cannot be read ({type(error).__name__}).") from error
    batches = found if isinstance(found, list) else _split(found, rows, path)
    if not batches:
        raise ArgumentError(f"--data {path} holds no batches.")
    return batches


def describe(batches: Batches, *, text: bool) -> str:
    """How much there is: ``"200 lines, 6,342 tokens in 25 batches"``."""
    rows = sum(batch_size(batch) for batch in batches)
    masks = [padding_mask(batch) for batch in batches]
    tokens = sum(int(mask.sum()) for mask in masks if mask is not None)
    counted = f", {_many(tokens, 'token')}" if tokens else ""
    return f"{_many(rows, 'line' if text else 'row')}{counted} in {_many(len(batches), 'batch')}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 'es' if what.endswith('h') else 's'}"


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


def _hugging_face_model(path: Path) -> nn.Module:
    transformers = _transformers()
    if not (path / "config.json").is_file():
        raise ArgumentError(f"{path} holds no config.json; give a Hugging Face folder or a Lightning checkpoint.")
    if not any(path.glob("*.safetensors")):
        raise ArgumentError(
            f'{path} holds no weights in safetensors; save them anew in Python: model.save_pretrained("{path}").'
        )
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
        raise ArgumentError(f"{path} cannot be loaded ({reason(error)}).") from error
    return model


def _tokens(path: Path, source: Path, max_length: int) -> dict[str, Tensor]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not source.is_dir():
        raise ArgumentError(f"--data {path}: text needs a Hugging Face folder with a tokenizer; give .pt batches.")
    if not lines:
        raise ArgumentError(f"--data {path} holds no text.")
    tokenizer = read_tokenizer(source, f"to read --data {path}; give .pt batches, or save it there, ")
    try:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        encoded = tokenizer(lines, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    except Exception as error:  # whatever a damaged tokenizer leads to
        raise _no_use(source, error) from error
    if _is_all_unknown(encoded["input_ids"], tokenizer):
        raise ArgumentError(f"--data {path}: the tokenizer of {source} knows no word of it; give text of the model.")
    return dict(encoded)


def _is_all_unknown(tokens: Tensor, tokenizer: Any) -> bool:
    """Whether a text is nothing but the token for what is unknown, and special ones around it."""
    unknown = tokenizer.unk_token_id
    others = set(tokenizer.all_special_ids) - {unknown}
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return False
    words = tokens[~torch.isin(tokens, torch.tensor(sorted(others), dtype=tokens.dtype))]
    return len(words) > 0 and bool((words == unknown).all())


def read_tokenizer(source: Path, why: str) -> Any:
    """The tokenizer of a Hugging Face folder.

    Args:
        source: The folder.
        why: What for and what else could be done, in the middle of a sentence.

    Raises:
        ArgumentError: If there is none, or it cannot be read.
    """
    transformers = _transformers()
    if not _has_tokenizer(source):
        raise ArgumentError(f'{source} holds no tokenizer {why}tokenizer.save_pretrained("{source}").')
    try:
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    except PrehabError:
        raise
    except Exception as error:  # whatever a damaged tokenizer leads to
        raise _no_use(source, error) from error


def can_write(source: str) -> bool:
    """Whether a source is a Hugging Face folder of a language model that writes text, with its tokenizer."""
    try:
        names = json.loads((Path(source) / "config.json").read_bytes())["architectures"]
        return bool(re.search(r"(ForCausalLM|LMHeadModel)$", names[0])) and _has_tokenizer(Path(source))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _has_tokenizer(source: Path) -> bool:
    return any(file for pattern in ("*token*", "vocab*", "*.model", "*.spm") for file in source.glob(pattern))


def _no_use(source: Path, error: Exception) -> ArgumentError:
    return ArgumentError(f"{source}: its tokenizer cannot be used ({reason(error)}).")


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
