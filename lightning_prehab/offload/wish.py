"""What a result depends on, so that work is taken up again for the same wish alone."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.__about__ import __version__
from lightning_prehab.offload.skeleton import Source
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.refinement.settings import Refinement


def describe_wish(
    source: Source, recipe: Recipe, batches: list[Any] | None, limit: int | None, refinement: Refinement | None
) -> dict[str, Any]:
    """Everything that the result depends on, for JSON: the files, the recipe, the data, the versions."""
    return {
        "source": str(source.folder.resolve()),
        "files": source.facts(),
        "recipe": repr(recipe),
        "data": None if batches is None else digest_of(batches),
        "memory": limit,
        "refine": None if refinement is None else refinement.to_dict(),
        "versions": {"lightning_prehab": __version__, "torch": str(torch.__version__)},
    }


def digest_of(batches: Any) -> str:
    """A checksum of nested tensors, with the names in mappings.

    >>> digest_of([torch.zeros(2)]) == digest_of([torch.zeros(2)]), digest_of([torch.zeros(2)]) == digest_of([])
    (True, False)
    """
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, Mapping | tuple | list):
            parts = dict(part) if isinstance(part, Mapping) else dict(enumerate(part))
            digest.update(repr([str(key) for key in parts]).encode())
            for value in parts.values():
                add(value)
        else:
            digest.update(repr(part).encode())

    add(batches)
    return digest.hexdigest()
