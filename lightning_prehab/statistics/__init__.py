"""What calibration sees of a layer: sums, hooks that collect them, a loop that runs the model."""
