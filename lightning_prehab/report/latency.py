"""How long a forward pass takes before and after a compression, as a document of its own or a part of a report."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_prehab.documents import settings
from lightning_prehab.documents.checks import check_kind
from lightning_prehab.documents.tables import Table
from lightning_prehab.errors import ArgumentError, CheckpointError, PrehabError
from lightning_prehab.plan.timing import time_calls
from lightning_prehab.progress import counted, tell
from lightning_prehab.statistics.batches import ask_model, batch_size, check_batches, to_device
from lightning_prehab.statistics.calibration import Forward, as_found
from lightning_prehab.targets.find import count_parameters
from lightning_prehab.targets.names import clean_name

#: A difference of latencies up to this share is called none: medians on a busy machine differ by as much.
NO_DIFFERENCE = 0.05


@dataclass(frozen=True)
class BatchLatency:
    """Median seconds of a forward pass of one batch.

    Attributes:
        batch_size: Rows of the batch.
        dense_seconds: Before.
        compressed_seconds: After.
        layers: ``{name: (before, after)}`` of the layers that were replaced, each alone on the input that it gets.
    """

    batch_size: int
    dense_seconds: float
    compressed_seconds: float
    layers: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "batch_size": self.batch_size,
            "dense_seconds": self.dense_seconds,
            "compressed_seconds": self.compressed_seconds,
            "verdict": verdict(self.dense_seconds, self.compressed_seconds),
            "layers": [
                {"name": name, "dense_seconds": dense, "compressed_seconds": compressed}
                for name, (dense, compressed) in self.layers.items()
            ],
        }


@dataclass(frozen=True)
class ModelLatency:
    """Latencies of a dense and of a compressed model, measured in turn; see :func:`compare_latencies`.

    Attributes:
        device: Where both ran.
        threads: Of the CPU.
        parameters_before: Parameters of the dense model.
        parameters_after: Parameters of the compressed one.
        batches: One entry for each batch, in the order of measuring.
    """

    device: str
    threads: int
    parameters_before: int
    parameters_after: int
    batches: tuple[BatchLatency, ...]

    @property
    def where(self) -> str:
        """Device and threads, in words."""
        return f"{self.device}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    @property
    def largest(self) -> BatchLatency:
        """The batch with the most rows, the first of several."""
        return max(self.batches, key=lambda batch: batch.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON: what ``bench --json`` prints."""
        return {
            "device": self.device,
            "threads": self.threads,
            "parameters_dense": self.parameters_before,
            "parameters_compressed": self.parameters_after,
            "latency": [batch.to_dict() for batch in self.batches],
        }

    @classmethod
    def from_dict(cls, data: object) -> "ModelLatency":
        """What :meth:`to_dict` has written.

        Raises:
            CheckpointError: If it is something else.
        """
        try:
            if not isinstance(data, Mapping):
                raise CheckpointError(f"These are not latencies, but {settings.show(data)}.")
            batches = tuple(
                BatchLatency(
                    _count(row["batch_size"], "batch_size"),
                    *_seconds_of(row),
                    {str(layer["name"]): _seconds_of(layer) for layer in row.get("layers", [])},
                )
                for row in data["latency"]
            )
            if not batches:
                raise CheckpointError("There are no latencies in it.")
            return cls(
                str(data["device"]),
                _count(data["threads"], "threads"),
                _count(data["parameters_dense"], "parameters_dense"),
                _count(data["parameters_compressed"], "parameters_compressed"),
                batches,
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"These are not whole latencies ({type(error).__name__}: {error}).") from error

    @classmethod
    def load_json(cls, path: str | os.PathLike[str]) -> "ModelLatency":
        """Reads a file that holds what ``bench --json`` has printed.

        Raises:
            CheckpointError: If the file cannot be read, or holds something else; the file is named.
        """
        try:
            return cls.from_dict(json.loads(settings.read_file(path)))
        except (PrehabError, RecursionError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise CheckpointError(
                f"{os.fspath(path)} holds no latencies: {reason}. Write it with: bench ... --json > FILE"
            ) from error

    def summary(self) -> str:
        """One line about the largest batch."""
        batch = self.largest
        return (
            f"forward pass of {batch.batch_size} rows {1e3 * batch.dense_seconds:.3f} -> "
            f"{1e3 * batch.compressed_seconds:.3f} ms on {self.device} "
            f"({verdict(batch.dense_seconds, batch.compressed_seconds)})"
        )

    def table(self) -> Table:
        """A row for each batch."""
        rows = [
            {
                "batch size": str(batch.batch_size),
                "dense ms": f"{1e3 * batch.dense_seconds:.3f}",
                "compressed ms": f"{1e3 * batch.compressed_seconds:.3f}",
                "verdict": verdict(batch.dense_seconds, batch.compressed_seconds),
            }
            for batch in self.batches
        ]
        caption = (
            f"medians of this machine under its load of the moment, {self.where}; "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        )
        columns = ["batch size", "dense ms", "compressed ms", "verdict"]
        return Table("Latency of a forward pass", columns, rows, {}, notes=[caption], texts=["verdict"])

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Table:
        return self.table()


def compare_latencies(
    dense: nn.Module, compressed: nn.Module, batches: Iterable[Any], forward: Forward | None = None
) -> ModelLatency:
    """Measures both models on the same batches, in eval mode, without autograd.

    Dense and compressed take turns, after a warm-up; the median of several turns counts. Each layer that was replaced
    is measured alone too, on the input that it gets from the batch; layers that their parent does not call, but reads
    (in a fused kernel), are left out. Numbers are those of this machine under its load of the moment.

    Args:
        dense: The model before, for example a copy that was made before :func:`~lightning_prehab.compress_`.
        compressed: The model after. Both stay as they are.
        batches: As for :func:`~lightning_prehab.collect_statistics`; each one is a measurement.
        forward: ``(model, batch) -> anything``, instead of calling the model on the batch.

    Raises:
        ArgumentError: If there are no batches, a model cannot be called on them, or both are on different devices.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> latency = compare_latencies(model, model, [torch.ones(2, 8)])
    >>> latency.batches[0].batch_size, latency.batches[0].dense_seconds > 0
    (2, True)
    """
    check_kind("dense", dense, nn.Module, "an nn.Module")
    check_kind("compressed", compressed, nn.Module, "an nn.Module")
    check_batches(batches, forward)
    batches = [] if batches is None else batches
    device, other = (next(model.parameters()).device for model in (dense, compressed))
    if device != other:
        raise ArgumentError(f"The dense model is on {device}, the compressed one on {other}; move one of them.")
    run = ask_model if forward is None else forward
    measured = []
    with as_found(dense), as_found(compressed), torch.no_grad():
        for batch in (to_device(found, device) for found in counted(batches, "measure")):
            layers = _layers(dense, compressed, lambda batch=batch: run(dense, batch), device)  # type: ignore[misc]
            before, after = _in_turn(
                lambda batch=batch: run(dense, batch),  # type: ignore[misc]
                lambda batch=batch: run(compressed, batch),  # type: ignore[misc]
                device,
            )
            measured.append(BatchLatency(batch_size(batch), before, after, layers))
    if not measured:
        raise ArgumentError("There are no batches to measure; give at least one.")
    parameters = count_parameters(dense), count_parameters(compressed)
    return ModelLatency(str(device), torch.get_num_threads(), *parameters, tuple(measured))


def verdict(dense: float, compressed: float) -> str:
    """What two latencies say, in words.

    >>> verdict(2.0, 1.0), verdict(1.0, 0.97), verdict(1.0, 2.0)
    ('2.00 times as fast', 'no gain', 'no gain: slower, 0.50 times as fast')
    """
    speed = dense / compressed
    if speed > 1 + NO_DIFFERENCE:
        return f"{speed:.2f} times as fast"
    return "no gain" if speed >= 1 / (1 + NO_DIFFERENCE) else f"no gain: slower, {speed:.2f} times as fast"


def _layers(
    dense: nn.Module, compressed: nn.Module, run: Callable[[], object], device: torch.device
) -> dict[str, tuple[float, float]]:
    """Seconds of each replaced layer, measured when the dense model calls it for the first time."""
    replaced = _replaced(dense, compressed)
    found: dict[str, tuple[float, float]] = {}
    handles: dict[str, RemovableHandle] = {}

    def measure(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        handles.pop(name).remove()  # nothing but the layer itself is measured
        tell("time", len(found), len(replaced), name)
        old, new = replaced[name]
        found[name] = _in_turn(lambda: old(*args, **kwargs), lambda: new(*args, **kwargs), device)

    try:
        for name, (old, _) in replaced.items():
            handles[name] = old.register_forward_pre_hook(partial(measure, name), with_kwargs=True)
        run()
        tell("time", len(replaced), len(replaced))
    finally:
        for handle in handles.values():
            handle.remove()
    return {name: found[name] for name in replaced if name in found}


def _replaced(dense: nn.Module, compressed: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The outermost modules that another type has taken the place of, with what has, by name."""
    news = {clean_name(name): module for name, module in compressed.named_modules()}
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    inside: set[int] = set()
    for full_name, old in dense.named_modules():
        new = news.get(name := clean_name(full_name))
        if name and new is not None and id(old) not in inside and type(new) is not type(old):
            inside.update(id(module) for module in old.modules())
            found[name] = old, new
    return found


def _in_turn(
    dense: Callable[[], object], compressed: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    seconds = time_calls({None: dense, 1: compressed}, device)
    return seconds[None], seconds[1]


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, got {settings.show(value)}")
    return value


def _seconds_of(row: Mapping[str, Any]) -> tuple[float, float]:
    pair = (row["dense_seconds"], row["compressed_seconds"])
    for value in pair:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
            raise ValueError(f"seconds must be positive and finite, got {settings.show(value)}")
    return float(pair[0]), float(pair[1])
