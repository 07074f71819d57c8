"""Which model a report is about, when it was made, and with which versions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from lightning_prehab.__about__ import __version__


@dataclass(frozen=True)
class Origin:
    """Where a report comes from; it says nothing of what happened.

    Attributes:
        model: Its class, and where it was loaded from.
        created: When the model was cut: ISO 8601, UTC; empty if not known. Not compared: the time of day is no fact of
            the cut.
        versions: ``{package: version}``.
    """

    model: str = ""
    created: str = field(default="", compare=False)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "Origin":
        """A model that is cut now."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
        versions = {"lightning_prehab": __version__, "torch": str(torch.__version__)}
        return cls(_name_of(model), now, versions)

    def to_dict(self) -> dict[str, Any]:
        """Three entries of a report."""
        return {"model": self.model, "created": self.created, "versions": dict(self.versions)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Origin":
        """What :meth:`to_dict` has written; entries may be missing."""
        versions = {str(name): str(version) for name, version in (data.get("versions") or {}).items()}
        return cls(str(data.get("model") or ""), str(data.get("created") or ""), versions)

    def summary(self) -> str:
        """One line.

        >>> Origin("Net", "2026-01-31T12:00:05Z", {"torch": "2.14.0"}).summary()
        '2026-01-31 12:00 UTC, torch 2.14.0'
        """
        when = [f"{self.created[:16].replace('T', ' ')} UTC"] if self.created else []
        return ", ".join([*when, *(f"{name} {version}" for name, version in self.versions.items())])


def _name_of(model: nn.Module) -> str:
    source = getattr(getattr(model, "config", None), "_name_or_path", None)  # of a transformers model
    name = PurePath(source).name if isinstance(source, str) else ""
    return f"{type(model).__name__} ({name})" if name else type(model).__name__
