"""Latency before and after a compression; the code is in :mod:`lightning_prehab.report.latency`."""

from lightning_prehab.report.latency import BatchLatency, ModelLatency, compare_latencies

__all__ = ["BatchLatency", "ModelLatency", "compare_latencies"]
