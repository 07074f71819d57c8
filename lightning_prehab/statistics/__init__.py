"""What calibration sees of a layer: sums, hooks that collect them, a loop that runs the model."""

from lightning_prehab.statistics.sums import LayerStatistics, Wanted

__all__ = ["LayerStatistics", "Wanted"]
