"""What calibration knows of a batch: how to call a model on it, its size, its padding, its device."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, PrehabError, is_out_of_memory, reason

#: A label that does not count, as for ``torch.nn.functional.cross_entropy``.
IGNORED = -100


NO_BATCHES = (
    "batches is empty; calibration needs at least one batch. A generator can be gone through once only: make a "
    "new one, or give a list."
)


_WAY_OUT = "give data that it takes, or in Python a function that calls it: loss= or forward="
#: What a model raises on a batch that is not for it.
_OF_BATCHES = (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError)


def check_batches(batches: object, forward: object = None) -> None:
    """Raises :class:`ArgumentError` for what is no iterable of batches, and for what cannot be called on one.

    Args:
        batches: What was given for them; None is left to others.
        forward: What was given to call the model with, or None.
    """
    if isinstance(batches, Tensor | Mapping):
        kind = "tensor" if isinstance(batches, Tensor) else "mapping"
        raise ArgumentError(f"batches is one {kind}; give an iterable of batches, for example batches=[{kind}].")
    iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, str) or not (batches is None or iterable):
        raise ArgumentError(
            f"batches must be a list, a DataLoader or another iterable of batches, got {show(batches)}."
        )
    if isinstance(forward, nn.Module):
        raise ArgumentError(
            f"The loss is called with the model and a batch, and {type(forward).__name__} takes an output and a "
            "target; give a function: lambda model, batch: criterion(model(batch[0]), batch[1])."
        )
    if forward is not None and not callable(forward):
        raise ArgumentError(f"The loss must be a function (model, batch) -> scalar, got {show(forward)}.")


def batch_size(batch: Any) -> int:
    """Size of the first dimension of the first tensor found in a batch; 1 if there is none.

    >>> batch_size({"x": torch.zeros(4, 3), "y": torch.zeros(4)})
    4
    """
    for tensor in tensors(batch):
        if tensor.dim() > 0:
            return tensor.shape[0]
    return 1


def count_positions(batch: Any) -> int:
    """Positions of a batch, padding too."""
    mask = padding_mask(batch)
    if mask is not None:
        return mask.numel()
    first = next(tensors(batch), None)
    return 0 if first is None else math.prod(first.shape[:2])


def padding_mask(batch: Any) -> Tensor | None:
    """The ``attention_mask`` of a mapping, or of one inside a tuple or list.

    Returns:
        Booleans of shape ``(batch, positions)``, True for tokens; None if there is no such mask.
    """
    mask = _of_tokens(batch, "attention_mask")
    return None if mask is None else mask.bool()


def has_decoder(model: Any) -> bool:
    """Whether a model of transformers, or what is in it, reads one sequence and predicts another."""
    parts = [model, *model.children()] if isinstance(model, nn.Module) else []
    return any(getattr(getattr(one, "config", None), "is_encoder_decoder", False) is True for one in parts)


def as_predicted(batch: Any, decoded: bool) -> Any:
    """A batch with the mask of what is predicted, of a model that has a decoder.

    Its ``attention_mask`` is about the source, which may be as long as the target by chance. What counts of the target
    says ``decoder_attention_mask``, or labels that are not -100.
    """
    if not (decoded and isinstance(batch, Mapping)):
        return batch
    found = {key: value for key, value in batch.items() if key != "attention_mask"}
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if isinstance(mask, Tensor):
        found["attention_mask"] = mask
    elif isinstance(labels, Tensor):
        found["attention_mask"] = labels != IGNORED
    return found


def position_ids(batch: Any) -> Tensor | None:
    """The ``position_ids`` of a mapping, or of one inside a tuple or list; shape ``(batch or 1, positions)``, or None.

    They begin anew where several sequences lie in one row.
    """
    return _of_tokens(batch, "position_ids")


def _of_tokens(batch: Any, name: str) -> Tensor | None:
    """What a batch says of each token under this name, if it is a matrix."""
    if isinstance(batch, Mapping):
        found = batch.get(name)
        return found if isinstance(found, Tensor) and found.dim() == 2 else None
    if isinstance(batch, tuple | list):
        return next((found for part in batch if (found := _of_tokens(part, name)) is not None), None)
    return None


def call_model(model: nn.Module, batch: Any) -> Any:
    """A mapping is called as ``model(**batch)``, a tuple or list as ``model(*batch)``, a tensor as ``model(batch)``.

    Of a pair of inputs and labels a model that takes one argument is given the inputs alone; see :func:`is_labelled`.

    Args:
        model: It is called in the mode that it is in.
        batch: On its device.

    Raises:
        ArgumentError: If the batch is something else. What the model raises goes through: see :func:`explained`.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch[:1] if is_labelled(model, batch) else batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise ArgumentError(
        f"A batch must be a mapping, a tuple, a list or a tensor, got {type(batch).__name__}; pass loss=, a "
        "function (model, batch) -> scalar, or to collect_statistics forward=, to call the model yourself."
    )


