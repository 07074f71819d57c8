"""Places where a model can live, each a few answers for the road: one file per place that needs no Trainer."""

from lightning_prehab.sites.base import Site
from lightning_prehab.sites.process import KnownSite, ProcessSite

__all__ = ["KnownSite", "ProcessSite", "Site"]
