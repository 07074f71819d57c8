"""Calibration statistics as a folder: sums in safetensors, what belongs to what in readable JSON, no pickle.

Layers that are fed by the same tensor share their sums here too, and of a symmetric matrix one half is stored.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_prehab.__about__ import __version__
from lightning_prehab.errors import PrehabError, StatisticsError
from lightning_prehab.statistics.sums import LayerStatistics

#: Of the folder's layout.
VERSION = 1
INDEX = "statistics.json"
_FORMAT = "lightning_prehab statistics"


class StatisticsWriter:
    """Writes statistics into a folder, as many at a time as there are in memory.

    Args:
        folder: Made with the first statistics, if it does not exist.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._files: dict[str, str] = {}
        self._layers: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        """Number of layers so far."""
        return len(self._layers)

    def add(self, statistics: Mapping[str, LayerStatistics]) -> None:
        """Writes one file.

        Args:
            statistics: ``{name: LayerStatistics}``; other names than those before.

        Raises:
            PrehabError: If the ``safetensors`` package is missing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = f"part-{len(self._files) + 1}.safetensors"
        stored: dict[str, Tensor] = {}
        keys: dict[int, str] = {}  # sums that layers share are one tensor object
        for name, layer in statistics.items():
            sums = {}
            for sum_name, tensor in layer.tensors():
                if id(tensor) not in keys:
                    keys[id(tensor)] = f"{name}/{sum_name}"
                    stored[keys[id(tensor)]] = _packed(tensor.detach().cpu(), sum_name)
                sums[sum_name] = keys[id(tensor)]
            shape = [layer.out_features, layer.in_features]
            self._layers[name] = {"file": file, "shape": shape, "sums": sums}
        save_tensors(stored, self.folder / file)
        self._files[file] = _digest(self.folder / file)

    def finish(self, model: str) -> int:
        """Writes the JSON.

        Args:
            model: What :func:`fingerprint` says of the model that was calibrated.

        Returns:
            Bytes of all files.
        """
        index = {
            "format": _FORMAT,
            "version": VERSION,
            "written_by": f"lightning_prehab {__version__}, torch {torch.__version__}",
            "model": model,
            "files": self._files,
            "layers": self._layers,
        }
        written = self.folder / INDEX
        written.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for file in self._files:  # safetensors makes files that nobody else can read
            (self.folder / file).chmod(written.stat().st_mode)
        return sum(file.stat().st_size for file in self.folder.iterdir())


class StoredStatistics(Mapping[str, LayerStatistics]):
    """``{name: LayerStatistics}`` out of a folder; each is read when it is asked for.

    Args:
        folder: What a :class:`StatisticsWriter` has written.

    Attributes:
        model: What :func:`fingerprint` said of the model that was calibrated.

    Raises:
        StatisticsError: If the files are missing or damaged.
        PrehabError: If the ``safetensors`` package is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._read: WeakValueDictionary[tuple[str, str], Tensor] = WeakValueDictionary()
        self._open = _safetensors().safe_open
        try:
            index = json.loads((self._folder / INDEX).read_bytes())
            if index["format"] != _FORMAT or index["version"] != VERSION:
                raise ValueError(f"{INDEX} has another format or version")
            self.model = str(index["model"])
            self._layers: dict[str, dict[str, Any]] = index["layers"]
            for file, digest in index["files"].items():
                if Path(file).name != file or _digest(self._folder / file) != digest:
                    raise ValueError(f"the checksum of {file} is wrong")
        except Exception as error:  # whatever a damaged folder leads to
            raise StatisticsError(
                f"{self._folder}: the statistics cannot be read ({type(error).__name__}: {error}); collect them anew."
            ) from error

    def __getitem__(self, name: str) -> LayerStatistics:
        """The statistics of one layer; sums that layers share are read once as long as somebody has them.

        Raises:
            StatisticsError: If the file holds something else than its JSON says.
        """
        entry = self._layers[name]
        try:
            return self._layer(entry["file"], entry["shape"], entry["sums"])
        except Exception as error:  # whatever a damaged folder leads to
            raise StatisticsError(
                f"{self._folder}: the statistics of layer {name!r} cannot be read ({type(error).__name__}: {error})."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def _layer(self, file: str, shape: list[int], sums: Mapping[str, str]) -> LayerStatistics:
        m, n = shape
        layer = LayerStatistics(
            n,
            m,
            gradients="gradient_gram" in sums,
            weight_gradients="weight_gradient" in sums,
            halves="half.tokens" in sums,
            magnitudes="input_absolute_sum" in sums,
            device="cpu",
        )
        for name, mine in list(layer.tensors()):
            found = self._tensor(file, sums[name])
            if found.shape != mine.shape:
                raise ValueError(f"{name} has shape {tuple(found.shape)}, expected {tuple(mine.shape)}")
            holder = layer.half if name.startswith("half.") else layer
            setattr(holder, name.removeprefix("half."), found)
        return layer

    def _tensor(self, file: str, key: str) -> Tensor:
        found = self._read.get((file, key))
        if found is None:
            with self._open(self._folder / file, "pt") as tensors:
                found = _unpacked(tensors.get_tensor(key), key)
            self._read[file, key] = found
        return found


def fingerprint(model: nn.Module) -> str:
    """A checksum of all parameters, with their names, shapes and dtypes, wherever they lie."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        values = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _packed(tensor: Tensor, key: str) -> Tensor:
    """The upper half of a symmetric Gram matrix in one row, or a copy of what is none."""
    if key.endswith("_gram") and torch.equal(tensor, tensor.mT):
        return tensor[_upper(tensor.shape[0])]
    return tensor.clone(memory_format=torch.contiguous_format)


def _unpacked(tensor: Tensor, key: str) -> Tensor:
    if not key.endswith("_gram") or tensor.dim() != 1:
        return tensor
    size = int((2 * tensor.numel()) ** 0.5)
    found = tensor.new_empty(size, size)
    upper = _upper(size)
    found[upper] = tensor
    found.mT[upper] = tensor
    return found


def _upper(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device="cpu").triu()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a file of safetensors.

    Raises:
        OSError: If it cannot be written, such as on a full disk; safetensors has an error of its own for that.
        PrehabError: If the package is missing.
    """
    library = _safetensors()
    try:
        library.torch.save_file(dict(tensors), path)
    except library.SafetensorError as error:
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise PrehabError("Files need the safetensors package: pip install 'lightning-prehab[hf]'.") from error
    return safetensors
