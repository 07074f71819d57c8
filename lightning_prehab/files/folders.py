"""A compressed model as a folder: weights in safetensors, structure in readable JSON, no pickle.

``structure.json`` names the weights file, which carries a part of its own checksum in its name. The JSON is replaced
last, in one step of the file system: whoever is killed while saving leaves the old model or the new one, never a
mixture.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.__about__ import __version__
from lightning_prehab.documents.checks import check_kind, check_path
from lightning_prehab.errors import CheckpointError, PrehabError, UnsupportedError
from lightning_prehab.layers.linear import LowRankLayer, LowRankPlusSparseLinear
from lightning_prehab.layers.pivot import PivotLayer
from lightning_prehab.linalg.matrices import is_quantized
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.surgery.holders import names_holders
from lightning_prehab.surgery.structure import follow_state_dict_
from lightning_prehab.targets.find import check_model
from lightning_prehab.targets.shards import check_not_in_shards

#: Of the folder's layout.
VERSION = 1
#: Of one whose weights lie in several files, as :func:`~lightning_prehab.compress_folder` writes it.
VERSION_OF_SEVERAL = 2
STRUCTURE = "structure.json"
_OTHER = "it was saved from another architecture"
_SAME = "Build the model with the class and the settings that it was saved with."
_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")


def save_compressed(model: nn.Module, folder: str | os.PathLike[str], report: CompressionReport | None = None) -> Path:
    """Writes a model, compressed or not, into a folder.

    Tied and shared weights are stored once. A model that is already there is replaced atomically.

    Args:
        model: Any module; all entries of its state dict must be tensors.
        folder: Made if it does not exist.
        report: Adds the method and the errors of each layer to the JSON.

    Returns:
        The folder.

    Raises:
        ArgumentError: If an argument is something else.
        PrehabError: If the ``safetensors`` package is missing, or the state dict holds something else than tensors.
        CheckpointError: If ``folder`` is a file.
        UnsupportedError: If a tensor is quantized, sparse or nested, or lies in shards on several processes.
    """
    save, _ = _safetensors()
    check_model(model)
    check_path("folder", folder)
    check_kind("report", report, CompressionReport, "a CompressionReport", optional=True)
    check_not_in_shards(model, "save_compressed")
    state = dict(model.state_dict())
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise PrehabError(
            f"The state dict entry {odd[0]!r} is not a tensor ({type(state[odd[0]]).__name__}) and cannot be stored "
            "without pickle; keep it out of the state dict (get_extra_state), or make it a buffer."
        )
    quantized = [name for name, value in state.items() if is_quantized(value) or value.is_quantized]
    if quantized:
        raise UnsupportedError(
            f"{quantized[0]!r} is quantized ({type(state[quantized[0]]).__name__}), and safetensors has no place for "
            "that; save the model before it is quantized, and quantize it anew after load_compressed."
        )
    packed = [name for name, value in state.items() if value.is_nested or value.layout != torch.strided]
    if packed:
        kind = "nested" if state[packed[0]].is_nested else state[packed[0]].layout
        raise UnsupportedError(
            f"{packed[0]!r} is no dense tensor ({kind}), and safetensors has no place for that; keep it dense, or out "
            "of the state dict."
        )
    stored, aliases = _without_aliases(state)
    weights: bytes = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in stored.items()})
    digest = hashlib.sha256(weights).hexdigest()
    name = f"weights-{digest[:16]}.safetensors"
    tensors = {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in stored.items()}
    structure = describe_structure(model, report, {name: digest}, tensors, aliases)

    path = Path(folder)
    if path.is_file():
        raise CheckpointError(f"{str(path)!r} is a file; give the path of a folder, which may be there or not.")
    path.mkdir(parents=True, exist_ok=True)
    _write(path / name, weights)
    _write(path / STRUCTURE, structure.encode())
    for old in path.glob("weights-*.safetensors"):
        if old.name != name and _WEIGHTS.fullmatch(old.name):
            old.unlink()
    return path


def describe_structure(
    model: nn.Module,
    report: CompressionReport | None,
    files: Mapping[str, str],
    tensors: Mapping[str, Mapping[str, Any]],
    aliases: Mapping[str, str],
) -> str:
    """The content of ``structure.json``.

    Args:
        model: With its low-rank layers; their values do not matter.
        report: Of the cut, or None.
        files: ``{name: SHA-256}`` of the files that hold the weights, one or several.
        tensors: ``{name: {"shape", "dtype"}}`` of what they hold.
        aliases: Other names of tied tensors.
    """
    stored = [{"file": name, "sha256": digest} for name, digest in files.items()]
    structure = {
        "format": "lightning_prehab",
        "version": VERSION if len(stored) == 1 else VERSION_OF_SEVERAL,
        "written_by": f"lightning_prehab {__version__}, torch {torch.__version__}",
        "weights": stored[0] if len(stored) == 1 else stored,
        "layers": _layers(model, report),
        "tensors": dict(tensors),
        "aliases": dict(aliases),
    }
    return json.dumps({**structure, "checksum": _checksum(structure)}, indent=1) + "\n"


@names_holders
def load_compressed(folder: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Loads what :func:`save_compressed` has written into a freshly built model, in place.

    Everything is checked before the model is changed: the checksums, every name, shape and dtype.

    Args:
        folder: The folder.
        model: Built as before the compression (or compressed already: it follows the file).

    Returns:
        The same model, with the low-rank layers of the file and its weights.

    Raises:
        ArgumentError: If an argument is something else.
        CheckpointError: If the files are missing, damaged or do not fit the model; the model is then as it was.
        PrehabError: If the ``safetensors`` package is missing.
    """
    _, load = _safetensors()
    check_model(model)
    check_path("folder", folder)
    path = Path(folder)
    _check_folder(path)
    try:
        structure, weights = _read(path)
        state = {name: tensor for part in weights for name, tensor in load(part).items()}
        described = {name: (list(t.shape), str(t.dtype)) for name, t in state.items()}
        if described != {name: (entry["shape"], entry["dtype"]) for name, entry in structure["tensors"].items()}:
            raise CheckpointError("the tensors in the weights file are not those that structure.json lists")
        for alias, name in structure["aliases"].items():
            state[alias] = state[name]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}. Copy the folder or save the model again.") from error
    except Exception as error:  # whatever a damaged file leads to
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}). Copy the folder or save the model again."
        ) from error
    _check_fit(model, state)
    follow_state_dict_(model, state)
    model.load_state_dict(state)
    return model