def ask_model(model: nn.Module, batch: Any) -> Any:
    """What a model answers to a batch.

    Raises:
        ArgumentError: If the model does not take it.
    """
    with explained(batch):
        return call_model(model, batch)


@contextmanager
def explained(batch: Any, who: str = "The model", way_out: str = _WAY_OUT) -> Iterator[None]:
    """Inside, the error of a model that is called on a batch becomes one that says so.

    That is for errors that a batch can lead to. Memory that is not there is no fault of the batch.

    Args:
        batch: What it is called on.
        who: What is called.
        way_out: What can be done about it.

    Raises:
        ArgumentError: With the error of the model as its cause.
    """
    try:
        yield
    except _OF_BATCHES as error:
        if isinstance(error, PrehabError) or is_out_of_memory(error):
            raise
        raise ArgumentError(f"{who} cannot be called on {in_words(batch)} ({reason(error)}); {way_out}.") from error


def in_words(batch: Any) -> str:
    """A batch by its type and the sizes of its tensors.

    >>> in_words({"input_ids": torch.zeros(4, 8), "labels": torch.zeros(4)}), in_words([torch.zeros(4, 3), "x"])
    ('a batch of type dict with input_ids 4x8, labels 4', 'a batch of type list with 4x3')
    """
    whole = [batch] if isinstance(batch, Tensor) else batch if isinstance(batch, tuple | list) else []
    parts = batch.items() if isinstance(batch, Mapping) else [("", one) for one in whole]
    sizes = [f"{key} {'x'.join(map(str, one.shape))}".strip() for key, one in parts if isinstance(one, Tensor)]
    sizes = [*sizes[:8], "..."] if len(sizes) > 8 else sizes
    return f"a batch of type {type(batch).__name__}" + (f" with {', '.join(sizes)}" if sizes else "")


def is_labelled(model: nn.Module, batch: Any) -> bool:
    """Whether a batch is a pair of inputs and labels, and nothing else it could be.

    The second part is an integer for each row of the first, and the model's ``forward`` can be called with one argument
    and not with two; or the second is a mask, as of timm's vision transformers, which labels are not.

    >>> is_labelled(nn.Sequential(nn.Linear(3, 2)), [torch.zeros(4, 3), torch.tensor([0, 1, 1, 0])])
    True
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        return False
    labels = batch[1]
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    if not whole or labels.dim() != 1 or len(labels) != batch_size(batch[0]):
        return False
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return False
    no_place = not _takes(signature, 2) or any("mask" in name for name in list(signature.parameters)[1:2])
    return _takes(signature, 1) and no_place


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on the device; its type is kept wherever it can be.

    Tensors that were made in ``torch.inference_mode`` are copied outside of it: autograd refuses them.
    """
    if all(tensor.device == device and not _is_frozen(tensor) for tensor in tensors(batch)):
        return batch
    if isinstance(batch, Tensor) and _is_frozen(batch):
        return batch.to(device, copy=True)
    if hasattr(batch, "to") and not any(_is_frozen(tensor) for tensor in tensors(batch)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _is_frozen(tensor: Tensor) -> bool:
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, tuples and lists."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors(part)