def _check_folder(path: Path) -> None:
    """Raises :class:`CheckpointError` if this is no folder of :func:`save_compressed`, and says what would load it."""
    if not path.exists():
        raise CheckpointError(
            f"There is no folder {str(path)!r}. Check the path (a relative one counts from {str(Path.cwd())!r}), or "
            "write the folder with save_compressed(model, folder)."
        )
    if path.is_file():
        way_out = "load_compressed takes the folder that save_compressed has written"
        if (path.parent / STRUCTURE).is_file():
            way_out = f"give the folder that it lies in, {str(path.parent)!r}"
        elif path.suffix == ".ckpt":
            way_out = "a Lightning checkpoint is loaded with load_from_checkpoint(LitModel, path)"
        raise CheckpointError(f"{str(path)!r} is a file, not a folder; {way_out}.")
    if not (path / STRUCTURE).is_file():
        why = "it was not written by save_compressed, or not all of it was copied"
        if (path / "config.json").is_file():
            why = (
                "with its config.json it looks like a folder of transformers, which from_pretrained loads, compressed "
                "or not; load_compressed takes what save_compressed has written"
            )
        raise CheckpointError(f"The folder {str(path)!r} holds no {STRUCTURE}: {why}.")


def _read(path: Path) -> tuple[dict[str, Any], Iterator[bytes]]:
    """The structure and the bytes of the files of weights, all with the right checksum."""
    structure = json.loads((path / STRUCTURE).read_bytes())
    if not isinstance(structure, dict) or structure.get("format") != "lightning_prehab":
        raise CheckpointError(f"{STRUCTURE} was not written by lightning_prehab")
    if structure.get("version") not in (VERSION, VERSION_OF_SEVERAL):
        raise CheckpointError(
            f"{STRUCTURE} has version {structure.get('version')!r}, this lightning_prehab ({__version__}) reads "
            f"versions {VERSION} and {VERSION_OF_SEVERAL}; install the version that wrote it"
        )
    if structure.pop("checksum", None) != _checksum(structure):
        raise CheckpointError(f"{STRUCTURE} has been changed since it was written: its checksum is wrong")
    stored = structure["weights"]
    stored = stored if isinstance(stored, list) else [stored]
    for one in stored:
        if not _WEIGHTS.fullmatch(one["file"]):
            raise CheckpointError(f"{STRUCTURE} names a weights file that cannot be one of ours: {one['file']!r}")
        if not (path / one["file"]).is_file():
            raise CheckpointError(f"the weights file {one['file']} is missing")
    return structure, (_weights(path / one["file"], one["sha256"]) for one in stored)


def _weights(path: Path, digest: str) -> bytes:
    weights = path.read_bytes()
    if hashlib.sha256(weights).hexdigest() != digest:
        raise CheckpointError(f"{path.name} is damaged: its checksum is wrong")
    return weights


def _check_fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises :class:`CheckpointError` unless the model can take over the structure and then all of ``state``."""
    skeleton = _without_data(model)
    follow_state_dict_(skeleton, state)
    expected = skeleton.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise CheckpointError(f"{name!r} of the model is not in the file: {_OTHER}. {_SAME}")
        if name not in expected:
            unbuilt = not expected and hasattr(model, "configure_model")
            why = "nothing is built yet: call its configure_model() first" if unbuilt else f"{_OTHER}. {_SAME}"
            raise CheckpointError(f"{name!r} of the file is not in the model: {why}")
        ours, theirs = expected[name], state[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise CheckpointError(
                f"{name!r} is {tuple(theirs.shape)} {theirs.dtype} in the file and {tuple(ours.shape)} {ours.dtype} in "
                "the model; build the model with the sizes and the dtype that it was saved with."
            )


def _without_data(model: nn.Module) -> nn.Module:
    """A copy of the structure alone, on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _layers(model: nn.Module, report: CompressionReport | None) -> list[dict[str, Any]]:
    """The low-rank layers, for people who read the JSON."""
    facts = {} if report is None else {layer["name"]: layer for layer in report.to_dict()["layers"]}
    layers = []
    for name, module in model.named_modules():
        parts: Any = module
        if isinstance(module, PivotLayer):
            a, rows, rank = parts.D.weight, len(parts.order), module.rank
        elif isinstance(module, LowRankLayer) and {"A", "B"} <= module._modules.keys():
            a, (rows, rank) = parts.A.weight, parts.B.weight.shape[:2]
        else:
            continue
        entry = {"name": name, "kind": type(module).__name__, "shape": [rows, a[0].numel()], "rank": rank}
        if isinstance(module, LowRankPlusSparseLinear):
            entry["nonzeros"] = module.nonzeros
        if name in facts and report is not None:
            entry["method"] = repr(report.plan.factorization)
            entry["predicted_error"] = facts[name]["predicted_error"]
            entry["weight_error"] = facts[name]["weight_error"]
        layers.append(entry)
    return layers


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that are the same memory once, and the other names of each."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() > 0 and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            stored[name] = tensor
    return stored, aliases


def _checksum(structure: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Writes beside the target, to the disk, then moves into place."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:  # with the permissions of any new file
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _safetensors() -> tuple[Any, Any]:
    try:
        from safetensors.torch import load, save
    except ImportError as error:
        raise PrehabError("Files need the safetensors package: pip install 'lightning-prehab[hf]'.") from error
    return save, load
